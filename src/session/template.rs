//! Chat templates: the Jinja source in a model's file that turns a conversation into the text that the model was trained on.
//!
//! They are rendered as the Hugging Face library renders them: `trim_blocks` and `lstrip_blocks` on, Python's methods on texts, lists and
//! maps, `raise_exception`, `strftime_now` (in UTC), a `tojson` like Python's `json.dumps`, loop controls, and `{% generation %}` tags without
//! an effect. `include`, `import`, `extends`, `block` and `autoescape` are refused.
//!
//! A template is untrusted input: what it may execute, hold and print is bounded (`guard`, `meter`).

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use minijinja::machinery::{CodeGenerator, eval, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, ErrorKind, Value};
use serde::{Deserialize, Serialize};

use crate::gguf::printable;
use meter::{Cause, Meter};

mod builtins;
mod clock;
mod guard;
mod json;
mod meter;
#[cfg(test)]
mod tests;

/// The longest template, in bytes. Real ones have up to about 30 KB.
pub const MAX_SOURCE: usize = 256 * 1024;

/// Instructions that one rendering may execute; a long conversation takes a few hundred thousand.
const FUEL: u64 = 10_000_000;

/// What one rendering may make, in bytes: a base, and so much for each byte of the conversation. See [`meter`].
const MEMORY: (u64, u64) = (64 << 20, 512);

/// What it may read through. Templates that look at the whole conversation again at each turn read much.
const TIME: (u64, u64) = (512 << 20, 4096);

/// How deep macros, loops and blocks may be nested while rendering.
const RECURSION: usize = 150;

/// One turn of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// What was said.
    #[serde(default)]
    pub content: String,
    /// Further fields that the template may look at (`tool_calls`, `reasoning_content`, …); they may replace the two above.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A turn with nothing but a role and a text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: serde_json::Map::new() }
    }

    fn to_value(&self) -> Value {
        let own = [("role", Value::from(self.role.as_str())), ("content", Value::from(self.content.as_str()))];
        let own = own.into_iter().filter(|(name, _)| !self.extra.contains_key(*name));
        let extra = self.extra.iter().map(|(name, value)| (name.as_str(), json::to_value(value)));
        Value::from_pairs(own.chain(extra))
    }
}

/// Why a template can't be used, or not for this conversation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// It's longer than any real one.
    #[error(
        "the chat template has {len} bytes, at most {MAX_SOURCE} are taken: the file is damaged or hostile; `oncall run --raw` does without it"
    )]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// It isn't Jinja, or uses what isn't supported.
    #[error("the chat template can't be read, line {line}: {}; `oncall run --raw` does without it", printable(.detail))]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// What is wrong there.
        detail: String,
    },
    /// The template itself raised an exception.
    #[error("the model's chat template refuses this conversation: {}{}", printable(.message), if *.without_system {
        " (it accepts it without the system message: leave out the system prompt)"
    } else {
        ""
    })]
    Refused {
        /// In the template's words.
        message: String,
        /// Whether the same conversation without its system messages would be accepted.
        without_system: bool,
    },
    /// Something in it doesn't work on this conversation.
    #[error("the chat template fails on this conversation, line {line}: {}", printable(.detail))]
    Render {
        /// Counted from 1.
        line: usize,
        /// What is wrong there.
        detail: String,
    },
    /// It does more than any conversation needs.
    #[error(
        "the chat template was stopped at line {line}: {}; the template is damaged or hostile, or the conversation is far too long",
        printable(.detail)
    )]
    Limit {
        /// Counted from 1.
        line: usize,
        /// Which limit.
        detail: String,
    },
    /// The variables for the template aren't a JSON object.
    #[error("the variables for the chat template are {found}, they must be a JSON object")]
    Variables {
        /// What they are.
        found: &'static str,
    },
}

/// A model's chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    source: String,
    bos: String,
    eos: String,
    now: Option<SystemTime>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, bos, eos, now } = self;
        let n = source.len();
        write!(f, "ChatTemplate {{ {n} bytes, bos: {bos:?}, eos: {eos:?}, now: {now:?} }}")
    }
}

impl ChatTemplate {
    /// Takes the template's source (`tokenizer.chat_template`) and the texts of the tokens that it may write.
    ///
    /// # Errors
    /// It's too long, or isn't a template.
    pub fn new(source: impl Into<String>, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        let source = source.into();
        if source.len() > MAX_SOURCE {
            return Err(TemplateError::TooLong { len: source.len() });
        }
        let source = strip_generation(&source);
        compile(&source).map_err(|e| classify(&e))?;
        Ok(Self { source, bos: bos.to_owned(), eos: eos.to_owned(), now: None })
    }

    /// The same template in which it is always this moment, for results that don't change from day to day.
    #[must_use]
    pub fn at(mut self, now: SystemTime) -> Self {
        self.now = Some(now);
        self
    }

    /// The text of a conversation. With `add_generation_prompt` it ends where the assistant is to begin.
    ///
    /// `variables` is a JSON object of further variables (`tools`, `documents`, `enable_thinking`, …), or null for none.
    ///
    /// # Errors
    /// The template refuses the conversation, fails on it, or does more than it may.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &serde_json::Value,
    ) -> Result<String, TemplateError> {
        match self.render_once(messages, add_generation_prompt, variables) {
            Err(TemplateError::Refused { message, .. }) => {
                let others: Vec<Message> = messages.iter().filter(|m| m.role != "system").cloned().collect();
                let without_system = others.len() < messages.len()
                    && self.render_once(&others, add_generation_prompt, variables).is_ok();
                Err(TemplateError::Refused { message, without_system })
            }
            result => result,
        }
    }

    /// Whether a rendered text begins with the token for the beginning already, so that the tokeniser must not add another.
    pub fn has_bos(&self, rendered: &str) -> bool {
        !self.bos.is_empty() && rendered.starts_with(&self.bos)
    }

    fn render_once(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &serde_json::Value,
    ) -> Result<String, TemplateError> {
        let context = self.context(messages, add_generation_prompt, variables)?;
        let size = serde_json::to_vec(&(messages, variables)).map_or(0, |v| v.len() as u64);
        let purse = |(base, per_byte): (u64, u64)| base.saturating_add(size.saturating_mul(per_byte));
        let meter = Arc::new(Meter::new(purse(MEMORY), purse(TIME)));
        let now = clock::unix_seconds(self.now.unwrap_or_else(SystemTime::now));
        let mut env = builtins::environment(&meter, now);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(RECURSION);
        let mut text = String::new();
        compile(&self.source)
            .and_then(|(code, blocks)| {
                let mut out = make_string_output(&mut text);
                eval(&env, &code, context, &blocks, &mut out, AutoEscape::None).map(drop)
            })
            .map_err(|e| classify(&e))?;
        Ok(text)
    }

    /// The variables as the Hugging Face library sets them: `tools` and `documents` are there, and none.
    fn context(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &serde_json::Value,
    ) -> Result<Value, TemplateError> {
        use serde_json::Value as Json;
        let none = serde_json::Map::new();
        let found = match variables {
            Json::Object(_) | Json::Null => "",
            Json::Bool(_) => "a boolean",
            Json::Number(_) => "a number",
            Json::String(_) => "a text",
            Json::Array(_) => "a list",
        };
        if !found.is_empty() {
            return Err(TemplateError::Variables { found });
        }
        let variables = variables.as_object().unwrap_or(&none);
        let own = [
            ("messages", messages.iter().map(Message::to_value).collect()),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", Value::from(self.bos.as_str())),
            ("eos_token", Value::from(self.eos.as_str())),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let own = own.into_iter().filter(|(name, _)| !variables.contains_key(*name));
        let others = variables.iter().map(|(name, value)| (name.as_str(), json::to_value(value)));
        Ok(Value::from_pairs(own.chain(others)))
    }
}

type Compiled<'a> = (
    minijinja::machinery::Instructions<'a>,
    std::collections::BTreeMap<&'a str, minijinja::machinery::Instructions<'a>>,
);

fn compile(source: &str) -> Result<Compiled<'_>, minijinja::Error> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    guard::check_shape(source, &syntax)?;
    let tree = guard::meter(&parse(source, "chat template", syntax)?)?;
    let mut generator = CodeGenerator::new("chat template", source);
    generator.compile_stmt(&tree);
    Ok(generator.finish())
}

fn classify(error: &minijinja::Error) -> TemplateError {
    let line = error.line().unwrap_or(0);
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        match inner.downcast_ref::<Cause>() {
            Some(Cause::Refused(message)) => {
                return TemplateError::Refused { message: message.clone(), without_system: false };
            }
            Some(Cause::Unsupported { line, detail }) => {
                return TemplateError::Syntax { line: *line, detail: detail.clone() };
            }
            Some(cause) => return TemplateError::Limit { line, detail: cause.to_string() },
            None => source = inner.source(),
        }
    }
    match error.kind() {
        ErrorKind::SyntaxError | ErrorKind::BadEscape => TemplateError::Syntax { line, detail },
        ErrorKind::OutOfFuel => {
            TemplateError::Limit { line, detail: format!("it executes more than {FUEL} instructions") }
        }
        _ if detail == "recursion limit exceeded" => {
            TemplateError::Limit { line, detail: format!("it nests macros or loops more than {RECURSION} deep") }
        }
        kind => TemplateError::Render { line, detail: format!("{kind}: {detail}") },
    }
}

/// `{% generation %}` marks what a model is trained on. The tags become an `if` that always holds, which trims the space around itself likewise.
fn strip_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |i| i + 2);
        let (tag, after) = tag.split_at(end);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']);
        out += &match inner.trim() {
            name @ "generation" => tag.replace(name, "if true"),
            name @ "endgeneration" => tag.replace(name, "endif"),
            _ => tag.to_owned(),
        };
        rest = after;
    }
    out + rest
}
