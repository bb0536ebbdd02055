//! `oncall chat`: a conversation in the terminal.

use super::args::{ModelArgs, SamplingArgs};
use super::run::answer;
use super::{Failure, output};
use crate::engine::{Engine, Session};
use crate::gguf::{PartFile, WriteError};
use crate::session::template::{ChatTemplate, Message};
use clap::Args;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{IsTerminal, Read, Write};
use std::path::Path;

/// Flags of `chat`.
#[derive(Args)]
#[command(after_help = "In the chat: \"\"\" begins and ends a text of several lines; /help lists the commands; \
Ctrl-C stops the answer, Ctrl-D leaves. If the standard input isn't a terminal it is one message, and only the \
answer is printed.")]
pub(super) struct ChatArgs {
    /// What the model is told to be (-sys)
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

const HELP: &str = "\
/help                 this list
/set NAME VALUE       a sampling parameter (temp, top-k, top-p, min-p, seed, predict, ...) or system TEXT
/save FILE            write the conversation to a file
/load FILE            go on with a conversation from a file
/clear                forget the conversation
/bye                  leave, as Ctrl-D does
\"\"\"                   begin and end a text of several lines
";

struct Chat {
    engine: Engine,
    session: Session,
    template: Option<ChatTemplate>,
    messages: Vec<Message>,
    sampling: SamplingArgs,
}

pub(super) fn run(a: ChatArgs) -> Result<(), Failure> {
    output::catch_ctrl_c()?;
    let engine = a.model.load()?;
    let template = engine.chat_template()?;
    if template.is_none() && a.system.is_some() {
        return Err(Failure::usage("--system needs a model with a chat template, which this one doesn't have"));
    }
    let messages = a.system.iter().map(|s| Message::new("system", s.as_str())).collect();
    let mut chat = Chat { session: engine.session(), engine, template, messages, sampling: a.sampling };
    if !std::io::stdin().is_terminal() {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .map_err(|e| Failure::new(format!("reading the message from the standard input: {e}")))?;
        chat.turn(text.trim_end_matches('\n'))?;
        return if output::stopped() { Err(Failure::interrupted()) } else { Ok(()) };
    }
    output::note(&format!("{}: /help lists the commands, Ctrl-D leaves", a.model.name()));
    if chat.template.is_none() {
        output::note("this model has no chat template: it goes on with the text that you type");
    }
    chat.talk()
}

impl Chat {
    /// Reads messages and commands until Ctrl-D.
    fn talk(&mut self) -> Result<(), Failure> {
        let mut editor = DefaultEditor::new()?;
        loop {
            let message = match read_message(&mut editor) {
                Ok(m) => m,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            let line = message.trim();
            if line.is_empty() {
                continue;
            }
            editor.add_history_entry(line)?;
            if let Some(command) = line.strip_prefix('/') {
                if command == "bye" {
                    return Ok(());
                }
                match self.command(command) {
                    Ok(done) => output::note(&done),
                    Err(why) => output::note(&format!("not done: {why}")),
                }
                continue;
            }
            output::start_over();
            // A failed turn is told, and the chat goes on.
            match self.turn(&message) {
                Ok(()) => {}
                Err(f) if f.code == output::BROKEN_PIPE => return Err(f),
                Err(f) => output::note(&format!("error: {}", f.message)),
            }
        }
    }

    /// Sends a message and prints the answer. If that fails the message is taken back.
    fn turn(&mut self, message: &str) -> Result<(), Failure> {
        let mut tokens = self.session.tokens().to_vec();
        if let Some(t) = &self.template {
            self.messages.push(Message::new("user", message));
            tokens = match self.engine.chat_tokens(t, &self.messages) {
                Ok(tokens) => tokens,
                Err(e) => {
                    self.messages.pop();
                    return Err(e.into());
                }
            };
        } else {
            tokens.extend(self.engine.tokenizer().encode(message, tokens.is_empty(), false));
        }
        let mut text = String::new();
        let result = answer(&mut self.session, &tokens, &self.sampling.params(), &mut |piece| {
            text.push_str(piece);
            output::text(piece)
        });
        if self.template.is_some() {
            if result.is_err() && text.is_empty() {
                self.messages.pop();
            } else {
                self.messages.push(Message::new("assistant", text));
            }
        }
        let figures = result?;
        output::text("\n")?;
        // Without a template the session is all that is known of the conversation.
        if self.template.is_none() {
            self.session.feed(&figures.pending, &mut |_| true)?;
        }
        if std::io::stdin().is_terminal() {
            output::note(&figures.line());
        }
        Ok(())
    }

    /// Does what a line that begins with `/` says; what to tell the user.
    fn command(&mut self, line: &str) -> Result<String, String> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match name {
            "help" | "?" => Ok(HELP.trim_end().into()),
            "clear" => {
                self.messages.retain(|m| m.role == "system");
                self.session.truncate(0);
                Ok("forgotten".into())
            }
            "set" => {
                let (name, value) = rest.split_once(char::is_whitespace).ok_or("it takes a name and a value")?;
                if name == "system" {
                    self.set_system(value.trim())?;
                } else {
                    self.sampling.set(name, value.trim())?;
                }
                Ok(format!("{name} is {}", value.trim()))
            }
            "save" if !rest.is_empty() => self.save(Path::new(rest)).map(|()| format!("saved to {rest}")),
            "load" if !rest.is_empty() => self
                .load(Path::new(rest))
                .map(|()| format!("{} messages, {} tokens", self.messages.len(), self.session.tokens().len())),
            "save" | "load" => Err("it takes a file".into()),
            _ => Err(format!("there is no /{name}; /help lists the commands")),
        }
    }

    fn set_system(&mut self, text: &str) -> Result<(), String> {
        if self.template.is_none() {
            return Err("this model has no chat template, so it can't be told what to be".into());
        }
        self.messages.retain(|m| m.role != "system");
        self.messages.insert(0, Message::new("system", text));
        Ok(())
    }

    /// The conversation as JSON, and beside it what the model has computed of it, so that loading costs nothing.
    fn save(&self, path: &Path) -> Result<(), String> {
        let text = serde_json::to_string_pretty(&self.messages).map_err(|e| e.to_string())?;
        let write = || -> Result<(), WriteError> {
            let mut file = PartFile::replace(path)?;
            file.write_all(text.as_bytes()).map_err(|e| file.error(e))?;
            file.commit()
        };
        write().map_err(|e| e.to_string())?;
        self.session.save(&path.with_added_extension("kv")).map_err(|e| e.to_string())
    }

    fn load(&mut self, path: &Path) -> Result<(), String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let messages: Vec<Message> = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        match self.engine.restore(&path.with_added_extension("kv")) {
            Ok(session) => self.session = session,
            // The messages are enough where the model's chat template makes the tokens anew.
            Err(e) if self.template.is_none() => return Err(e.to_string()),
            Err(e) => {
                self.session.truncate(0);
                output::note(&format!("{e}; the conversation will be read again"));
            }
        }
        self.messages = messages;
        Ok(())
    }
}

/// A line, or the lines between two `"""`.
fn read_message(editor: &mut DefaultEditor) -> Result<String, ReadlineError> {
    let first = editor.readline(">>> ")?;
    let Some(rest) = first.trim_start().strip_prefix("\"\"\"") else { return Ok(first) };
    if let Some(whole) = rest.strip_suffix("\"\"\"") {
        return Ok(whole.into());
    }
    let mut text = rest.to_string();
    loop {
        let line = editor.readline("... ")?;
        if !text.is_empty() {
            text.push('\n');
        }
        match line.strip_suffix("\"\"\"") {
            Some(last) => return Ok(text + last),
            None => text += &line,
        }
    }
}
