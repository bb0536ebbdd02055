//! Any text is a chat template or an error, and any template renders any conversation or fails, in bounded time and memory.
//!
//! Input: a byte of choices, then `template \x01 message \x01 message …`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oncall::session::template::{ChatTemplate, Message};

const ROLES: [&str; 4] = ["user", "assistant", "system", "tool"];

fuzz_target!(|input: &[u8]| {
    let Some((&choices, rest)) = input.split_first() else { return };
    let rest = String::from_utf8_lossy(rest);
    let mut parts = rest.split('\x01');
    let source = parts.next().unwrap_or("");
    let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") else { return };
    let messages: Vec<Message> =
        parts.enumerate().map(|(i, text)| Message::new(ROLES[(i + usize::from(choices & 3)) % 4], text)).collect();
    if let Ok(text) = template.render(&messages, choices & 4 != 0, &serde_json::Value::Null) {
        // The purse for what is rendered holds.
        assert!(text.len() <= 64 << 20);
        let _ = template.has_bos(&text);
    }
});
