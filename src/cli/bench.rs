//! `oncall bench`: how fast prompts are read and texts are written.

use super::args::ModelArgs;
use super::figures::{Stats, losses, percent, rate};
use super::{Failure, output};
use crate::engine::{Engine, EngineError, Input, Session, Want};
use crate::gguf::printable;
use crate::moe::Losses;
use clap::Args;
use serde::Serialize;
use std::time::Instant;

/// Flags of `bench`.
#[derive(Args)]
#[command(
    after_help = "pp512 is reading a prompt of 512 tokens, tg128 writing 128 tokens, tg128 @ d8192 writing them when 8192 are in the \
context already; in tokens a second. GB/s are over the active bytes: the weights that one token must read; beside them the share of the rate \
at which all threads read memory here, measured at the beginning.",
    mut_arg("no_heat", |a| a.hide(true)),
    mut_arg("ctx_size", |a| a.help("Context in tokens; 0 for the model's own [default: what the longest test needs]"))
)]
pub(super) struct BenchArgs {
    /// Lengths of prompts to read
    #[arg(short = 'p', long = "prompt", value_name = "N", value_delimiter = ',', default_value = "512")]
    n_prompt: Vec<u32>,
    /// Numbers of tokens to write
    #[arg(short = 'n', long = "predict", value_name = "N", value_delimiter = ',', default_value = "128")]
    n_predict: Vec<u32>,
    /// Numbers of tokens in the context when the writing begins
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "0")]
    depth: Vec<u32>,
    /// Runs of each, after one that isn't counted
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repetitions: u32,
    /// Say below each row where the time went and what was reached of the machine's limits, as `run --stats` does
    #[arg(long)]
    stats: bool,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Serialize)]
struct Row {
    model: String,
    bytes: u64,
    isa: String,
    threads: usize,
    test: String,
    tokens_per_s: f64,
    deviation: f64,
    /// Weight bytes that one token must read, times tokens a second: only where each token reads them for itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    gb_per_s: Option<f64>,
    /// In all runs, also the one that isn't counted.
    #[serde(flatten)]
    losses: Losses,
    #[serde(flatten)]
    stats: Stats,
}

/// What is measured in one row of the table.
#[derive(Clone, Copy)]
enum Test {
    Read { n: usize },
    Write { n: usize, depth: usize },
}

impl Test {
    /// Tokens in the context in the end.
    fn n_ctx(self) -> usize {
        match self {
            Test::Read { n } => n,
            Test::Write { n, depth } => depth + n,
        }
    }

    /// Tokens that are measured.
    fn n(self) -> usize {
        match self {
            Test::Read { n } | Test::Write { n, .. } => n,
        }
    }
}

impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Test::Read { n } => write!(f, "pp{n}"),
            Test::Write { n, depth: 0 } => write!(f, "tg{n}"),
            Test::Write { n, depth } => write!(f, "tg{n} @ d{depth}"),
        }
    }
}

/// The rows, in their order.
fn tests(a: &BenchArgs) -> Vec<Test> {
    let mut depths = a.depth.clone();
    // The deeper after the less deep: what the context holds already is kept.
    depths.sort_unstable();
    let read = a.n_prompt.iter().map(|&n| Test::Read { n: n as usize });
    let write = depths.iter().flat_map(|&depth| {
        let at_depth = |&n: &u32| Test::Write { n: n as usize, depth: depth as usize };
        a.n_predict.iter().map(at_depth).collect::<Vec<_>>()
    });
    read.chain(write).filter(|t| t.n() > 0).collect()
}

pub(super) fn run(mut a: BenchArgs) -> Result<(), Failure> {
    let tests = tests(&a);
    let longest = tests.iter().max_by_key(|t| t.n_ctx());
    a.model.ctx_size = a.model.ctx_size.or(Some(longest.map_or(1, |t| t.n_ctx())));
    // Tokens that nobody wrote teach nothing about which experts will be wanted.
    a.model.no_heat = true;
    let engine = a.model.load()?;
    if let Some(test) = longest.filter(|t| t.n_ctx() > engine.n_ctx()) {
        return Err(Failure::usage(format!(
            "{test} needs a context of {}, -c makes it {}: leave -c out, or ask for less",
            test.n_ctx(),
            engine.n_ctx()
        )));
    }
    // Slots are empty yet, and whatever is measured disturbs no run.
    let memory = engine.measure_memory(true);
    if !a.json {
        output::text(&format!(
            "{}, {}, {}, {} active bytes a token\nmemory reads {}\n",
            printable(&a.model.name()),
            engine.isa(),
            output::counted(engine.n_threads(), "thread"),
            output::size(engine.active_bytes()),
            memory.as_ref().map_or_else(|why| format!("at a rate that isn't measured: {why}"), |r| rate(*r))
        ))?;
    }
    let mut session = engine.session();
    for test in tests {
        let row = row(&a, &mut session, test, &memory)?;
        if a.json {
            output::json(&row)?;
        } else {
            output::text(&row.line())?;
        }
        if a.stats {
            output::note(row.stats.table().trim_end());
        }
    }
    Ok(())
}

/// Runs a test; `memory` is what the threads read of it a second.
fn row(a: &BenchArgs, session: &mut Session, test: Test, memory: &Result<f64, String>) -> Result<Row, Failure> {
    let engine = session.engine().clone();
    let before = engine.account();
    let (mean, deviation) = mean_and_deviation(&rates(session, test, a.repetitions)?);
    let bytes_per_s = matches!(test, Test::Write { .. }).then_some(mean * engine.active_bytes() as f64);
    let mut stats = Stats::new(&engine, engine.account().since(&before), [None, None]);
    // The row's own rate, without the run that isn't counted.
    stats.reached.memory.bytes_per_s = bytes_per_s;
    stats.reached.memory.against(memory.clone());
    if a.stats {
        stats.measure(&engine, true);
    }
    Ok(Row {
        model: a.model.name(),
        bytes: engine.gguf().total_bytes(),
        isa: engine.isa().to_string(),
        threads: engine.n_threads(),
        test: test.to_string(),
        tokens_per_s: mean,
        deviation,
        gb_per_s: bytes_per_s.map(|b| b / 1e9),
        losses: stats.account.store().losses(),
        stats,
    })
}

impl Row {
    fn line(&self) -> String {
        let share = self.stats.reached.memory.share.map_or("?".into(), percent);
        let gb = self.gb_per_s.map_or(String::new(), |g| format!("  {g:6.2} GB/s  {share:>5} of memory's rate"));
        let lossy = losses(self.losses).map_or(String::new(), |l| format!("   {l}"));
        format!("{:<14} {:9.2} ± {:<7.2} tokens/s{gb}{lossy}\n", self.test, self.tokens_per_s, self.deviation)
    }
}

/// Tokens a second in so many runs, after one that isn't counted.
fn rates(session: &mut Session, test: Test, repetitions: u32) -> Result<Vec<f64>, Failure> {
    let mut rates = Vec::new();
    let bar = output::bar(&test.to_string(), "runs");
    bar.set_length(u64::from(repetitions) + 1);
    for _ in 0..=repetitions {
        let seconds = match test {
            Test::Read { n } => read(session, n)?,
            Test::Write { n, depth } => write(session, n, depth)?,
        };
        rates.push(test.n() as f64 / seconds);
        bar.inc(1);
        if output::stopped() {
            return Err(Failure::interrupted());
        }
    }
    bar.finish_and_clear();
    Ok(rates.split_off(1))
}

/// Tokens that differ, so that experts are used as a text would use them; the same in every run.
fn tokens(engine: &Engine, n: usize) -> Vec<u32> {
    let n_vocab = engine.config().n_vocab as u64;
    (0..n as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % n_vocab).map(|t| t as u32).collect()
}

fn read(session: &mut Session, n: usize) -> Result<f64, EngineError> {
    let tokens = tokens(session.engine(), n);
    session.truncate(0);
    let began = Instant::now();
    session.feed(&tokens, &mut |_| !output::stopped())?;
    Ok(began.elapsed().as_secs_f64())
}

/// The context isn't read anew for each run.
fn write(session: &mut Session, n: usize, depth: usize) -> Result<f64, EngineError> {
    let engine = session.engine().clone();
    let tokens = tokens(&engine, depth + n);
    session.truncate(depth);
    let held = session.tokens().len();
    session.feed(&tokens[held..depth], &mut |_| !output::stopped())?;
    let began = Instant::now();
    for t in tokens[depth..].iter().take_while(|_| !output::stopped()) {
        engine.forward(&mut [Input { session, tokens: &[*t], written: true, want: Want::Last }])?;
    }
    Ok(began.elapsed().as_secs_f64())
}

fn mean_and_deviation(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}
