//! `oncall run`: continue a prompt, or answer it.

use super::args::{ModelArgs, SamplingArgs};
use super::figures::{Figures, ProcessFigures};
use super::{Failure, output};
use crate::engine::{Generation, GenerationParams, Piece, Session};
use crate::session::template::Message;
use clap::Args;
use serde::Serialize;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
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
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_flag"])]
    file: Option<PathBuf>,
    /// What the model is told to be, where it has a chat template (-sys)
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the prompt as it stands, even where the model has a chat template
    #[arg(long)]
    raw: bool,
    /// Say where the time went: computing, waiting for the disk, everything else; hits, bytes read, memory
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
    output::catch_ctrl_c();
    let engine = a.model.load()?;
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
    if !chat && !a.json {
        output::text(&prompt)?;
    }
    let mut text = String::new();
    let figures = answer(&mut session, &tokens, &params, &mut |piece| {
        if a.json {
            text.push_str(&piece.text);
            return Ok(());
        }
        output::text(&piece.text)
    })?;
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
        output::text("\n")?;
        output::note(if a.stats { figures.table() } else { figures.line() }.trim_end());
    }
    if output::stopped() { Err(Failure::interrupted()) } else { Ok(()) }
}

/// The prompt from wherever it was given.
fn prompt(a: &RunArgs) -> Result<String, Failure> {
    if let Some(p) = a.prompt.as_ref().or(a.prompt_flag.as_ref()) {
        return Ok(p.clone());
    }
    if let Some(path) = &a.file {
        let text = std::fs::read_to_string(path).map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
        return Ok(without_last_newline(text));
    }
    if std::io::stdin().is_terminal() {
        return Err(Failure::usage(
            "there is no prompt: give one as an argument, with -f FILE or on the standard input; \
             to talk, use `oncall chat`",
        ));
    }
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|e| Failure::new(format!("reading the prompt from the standard input: {e}")))?;
    Ok(without_last_newline(text))
}

/// A text as a file or a pipe ends it: the last newline isn't part of it.
fn without_last_newline(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

/// Reads `tokens` (what the session has of them already is kept) and writes on, handing out text as it comes, until
/// the end or Ctrl-C.
pub(super) fn answer(
    session: &mut Session,
    tokens: &[u32],
    params: &GenerationParams,
    each: &mut dyn FnMut(&Piece) -> Result<(), Failure>,
) -> Result<Figures, Failure> {
    let engine = session.engine().clone();
    let before = engine.account();
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
    figures.account = engine.account().since(&before);
    figures.process = ProcessFigures::now();
    Ok(figures)
}

fn write(
    session: &mut Session,
    params: &GenerationParams,
    each: &mut dyn FnMut(&Piece) -> Result<(), Failure>,
    figures: &mut Figures,
) -> Result<(), Failure> {
    let before = session.tokens().len();
    let mut g = Generation::new(session, params.clone())?;
    let mut spent = Duration::ZERO;
    while !output::stopped() {
        let began = Instant::now();
        let piece = g.next()?;
        spent += began.elapsed();
        figures.seed = Some(g.seed());
        let Some(piece) = piece else { break };
        each(&piece)?;
    }
    (figures.n_written, figures.decode_s, figures.finish) = (g.n_written(), spent.as_secs_f64(), g.finish());
    figures.n_decoded = session.tokens().len() - before;
    Ok(())
}
