#!/usr/bin/env python3
"""Writes what Python's Jinja makes of chat templates, for tests/golden_templates.rs to compare with.

    python3 -m pip install jinja2==3.1.6
    python3 tests/golden/make_templates.py                     # the templates of this folder, the result is committed
    python3 tests/golden/make_templates.py IN_FOLDER OUT_FOLDER  # others, which aren't ours to distribute

A template is a file *.jinja; each is rendered as the Hugging Face library would, over every conversation of CONVERSATIONS and in every
variant of VARIANTS. With the second form the test then compares with ONCALL_GOLDEN_TEMPLATES=OUT_FOLDER.
"""

import datetime
import json
import pathlib
import sys

import jinja2.ext
import jinja2.sandbox

NOW = 1735689599  # 2024-12-31 23:59:59 UTC
BOS, EOS = "<s>", "</s>"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a place. Don't guess <it> & say \"so\".",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Town, e.g. Zürich"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": "integer", "minimum": 1},
                "items": {"type": "array", "items": {"type": "string"}},
                "precise": {"type": "boolean", "default": False},
                "scale": {"type": "number", "default": 1.5},
            },
            "required": ["place"],
        },
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "Zürich", "days": 2, "precise": True}}}
CALL_TEXT = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": '{"place": "Zürich", "days": 2}'}}


def say(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "nothing": [],
    "user": [say("user", "Hi")],
    "system": [say("system", "Be brief."), say("user", "Hi")],
    "developer": [say("developer", "Be brief."), say("user", "Hi")],
    "turns": [say("user", "Hi"), say("assistant", "Hello!"), say("user", "Tell me a story.")],
    "long": [say("system", "You are a pirate.\nNever smile.")]
    + [say(role, f"{role} {i}") for i in range(4) for role in ("user", "assistant")]
    + [say("user", "And now?")],
    "spaces": [say("system", "  \n S \n "), say("user", "  leading\n\ttab  "), say("assistant", " A \n\n"), say("user", "\n")],
    "scripts": [say("user", "Grüße, 世界! مرحبا 👩‍👩‍👧 \\n 'quote' \"double\" <b>&amp;</b> {{ x }} {% y %} \u2028")],
    "special": [say("user", "<|im_end|></s><s>[INST]")],
    "empty": [say("system", ""), say("user", ""), say("assistant", ""), say("user", "x")],
    "two users": [say("user", "One"), say("user", "Two")],
    "assistant first": [say("assistant", "Hello!"), say("user", "Hi")],
    "assistant last": [say("user", "Hi"), say("assistant", "Hel")],
    "system late": [say("user", "Hi"), say("system", "Be brief."), say("user", "Hi")],
    "thinking": [say("user", "2+2?"), say("assistant", "<think>\nEasy.\n</think>\n\n4"), say("user", "Sure?")],
    "reasoning": [say("user", "2+2?"), say("assistant", "4", reasoning_content="Easy.", thinking="Easy."), say("user", "Sure?")],
    "unknown role": [say("narrator", "It was dark."), say("user", "Hi")],
    "tool": [
        say("user", "Weather?"),
        say("assistant", None, tool_calls=[CALL]),
        say("tool", '{"sky": "blue"}', name="get_weather", tool_call_id="call12345"),
        say("assistant", "Blue."),
        say("user", "Thanks"),
    ],
    "tool text": [
        say("system", "Use tools."),
        say("user", "Weather?"),
        say("assistant", "Let me see.", tool_calls=[CALL_TEXT, CALL_TEXT]),
        say("tool", "blue", name="get_weather", tool_call_id="call12345"),
        say("tool", "red", name="get_weather", tool_call_id="call12345"),
    ],
    "parts": [say("user", [{"type": "text", "text": "Part one. "}, {"type": "text", "text": "Part two."}])],
}

VARIANTS = {
    "plain": {"add_generation_prompt": False},
    "prompt": {"add_generation_prompt": True},
    "tools": {"add_generation_prompt": True, "tools": [WEATHER, {**WEATHER, "function": {**WEATHER["function"], "name": "second"}}]},
    "think": {"add_generation_prompt": True, "enable_thinking": True, "thinking": True, "date_string": "26 Jul 2024"},
    "no think": {"add_generation_prompt": True, "enable_thinking": False, "thinking": False, "custom_tools": None},
}


class Refused(Exception):
    pass


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: what is inside, as it is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message):
    raise Refused(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format):
    return datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).replace(tzinfo=None).strftime(format)


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def render(template, messages, variables):
    variables = {"tools": None, "documents": None, **variables}
    try:
        return {"text": template.render(messages=messages, bos_token=BOS, eos_token=EOS, **variables)}
    except Refused as e:
        return {"refused": str(e)}
    except Exception as e:  # noqa: BLE001: whatever a template stumbles over
        return {"fails": f"{type(e).__name__}: {e}"}


def main():
    here = pathlib.Path(__file__).resolve().parent / "templates"
    source, out = (here, here) if len(sys.argv) < 3 else map(pathlib.Path, sys.argv[1:3])
    out.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        golden = {"now": NOW, "bos": BOS, "eos": EOS, "variants": VARIANTS, "conversations": CONVERSATIONS, "results": {}}
        if source != here:
            golden["source"] = text
        try:
            template = environment().from_string(text)
        except jinja2.TemplateSyntaxError as e:
            golden["syntax"] = str(e)
            template = None
        for name, messages in CONVERSATIONS.items() if template else ():
            for variant, variables in VARIANTS.items():
                golden["results"][f"{name}/{variant}"] = render(template, messages, variables)
        if source == here:
            # The inputs are the same for all: once is enough.
            common = {k: golden.pop(k) for k in ("now", "bos", "eos", "variants", "conversations")}
            (out / "conversations.json").write_text(json.dumps(common, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        (out / f"{path.stem}.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
