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
    for (name, source) in cases {
        let start = std::time::Instant::now();
        let result = plain(&source);
        let error = match result {
            Ok(text) => panic!("{name}: {} bytes came out", text.len()),
            Err(e) => e,
        };
        println!("{name}: {:?} {}", start.elapsed(), &error[..error.len().min(200)]);
    }
}
