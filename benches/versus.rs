//! oncall and llama.cpp on the same file, in turn: speed as a ratio, measured side by side in one run.
//!
//! `cargo bench --features llama-cpp --bench versus -- --model smolmoe` (needs clang and cmake). Both engines take the same
//! tokens; each pair of runs gives one ratio and the median counts, since machines are shared and noisy. llama.cpp runs
//! in both of its modes, plain and repacked; the better one is compared with.

#[path = "../tests/common/mod.rs"]
mod common;
mod shared;

use clap::Parser;
use common::llama::{Context, Kv, Mode, Model, Options};
use oncall::engine::{Engine, EngineOptions, Memory};
use serde::Serialize;
use shared::{median, model};
use std::path::Path;
use std::time::Instant;

/// oncall against llama.cpp, side by side.
#[derive(Parser)]
struct Args {
    /// smolmoe, smollm2, a shape of the synth example (olmoe-1b-7b, qwen3-30b-a3b, ...), or a file; may be given several times
    #[arg(long, default_values = ["smolmoe", "olmoe-1b-7b"])]
    model: Vec<String>,
    /// The mixture of formats of shapes that are made here
    #[arg(long, default_value = "q4_k_m")]
    format: String,
    /// decode or prefill [default: both]
    #[arg(long)]
    phase: Vec<String>,
    /// Threads
    #[arg(long, default_values_t = [2])]
    threads: Vec<usize>,
    /// Pairs of runs
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// cargo gives it
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Serialize)]
struct Row {
    model: String,
    format: String,
    threads: usize,
    isa: String,
    phase: String,
    /// Tokens a second, medians.
    ours: f64,
    theirs: f64,
    /// Which of llama.cpp's modes was the better one.
    their_mode: String,
    /// The median of the pairs' ratios.
    ratio: f64,
    /// Decoding: the share of the memory's bandwidth, as a plain read loop reaches it here, that the active bytes take.
    #[serde(skip_serializing_if = "Option::is_none")]
    roofline: Option<f64>,
}

const N_PREFILL: usize = 512;
const N_DECODE: usize = 48;

fn main() {
    let a = Args::parse();
    for name in &a.model {
        let path = model(name, &a.format);
        for &threads in &a.threads {
            for phase in ["decode", "prefill"] {
                if a.phase.is_empty() || a.phase.iter().any(|p| p == phase) {
                    report(&a, &compare(name, &path, threads, phase, a.pairs));
                }
            }
        }
    }
}

fn report(a: &Args, r: &Row) {
    if a.json {
        println!("{}", serde_json::to_string(r).expect("plain numbers"));
    } else {
        let roof = r.roofline.map_or(String::new(), |f| format!("  {:3.0} % of bandwidth", 100.0 * f));
        println!(
            "{:<24} {} threads {:<8} ours {:8.1}  llama.cpp {:8.1} tokens/s ({})  ratio {:5.2}{roof}",
            r.model, r.threads, r.phase, r.ours, r.theirs, r.their_mode, r.ratio
        );
    }
}

fn tokens(n: usize, n_vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % n_vocab as u64) as u32).collect()
}

/// Tokens a second of reading a prompt, or of decoding after a short one.
fn speed(phase: &str, tokens: &[u32], clear: &mut dyn FnMut(), feed: &mut dyn FnMut(&[u32])) -> f64 {
    clear();
    if phase == "prefill" {
        let began = Instant::now();
        feed(&tokens[..N_PREFILL]);
        return N_PREFILL as f64 / began.elapsed().as_secs_f64();
    }
    feed(&tokens[..16]);
    let began = Instant::now();
    tokens[16..16 + N_DECODE].iter().for_each(|t| feed(&[*t]));
    N_DECODE as f64 / began.elapsed().as_secs_f64()
}

fn ours(engine: &Engine, phase: &str, tokens: &[u32]) -> f64 {
    let session = std::cell::RefCell::new(engine.session());
    speed(phase, tokens, &mut || session.borrow_mut().truncate(0), &mut |t| {
        session.borrow_mut().feed(t, &mut |_| true).expect("the tokens fit");
    })
}

fn theirs(context: &std::cell::RefCell<Context>, phase: &str, tokens: &[u32]) -> f64 {
    speed(phase, tokens, &mut || context.borrow_mut().clear(), &mut |t| {
        context.borrow_mut().decode(t);
    })
}

fn compare(name: &str, path: &Path, threads: usize, phase: &str, pairs: usize) -> Row {
    let options = EngineOptions {
        n_ctx: Some(1024),
        n_threads: Some(threads),
        memory: Memory::Bytes(u64::MAX),
        ..EngineOptions::default()
    };
    let engine = Engine::load(path, &options, &|_, _| ()).unwrap_or_else(|e| panic!("{e}"));
    let tokens = tokens(N_PREFILL, engine.config().n_vocab);
    ours(&engine, "prefill", &tokens); // every expert is resident from here on
    let mut best: Option<(f64, f64, f64, Mode)> = None;
    for mode in [Mode::Plain, Mode::Repacked] {
        if mode == Mode::Repacked && engine.config().arch == "deepseek2" {
            continue; // llama.cpp aborts there
        }
        let options =
            Options { n_ctx: 1024, n_batch: 512, n_threads: threads as i32, kv: Kv::F16, flash_attn: true, n_seq: 1 };
        let context = std::cell::RefCell::new(Model::load(path, mode).context(options));
        theirs(&context, phase, &tokens);
        let runs: Vec<(f64, f64)> =
            (0..pairs).map(|_| (ours(&engine, phase, &tokens), theirs(&context, phase, &tokens))).collect();
        let (a, b) = (median(runs.iter().map(|r| r.0)), median(runs.iter().map(|r| r.1)));
        let ratio = median(runs.iter().map(|r| r.0 / r.1));
        if best.is_none_or(|x| ratio < x.2) {
            best = Some((a, b, ratio, mode));
        }
    }
    let (ours, theirs, ratio, mode) = best.expect("two modes");
    Row {
        model: name.into(),
        format: path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default(),
        threads,
        isa: engine.isa().to_string(),
        phase: phase.into(),
        ours,
        theirs,
        their_mode: format!("{mode:?}").to_lowercase(),
        ratio,
        roofline: (phase == "decode").then(|| ours * engine.active_bytes() as f64 / read_bandwidth(threads)),
    }
}

/// Bytes a second that threads read from memory together, by plain sums over 256 MB each: the best of five.
fn read_bandwidth(threads: usize) -> f64 {
    let data: Vec<Vec<u64>> = (0..threads).map(|i| vec![i as u64; 32 << 20]).collect();
    let once = || {
        let began = Instant::now();
        std::thread::scope(|s| {
            for d in &data {
                s.spawn(move || std::hint::black_box(d.iter().fold(0u64, |a, b| a.wrapping_add(*b))));
            }
        });
        (threads * (256 << 20)) as f64 / began.elapsed().as_secs_f64()
    };
    (0..5).map(|_| once()).fold(0.0, f64::max)
}
