//! A line of the output. It holds no clock and no chance: the same request gives the same line, with any neighbours, before and
//! after a crash. So `created` is 0 and ids are made from the `custom_id`.

use super::request::Refused;
use crate::engine::{Engine, Finish, Finished, Piece};
use crate::session::sampler::Logprobs;
use crate::session::tokenizer::{StreamDecoder, Tokenizer};
use serde::Serialize;
use serde_json::{Value, json};

/// A result, as it is written.
#[derive(Serialize)]
struct Line<'a> {
    id: &'a str,
    custom_id: Option<&'a str>,
    response: Value,
    error: Option<Value>,
}

/// One completion as it grows.
#[derive(Default)]
pub(super) struct Choice {
    text: String,
    tokens: Vec<(u32, Option<Logprobs>)>,
    done: Option<Finished>,
}

impl Choice {
    /// Takes what was written.
    pub fn push(&mut self, piece: Piece) {
        self.text.push_str(&piece.text);
        if let Some(token) = piece.token.filter(|_| piece.logprobs.is_some()) {
            self.tokens.push((token, piece.logprobs));
        }
    }

    /// It's complete.
    pub fn finish(&mut self, f: Finished) {
        self.done = Some(f);
    }

    /// Whether it is.
    pub fn is_done(&self) -> bool {
        self.done.is_some()
    }

    fn reason(&self) -> &'static str {
        match self.done.map(|d| d.finish) {
            Some(Finish::Length | Finish::ContextFull) => "length",
            _ => "stop",
        }
    }
}

/// Whose line it is.
pub(super) struct Whose<'a> {
    /// The line's id: from the `custom_id`, or the line's number where there is none.
    pub id: &'a str,
    /// The request's.
    pub custom_id: Option<&'a str>,
}

/// What a request's answer says about itself.
pub(super) struct About<'a> {
    /// A chat, or a plain completion.
    pub chat: bool,
    /// The model as the request named it.
    pub model: &'a str,
    /// Tokens of its prompts.
    pub n_prompt: usize,
    /// Whether log-probabilities were asked for.
    pub logprobs: bool,
}

/// The line of a request that was served.
pub(super) fn answered(engine: &Engine, whose: &Whose<'_>, about: &About<'_>, choices: &[Choice]) -> String {
    let t = engine.tokenizer();
    let n_written: usize = choices.iter().filter_map(|c| c.done).map(|d| d.n_written).sum();
    let choice = |(index, c): (usize, &Choice)| {
        let logprobs = about.logprobs.then(|| if about.chat { chat_logprobs(t, c) } else { text_logprobs(t, c) });
        if about.chat {
            let message = json!({ "role": "assistant", "content": c.text, "refusal": null });
            json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": c.reason() })
        } else {
            json!({ "text": c.text, "index": index, "logprobs": logprobs, "finish_reason": c.reason() })
        }
    };
    let (prefix, object) = if about.chat { ("chatcmpl", "chat.completion") } else { ("cmpl", "text_completion") };
    let body = json!({
        "id": format!("{prefix}-{}", whose.id),
        "object": object,
        "created": 0,
        "model": about.model,
        "choices": choices.iter().enumerate().map(choice).collect::<Vec<_>>(),
        "usage": {
            "prompt_tokens": about.n_prompt,
            "completion_tokens": n_written,
            "total_tokens": about.n_prompt + n_written,
        },
        // What else an answer depends on: the numbers differ in their last bits between instruction sets.
        "system_fingerprint": format!("oncall-{}-{}", env!("CARGO_PKG_VERSION"), engine.isa()),
    });
    write(whose, 200, body, None)
}

/// The line of a request that can't be served.
pub(super) fn refused(whose: &Whose<'_>, why: &Refused) -> String {
    let error = json!({
        "message": why.message, "type": "invalid_request_error", "param": why.param, "code": why.code,
    });
    write(whose, 400, json!({ "error": error }), Some(json!({ "code": why.code, "message": why.message })))
}

fn write(whose: &Whose<'_>, status_code: u16, body: Value, error: Option<Value>) -> String {
    let response = json!({ "status_code": status_code, "request_id": whose.id, "body": body });
    let line = Line { id: whose.id, custom_id: whose.custom_id, response, error };
    // Texts and numbers always become JSON.
    serde_json::to_string(&line).unwrap_or_default() + "\n"
}

/// A token as chats' log-probabilities show it.
fn shown(t: &Tokenizer, token: u32, logprob: f32) -> Value {
    let bytes = t.token_bytes(token);
    json!({ "token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": &*bytes })
}

fn chat_logprobs(t: &Tokenizer, c: &Choice) -> Value {
    let each = c.tokens.iter().filter_map(|(token, l)| l.as_ref().map(|l| (*token, l))).map(|(token, l)| {
        let mut v = shown(t, token, l.token);
        v["top_logprobs"] = l.top.iter().map(|&(id, p)| shown(t, id, p)).collect();
        v
    });
    json!({ "content": each.collect::<Vec<_>>(), "refusal": null })
}

fn text_logprobs(t: &Tokenizer, c: &Choice) -> Value {
    let text = |id: u32| String::from_utf8_lossy(&t.token_bytes(id)).into_owned();
    let (mut tokens, mut logprobs, mut tops, mut offsets, mut at) = (vec![], vec![], vec![], vec![], 0);
    // A character may be written by several tokens: it counts with the last of them.
    let mut decoder = StreamDecoder::new(false);
    for (token, l) in &c.tokens {
        let Some(l) = l else { continue };
        offsets.push(at);
        at += decoder.push(t, *token).chars().count();
        tokens.push(text(*token));
        logprobs.push(l.token);
        // Tokens that look the same are told apart by nothing here: the likelier one is shown.
        let mut top = serde_json::Map::new();
        for &(id, p) in &l.top {
            top.entry(text(id)).or_insert(json!(p));
        }
        tops.push(top);
    }
    json!({ "tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets })
}
