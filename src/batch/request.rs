//! A line of the input: what is asked for, checked field by field. What isn't supported is an error, never ignored.

use super::{json_error, text_of};
use crate::engine::GenerationParams;
use crate::session::grammar::{Grammar, GrammarError};
use crate::session::sampler::SamplingParams;
use crate::session::template::Message;
use serde_json::{Map, Value};

/// The code of a line that isn't JSON.
pub(super) const NO_JSON: &str = "invalid_json";
/// Completions that one request may ask for.
pub(super) const MAX_N: u64 = 128;
/// Most likely tokens with each, at most.
const MAX_TOP_LOGPROBS: u64 = 20;

/// What a request goes on from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    /// A conversation, for the model's chat template.
    Chat(Vec<Message>),
    /// Texts.
    Texts(Vec<String>),
    /// Tokens.
    Tokens(Vec<Vec<u32>>),
}

/// A request as it was asked for.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub prompt: Prompt,
    /// Completions of each prompt.
    pub n: u64,
    /// As it was named; the answer says it again.
    pub model: String,
    pub params: GenerationParams,
    pub priority: i32,
}

/// Why a line can't be served.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub(super) struct Refused {
    /// A word for programs.
    pub code: &'static str,
    /// The field.
    pub param: Option<String>,
    /// For people.
    pub message: String,
}

impl Refused {
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Refused { code, param: None, message: message.into() }
    }

    pub fn field(name: &str, message: impl std::fmt::Display) -> Self {
        Refused { code: "invalid_value", param: Some(name.into()), message: format!("{name} {message}") }
    }
}

/// The fields that both endpoints take. Those in the second line don't change the answer.
const COMMON: &str = "model, max_tokens, temperature, top_p, top_k, min_p, typical_p, repeat_penalty, repeat_last_n, \
     presence_penalty, frequency_penalty, seed, stop, n, logprobs, logit_bias, response_format, ignore_eos, priority, \
     stream (false), user, metadata, store (false)";

/// Completions of one line, for all its prompts, at most: a line's result is held until it's whole.
const MAX_CHOICES: usize = 2048;

/// The `custom_id` of a line, and the rest of it.
pub(super) fn line(bytes: &[u8]) -> Result<(String, Map<String, Value>), Refused> {
    let value: Value = serde_json::from_slice(text_of(bytes))
        .map_err(|e| Refused::new(NO_JSON, format!("the line isn't JSON: {}", json_error(&e))))?;
    let Value::Object(mut fields) = value else {
        return Err(Refused::new(NO_JSON, "the line must be a JSON object"));
    };
    match fields.remove("custom_id") {
        Some(Value::String(id)) if !id.is_empty() => Ok((id, fields)),
        Some(_) => Err(Refused::new("invalid_custom_id", "custom_id must be a text that isn't empty")),
        None => Err(Refused::new("missing_custom_id", "the line has no custom_id")),
    }
}

/// The text that decides where a request begins like another; empty if there is none.
pub(super) fn beginning(fields: &Map<String, Value>) -> Vec<u8> {
    let body = fields.get("body");
    let part = |name: &str| {
        body.and_then(|b| b.get(name)).map(|v| match v {
            Value::String(text) => text.clone().into_bytes(),
            other => other.to_string().into_bytes(),
        })
    };
    part("messages").or_else(|| part("prompt")).unwrap_or_default()
}

/// How many prompts a line has, and about how many bytes of text they are.
pub(super) fn prompts(fields: &Map<String, Value>) -> (u64, u64) {
    const BYTES_A_TOKEN: usize = 4;
    let bytes = |v: &Value| match v {
        Value::String(text) => text.len(),
        Value::Array(tokens) => BYTES_A_TOKEN * tokens.len(),
        _ => BYTES_A_TOKEN,
    };
    match fields.get("body").and_then(|b| b.get("prompt")) {
        Some(Value::Array(list)) if !list.is_empty() => {
            let n = if list.iter().all(Value::is_number) { 1 } else { list.len() };
            (n as u64, list.iter().map(bytes).sum::<usize>() as u64)
        }
        _ => (1, beginning(fields).len() as u64),
    }
}

/// How urgent a line is; what isn't a priority is refused later.
pub(super) fn priority(fields: &Map<String, Value>) -> i32 {
    let p = fields.get("body").and_then(|b| b.get("priority")).and_then(Value::as_i64);
    p.and_then(|p| i32::try_from(p).ok()).unwrap_or(0)
}

/// Whether a line asks for a chat.
pub(super) fn is_chat(fields: &Map<String, Value>) -> bool {
    fields.get("url").and_then(Value::as_str) == Some("/v1/chat/completions")
}

/// Reads a line's fields without its `custom_id`, from which the seed is made if none is given: so the same line gives the same answer.
pub(super) fn asked(mut fields: Map<String, Value>, seed: u64) -> Result<Asked, Refused> {
    match fields.remove("method") {
        Some(Value::String(m)) if m == "POST" => {}
        None => {}
        Some(other) => return Err(Refused::field("method", format!("must be \"POST\", it is {other}"))),
    }
    let chat = match fields.remove("url") {
        Some(Value::String(url)) if url == "/v1/chat/completions" => true,
        Some(Value::String(url)) if url == "/v1/completions" => false,
        other => {
            let got = other.unwrap_or_default();
            return Err(Refused::field("url", format!("must be /v1/chat/completions or /v1/completions, it is {got}")));
        }
    };
    let Some(Value::Object(body)) = fields.remove("body") else {
        return Err(Refused::field("body", "must be an object"));
    };
    if let Some(name) = fields.keys().next() {
        return Err(Refused {
            code: "unknown_field",
            param: Some(name.clone()),
            message: format!("unknown field {name:?}: a line has custom_id, method, url and body"),
        });
    }
    Body { fields: body }.read(chat, seed)
}

/// The fields of a body that haven't been read yet. Null is as good as absent.
struct Body {
    fields: Map<String, Value>,
}

impl Body {
    fn read(mut self, chat: bool, seed: u64) -> Result<Asked, Refused> {
        let mut s = SamplingParams::default();
        let f = &mut self;
        f.float("temperature", 0.0..=f64::from(f32::MAX), &mut s.temp)?;
        f.float("top_p", 0.0..=1.0, &mut s.top_p)?;
        f.float("min_p", 0.0..=1.0, &mut s.min_p)?;
        f.float("typical_p", 0.0..=1.0, &mut s.typical_p)?;
        f.float("repeat_penalty", 1e-6..=100.0, &mut s.repeat_penalty)?;
        f.float("presence_penalty", -100.0..=100.0, &mut s.presence_penalty)?;
        f.float("frequency_penalty", -100.0..=100.0, &mut s.frequency_penalty)?;
        s.top_k = f.int("top_k", -1..=i64::from(i32::MAX))?.map_or(s.top_k, |k| k as i32);
        s.repeat_last_n = f.int("repeat_last_n", -1..=i64::from(i32::MAX))?.map_or(s.repeat_last_n, |n| n as i32);
        s.seed = Some(f.int("seed", i64::MIN..=i64::MAX)?.map_or(seed, |s| s as u64));
        s.logit_bias = f.logit_bias()?;
        let most = i64::from(u32::MAX);
        let mut n_predict = f.int("max_tokens", 0..=most)?;
        if chat {
            n_predict = f.int("max_completion_tokens", 0..=most)?.or(n_predict);
        }
        let params = GenerationParams {
            sampling: s,
            n_predict: n_predict.map(|n| n as usize),
            stop: f.stop()?,
            ignore_eos: f.bool("ignore_eos")?.unwrap_or(false),
            show_special: false,
            logprobs: f.logprobs(chat)?,
            grammar: f.response_format()?,
        };
        let n = f.int("n", 1..=MAX_N as i64)?.map_or(1, |n| n as u64);
        let priority = f.int("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0) as i32;
        let model = match f.take("model") {
            None => String::new(),
            Some(Value::String(model)) => model,
            Some(_) => return Err(Refused::field("model", "must be a text")),
        };
        f.neutral("stream", false.into())?;
        f.neutral("store", false.into())?;
        if !chat {
            f.neutral("echo", false.into())?;
            f.neutral("best_of", n.into())?;
        }
        f.take("user");
        f.take("metadata");
        let prompt = if chat { f.messages()? } else { f.prompt()? };
        prompt.check_number(n as usize)?;
        if let Some((name, _)) = self.fields.iter().find(|(_, v)| !v.is_null()) {
            let own = if chat { "messages, max_completion_tokens, top_logprobs" } else { "prompt" };
            return Err(Refused {
                code: "unsupported_field",
                param: Some(name.clone()),
                message: format!("{name:?} isn't supported; these fields are: {own}, {COMMON}"),
            });
        }
        Ok(Asked { prompt, n, model, params, priority })
    }

    /// A field that may be there as long as it asks for nothing.
    fn neutral(&mut self, name: &str, neutral: Value) -> Result<(), Refused> {
        match self.take(name) {
            Some(v) if v != neutral => Err(Refused::field(name, format!("can only be {neutral} here, it is {v}"))),
            _ => Ok(()),
        }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        self.fields.remove(name).filter(|v| !v.is_null())
    }

    fn float(&mut self, name: &str, range: std::ops::RangeInclusive<f64>, to: &mut f32) -> Result<(), Refused> {
        if let Some(v) = self.take(name) {
            let x = v.as_f64().filter(|x| range.contains(x));
            let (low, high) = (range.start(), range.end());
            let which = if *high == f64::from(f32::MAX) {
                format!("of at least {low}")
            } else {
                format!("from {low} to {high}")
            };
            *to = x.ok_or_else(|| Refused::field(name, format!("must be a number {which}, it is {v}")))? as f32;
        }
        Ok(())
    }

    fn int(&mut self, name: &str, range: std::ops::RangeInclusive<i64>) -> Result<Option<i64>, Refused> {
        let Some(v) = self.take(name) else { return Ok(None) };
        let (low, high) = (range.start(), range.end());
        match v.as_i64().filter(|x| range.contains(x)) {
            Some(x) => Ok(Some(x)),
            None => Err(Refused::field(name, format!("must be a whole number from {low} to {high}, it is {v}"))),
        }
    }

    fn bool(&mut self, name: &str) -> Result<Option<bool>, Refused> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(v) => Err(Refused::field(name, format!("must be true or false, it is {v}"))),
        }
    }

    fn stop(&mut self) -> Result<Vec<String>, Refused> {
        let texts: Vec<String> = match self.take("stop") {
            None => return Ok(Vec::new()),
            Some(Value::String(s)) => vec![s],
            Some(Value::Array(list)) => {
                list.iter().map(|v| v.as_str().map(String::from)).collect::<Option<_>>().unwrap_or_default()
            }
            Some(_) => Vec::new(),
        };
        if texts.is_empty() || texts.len() > 64 || texts.iter().any(String::is_empty) {
            return Err(Refused::field("stop", "must be a text or a list of up to 64 texts, none of them empty"));
        }
        Ok(texts)
    }

    fn logit_bias(&mut self) -> Result<Vec<(u32, f32)>, Refused> {
        let wrong = || Refused::field("logit_bias", "must be an object of token numbers and biases from -100 to 100");
        match self.take("logit_bias") {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(token, bias)| {
                    let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b)).ok_or_else(wrong)?;
                    Ok((token.parse().map_err(|_| wrong())?, bias as f32))
                })
                .collect(),
            Some(_) => Err(wrong()),
        }
    }

    /// Chats say whether and how many; completions only how many.
    fn logprobs(&mut self, chat: bool) -> Result<Option<usize>, Refused> {
        let most = MAX_TOP_LOGPROBS as i64;
        if !chat {
            return Ok(self.int("logprobs", 0..=most)?.map(|n| n as usize));
        }
        let wanted = self.bool("logprobs")?.unwrap_or(false);
        match self.int("top_logprobs", 0..=most)? {
            Some(_) if !wanted => Err(Refused::field("top_logprobs", "needs logprobs to be true")),
            n => Ok(wanted.then_some(n.unwrap_or(0) as usize)),
        }
    }

    fn response_format(&mut self) -> Result<Option<Grammar>, Refused> {
        let name = "response_format";
        let Some(v) = self.take(name) else { return Ok(None) };
        check_fields(name, &v, &["type", "json_schema"])?;
        if let Some(schema) = v.get("json_schema") {
            check_fields("response_format.json_schema", schema, &["name", "description", "schema", "strict"])?;
        }
        let of_grammar = |e: GrammarError| Refused::field(name, format!("can't be used: {e}"));
        match v.get("type").and_then(Value::as_str) {
            Some("text") => Ok(None),
            Some("json_object") => Ok(Some(Grammar::json_object())),
            Some("json_schema") => match v.get("json_schema").and_then(|s| s.get("schema")) {
                Some(schema) => Grammar::schema(schema.clone()).map(Some).map_err(of_grammar),
                None => Err(Refused::field(name, "of type json_schema must have json_schema.schema")),
            },
            _ => Err(Refused::field(name, "must have a type: text, json_object or json_schema")),
        }
    }

    fn messages(&mut self) -> Result<Prompt, Refused> {
        let wrong = |why: String| Refused::field("messages", why);
        let Some(Value::Array(list)) = self.take("messages") else {
            return Err(wrong("must be a list of objects with role and content".into()));
        };
        if list.is_empty() {
            return Err(wrong("is empty".into()));
        }
        let message = |(i, v): (usize, Value)| {
            let Value::Object(mut extra) = v else { return Err(wrong(format!("[{i}] must be an object"))) };
            let Some(Value::String(role)) = extra.remove("role") else {
                return Err(wrong(format!("[{i}] must have a role")));
            };
            for name in ["tool_calls", "function_call", "audio"] {
                if extra.get(name).is_some_and(|v| !v.is_null()) {
                    return Err(wrong(format!("[{i}].{name} isn't supported")));
                }
            }
            let content = content(extra.remove("content"), role == "assistant").ok_or_else(|| {
                wrong(format!(
                    "[{i}].content must be a text, or a list of parts with type (text) and text alone; other media aren't supported"
                ))
            })?;
            Ok(Message { role, content, extra })
        };
        Ok(Prompt::Chat(list.into_iter().enumerate().map(message).collect::<Result<_, _>>()?))
    }

    fn prompt(&mut self) -> Result<Prompt, Refused> {
        let tokens = |v: &Value| -> Option<Vec<u32>> {
            v.as_array()?.iter().map(|t| t.as_u64().and_then(|t| u32::try_from(t).ok())).collect()
        };
        let v = self.take("prompt").unwrap_or_default();
        let prompt = match &v {
            Value::String(text) => Some(Prompt::Texts(vec![text.clone()])),
            Value::Array(list) if list.is_empty() => None,
            Value::Array(list) if list.len() > MAX_CHOICES && !list[0].is_number() => {
                return Err(too_many(list.len(), 1));
            }
            Value::Array(list) if list.iter().all(Value::is_string) => {
                Some(Prompt::Texts(list.iter().filter_map(|t| t.as_str().map(String::from)).collect()))
            }
            Value::Array(list) if list.iter().all(Value::is_number) => tokens(&v).map(|t| Prompt::Tokens(vec![t])),
            Value::Array(list) => list.iter().map(tokens).collect::<Option<_>>().map(Prompt::Tokens),
            _ => None,
        };
        prompt.ok_or_else(|| Refused::field("prompt", "must be a text, a list of texts, or a list of token numbers"))
    }
}

impl Prompt {
    /// Whether so many completions of each aren't too many.
    fn check_number(&self, n: usize) -> Result<(), Refused> {
        let n_prompts = match self {
            Prompt::Chat(_) => 1,
            Prompt::Texts(texts) => texts.len(),
            Prompt::Tokens(tokens) => tokens.len(),
        };
        if n_prompts * n <= MAX_CHOICES {
            return Ok(());
        }
        Err(too_many(n_prompts, n))
    }
}

fn too_many(n_prompts: usize, n: usize) -> Refused {
    let why =
        format!("has {n_prompts} prompts, with n = {n}; a line can have {MAX_CHOICES} completions in all: divide it");
    Refused::field("prompt", why)
}

/// An object may have these fields and no others.
fn check_fields(name: &str, v: &Value, known: &[&str]) -> Result<(), Refused> {
    let strange = |fields: &Map<String, Value>| fields.keys().find(|k| !known.contains(&&***k)).cloned();
    match v.as_object().and_then(strange) {
        Some(field) => Err(Refused::field(name, format!("can't have {field:?}: it has {}", known.join(", ")))),
        None => Ok(()),
    }
}

/// A message's text, which may be written in parts, or be missing.
fn content(v: Option<Value>, may_be_missing: bool) -> Option<String> {
    match v {
        None | Some(Value::Null) => may_be_missing.then(String::new),
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => parts
            .iter()
            .map(|p| match p.get("type").and_then(Value::as_str) {
                Some("text") if check_fields("", p, &["type", "text"]).is_ok() => p.get("text").and_then(Value::as_str),
                _ => None,
            })
            .collect(),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(v: Value) -> Result<Asked, Refused> {
        let (_, fields) = line(v.to_string().as_bytes())?;
        asked(fields, 77)
    }

    fn completion(body: Value) -> Result<Asked, Refused> {
        read(json!({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}))
    }

    fn chat(body: Value) -> Result<Asked, Refused> {
        read(json!({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    }

    #[test]
    fn everything_that_is_supported() {
        let a = chat(json!({
            "model": "m", "messages": [{"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"}],
            "max_tokens": 5, "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125,
            "typical_p": 0.5, "repeat_penalty": 1.5, "repeat_last_n": -1, "seed": -1, "stop": ["x", "y"], "n": 2,
            "logprobs": true, "top_logprobs": 4, "logit_bias": {"5": -100, "6": 1.5}, "presence_penalty": 0.5,
            "frequency_penalty": -0.5, "response_format": {"type": "json_object"}, "ignore_eos": true, "priority": -3,
            "stream": false, "user": "u", "metadata": {"a": 1}, "store": null, "tools": null
        }))
        .unwrap();
        let Prompt::Chat(messages) = &a.prompt else { panic!("{a:?}") };
        assert_eq!(
            (&*messages[0].role, &*messages[1].content, &messages[1].extra["name"]),
            ("system", "ab", &json!("x"))
        );
        let p = &a.params;
        assert_eq!((a.n, a.priority, &*a.model, p.n_predict, p.logprobs), (2, -3, "m", Some(7), Some(4)));
        assert_eq!(p.stop, ["x", "y"]);
        assert!(p.ignore_eos && p.grammar.is_some());
        let s = SamplingParams {
            temp: 0.5,
            top_k: 3,
            top_p: 0.25,
            min_p: 0.125,
            typical_p: 0.5,
            repeat_penalty: 1.5,
            repeat_last_n: -1,
            presence_penalty: 0.5,
            frequency_penalty: -0.5,
            seed: Some(u64::MAX),
            logit_bias: vec![(5, -100.0), (6, 1.5)],
        };
        assert_eq!(p.sampling, s);
        let a = completion(json!({"prompt": "once", "logprobs": 2})).unwrap();
        assert_eq!((a.prompt, a.params.logprobs), (Prompt::Texts(vec!["once".into()]), Some(2)));
        assert_eq!(a.params.sampling, SamplingParams { seed: Some(77), ..SamplingParams::default() });
        completion(json!({"prompt": vec!["a"; 16], "n": 128, "best_of": 128, "echo": false})).unwrap();
        let marked = "\u{feff}{\"custom_id\": \"a\"}\r\n";
        assert_eq!(line(marked.as_bytes()).unwrap().0, "a");
        assert_eq!(completion(json!({"prompt": [1, 2]})).unwrap().prompt, Prompt::Tokens(vec![vec![1, 2]]));
        assert_eq!(completion(json!({"prompt": [[1], [2]]})).unwrap().prompt, Prompt::Tokens(vec![vec![1], vec![2]]));
    }

    #[test]
    fn what_is_refused_names_the_field() {
        for (body, word) in [
            (json!({"prompt": "a", "top_n_sigma": 1}), "top_n_sigma"),
            (json!({"prompt": "a", "messages": []}), "messages"),
            (json!({"prompt": "a", "max_completion_tokens": 1}), "max_completion_tokens"),
            (json!({"prompt": "a", "stream": true}), "stream"),
            (json!({"prompt": "a", "n": 0}), "n must"),
            (json!({"prompt": "a", "n": 1.5}), "1.5"),
            (json!({"prompt": "a", "temperature": "hot"}), "temperature"),
            (json!({"prompt": "a", "temperature": -1}), "temperature"),
            (json!({"prompt": "a", "top_p": 2}), "top_p"),
            (json!({"prompt": "a", "stop": [""]}), "stop"),
            (json!({"prompt": "a", "stop": 5}), "stop"),
            (json!({"prompt": "a", "stop": ["zzz", 5, null]}), "stop"),
            (json!({"prompt": "a", "echo": true}), "can only be false"),
            (json!({"prompt": "a", "n": 2, "best_of": 3}), "can only be 2"),
            (json!({"prompt": vec!["a"; 17], "n": 128}), "17 prompts, with n = 128"),
            (json!({"prompt": vec![[1]; 2049]}), "2049 prompts"),
            (json!({"prompt": "a", "temperature": -2}), "of at least 0, it is -2"),
            (json!({"prompt": "a", "logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"prompt": "a", "max_tokens": -1}), "max_tokens"),
            (json!({"prompt": "a", "logprobs": true}), "logprobs"),
            (json!({"prompt": "a", "response_format": {"type": "xml"}}), "response_format"),
            (json!({"prompt": "a", "response_format": {"type": "json_schema"}}), "json_schema.schema"),
            (json!({"prompt": []}), "prompt"),
            (json!({"prompt": [1, "a"]}), "prompt"),
            (json!({"prompt": [-1]}), "prompt"),
            (json!({}), "prompt"),
            (json!({"prompt": "a", "model": 5}), "model"),
        ] {
            let e = completion(body.clone()).expect_err(&body.to_string());
            assert!(e.message.contains(word), "{body}: {e}");
        }
        for (body, word) in [
            (json!({"messages": []}), "empty"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": [{"content": "a"}]}), "[0] must have a role"),
            (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "media"),
            (json!({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}), "logprobs to be true"),
            (json!({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}), "tools"),
            (json!({"messages": [{"role": "user"}]}), "[0].content"),
            (json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]}), "alone"),
            (json!({"messages": [{"role": "assistant", "tool_calls": [{}]}]}), "[0].tool_calls"),
            (json!({"messages": [], "response_format": {"type": "text", "strict": true}}), "can't have \"strict\""),
        ] {
            let e = chat(body.clone()).expect_err(&body.to_string());
            assert!(e.message.contains(word), "{body}: {e}");
        }
        let deep = format!("{{\"custom_id\": {}", "[".repeat(200));
        let said = |text: &str| line(text.as_bytes()).unwrap_err().message;
        assert!(said(&deep).contains("nested more than 127 levels deep"), "{}", said(&deep));
        assert!(said("{\"custom_id\": }").ends_with("at byte 15"), "{}", said("{\"custom_id\": }"));
        let envelope = |v: Value| read(v).unwrap_err().message;
        assert!(envelope(json!([])).contains("object"));
        assert!(envelope(json!({"url": "/v1/completions"})).contains("custom_id"));
        assert!(envelope(json!({"custom_id": 5})).contains("custom_id"));
        assert!(envelope(json!({"custom_id": "a", "url": "/v1/embeddings", "body": {}})).contains("/v1/embeddings"));
        assert!(envelope(json!({"custom_id": "a", "url": "/v1/completions"})).contains("body"));
        assert!(envelope(json!({"custom_id": "a", "method": "GET"})).contains("GET"));
        let more = json!({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}, "extra": 1});
        assert!(envelope(more).contains("extra"));
    }

    proptest! {
        /// Whatever a line holds, it is read or refused.
        #[test]
        fn no_line_is_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..80), text in "[\\PC]{0,60}") {
            let _ = line(&bytes).map(|(_, f)| asked(f, 0));
            let body = json!({"custom_id": text, "url": "/v1/completions", "body": {"prompt": text, "stop": text}});
            let _ = line(body.to_string().as_bytes()).map(|(_, f)| { beginning(&f); asked(f, 0) });
        }
    }
}
