//! `oncall bench`: how fast prompts are read and texts are written.

use super::args::ModelArgs;
use super::{Failure, output};
use crate::engine::{Engine, EngineError, Session};
use clap::Args;
use serde::Serialize;
use std::time::Instant;

/// Flags of `bench`.
#[derive(Args)]
#[command(
    after_help = "pp512 is reading a prompt of 512 tokens, tg128 writing 128 tokens, in tokens a second. GB/s are over \
the active bytes: the weights that one token must read."
)]
pub(super) struct BenchArgs {
    /// Lengths of prompts to read
    #[arg(short = 'p', long = "prompt", value_name = "N", value_delimiter = ',', default_value = "512")]
    n_prompt: Vec<usize>,
    /// Numbers of tokens to write
    #[arg(short = 'n', long = "predict", value_name = "N", value_delimiter = ',', default_value = "128")]
    n_predict: Vec<usize>,
    /// Tokens in the context before the writing begins
    #[arg(short = 'd', long, value_name = "N", default_value_t = 0)]
    depth: usize,
    /// Runs of each, after one that isn't counted
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repetitions: u32,
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
}

pub(super) fn run(mut a: BenchArgs) -> Result<(), Failure> {
    let longest =
        a.n_prompt.iter().copied().max().unwrap_or(0).max(a.depth + a.n_predict.iter().copied().max().unwrap_or(0));
    a.model.ctx_size = Some(a.model.ctx_size.unwrap_or(0).max(longest).max(1));
    output::catch_ctrl_c()?;
    let engine = a.model.load()?;
    let active = engine.active_bytes();
    if !a.json {
        output::text(&format!(
            "{}, {}, {} threads, {} active bytes a token\n",
            a.model.name(),
            engine.isa(),
            engine.n_threads(),
            output::size(active)
        ))?;
    }
    let tests = a.n_prompt.iter().map(|&n| (true, n)).chain(a.n_predict.iter().map(|&n| (false, n)));
    for (prompt, n) in tests.filter(|t| t.1 > 0) {
        let mut rates = Vec::new();
        let bar = output::bar(&format!("{}{n}", if prompt { "pp" } else { "tg" }), "runs");
        bar.set_length(u64::from(a.repetitions) + 1);
        for _ in 0..=a.repetitions {
            rates.push(n as f64 / if prompt { read(&engine, n)? } else { write(&engine, n, a.depth)? });
            bar.inc(1);
            if output::stopped() {
                return Err(Failure::interrupted());
            }
        }
        bar.finish_and_clear();
        let (mean, deviation) = mean_and_deviation(&rates[1..]);
        let depth = if prompt || a.depth == 0 { String::new() } else { format!(" @ d{}", a.depth) };
        let row = Row {
            model: a.model.name(),
            bytes: engine.gguf().total_bytes(),
            isa: engine.isa().to_string(),
            threads: engine.n_threads(),
            test: format!("{}{n}{depth}", if prompt { "pp" } else { "tg" }),
            tokens_per_s: mean,
            deviation,
            gb_per_s: (!prompt).then_some(mean * active as f64 / 1e9),
        };
        if a.json {
            output::json(&row)?;
        } else {
            let gb = row.gb_per_s.map_or(String::new(), |g| format!("   {g:6.2} GB/s"));
            output::text(&format!(
                "{:<14} {:9.2} ± {:<7.2} tokens/s{gb}\n",
                row.test, row.tokens_per_s, row.deviation
            ))?;
        }
    }
    Ok(())
}

/// Tokens that differ, so that experts are used as a text would use them; the same in every run.
fn tokens(engine: &Engine, n: usize) -> Vec<u32> {
    let n_vocab = engine.config().n_vocab as u64;
    (0..n as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % n_vocab).map(|t| t as u32).collect()
}

fn read(engine: &Engine, n: usize) -> Result<f64, EngineError> {
    let mut session = engine.session();
    let began = Instant::now();
    session.feed(&tokens(engine, n), &mut |_| true)?;
    Ok(began.elapsed().as_secs_f64())
}

fn write(engine: &Engine, n: usize, depth: usize) -> Result<f64, EngineError> {
    let tokens = tokens(engine, depth + n);
    let mut session: Session = engine.session();
    session.feed(&tokens[..depth], &mut |_| true)?;
    let began = Instant::now();
    for t in &tokens[depth..] {
        session.feed(&[*t], &mut |_| !output::stopped())?;
    }
    Ok(began.elapsed().as_secs_f64())
}

fn mean_and_deviation(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}
