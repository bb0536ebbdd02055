//! oncall and llama.cpp on the same file, in turn: speed as a ratio, measured side by side in one run.
//!
//! `benches/native cargo bench --features llama-cpp --bench versus -- --model smolmoe` (needs clang and cmake). Both engines take the same
//! tokens; each pair of runs gives one ratio and the median counts, since machines are shared and noisy. llama.cpp runs
//! in both of its modes, plain and repacked; the better one is compared with. Models that aren't there are made; one that doesn't fit
//! into memory three times is loaded anew for each run, one engine at a time.

#[path = "../tests/common/mod.rs"]
mod common;
mod shared;

use clap::Parser;
use common::llama::{self, Context, Kv, Mode, Model, Options};
use oncall::cpu::{Pages, memory};
use oncall::engine::{Engine, EngineOptions, Memory, Session};
use oncall::gguf::Tensor;
use oncall::ops::matmul::multiply_rate;
use serde::Serialize;
use shared::{median, model};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// oncall against llama.cpp, side by side.
#[derive(Parser)]
struct Args {
    /// smolmoe, smollm2, a shape of the synth example (olmoe-1b-7b, qwen3-30b-a3b, ...), or a file
    #[arg(long, value_delimiter = ',', default_values = ["smolmoe", "olmoe-1b-7b"])]
    model: Vec<String>,
    /// Mixtures of formats of the models that are made here [default: q4_0 for smolmoe, q4_1 for smollm2, else q4_k_m]
    #[arg(long, value_delimiter = ',')]
    format: Vec<String>,
    /// decode or prefill [default: both]
    #[arg(long, value_delimiter = ',', value_parser = ["decode", "prefill"])]
    phase: Vec<String>,
    /// Threads
    #[arg(long, value_delimiter = ',', default_values_t = [2])]
    threads: Vec<usize>,
    /// Tokens in the context when decoding begins
    #[arg(long, value_delimiter = ',', default_values_t = [16])]
    depth: Vec<usize>,
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
    phase: &'static str,
    /// Tokens in the context at the beginning.
    depth: usize,
    /// Tokens a second, medians.
    ours: f64,
    theirs: f64,
    /// Which of llama.cpp's modes was the better one.
    their_mode: String,
    /// The instruction sets that llama.cpp was compiled for.
    their_isa: Vec<String>,
    /// The median of the pairs' ratios.
    ratio: f64,
    /// What we reach of the machine. Decoding: the active bytes against what a plain read loop gets from memory. Prefill: the
    /// weights' multiplications and additions against a loop on registers. Both loops run here, on as many threads.
    roofline: f64,
}

const N_PREFILL: usize = 512;
const N_DECODE: usize = 48;

/// What is measured.
#[derive(Clone, Copy)]
enum Phase {
    /// Writing after so many tokens.
    Decode(usize),
    Prefill,
}

impl Phase {
    fn name(self) -> &'static str {
        if matches!(self, Phase::Prefill) { "prefill" } else { "decode" }
    }

    fn depth(self) -> usize {
        if let Phase::Decode(depth) = self { depth } else { 0 }
    }

    fn n_tokens(self) -> usize {
        if matches!(self, Phase::Prefill) { N_PREFILL } else { self.depth() + N_DECODE }
    }
}

fn main() {
    let a = Args::parse();
    let wanted = |name: &str| a.phase.is_empty() || a.phase.iter().any(|p| p == name);
    let mut phases: Vec<Phase> = a.depth.iter().map(|d| Phase::Decode(*d)).filter(|_| wanted("decode")).collect();
    phases.extend(wanted("prefill").then_some(Phase::Prefill));
    let mut limits = Limits::default();
    for name in &a.model {
        let own = [default_format(name).to_owned()];
        for format in if a.format.is_empty() { &own[..] } else { &a.format[..] } {
            let path = model(name, format);
            for &threads in &a.threads {
                for &phase in &phases {
                    let row = Compared { name, format, path: &path, threads, phase, pairs: a.pairs }.run(&mut limits);
                    report(a.json, &row);
                }
            }
        }
    }
}

fn report(json: bool, r: &Row) {
    if json {
        println!("{}", serde_json::to_string(r).expect("plain numbers"));
        return;
    }
    let phase = if r.depth > 0 { format!("{} at {}", r.phase, r.depth) } else { r.phase.into() };
    let limit = if r.phase == "prefill" { "multiply rate" } else { "bandwidth" };
    println!(
        "{:<14} {:<7} {} threads {phase:<15} ours {:8.1}  llama.cpp {:8.1} tokens/s ({:<8})  ratio {:5.2}  {:3.0} % of {limit}",
        r.model,
        r.format,
        r.threads,
        r.ours,
        r.theirs,
        r.their_mode,
        r.ratio,
        100.0 * r.roofline
    );
}

fn default_format(model: &str) -> &'static str {
    match model {
        "smolmoe" => "q4_0",
        "smollm2" => "q4_1",
        _ => "q4_k_m",
    }
}

fn tokens(n: usize, n_vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % n_vocab as u64) as u32).collect()
}

/// An engine with a timeline.
trait Side {
    /// Keeps the first tokens of the timeline.
    fn truncate(&mut self, len: usize);
    fn feed(&mut self, tokens: &[u32]);
}

impl Side for Session {
    fn truncate(&mut self, len: usize) {
        Session::truncate(self, len);
    }
    fn feed(&mut self, tokens: &[u32]) {
        Session::feed(self, tokens, &mut |_| true).expect("the tokens fit");
    }
}

impl Side for Context {
    fn truncate(&mut self, len: usize) {
        Context::truncate(self, len);
    }
    fn feed(&mut self, tokens: &[u32]) {
        self.decode(tokens);
    }
}

/// Tokens a second. The timeline holds the tokens before, so that a deep context is read only once.
fn speed(phase: Phase, tokens: &[u32], side: &mut impl Side) -> f64 {
    side.truncate(phase.depth());
    let new = &tokens[phase.depth()..];
    let began = Instant::now();
    match phase {
        Phase::Prefill => side.feed(new),
        Phase::Decode(_) => new.iter().for_each(|t| side.feed(&[*t])),
    }
    new.len() as f64 / began.elapsed().as_secs_f64()
}

/// One of the two engines: loaded when its turn comes, and dropped after it where both don't fit into memory.
struct Turns<S, L> {
    load: L,
    loaded: Option<S>,
    keep: bool,
}

impl<S: Side, L: Fn() -> S> Turns<S, L> {
    fn speed(&mut self, phase: Phase, tokens: &[u32]) -> f64 {
        let side = self.loaded.get_or_insert_with(|| {
            let mut side = (self.load)();
            side.feed(&tokens[..phase.depth()]);
            // Every expert that these tokens need is resident after it.
            speed(phase, tokens, &mut side);
            side
        });
        let rate = speed(phase, tokens, side);
        if !self.keep {
            self.loaded = None;
        }
        rate
    }
}

/// Runs it in a thread of its own. llama.cpp sets up AMX's tiles once a thread and dies of an illegal instruction where oncall has released
/// them since.
fn apart<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|s| s.spawn(run).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A model, and what is measured of it.
struct Compared<'a> {
    name: &'a str,
    format: &'a str,
    path: &'a Path,
    threads: usize,
    phase: Phase,
    pairs: usize,
}

impl Compared<'_> {
    fn run(&self, limits: &mut Limits) -> Row {
        let engine = self.engine();
        llama::require(engine.isa());
        let phase = self.phase;
        let tokens = tokens(phase.n_tokens(), engine.config().n_vocab);
        let per_token = match phase {
            Phase::Decode(_) => engine.active_bytes() as f64 / limits.read(self.threads),
            Phase::Prefill => active_ops(&engine) / limits.multiply(self.threads, &engine),
        };
        let isa = engine.isa().to_string();
        let can_repack = engine.config().arch != "deepseek2"; // llama.cpp aborts there
        drop(engine);

        // Ours, llama.cpp's map of the file, and its second copy.
        let size = std::fs::metadata(self.path).expect("the model's file").len();
        let keep = memory::available().is_none_or(|a| a >= 3 * size);
        let mut ours = Turns { load: || self.engine().session(), loaded: None, keep };
        let modes = [Mode::Plain, Mode::Repacked].into_iter().filter(|m| *m == Mode::Plain || can_repack);
        let compared = modes.map(|mode| {
            let mut theirs = Turns { load: || self.context(mode), loaded: None, keep };
            let pair = |_| (apart(|| ours.speed(phase, &tokens)), theirs.speed(phase, &tokens));
            let runs: Vec<(f64, f64)> = (0..self.pairs).map(pair).collect();
            let median_of = |f: fn(&(f64, f64)) -> f64| median(runs.iter().map(f));
            (median_of(|r| r.0), median_of(|r| r.1), median_of(|r| r.0 / r.1), mode)
        });
        let (ours, theirs, ratio, mode) = compared.min_by(|a, b| a.2.total_cmp(&b.2)).expect("a mode");
        Row {
            model: self.name.into(),
            format: self.format.into(),
            threads: self.threads,
            isa,
            phase: phase.name(),
            depth: phase.depth(),
            ours,
            theirs,
            their_mode: format!("{mode:?}").to_lowercase(),
            their_isa: llama::instruction_sets(),
            ratio,
            roofline: ours * per_token,
        }
    }

    fn n_ctx(&self) -> usize {
        self.phase.n_tokens().next_multiple_of(1024)
    }

    fn engine(&self) -> Engine {
        let options = EngineOptions {
            n_ctx: Some(self.n_ctx()),
            n_threads: Some(self.threads),
            memory: Memory::Bytes(u64::MAX),
            ..EngineOptions::default()
        };
        Engine::load(self.path, &options, &|_, _| ()).unwrap_or_else(|e| panic!("{e}"))
    }

    fn context(&self, mode: Mode) -> Context {
        let (n_ctx, n_threads) = (self.n_ctx() as u32, self.threads as i32);
        let options = Options { n_ctx, n_batch: 512, n_threads, kv: Kv::F16, flash_attn: true, n_seq: 1 };
        Model::load(self.path, mode).context(options)
    }
}

/// Multiplications and additions with weights that a token of a prompt needs; its logits aren't wanted.
fn active_ops(engine: &Engine) -> f64 {
    let used = engine.config().moe.as_ref().map_or(1.0, |m| m.router.n_expert_used as f64 / m.router.n_expert as f64);
    let ops = |t: &Tensor| {
        let once = 2.0 * t.shape().iter().product::<u64>() as f64;
        if t.name.contains("_exps.") { once * used } else { once }
    };
    let matrix =
        |t: &&Tensor| t.shape().len() > 1 && !t.name.starts_with("token_embd") && !t.name.starts_with("output");
    engine.gguf().tensors().iter().filter(matrix).map(ops).sum()
}

/// What so many threads reach together, measured once.
#[derive(Default)]
struct Limits {
    read: BTreeMap<usize, f64>,
    multiply: BTreeMap<usize, f64>,
}

impl Limits {
    /// Bytes a second from memory, by plain sums over 256 MiB in huge pages for each thread: the best of five.
    fn read(&mut self, threads: usize) -> f64 {
        *self.read.entry(threads).or_insert_with(|| {
            let data: Vec<Pages> = (0..threads)
                .map(|i| {
                    let mut pages = Pages::new(256 << 20).expect("memory");
                    pages.fill(i as u8 + 1); // untouched, all of it would be the one page of zeros
                    pages
                })
                .collect();
            let sum = |d: &Pages| d.as_chunks().0.iter().fold(0u64, |a, b| a.wrapping_add(u64::from_le_bytes(*b)));
            let once = || {
                let began = Instant::now();
                std::thread::scope(|s| data.iter().for_each(|d| drop(s.spawn(move || std::hint::black_box(sum(d))))));
                (threads * (256 << 20)) as f64 / began.elapsed().as_secs_f64()
            };
            (0..5).map(|_| once()).fold(0.0, f64::max)
        })
    }

    /// Operations a second on registers.
    fn multiply(&mut self, threads: usize, engine: &Engine) -> f64 {
        let isa = engine.isa();
        *self.multiply.entry(threads).or_insert_with(|| {
            let once = move || multiply_rate(isa, Duration::from_millis(300));
            let running: Vec<_> = (0..threads).map(|_| std::thread::spawn(once)).collect();
            running.into_iter().map(|t| t.join().expect("a loop")).sum()
        })
    }
}
