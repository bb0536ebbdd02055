//! Rendered chat templates against llama.cpp's built-in ones, which are C++ and were written apart from Jinja. They leave BOS to the tokeniser.
//! The whole of Jinja is compared with Python's in `golden_templates.rs`.
#![cfg(feature = "llama-cpp")]

mod common;

use common::llama::Model;
use oncall::gguf::Gguf;
use oncall::session::template::{ChatTemplate, Message};
use std::path::Path;

const BOS: &str = "<s>";

/// The repository's templates that llama.cpp has under the same name. Left out are llama2 (llama.cpp drops the spaces that the original
/// has around an answer) and gpt-oss (it writes neither the date nor the channel of an answer).
const NAMES: &[&str] = &[
    "chatml",
    "phi3",
    "zephyr",
    "gemma",
    "llama3",
    "granite",
    "mistral-v1",
    "mistral-v3",
    "mistral-v7-tekken",
    "deepseek3",
];

const CONVERSATIONS: &[&[(&str, &str)]] = &[
    &[("user", "Hi")],
    &[("system", "Be brief."), ("user", "Hi")],
    &[("user", "Hi"), ("assistant", "Hello!"), ("user", "Tell me a story.")],
    &[
        ("system", "You are a pirate.\nNever smile."),
        ("user", "user 0"),
        ("assistant", "assistant 0"),
        ("user", "user 1"),
        ("assistant", "assistant 1"),
        ("user", "And now?"),
    ],
    &[("user", "Grüße, 世界! مرحبا 👩\u{200d}👧 \\n 'quote' \"double\" <&>")],
    &[("user", "{{ 1 + 1 }} {% if x %}")],
];

/// Mistral's third template says the system's words in the last turn, llama.cpp's in the first: equal only if that is one.
fn told_apart(name: &str, conversation: &[(&str, &str)]) -> bool {
    name == "mistral-v3" && conversation.len() > 2 && conversation[0].0 == "system"
}

#[test]
fn built_in_templates() {
    let (mut equal, mut wrong) = (0, Vec::new());
    for name in NAMES {
        let source = std::fs::read_to_string(format!("tests/golden/templates/{name}.jinja")).unwrap();
        let template = ChatTemplate::new(&source, BOS, "</s>").unwrap();
        for conversation in CONVERSATIONS.iter().filter(|c| !told_apart(name, c)) {
            let (ours, theirs) =
                (render(&template, conversation), Model::apply_chat_template(name, conversation, true));
            match ours.strip_prefix(BOS).unwrap_or(&ours) {
                ours if ours == theirs => equal += 1,
                ours => wrong.push(format!("{name}:\n{ours:?}\n{theirs:?}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("note: {equal} texts equal");
}

/// The chat model's own template, from its file. It adds words of its own if there are none of the system's.
#[test]
fn smollm2() {
    let path = Path::new("models/cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "models/fetch-smollm2.sh fetches {}", path.display());
    let source = Model::load_vocab(path).chat_template().expect("the file has a template");
    let file = Gguf::open(path).unwrap();
    let ours = file.metadata().get("tokenizer.chat_template").and_then(|v| v.as_str());
    assert_eq!(ours, Some(source.as_str()));
    let template = ChatTemplate::new(source.clone(), "<|im_start|>", "<|im_end|>").unwrap();
    for conversation in CONVERSATIONS.iter().filter(|c| c[0].0 == "system") {
        assert_eq!(render(&template, conversation), Model::apply_chat_template(&source, conversation, true));
    }
}

fn render(template: &ChatTemplate, conversation: &[(&str, &str)]) -> String {
    let messages: Vec<Message> = conversation.iter().map(|(role, text)| Message::new(*role, *text)).collect();
    template.render(&messages, true, &serde_json::json!({})).unwrap()
}
