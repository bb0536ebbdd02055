use super::*;
use serde_json::json;

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn turns(list: &[(&str, &str)]) -> Vec<Message> {
    list.iter().map(|(role, content)| Message::new(*role, *content)).collect()
}

/// The template's text with nothing said, or the error's.
fn plain(source: &str) -> Result<String, String> {
    let template = ChatTemplate::new(source, "<s>", "</s>").map_err(|e| e.to_string())?;
    template.render(&[], false, &json!(null)).map_err(|e| e.to_string())
}

#[test]
fn chatml() {
    let t = ChatTemplate::new(CHATML, "<s>", "</s>").unwrap();
    let text = t.render(&turns(&[("system", "Be brief."), ("user", "Hi")]), true, &json!(null)).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

fn error(source: &str) -> String {
    plain(source).unwrap_err()
}

#[test]
fn errors_name_the_line_and_what_to_do() {
    assert_eq!(
        error("a\n{% if %}"),
        "the chat template can't be read, line 2: unexpected end of block; `oncall run --raw` does without it"
    );
    assert_eq!(
        error("a\n\n{{ messages.x.y }}"),
        "the chat template fails on this conversation, line 3: undefined value: `messages.x` is undefined"
    );
    assert_eq!(
        error("{{ 1|nothing }}"),
        "the chat template fails on this conversation, line 1: unknown filter: filter nothing is unknown"
    );
    assert_eq!(error("{{ strftime_now('%Q') }}").split(": ").last(), Some("strftime_now doesn't know `%Q`"));
    assert_eq!(
        error("{% for i in range(9) %}\n{% include 'x' %}{% endfor %}"),
        "the chat template can't be read, line 2: a chat template stands alone and can't use `include`; `oncall run --raw` does without it"
    );
    assert!(error(&"x".repeat(MAX_SOURCE + 1)).starts_with("the chat template has 262145 bytes, at most 262144"));
}

#[test]
fn a_refusal_says_if_the_system_message_is_why() {
    let source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system!') }}{% endif %}{{ m.content }}{% endfor %}";
    let t = ChatTemplate::new(source, "", "").unwrap();
    let list = turns(&[("system", "S"), ("user", "U")]);
    let e = t.render(&list, true, &json!(null)).unwrap_err();
    assert!(matches!(&e, TemplateError::Refused { message, without_system: true } if message == "No system!"));
    assert_eq!(
        e.to_string(),
        "the model's chat template refuses this conversation: No system! (it accepts it without the system message: leave out the system prompt)"
    );
    let t = ChatTemplate::new("{{ raise_exception('Never.') }}", "", "").unwrap();
    let e = t.render(&list, true, &json!(null)).unwrap_err();
    assert_eq!(e.to_string(), "the model's chat template refuses this conversation: Never.");
    assert!(matches!(e, TemplateError::Refused { without_system: false, .. }));
    let t = ChatTemplate::new("{{ raise_exception('It\\'s\x1b[31m\\nred') }}", "", "").unwrap();
    let e = t.render(&list, true, &json!(null)).unwrap_err();
    assert_eq!(e.to_string(), "the model's chat template refuses this conversation: It's\\u{1b}[31m\\nred");
}

#[test]
fn a_beginning_that_is_written_is_seen() {
    let with = ChatTemplate::new("{{ bos_token }}{{ messages[0].content }}", "<s>", "</s>").unwrap();
    let without = ChatTemplate::new("{{ messages[0].content }}", "<s>", "</s>").unwrap();
    let list = turns(&[("user", "Hi")]);
    let render = |t: &ChatTemplate| t.render(&list, true, &json!(null)).unwrap();
    assert!(with.has_bos(&render(&with)));
    assert!(!without.has_bos(&render(&without)));
    assert!(!ChatTemplate::new("x", "", "").unwrap().has_bos("x"));
}

#[test]
fn variables_reach_the_template_and_win() {
    let t = ChatTemplate::new("{{ tools is none }} {{ x }} {{ bos_token }} {{ add_generation_prompt }}", "<s>", "")
        .unwrap();
    assert_eq!(t.render(&[], true, &json!(null)).unwrap(), "True  <s> True");
    assert_eq!(
        t.render(&[], false, &json!({"tools": [1], "x": {"b": 1, "a": 2}})).unwrap(),
        "False {'b': 1, 'a': 2} <s> False"
    );
    assert_eq!(t.render(&[], false, &json!({"bos_token": "B"})).unwrap(), "True  B False");
    let e = t.render(&[], false, &json!([1])).unwrap_err();
    assert_eq!(e.to_string(), "the variables for the chat template are a list, they must be a JSON object");
}

#[test]
fn messages_carry_further_fields() {
    let m: Message = serde_json::from_value(json!({"role": "tool", "content": "c", "z": 1, "a": [null]})).unwrap();
    assert_eq!(m.content, "c");
    assert_eq!(serde_json::to_string(&m).unwrap(), r#"{"role":"tool","content":"c","z":1,"a":[null]}"#);
    let t = ChatTemplate::new("{{ messages[0]|tojson }}", "", "").unwrap();
    let text = t.render(&[m], false, &json!(null)).unwrap();
    assert_eq!(text, r#"{"role": "tool", "content": "c", "z": 1, "a": [null]}"#);
    // A field may replace the text: no content at all, for one.
    let mut m = Message::new("assistant", "");
    m.extra.insert("content".into(), json!(null));
    assert_eq!(t.render(&[m], false, &json!(null)).unwrap(), r#"{"role": "assistant", "content": null}"#);
}

#[test]
fn the_clock_can_be_held() {
    let t = ChatTemplate::new("{{ strftime_now('%Y-%m-%d') }}", "", "").unwrap();
    let held = t.clone().at(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(86_400));
    assert_eq!(held.render(&[], false, &json!(null)).unwrap(), "1970-01-02");
    assert!(t.render(&[], false, &json!(null)).unwrap().as_str() > "2025");
}

#[test]
fn generation_tags_trim_and_keep_lines() {
    assert_eq!(plain("a {% generation %} b {% endgeneration %} c").unwrap(), "a  b  c");
    assert_eq!(plain("a {%- generation -%} b {%- endgeneration -%} c").unwrap(), "abc");
    assert!(plain("a{%generation%}b{%endgeneration%}c {% generations").unwrap_err().contains("line 1"));
    assert!(error("{% generation %}\n{% endgeneration %}\n{{ 1|x }}").contains("line 3"));
    assert_eq!(plain("{% raw %}{% x %}{% endraw %}{{ '{%' }}").unwrap(), "{% x %}{%");
}

/// A long conversation is no attack: 2000 turns through a template that looks back at each turn.
#[test]
fn long_conversations_are_affordable() {
    let source = "{% set ns = namespace(all='') %}{% for m in messages %}{% if messages|selectattr('role', 'equalto', 'user')|list|length and m.content.strip() %}{% set ns.all = m.content %}{{ m.role ~ ': ' ~ m.content|trim ~ '\n' }}{% endif %}{% endfor %}";
    let t = ChatTemplate::new(source, "", "").unwrap();
    let text = "It was a dark and stormy night; the rain fell in torrents. ".repeat(4);
    let list: Vec<Message> = (0..2000).map(|i| Message::new(["user", "assistant"][i % 2], text.as_str())).collect();
    let rendered = t.render(&list, false, &json!(null)).unwrap();
    assert_eq!(rendered.len(), 2000 * text.trim().len() + 1000 * ("user: \n".len() + "assistant: \n".len()));
}

#[test]
fn hostile_templates_end_in_errors() {
    let unroll = |piece: &str, n: usize| piece.repeat(n);
    let loops = |inner: &str| {
        format!("{{% set ns = namespace(x='a', l=[1]) %}}{{% for i in range(100000) %}}{inner}{{% endfor %}}")
    };
    let big = "{% set b = 'x' * 10000000 %}";
    let cases: Vec<(&str, String)> = vec![
        ("doubling by ~", loops("{% set ns.x = ns.x ~ ns.x %}")),
        ("doubling by +", loops("{% set ns.x = ns.x + ns.x %}")),
        ("doubling a list", loops("{% set ns.l = ns.l + ns.l %}")),
        ("holding twice", loops("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}"),
        ("holding twice, map", loops("{% set ns.l = {'a': ns.l, 'b': ns.l} %}") + "{{ ns.l }}"),
        ("holding twice, dict", loops("{% set ns.l = dict(a=ns.l, b=ns.l) %}") + "{{ ns.l }}"),
        ("deep", loops("{% set ns.l = [ns.l] %}")),
        ("deep dict", loops("{% set ns.l = dict(a=ns.l) %}")),
        ("deep locals", format!("{{% set x = 1 %}}{}", unroll("{% set x = [x] %}", 10000))),
        ("deep namespaces", format!("{{% set x = 1 %}}{}", unroll("{% set x = namespace(a=x) %}", 8000))),
        ("cycle", "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".into()),
        ("cycle in a list", "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}".into()),
        ("macro kept", "{% macro m() %}{% endmacro %}{% set ns = namespace() %}{% set ns.x = m %}".into()),
        ("replace", loops("{% set ns.x = ns.x|replace('a', 'aaaaaaaaaa') %}")),
        ("replace method", loops("{% set ns.x = ns.x.replace('a', 'aaaaaaaaaa') %}")),
        ("replace product", "{% set b = 'x' * 100000 %}{{ b|replace('x', b) }}".into()),
        ("replace method product", "{% set b = 'x' * 100000 %}{{ b.replace('x', b) }}".into()),
        ("join product", "{% set b = 'x' * 100000 %}{{ b|join(b) }}".into()),
        ("join method product", "{% set b = 'x' * 100000 %}{{ b.join(b) }}".into()),
        ("join named product", "{% set b = 'x' * 100000 %}{{ b|join(d=b) }}".into()),
        ("indent", "{{ 'a\nb'|indent(1000000000) }}".into()),
        ("indent named", "{{ 'a\nb'|indent(width=1000000000) }}".into()),
        ("indent lines", "{% set b = '\n' * 100000 %}{{ b|indent(100000, true, true) }}".into()),
        ("tojson indent", "{{ [[1]]|tojson(indent=1000000000) }}".into()),
        ("tojson indent text", "{% set b = 'x' * 1000000 %}{{ (range(1000)|list)|tojson(indent=b) }}".into()),
        ("tojson separators", "{% set b = 'x' * 1000000 %}{{ (range(1000)|list)|tojson(separators=(b, b)) }}".into()),
        ("repeat text", "{{ 'a' * 1000000000 }}".into()),
        ("repeat text, turned", "{{ 1000000000 * 'a' }}".into()),
        ("repeat list", "{{ [1] * 1000000000 }}".into()),
        ("repeat tuple", "{{ (1,) * 1000000000 }}".into()),
        ("constants", format!("{{{{ {} }}}}", vec!["('a' * 90000000)"; 100].join(" ~ "))),
        ("format", "{{ '%1000000000d'|format(1) }}".into()),
        ("format star", "{{ '%*d'|format(1000000000, 1) }}".into()),
        ("format precision", "{{ '%.1000000000f'|format(1) }}".into()),
        ("format method", "{{ '{:>1000000000}'.format(1) }}".into()),
        ("format method nested", "{{ '{:>{}}'.format(1, 1000000000) }}".into()),
        ("format many", "{% set b = '%999d' * 1000000 %}{{ b|format(1) }}".into()),
        ("format positions", "{% set b = 'x' * 1000000 %}{{ ('{0}' * 1000).format(b) }}".into()),
        ("capture", "{% for i in range(100000) %}{% set x %}{% for j in range(1000) %}0123456789012345678901234567890123456789{% endfor %}{% endset %}{% endfor %}".into()),
        ("output", "{% for i in range(100000) %}{% for j in range(1000) %}0123456789012345678901234567890123456789{% endfor %}{% endfor %}".into()),
        ("endless", "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}".into()),
        ("macro", "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}".into()),
        ("macro fan", "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(14) ~ m(14) }}{% for i in range(100000) %}{{ m(10) }}{% endfor %}".into()),
        ("recursive loop", "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into()),
        ("reading by index", format!("{big}{{% for i in range(100000) %}}{{% if b[i] %}}{{% endif %}}{{% endfor %}}")),
        ("slicing", format!("{big}{{% for i in range(100000) %}}{{% if b[i:] %}}{{% endif %}}{{% endfor %}}")),
        ("searching", format!("{big}{{% for i in range(100000) %}}{{% if 'y' in b %}}{{% endif %}}{{% endfor %}}")),
        ("comparing", "{% set b = 'x' * 10000000 %}{% set c = b ~ 'a' %}{% set d = b ~ 'b' %}{% for i in range(100000) %}{% if c == d %}{% endif %}{% endfor %}".into()),
        ("a test that compares", "{% set b = 'x' * 10000000 %}{% set c = b ~ 'a' %}{% set d = b ~ 'b' %}{% for i in range(100000) %}{% if c is eq(d) %}{% endif %}{% endfor %}".into()),
        ("methods that search", format!("{big}{{% for i in range(100000) %}}{{% if b.find('y') %}}{{% endif %}}{{% endfor %}}")),
        ("a text as characters", format!("{big}{{% for c in b %}}{{% break %}}{{% endfor %}}{{{{ b|list|length }}}}")),
        ("characters again and again", format!("{{% set b = 'x' * 100000 %}}{}", "{% for i in range(100000) %}{% for c in b %}{% break %}{% endfor %}{% endfor %}")),
        ("each in each", "{% set l = range(100000)|list %}{{ l|select('in', l)|list|length }}".into()),
        ("each in each by map", "{% set l = range(10000)|list %}{% for i in range(100000) %}{{ l|map('default', l)|list|length }}{% endfor %}".into()),
        ("lazy stack", loops("{% set ns.l = ns.l|map('upper') %}") + "{{ raise_exception('survived') }}"),
        ("split", format!("{big}{{{{ b.split('x')|length }}}}")),
        ("ranges", loops("{% set ns.l = range(100000)|list %}")),
        ("many namespaces", loops("{% set ns.l = [namespace()] %}")),
        ("changed", "{% set b = 'x' * 10000000 %}{% set c = b ~ 'a' %}{% set d = b ~ 'b' %}{% for i in range(100000) %}{% if loop.changed(c if i % 2 else d) %}{% endif %}{% endfor %}".into()),
        ("long sum", format!("{{{{ a{} }}}}", unroll(" + a", 100_000))),
        ("long filter", format!("{{{{ a{} }}}}", unroll("|d", 100_000))),
        ("long attribute", format!("{{{{ a{} }}}}", unroll(".a", 100_000))),
        ("long not", format!("{{{{ {}a }}}}", unroll("not ", 50_000))),
        ("long elif", format!("{{% if a %}}{}{{% endif %}}", unroll("{% elif a %}", 20_000))),
        ("long list", format!("{{{{ {}a{} }}}}", unroll("[", 100_000), unroll("]", 100_000))),
        ("long nesting", format!("{}{}", unroll("{% if a %}", 10_000), unroll("{% endif %}", 10_000))),
        ("many macros", unroll("{% set f = m %}{% macro m() %}{{ f }}{% endmacro %}", 4000)),
        ("many arguments", format!("{{{{ range({}) }}}}", unroll("1,", 70_000))),
        ("too long", unroll("x", MAX_SOURCE + 1)),
        ("include", "{% include 'x' %}".into()),
        ("import", "{% import 'x' as x %}".into()),
        ("from", "{% from 'x' import y %}".into()),
        ("extends", "{% extends 'x' %}".into()),
        ("block", "{% block x %}{% endblock %}".into()),
        ("autoescape", "{% autoescape true %}{% endautoescape %}".into()),
    ];
    // A stack as small as a thread of an app may have.
    let run = move || {
        for (name, source) in cases {
            let start = std::time::Instant::now();
            match plain(&source) {
                Ok(text) => panic!("{name}: {} bytes came out", text.len()),
                Err(e) => assert!(e.len() < 500, "{name}: {e}"),
            }
            println!("{name}: {:?}", start.elapsed());
            assert!(start.elapsed().as_secs() < 60, "{name} took {:?}", start.elapsed());
        }
    };
    std::thread::Builder::new().stack_size(1024 * 1024).spawn(run).unwrap().join().unwrap();
}

/// What just passes the limits on the source is compiled and run on a small stack, too.
#[test]
fn templates_at_the_limits_fit_the_stack() {
    let chain = |first: &str, piece: &str, n: usize| {
        let tag = format!("{{{{ {first}{} }}}}", piece.repeat(n));
        format!("{tag}{{% if false %}}{tag}{{% endif %}}")
    };
    let around = |open: &str, close: &str, n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
    let cases = vec![
        chain("1", " + 1", 490),
        chain("x", "|d", 490),
        chain("[]", "|list", 490),
        chain("1", " == 1", 490),
        chain("1", " if 1", 490),
        chain("'a'", " ~ 'a'", 490),
        chain("1", " * 1", 490),
        chain("1", " and 1", 490),
        chain("messages", "[:]", 240),
        chain("'a'", ".strip()", 190),
        format!("{{{{ {} }}}}", around("not ", "", 990)),
        format!("{{{{ {} }}}}", around("[", "]", 70)),
        format!("{{{{ {} }}}}", around("(", ")", 70)),
        format!("{{{{ {} }}}}", around("dict(a=", ")", 70)),
        format!("{{% if false %}}{}{{% endif %}}", "{% elif false %}".repeat(200)),
        around("{% if true %}", "{% endif %}", 140),
        around("{% for i in [1] %}", "{% endfor %}", 140),
        around("{% filter upper %}", "{% endfilter %}", 140),
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{% endif %}x{% endmacro %}{{ m(10) }}".to_owned(),
        "{% set f = m %}{% macro m() %}{{ f }}{% endmacro %}".repeat(200),
        "x\n".repeat(MAX_SOURCE / 2),
    ];
    let run = move || {
        for source in cases {
            if let Err(e) = plain(&source) {
                panic!("{}…: {e}", &source[..source.len().min(60)]);
            }
        }
    };
    std::thread::Builder::new().stack_size(1024 * 1024).spawn(run).unwrap().join().unwrap();
}
