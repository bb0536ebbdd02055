//! Many sequences against one, in the same budget; and against llama.cpp's parallel sequences.
//!
//! `cargo bench --bench batch -- --model smolmoe --sequences 32`; with `--features llama-cpp` (clang, cmake) beside llama.cpp's
//! own batched decoding. `--budget 25%` pages: of the file's size, for everything. Runs alternate and medians count, since
//! machines are shared and noisy.

#[cfg(feature = "llama-cpp")]
#[path = "../tests/common/mod.rs"]
mod common;
mod shared;

use clap::Parser;
use oncall::engine::{Engine, EngineOptions, GenerationParams, Memory, Queue, Request};
use oncall::session::sampler::SamplingParams;
use serde::Serialize;
use shared::{median, model};
use std::path::Path;
use std::time::Instant;

/// Many sequences against one, and against llama.cpp's.
#[derive(Parser)]
struct Args {
    /// smolmoe, smollm2, a shape of the synth example, or a file; may be given several times
    #[arg(long, default_values = ["smolmoe"], value_delimiter = ',')]
    model: Vec<String>,
    /// The mixture of formats of shapes that are made here
    #[arg(long, default_value = "q4_k_m")]
    format: String,
    /// Memory for everything, in percent of the file, or `all` for as much as it takes
    #[arg(long, default_values = ["all"], value_delimiter = ',')]
    budget: Vec<String>,
    /// Sequences together
    #[arg(long, default_values_t = [32], value_delimiter = ',')]
    sequences: Vec<usize>,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Tokens that each sequence writes
    #[arg(long, default_value_t = 32)]
    predict: usize,
    /// Runs of each
    #[arg(long, default_value_t = 3)]
    runs: usize,
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
    budget: String,
    sequences: usize,
    /// Tokens a second of all sequences together.
    ours: f64,
    /// Of a single one in the same budget.
    single: f64,
    /// llama.cpp's of all together, in the better of its modes; only with everything in memory.
    theirs: Option<f64>,
    /// The median of `ours` over `single`.
    ratio: f64,
    /// The share of max(compute, disk) that was reached: compute as in the same run with everything in memory, disk as the missed
    /// bytes over the rate of direct reads. Only for a budget that pages.
    bound: Option<f64>,
    hit_rate: Option<f64>,
    mb_per_token: Option<f64>,
    /// The most memory that the process has held up to here.
    peak_mib: u64,
}

/// Tokens of a prompt: few, since decoding is what's measured.
const N_PROMPT: usize = 16;

fn main() {
    let a = Args::parse();
    for name in &a.model {
        let path = model(name, &a.format);
        for &n in &a.sequences {
            let mut resident = None;
            for budget in &a.budget {
                let row = measure(&a, name, &path, budget, n, &mut resident);
                if a.json {
                    println!("{}", serde_json::to_string(&row).expect("plain numbers"));
                } else {
                    let theirs = row.theirs.map_or(String::new(), |t| format!("  llama.cpp {t:.1}"));
                    let bound = row.bound.map_or(String::new(), |b| format!("  {:.0} % of the bound", 100.0 * b));
                    println!(
                        "{:<16} {:>5} {:>3} sequences  ours {:8.1}  one {:7.1} tokens/s  ratio {:5.2}{theirs}{bound}",
                        row.model, row.budget, n, row.ours, row.single, row.ratio
                    );
                }
            }
        }
    }
}

fn load(path: &Path, threads: usize, n: usize, memory: Memory) -> Engine {
    let options =
        EngineOptions { n_ctx: Some(256), n_sessions: n, n_threads: Some(threads), memory, ..EngineOptions::default() };
    Engine::load(path, &options, &|_, _| ()).unwrap_or_else(|e| panic!("{e}"))
}

/// A prompt that differs for each sequence and run, so that nothing is shared and experts are chosen anew.
fn prompt(engine: &Engine, seed: usize) -> Vec<u32> {
    let n_vocab = engine.config().n_vocab as u64;
    let number = |i: usize| ((seed * 1000 + i) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    (0..N_PROMPT).map(|i| (number(i) % n_vocab) as u32).collect()
}

/// Tokens a second while `n` sequences write, from when all have begun.
fn decode(engine: &Engine, n: usize, predict: usize, seed: usize) -> f64 {
    let queue = Queue::new(engine, n);
    for i in 0..n {
        let sampling = SamplingParams { temp: 0.0, ..SamplingParams::default() };
        let params =
            GenerationParams { sampling, n_predict: Some(predict), ignore_eos: true, ..GenerationParams::default() };
        let request = Request { prompt: prompt(engine, seed * n + i), params, priority: 0 };
        queue.submit(request, |_| ()).expect("the request fits");
    }
    while queue.stats().n_written < n as u64 {
        queue.step();
    }
    let (first, began) = (queue.stats().n_written, Instant::now());
    queue.drive();
    (queue.stats().n_written - first) as f64 / began.elapsed().as_secs_f64()
}

fn measure(a: &Args, name: &str, path: &Path, budget: &str, n: usize, resident: &mut Option<f64>) -> Row {
    let file = std::fs::metadata(path).expect("the model's file").len();
    let percent: Option<f64> = (budget != "all").then(|| budget.trim_end_matches('%').parse().expect("a percentage"));
    let memory = Memory::Bytes(percent.map_or(u64::MAX, |p| (p / 100.0 * file as f64) as u64));
    if percent.is_some() && resident.is_none() {
        let engine = load(path, a.threads, n, Memory::Bytes(u64::MAX));
        decode(&engine, n, a.predict, 0);
        *resident = Some(median((1..=a.runs).map(|i| decode(&engine, n, a.predict, i))));
    }
    let engine = load(path, a.threads, n, memory);
    decode(&engine, n, a.predict, 0);
    let mut reference = reference(a, path, n, percent);
    let (mut ours, mut single, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    let (mut uses, mut hits, mut bytes) = (0, 0, 0);
    for i in 1..=a.runs {
        single.push(decode(&engine, 1, a.predict, i));
        let before = engine.account();
        ours.push(decode(&engine, n, a.predict, i));
        let done = engine.account().since(&before);
        let store = done.prefill.store.and(&done.decode.store);
        (uses, hits, bytes) = (uses + store.uses, hits + store.hits, bytes + store.bytes_read());
        theirs.extend(reference());
    }
    let rate = median(ours.iter().copied());
    if percent.is_none() {
        *resident = Some(rate);
    }
    let a_token = bytes as f64 / (a.runs * n * (a.predict + N_PROMPT)) as f64;
    let bound = percent.zip(*resident).map(|(_, r)| rate * (1.0 / r).max(a_token / disk_rate(path, file)));
    Row {
        model: name.into(),
        format: path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default(),
        budget: budget.into(),
        sequences: n,
        ours: rate,
        single: median(single.iter().copied()),
        theirs: (!theirs.is_empty()).then(|| median(theirs.into_iter())),
        ratio: median(ours.iter().zip(&single).map(|(o, s)| o / s)),
        bound,
        hit_rate: (uses > 0).then(|| hits as f64 / uses as f64),
        mb_per_token: (uses > 0).then_some(a_token / 1e6),
        peak_mib: peak_mib(),
    }
}

/// llama.cpp's rate for the same work, in the better of its two modes; nothing when it can't be compared with.
#[cfg(feature = "llama-cpp")]
fn reference(a: &Args, path: &Path, n: usize, percent: Option<f64>) -> Box<dyn FnMut() -> Option<f64>> {
    use common::llama::{Kv, Mode, Model, Options};
    if percent.is_some() {
        return Box::new(|| None);
    }
    let (predict, threads) = (a.predict, a.threads as i32);
    let options = Options {
        n_ctx: (n * 256) as u32,
        n_batch: 512,
        n_threads: threads,
        kv: Kv::F16,
        flash_attn: true,
        n_seq: n as u32,
    };
    let arch = oncall::gguf::Gguf::open(path)
        .ok()
        .and_then(|g| g.metadata().str("general.architecture").ok().flatten().map(String::from));
    let run = move |model: &Model| {
        let mut context = model.context(options);
        let mut tokens: Vec<u32> = (0..n as u32).map(|i| 300 + i * 17).collect();
        for pos in 0..N_PROMPT {
            tokens = context.decode_together(&tokens, pos);
        }
        let began = Instant::now();
        for pos in N_PROMPT..N_PROMPT + predict - 1 {
            tokens = context.decode_together(&tokens, pos);
        }
        (n * (predict - 1)) as f64 / began.elapsed().as_secs_f64()
    };
    // The repacked mode aborts on deepseek2.
    let modes =
        [Mode::Plain, Mode::Repacked].into_iter().filter(|m| *m == Mode::Plain || arch.as_deref() != Some("deepseek2"));
    let tried = modes.map(|m| Model::load(path, m)).map(|m| (run(&m), m));
    let best = tried.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, m)| m);
    Box::new(move || best.as_ref().map(&run))
}

#[cfg(not(feature = "llama-cpp"))]
fn reference(_: &Args, _: &Path, _: usize, _: Option<f64>) -> Box<dyn FnMut() -> Option<f64>> {
    Box::new(|| None)
}

/// Bytes a second of direct reads of 2 MiB at places all over the file, four at a time.
#[cfg(target_os = "linux")]
fn disk_rate(path: &Path, file: u64) -> f64 {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    const SIZE: usize = 2 << 20;
    const READS: u64 = 24;
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let input = std::fs::OpenOptions::new().read(true).custom_flags(direct).open(path).expect("direct reads");
    let places = (file / SIZE as u64).max(1);
    let began = Instant::now();
    std::thread::scope(|s| {
        for lane in 0..4 {
            let input = &input;
            s.spawn(move || {
                let mut buffer = vec![0u8; SIZE + 4096];
                let start = buffer.as_ptr().align_offset(4096);
                for i in 0..READS {
                    let place = (lane * READS + i).wrapping_mul(0x9e37_79b9_7f4a_7c15) % places;
                    input.read_at(&mut buffer[start..start + SIZE], place * SIZE as u64).expect("direct reads");
                }
            });
        }
    });
    (4 * READS) as f64 * SIZE as f64 / began.elapsed().as_secs_f64()
}

#[cfg(not(target_os = "linux"))]
fn disk_rate(_: &Path, _: u64) -> f64 {
    f64::NAN
}

fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
