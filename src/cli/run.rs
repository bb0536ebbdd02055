//! `oncall run`: continue a prompt, or answer it.

use super::args::{ModelArgs, SamplingArgs};
use super::figures::Figures;
use super::{Failure, output, unreadable};
use crate::arch::PassError;
use crate::engine::{Account, EngineError, Finish, Generation, GenerationParams, Piece, Session};
use crate::session::template::Message;
use clap::Args;
use serde::Serialize;
use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Flags of `run`.
#[derive(Args)]
pub(super) struct RunArgs {
    /// The prompt [default: the standard input, if it isn't a terminal]
    #[arg(value_name = "PROMPT")]
    prompt: Option<String>,
    /// The prompt, as in llama.cpp
    #[arg(short, long = "prompt", value_name = "TEXT", conflicts_with = "prompt")]
    prompt_flag: Option<String>,
    /// Read the prompt from a file; - for the standard input
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_flag"])]
    file: Option<PathBuf>,
    /// What the model is told to be, where it has a chat template (-sys)
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the prompt as it stands, even where the model has a chat template
    #[arg(long)]
    raw: bool,
    /// Say where the time went: computing, waiting for the disk, everything else; hits, bytes read, memory. And measure for some
    /// tenths of a second what memory and disk would give, which --json says too then
    #[arg(long)]
    stats: bool,
    /// Print one JSON object with the text and the figures instead of streaming
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub(super) fn run(a: RunArgs) -> Result<(), Failure> {
    let prompt = prompt(&a)?;
    let engine = a.model.load()?;
    engine.check_length(&prompt)?;
    let template = if a.raw { None } else { engine.chat_template()? };
    let (tokens, chat) = match &template {
        Some(t) => {
            let system = a.system.iter().map(|s| Message::new("system", s.as_str()));
            let messages: Vec<Message> = system.chain([Message::new("user", prompt.as_str())]).collect();
            (engine.chat_tokens(t, &messages)?, true)
        }
        None if a.system.is_some() => {
            return Err(Failure::usage("--system needs a model with a chat template, which this one doesn't have"));
        }
        None => (engine.tokenizer().encode(&prompt, true, true), false),
    };
    let mut session = engine.session();
    let params = a.sampling.params();
    session.check(&params)?;
    // Once it's read: it may not fit, and a progress bar can't be drawn behind it.
    let mut echo = (!chat && !a.json).then_some(&prompt);
    let mut text = String::new();
    let mut figures = answer(&mut session, &tokens, &params, &mut Account::default(), &mut |piece| {
        if a.json {
            text.push_str(&piece.text);
            return Ok(());
        }
        if let Some(prompt) = echo.take() {
            output::text(prompt)?;
        }
        output::text(&piece.text)
    })?;
    if let Some(prompt) = echo.filter(|_| !output::stopped()) {
        output::text(prompt)?;
    }
    if !a.json {
        output::text("\n")?;
    }
    if a.stats && !output::stopped() {
        figures.stats.measure(&engine, true);
    }
    if a.json {
        #[derive(Serialize)]
        struct Answer<'a> {
            model: String,
            text: &'a str,
            #[serde(flatten)]
            figures: &'a Figures,
        }
        output::json(&Answer { model: a.model.name(), text: &text, figures: &figures })?;
    } else {
        output::note(&if a.stats { figures.table() } else { figures.line() });
        if figures.finish == Some(Finish::ContextFull) {
            output::note(&format!("stopped: the context of {} tokens is full (-c takes a longer one)", engine.n_ctx()));
        }
    }
    if output::stopped() { Err(Failure::interrupted()) } else { Ok(()) }
}

/// The prompt from wherever it was given.
fn prompt(a: &RunArgs) -> Result<String, Failure> {
    if let Some(p) = a.prompt.as_ref().or(a.prompt_flag.as_ref()) {
        return Ok(p.clone());
    }
    let dash = a.file.as_deref().is_some_and(|path| path == Path::new("-"));
    if let Some(path) = a.file.as_ref().filter(|_| !dash) {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|e| Failure::new(format!("{name}: {}", unreadable(&e))))?;
        return read_prompt(file, &name);
    }
    // Who asks for it by its name may type a prompt.
    if std::io::stdin().is_terminal() && !dash {
        return Err(Failure::usage(
            "there is no prompt: give one as an argument, with -f FILE or on the standard input; \
             to talk, use `oncall chat`",
        ));
    }
    read_prompt(std::io::stdin(), "the standard input")
}

/// More than the longest contexts hold, and little beside a model.
const MAX_PROMPT: u64 = 16 << 20;

/// A text as a file or a pipe has it: the last newline isn't part of it.
fn read_prompt(from: impl Read, name: &str) -> Result<String, Failure> {
    let fail = |why: &dyn std::fmt::Display| Failure::new(format!("{name}: {why}"));
    let mut bytes = Vec::new();
    from.take(MAX_PROMPT + 1).read_to_end(&mut bytes).map_err(|e| fail(&unreadable(&e)))?;
    if bytes.len() as u64 > MAX_PROMPT {
        return Err(fail(&format!("a prompt of more than {} MiB fits no context; shorten it", MAX_PROMPT >> 20)));
    }
    let mut text = String::from_utf8(bytes).map_err(|_| fail(&unreadable(&ErrorKind::InvalidData.into())))?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// Reads `tokens` (what the session has of them already is kept) and writes on, handing out text as it comes, until
/// the end or Ctrl-C. The figures are of what the engine did since it was `told` of last.
pub(super) fn answer(
    session: &mut Session,
    tokens: &[u32],
    params: &GenerationParams,
    told: &mut Account,
    each: &mut dyn FnMut(&Piece) -> Result<(), Failure>,
) -> Result<Figures, Failure> {
    let engine = session.engine().clone();
    let bar = output::bar("reading the prompt", "tokens");
    bar.set_length(tokens.len() as u64);
    let began = Instant::now();
    let kept = session.feed_from_common(tokens, &mut |done| {
        bar.set_position(done as u64);
        !output::stopped()
    })?;
    bar.finish_and_clear();
    let prefill = began.elapsed();
    let mut figures = Figures::new(session.tokens().len() - kept, prefill);
    if !output::stopped() {
        write(session, params, each, &mut figures)?;
    }
    let account = engine.account();
    figures.of_engine(&engine, account.since(told));
    *told = account;
    Ok(figures)
}

fn write(
    session: &mut Session,
    params: &GenerationParams,
    each: &mut dyn FnMut(&Piece) -> Result<(), Failure>,
    figures: &mut Figures,
) -> Result<(), Failure> {
    let before = session.n_computed();
    let mut g = Generation::new(session, params.clone())?;
    let mut spent = Duration::ZERO;
    while !output::stopped() {
        let began = Instant::now();
        let piece = g.next();
        spent += began.elapsed();
        let piece = match piece {
            Err(EngineError::Pass(PassError::Stopped)) => break,
            piece => piece?,
        };
        figures.seed = Some(g.seed());
        let Some(piece) = piece else { break };
        each(&piece)?;
    }
    (figures.n_written, figures.decode_s, figures.finish) = (g.n_written(), spent.as_secs_f64(), g.finish());
    figures.n_decoded = session.n_computed() - before;
    Ok(())
}
