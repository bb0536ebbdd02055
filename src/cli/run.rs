//! `oncall run`: continue a prompt, or answer it.

use super::args::{ModelArgs, SamplingArgs};
use super::{Failure, output};
use crate::engine::{Finish, Generation, GenerationParams, Session};
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
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Continue the prompt as it stands, even where the model has a chat template
    #[arg(long)]
    raw: bool,
    /// Print one JSON object with the text and the figures instead of streaming
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// What a run did, and how fast.
#[derive(Serialize)]
pub(super) struct Figures {
    /// Tokens of the prompt that were computed.
    pub n_prompt: usize,
    /// Seconds for them.
    pub prefill_s: f64,
    /// Tokens written.
    pub n_written: usize,
    /// Seconds for them.
    pub decode_s: f64,
    /// The seed that was used.
    pub seed: u64,
    /// Why it ended.
    pub finish: Option<Finish>,
    /// Shares of expert uses that were at hand; absent without experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hit_rate: Option<f64>,
    /// Bytes of experts read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_bytes_read: Option<u64>,
    /// The most memory held, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
}

impl Figures {
    /// One line for people.
    pub fn line(&self) -> String {
        let rate = |n: usize, s: f64| if s > 0.0 { n as f64 / s } else { 0.0 };
        let mut line = format!(
            "read {} tokens at {:.1}/s, wrote {} at {:.1}/s",
            self.n_prompt,
            rate(self.n_prompt, self.prefill_s),
            self.n_written,
            rate(self.n_written, self.decode_s)
        );
        if let (Some(hits), Some(bytes)) = (self.hit_rate, self.expert_bytes_read) {
            line += &format!(", experts {:.1}% at hand, {} read", 100.0 * hits, output::size(bytes));
        }
        if let Some(peak) = self.peak_memory {
            line += &format!(", {} of memory at most", output::size(peak));
        }
        line + &format!(", seed {}", self.seed)
    }
}

pub(super) fn run(a: RunArgs) -> Result<(), Failure> {
    let prompt = prompt(&a)?;
    output::catch_ctrl_c()?;
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
    if !chat && !a.json {
        output::text(&prompt)?;
    }
    let mut text = String::new();
    let figures = answer(&mut session, &tokens, &a.sampling.params(), &mut |piece| {
        if a.json {
            text.push_str(piece);
            return Ok(());
        }
        output::text(piece)
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
        output::note(&figures.line());
    }
    if output::stopped() { Err(Failure::interrupted()) } else { Ok(()) }
}

/// The prompt from wherever it was given.
fn prompt(a: &RunArgs) -> Result<String, Failure> {
    if let Some(p) = a.prompt.as_ref().or(a.prompt_flag.as_ref()) {
        return Ok(p.clone());
    }
    if let Some(path) = &a.file {
        return std::fs::read_to_string(path).map_err(|e| Failure::new(format!("{}: {e}", path.display())));
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
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_string())
}

/// Reads `tokens` (what the session has of them already is kept) and writes on, handing out text as it comes, until
/// the end or Ctrl-C.
pub(super) fn answer(
    session: &mut Session,
    tokens: &[u32],
    params: &GenerationParams,
    each: &mut dyn FnMut(&str) -> Result<(), Failure>,
) -> Result<Figures, Failure> {
    let engine = session.engine().clone();
    let before = engine.store_stats();
    let bar = output::bar("reading the prompt", "tokens");
    bar.set_length(tokens.len() as u64);
    let began = Instant::now();
    let kept = session.feed_from_common(tokens, &mut |done| {
        bar.set_position(done as u64);
        !output::stopped()
    })?;
    bar.finish_and_clear();
    let prefill = began.elapsed();
    let mut figures = Figures {
        n_prompt: session.tokens().len() - kept,
        prefill_s: prefill.as_secs_f64(),
        n_written: 0,
        decode_s: 0.0,
        seed: 0,
        finish: None,
        hit_rate: None,
        expert_bytes_read: None,
        peak_memory: None,
    };
    if !output::stopped() {
        write(session, params, each, &mut figures)?;
    }
    if let (Some(b), Some(a)) = (before, engine.store_stats()) {
        figures.hit_rate = (a.uses > b.uses).then(|| (a.hits - b.hits) as f64 / (a.uses - b.uses) as f64);
        figures.expert_bytes_read = Some(a.bytes_read - b.bytes_read);
    }
    figures.peak_memory = output::peak_memory();
    Ok(figures)
}

fn write(
    session: &mut Session,
    params: &GenerationParams,
    each: &mut dyn FnMut(&str) -> Result<(), Failure>,
    figures: &mut Figures,
) -> Result<(), Failure> {
    let mut g = Generation::new(session, params.clone())?;
    figures.seed = g.seed();
    let mut spent = Duration::ZERO;
    while !output::stopped() {
        let began = Instant::now();
        let piece = g.next()?;
        spent += began.elapsed();
        let Some(piece) = piece else { break };
        each(&piece.text)?;
    }
    (figures.n_written, figures.decode_s, figures.finish) = (g.n_written(), spent.as_secs_f64(), g.finish());
    Ok(())
}
