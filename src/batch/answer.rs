//! A line of the output. It holds no clock and no chance: the same request gives the same line, with any neighbours, before and
//! after a crash. So `created` is 0 and ids are made from the request's line.

use super::request::Refused;
use crate::engine::{EngineOptions, Finish, Finished, Piece};
use crate::ops::kv::KvType;
use crate::session::sampler::Logprobs;
use crate::session::tokenizer::{StreamDecoder, Tokenizer};
use serde::{Serialize, Serializer};
use serde_json::json;
use std::collections::HashSet;

/// A result, as it is written.
#[derive(Serialize)]
struct Line<'a, B: Serialize, E: Serialize> {
    id: &'a str,
    custom_id: Option<&'a str>,
    response: Response<'a, B>,
    error: E,
}

#[derive(Serialize)]
struct Response<'a, B: Serialize> {
    status_code: u16,
    request_id: &'a str,
    body: B,
}

/// A list that is written item by item: log-probabilities of many tokens are large as values.
struct List<F>(F);

impl<I: IntoIterator<Item: Serialize>, F: Fn() -> I> Serialize for List<F> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq((self.0)())
    }
}

/// An object, likewise.
struct Object<F>(F);

impl<V: Serialize, I: IntoIterator<Item = (String, V)>, F: Fn() -> I> Serialize for Object<F> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map((self.0)())
    }
}

/// What a completion has and what a chat has.
#[derive(Serialize)]
#[serde(untagged)]
enum Of<T, C> {
    Text(T),
    Chat(C),
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

    /// Its tokens that have log-probabilities.
    fn logprobs(&self) -> impl Iterator<Item = (u32, &Logprobs)> {
        self.tokens.iter().filter_map(|(token, l)| Some((*token, l.as_ref()?)))
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
    /// The line's id.
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
    /// See [`fingerprint`].
    pub fingerprint: &'a str,
    /// Tokens of its prompts.
    pub n_prompt: usize,
    /// Whether log-probabilities were asked for.
    pub logprobs: bool,
}

/// What answers depend on besides the request and the model: this version, and options that change the numbers.
pub(super) fn fingerprint(o: &EngineOptions) -> String {
    let mut all = format!("oncall-{}", env!("CARGO_PKG_VERSION"));
    if (o.type_k, o.type_v) != (KvType::F16, KvType::F16) {
        all += &format!("-k-{:?}-v-{:?}", o.type_k, o.type_v).to_lowercase();
    }
    if let Some(n) = o.n_expert_used {
        all += &format!("-experts-{n}");
    }
    if !o.lossy.is_off() {
        all += &format!("-drop-cold-{}-prefer-resident-{}", o.lossy.drop_cold, o.lossy.prefer_resident);
    }
    all
}

/// The line of a request that was served.
pub(super) fn answered<'a>(t: &'a Tokenizer, whose: &Whose<'_>, about: &About<'_>, choices: &'a [Choice]) -> String {
    let n_written: usize = choices.iter().filter_map(|c| c.done).map(|d| d.n_written).sum();
    let choice = |(index, c): (usize, &'a Choice)| {
        let finish_reason = c.reason();
        if about.chat {
            let message = Message { role: "assistant", content: &c.text, refusal: () };
            let logprobs = about.logprobs.then(|| chat_logprobs(t, c));
            Of::Chat(ChatChoice { index, message, logprobs, finish_reason })
        } else {
            let logprobs = about.logprobs.then(|| text_logprobs(t, c));
            Of::Text(TextChoice { text: &c.text, index, logprobs, finish_reason })
        }
    };
    let (prefix, object) = if about.chat { ("chatcmpl", "chat.completion") } else { ("cmpl", "text_completion") };
    let body = Body {
        id: format!("{prefix}-{}", whose.id),
        object,
        created: 0,
        model: about.model,
        choices: List(|| choices.iter().enumerate().map(choice)),
        usage: Usage {
            prompt_tokens: about.n_prompt,
            completion_tokens: n_written,
            total_tokens: about.n_prompt + n_written,
        },
        system_fingerprint: about.fingerprint,
    };
    write(whose, 200, &body, ())
}

/// The line of a request that can't be served.
pub(super) fn refused(whose: &Whose<'_>, why: &Refused) -> String {
    let error = json!({
        "message": why.message, "type": "invalid_request_error", "param": why.param, "code": why.code,
    });
    write(whose, 400, &json!({ "error": error }), json!({ "code": why.code, "message": why.message }))
}

fn write(whose: &Whose<'_>, status_code: u16, body: &impl Serialize, error: impl Serialize) -> String {
    let response = Response { status_code, request_id: whose.id, body };
    let line = Line { id: whose.id, custom_id: whose.custom_id, response, error };
    // Texts and numbers always become JSON.
    serde_json::to_string(&line).unwrap_or_default() + "\n"
}

#[derive(Serialize)]
struct Body<'a, C: Serialize> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: C,
    usage: Usage,
    system_fingerprint: &'a str,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize)]
struct TextChoice<'a, L: Serialize> {
    text: &'a str,
    index: usize,
    logprobs: Option<L>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct ChatChoice<'a, L: Serialize> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<L>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: (),
}

/// The log-probabilities of a chat's text.
#[derive(Serialize)]
struct ChatLogprobs<C: Serialize> {
    content: C,
    refusal: (),
}

/// A token as chats' log-probabilities show it.
#[derive(Serialize)]
struct Shown {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// A token that was written.
#[derive(Serialize)]
struct Written<T: Serialize> {
    #[serde(flatten)]
    token: Shown,
    top_logprobs: T,
}

/// The log-probabilities of a completion's text.
#[derive(Serialize)]
struct TextLogprobs<A: Serialize, B: Serialize, C: Serialize> {
    tokens: A,
    token_logprobs: B,
    top_logprobs: C,
    text_offset: Vec<usize>,
}

fn chat_logprobs<'a>(t: &'a Tokenizer, c: &'a Choice) -> impl Serialize + 'a {
    let shown = |token: u32, logprob: f32| {
        let bytes = t.token_bytes(token).to_vec();
        Shown { token: String::from_utf8_lossy(&bytes).into_owned(), logprob, bytes }
    };
    let written = move |(token, l): (u32, &'a Logprobs)| Written {
        token: shown(token, l.token),
        top_logprobs: List(move || l.top.iter().map(move |&(id, p)| shown(id, p))),
    };
    ChatLogprobs { content: List(move || c.logprobs().map(written)), refusal: () }
}

fn text_logprobs<'a>(t: &'a Tokenizer, c: &'a Choice) -> impl Serialize + 'a {
    // As OpenAI shows tokens that are part of a character.
    let text = move |id: u32| {
        let bytes = t.token_bytes(id);
        let hex = || bytes.iter().map(|b| format!("\\x{b:02x}")).collect::<String>();
        std::str::from_utf8(&bytes).map_or_else(|_| format!("bytes:{}", hex()), String::from)
    };
    // The most likely ones and the one that was chosen. Tokens with the same text are told apart by nothing here: the likelier
    // one is shown.
    let top = move |token: u32, l: &'a Logprobs| {
        Object(move || {
            let mut seen = HashSet::new();
            let all = l.top.iter().copied().chain([(token, l.token)]).map(move |(id, p)| (text(id), p));
            all.filter(move |(text, _)| seen.insert(text.clone()))
        })
    };
    // A character may be written by several tokens: it counts with the last of them.
    let (mut decoder, mut at) = (StreamDecoder::new(false), 0);
    let offset = |(token, _)| {
        let here = at;
        at += decoder.push(t, token).chars().count();
        here
    };
    TextLogprobs {
        text_offset: c.logprobs().map(offset).collect(),
        tokens: List(move || c.logprobs().map(move |(token, _)| text(token))),
        token_logprobs: List(|| c.logprobs().map(|(_, l)| l.token)),
        top_logprobs: List(move || c.logprobs().map(move |(token, l)| top(token, l))),
    }
}
