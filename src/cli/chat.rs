//! `oncall chat`: a conversation in the terminal.

use super::args::{ModelArgs, SamplingArgs};
use super::figures::Figures;
use super::run::answer;
use super::{Failure, output, unreadable};
use crate::engine::{Account, Engine, Finish, Session};
use crate::gguf::{PartFile, WriteError};
use crate::session::template::{ChatTemplate, Message};
use clap::Args;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

/// Flags of `chat`.
#[derive(Args)]
#[command(
    after_help = "In the chat: \"\"\" begins and ends a text of several lines, or one that begins with /; /help lists the commands; \
Ctrl-C stops the answer, Ctrl-D leaves. If the standard input isn't a terminal it is one message, and only the \
answer is printed."
)]
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
/set NAME VALUE       a sampling parameter (temp, top-k, top-p, min-p, seed,
                      predict, ...) or system TEXT; seed, predict and system
                      without a value are as if they had never been set
/save FILE            write the conversation to a file; ~ is your home
/load FILE            go on with a conversation from a file
/clear                forget the conversation
/stats                where the last answer's time went
/bye                  leave, as Ctrl-D, /quit and /exit do
\"\"\"                   begin and end a text of several lines, or one that begins
                      with /
";

struct Chat {
    engine: Engine,
    session: Session,
    template: Option<ChatTemplate>,
    /// What was said, for the template; without one the session's tokens are all there is.
    messages: Vec<Message>,
    /// What the engine did up to the last figures.
    told: Account,
    /// Of the last answer.
    figures: Option<Figures>,
    sampling: SamplingArgs,
}

pub(super) fn run(a: ChatArgs) -> Result<(), Failure> {
    let piped = if std::io::stdin().is_terminal() { None } else { Some(piped_message()?) };
    let engine = a.model.load()?;
    let template = engine.chat_template()?;
    if template.is_none() && a.system.is_some() {
        return Err(Failure::usage("--system needs a model with a chat template, which this one doesn't have"));
    }
    let messages = a.system.iter().map(|s| Message::new("system", s.as_str())).collect();
    let session = engine.session();
    let mut chat =
        Chat { engine, session, template, messages, told: Account::default(), figures: None, sampling: a.sampling };
    if let Some(message) = piped {
        chat.turn(&message, &mut output::text)?;
        return if output::stopped() { Err(Failure::interrupted()) } else { Ok(()) };
    }
    output::note(&format!("{}: /help lists the commands, Ctrl-D leaves", a.model.name()));
    if chat.template.is_none() {
        output::note("this model has no chat template: it goes on with the text that you type");
    }
    chat.talk()
}

/// The one message, if the standard input isn't a terminal.
fn piped_message() -> Result<String, Failure> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|e| Failure::new(format!("reading the message from the standard input: {e}")))?;
    Ok(text.trim_end_matches('\n').into())
}

impl Chat {
    /// Reads messages and commands until Ctrl-D.
    fn talk(&mut self) -> Result<(), Failure> {
        let mut editor = DefaultEditor::new()?;
        loop {
            let typed = match read_typed(&mut |prompt| editor.readline(prompt)) {
                Ok(typed) => typed,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            if typed.text().trim().is_empty() {
                continue;
            }
            editor.add_history_entry(typed.again())?;
            output::start_over();
            let message = match &typed {
                Typed::Line(line) if is_bye(line) => return Ok(()),
                Typed::Line(line) if line.trim().starts_with('/') => {
                    match self.command(&line.trim()[1..]) {
                        Ok(done) => output::note(&done),
                        Err(why) => output::note(&format!("not done: {why}")),
                    }
                    continue;
                }
                Typed::Line(text) | Typed::Block(text) => text,
            };
            // A failed turn is told, and the chat goes on.
            match self.turn(message, &mut output::text) {
                Ok(()) => {}
                Err(f) if f.code == output::BROKEN_PIPE => return Err(f),
                Err(f) => {
                    output::note(&format!("error: {}", f.message));
                    if self.session.tokens().len() >= self.engine.n_ctx() {
                        output::note(&self.full());
                    }
                }
            }
        }
    }

    /// What to do when nothing more can be said.
    fn full(&self) -> String {
        format!(
            "the context of {} tokens is full: /save FILE keeps the conversation, /clear begins anew",
            self.engine.n_ctx()
        )
    }

    /// Sends a message and prints the answer. If that fails, or is stopped before anything was answered, the message is taken back.
    fn turn(&mut self, message: &str, print: &mut dyn FnMut(&str) -> Result<(), Failure>) -> Result<(), Failure> {
        let before = self.session.tokens().len();
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
        let params = self.sampling.params();
        let checked = self.session.check(&params).map_err(Failure::from);
        let result = checked.and_then(|()| {
            answer(&mut self.session, &tokens, &params, &mut self.told, &mut |piece| {
                text.push_str(&piece.text);
                print(&piece.text)
            })
        });
        let nothing = text.is_empty() && result.as_ref().map_or(true, |f| f.finish.is_none());
        match (&self.template, nothing) {
            (Some(_), true) => drop(self.messages.pop()),
            (Some(_), false) => self.messages.push(Message::new("assistant", text)),
            (None, true) => self.session.truncate(before),
            (None, false) => {}
        }
        let figures = result?;
        print("\n")?;
        if std::io::stdin().is_terminal() {
            output::note(&figures.line());
            if figures.finish == Some(Finish::ContextFull) {
                output::note(&self.full());
            }
            if nothing {
                output::note("stopped before the answer began: the message was taken back");
            }
        }
        self.figures = Some(figures);
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
            "stats" => {
                let figures = self.figures.as_mut().ok_or("nothing was answered yet")?;
                // The next answer wants the experts that are at hand.
                figures.stats.measure(&self.engine, false);
                Ok(figures.table())
            }
            "set" => {
                let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
                let value = value.trim();
                match name {
                    "" => return Err("it takes a name and a value".into()),
                    "system" => self.set_system(value)?,
                    _ => self.sampling.set(name, value)?,
                }
                Ok(if value.is_empty() { format!("{name} isn't set") } else { format!("{name} is {value}") })
            }
            "save" if !rest.is_empty() => {
                let file = from_home(rest)?;
                self.save(&file).map(|()| format!("saved to {}", file.display()))
            }
            "load" if !rest.is_empty() => self.load(&from_home(rest)?).map(|()| {
                let [messages, tokens] = [(self.messages.len(), "message"), (self.session.tokens().len(), "token")]
                    .map(|(n, what)| output::counted(n, what));
                format!("{messages}, {tokens}")
            }),
            "save" | "load" => Err("it takes a file".into()),
            _ => Err(format!("there is no /{name}; /help lists the commands")),
        }
    }

    fn set_system(&mut self, text: &str) -> Result<(), String> {
        if self.template.is_none() {
            return Err("this model has no chat template, so it can't be told what to be".into());
        }
        self.messages.retain(|m| m.role != "system");
        if !text.is_empty() {
            self.messages.insert(0, Message::new("system", text));
        }
        Ok(())
    }

    /// The conversation as JSON, and beside it what the model has computed of it, so that loading costs nothing.
    fn save(&mut self, path: &Path) -> Result<(), String> {
        if self.messages.is_empty() && self.session.tokens().is_empty() {
            return Err("nothing was said yet".into());
        }
        if path.exists() && saved_messages(path).is_err() {
            return Err(format!("{} isn't a saved conversation: give another name", path.display()));
        }
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
        let messages = saved_messages(path)?;
        // The pool has blocks for one context. If this fails, the tokens are there still, to be computed again.
        self.session.free_kv();
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

/// A file's name as it was typed, where no shell writes out `~`.
fn from_home(name: &str) -> Result<PathBuf, String> {
    let Some(rest) = name.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with(std::path::is_separator))
    else {
        return Ok(name.into());
    };
    let home = std::env::home_dir().filter(|home| !home.as_os_str().is_empty());
    let home = home.ok_or("nothing says where your home is: give the file's whole name, without ~")?;
    Ok(home.join(rest.trim_start_matches(std::path::is_separator)))
}

/// The messages of a conversation that was saved.
fn saved_messages(path: &Path) -> Result<Vec<Message>, String> {
    let name = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| format!("{name}: {}", unreadable(&e)))?;
    serde_json::from_str(&text).map_err(|e| format!("{name} isn't a conversation that /save wrote: {e}"))
}

/// What was typed.
#[derive(Debug, PartialEq)]
enum Typed {
    /// A message or a command.
    Line(String),
    /// What stood between two `"""`: a message, whatever it begins with.
    Block(String),
}

impl Typed {
    fn text(&self) -> &str {
        let (Typed::Line(text) | Typed::Block(text)) = self;
        text
    }

    /// How it can be typed again.
    fn again(&self) -> String {
        match self {
            Typed::Line(text) => text.trim().into(),
            Typed::Block(text) => format!("\"\"\"{text}\"\"\""),
        }
    }
}

/// Whether a line says that the chat is over.
fn is_bye(line: &str) -> bool {
    matches!(line.split_whitespace().next(), Some("/bye" | "/quit" | "/exit"))
}

/// A line, or the lines between two `"""`; `read` reads a line after a prompt. The end of the input ends a block too.
fn read_typed(read: &mut dyn FnMut(&str) -> Result<String, ReadlineError>) -> Result<Typed, ReadlineError> {
    const QUOTES: &str = "\"\"\"";
    let first = read(">>> ")?;
    let Some(rest) = first.trim_start().strip_prefix(QUOTES) else { return Ok(Typed::Line(first)) };
    let (mut text, mut line) = (String::new(), rest.to_string());
    loop {
        if let Some(last) = line.trim_end().strip_suffix(QUOTES) {
            return Ok(Typed::Block(text + last));
        }
        text += &line;
        line = match read("... ") {
            Ok(line) => line,
            Err(ReadlineError::Eof) => return Ok(Typed::Block(text)),
            Err(e) => return Err(e),
        };
        if !text.is_empty() {
            text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineOptions;
    use clap::Parser;

    #[derive(Parser)]
    struct Sampling {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn without_template() -> Chat {
        let options = EngineOptions { n_ctx: Some(64), n_threads: Some(1), ..EngineOptions::default() };
        let engine = Engine::embedded(&options).unwrap();
        let sampling = Sampling::parse_from(["chat", "-n", "5", "--temp", "0"]).sampling;
        Chat {
            session: engine.session(),
            engine,
            template: None,
            messages: Vec::new(),
            told: Account::default(),
            figures: None,
            sampling,
        }
    }

    #[test]
    fn a_chat_without_a_template_goes_on_from_what_was_said() {
        let mut chat = without_template();
        chat.turn("Once upon a time", &mut |_| Ok(())).unwrap();
        let first = chat.session.tokens().to_vec();
        assert_eq!(first.len(), chat.engine.tokenizer().encode("Once upon a time", true, false).len() + 5);
        assert!(chat.turn(&"and on ".repeat(100), &mut |_| Ok(())).is_err(), "it doesn't fit into the context");
        assert_eq!(chat.session.tokens(), first);
        chat.turn(" and", &mut |_| Ok(())).unwrap();
        assert_eq!(chat.session.tokens()[..first.len()], first);
    }

    #[test]
    fn the_last_answer_can_be_accounted_for() {
        let mut chat = without_template();
        assert!(chat.command("stats").unwrap_err().contains("nothing was answered"));
        chat.turn("Once upon a time", &mut |_| Ok(())).unwrap();
        chat.turn(" and", &mut |_| Ok(())).unwrap();
        let slots = chat.engine.n_slots();
        let table = chat.command("stats").unwrap();
        // Four of the five tokens went through the model, and so did the last answer's fifth.
        let row = |name: &str| table.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().to_string();
        assert!(row("tokens computed").ends_with(" 4"), "{table}");
        assert!(row("weights from memory").ends_with("/s") && table.contains("  of the memory's"), "{table}");
        assert!(chat.engine.n_slots() == slots, "whatever is measured, the next answer's experts stay");
    }

    #[test]
    fn what_stands_between_quotes_is_no_command() {
        let typed = |lines: &[&str]| {
            let mut lines = lines.iter();
            let typed = read_typed(&mut |_| lines.next().map(|l| l.to_string()).ok_or(ReadlineError::Eof)).unwrap();
            assert_eq!(lines.next(), None);
            typed
        };
        let block = |text: &str| Typed::Block(text.into());
        assert_eq!(typed(&[" /bye "]), Typed::Line(" /bye ".into()));
        assert_eq!(typed(&["\"\"\"/bye\"\"\""]), block("/bye"));
        assert_eq!(typed(&["\"\"\"hello\"\"\" "]), block("hello"), "a blank after the end");
        assert_eq!(typed(&["\"\"\"", "a", "", " b \"\"\"  "]), block("a\n\n b "));
        assert_eq!(typed(&["  \"\"\"a", "b"]), block("a\nb"), "the end of the input ends it");
        assert!(matches!(read_typed(&mut |_| Err(ReadlineError::Eof)), Err(ReadlineError::Eof)));
        assert_eq!((block("a\nb").again(), Typed::Line(" a ".into()).again()), ("\"\"\"a\nb\"\"\"".into(), "a".into()));
        let byes = ["/bye", "/quit", " /exit", "/bye now"];
        assert!(byes.iter().all(|line| is_bye(line)) && !is_bye("/byebye") && !is_bye("bye"));
    }

    #[test]
    fn what_was_set_can_be_unset() {
        let mut chat = without_template();
        let n_predict = |chat: &Chat| chat.sampling.params().n_predict;
        assert_eq!(n_predict(&chat), Some(5));
        assert_eq!(chat.command("set predict"), Ok("predict isn't set".into()));
        assert_eq!(n_predict(&chat), None);
        assert_eq!(chat.command("set repeat-last-n 7"), Ok("repeat-last-n is 7".into()));
        assert_eq!(chat.sampling.params().sampling.repeat_last_n, 7);
        for bad in ["set", "set temp", "set repeat-last-n -7", "set nonsense"] {
            assert!(chat.command(bad).is_err(), "{bad}");
        }
        chat.template = chat.engine.chat_template().unwrap();
        chat.command("set system be brief").unwrap();
        assert_eq!(chat.messages.len(), 1);
        chat.command("set system").unwrap();
        assert!(chat.messages.is_empty());
    }

    #[test]
    fn only_a_saved_conversation_is_replaced() {
        let mut chat = without_template();
        let dir = tempfile::tempdir().unwrap();
        let (file, other) = (dir.path().join("chat.json"), dir.path().join("precious.txt"));
        std::fs::write(&other, "dear diary").unwrap();
        assert!(chat.save(&file).unwrap_err().contains("nothing was said") && !file.exists());
        chat.turn("Once upon a time", &mut |_| Ok(())).unwrap();
        assert!(chat.save(&other).unwrap_err().contains("another name"));
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "dear diary");
        assert!(chat.load(&other).unwrap_err().contains("/save"));
        (0..2).for_each(|_| chat.save(&file).unwrap());
    }

    /// The pool has blocks for one context, of which the conversation takes more than half.
    #[test]
    fn a_saved_chat_without_a_template_has_the_last_token_too() {
        let mut chat = without_template();
        chat.turn(&"Once upon a time ".repeat(10), &mut |_| Ok(())).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("chat.json");
        chat.save(&file).unwrap();
        let said = chat.session.tokens().to_vec();
        chat.load(&file).unwrap();
        assert_eq!(chat.session.tokens(), said);
        assert_eq!(chat.session.n_computed(), said.len() - 1, "nothing is read again");
        std::fs::write(dir.path().join("chat.json.kv"), "damaged").unwrap();
        assert!(chat.load(&file).is_err());
        assert_eq!(chat.session.tokens(), said, "nothing is lost");
        chat.turn(" and", &mut |_| Ok(())).unwrap();
        assert_eq!(chat.session.tokens()[..said.len()], said);
    }
}
