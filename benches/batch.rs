//! Many sequences against one, in the same budget; and against llama.cpp's parallel sequences.
//!
//! `cargo bench --bench batch -- --model smolmoe --format q4_0 --sequences 32`; after `benches/native` and with
//! `--features llama-cpp` (clang, cmake) beside llama.cpp's own batched decoding. Runs alternate and medians count, since machines are shared and noisy.
//!
//! `--budget 25%` pages: of the file's size, for everything. Then one sequence and many run in turn, each in a process of its own
//! inside a control group of the budget (root is needed) with nothing of it in the page cache, each with the memory divided as is best for it.
//!
//! `--measure schema` compares writing JSON after a schema with writing freely; `--measure prefix` sequences that begin alike
//! for a thousand tokens with others that don't.

#[path = "../tests/common/mod.rs"]
mod common;
mod shared;

use clap::{Parser, ValueEnum};
use oncall::cpu::probe::{DiskProbe, Mode};
use oncall::engine::{Engine, EngineOptions, GenerationParams, Memory, Queue, QueueStats, Request};
use oncall::ops::kv::KV_BLOCK;
use oncall::session::grammar::Grammar;
use oncall::session::sampler::SamplingParams;
use serde::{Deserialize, Serialize};
use shared::{in_group, median, model};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Many sequences against one, and against llama.cpp's.
#[derive(Parser, Clone)]
struct Args {
    /// smolmoe, smollm2, embedded, a shape of the synth example, or a file; may be given several times
    #[arg(long, default_values = ["smolmoe"], value_delimiter = ',')]
    model: Vec<String>,
    /// The mixture of formats of models that are made here
    #[arg(long, default_value = "q4_k_m")]
    format: String,
    /// What is compared
    #[arg(long, value_enum, default_value = "together")]
    measure: Measure,
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
    /// Runs so many sequences here: what the parent starts inside the control group
    #[arg(long, hide = true)]
    child: Option<usize>,
    /// The child's budget in bytes
    #[arg(long, hide = true, default_value_t = 0)]
    bytes: u64,
    /// cargo gives it
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Measure {
    /// Many sequences with one
    Together,
    /// Texts after a JSON schema with free ones
    Schema,
    /// Texts with a common beginning of a thousand tokens with others
    Prefix,
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
    /// The share of max(compute, disk) that was reached: compute as with everything in memory, disk as the bytes read
    /// over the rate of direct reads. Only for a budget that pages.
    bound: Option<f64>,
    hit_rate: Option<f64>,
    mb_per_token: Option<f64>,
    /// The most memory that the sequences together held: of their control group, or else of this process up to here.
    peak_mib: u64,
}

/// Tokens of a prompt: few, since decoding is what's measured.
const N_PROMPT: usize = 16;
/// A single sequence writes so many times more, to be measured for long enough.
const SINGLE_LONGER: usize = 4;

/// What decoding was like.
#[derive(Serialize, Deserialize, Clone, Copy, Default)]
struct Run {
    /// Tokens a second of all sequences together.
    rate: f64,
    /// Seconds of computing a token.
    compute_s: f64,
    /// The share of expert uses that were cache hits.
    hit_rate: Option<f64>,
    bytes_per_token: f64,
}

fn main() {
    let a = Args::parse();
    if let Some(n) = a.child {
        let engine = load(Path::new(&a.model[0]), &a, n, a.predict, Memory::Bytes(a.bytes));
        let run = decode(&engine, n, a.predict, 1);
        return println!("{}", serde_json::to_string(&run).expect("plain numbers"));
    }
    for name in &a.model {
        let path = (name != "embedded").then(|| model(name, &a.format));
        let path = path.as_deref().unwrap_or(Path::new("embedded"));
        for &n in &a.sequences {
            match a.measure {
                Measure::Together => a.budget.iter().for_each(|b| together(&a, name, path, b, n)),
                Measure::Schema => schema(&a, name, path, n),
                Measure::Prefix => prefix(&a, name, path, n),
            }
        }
    }
}

/// An engine with room for `n` sequences of this length, and no more.
fn load(path: &Path, a: &Args, n: usize, predict: usize, memory: Memory) -> Engine {
    let n_ctx = Some((N_PROMPT + predict).next_multiple_of(KV_BLOCK));
    let o = EngineOptions { n_ctx, n_sessions: n, n_threads: Some(a.threads), memory, ..EngineOptions::default() };
    load_with(path, &o)
}

fn load_with(path: &Path, o: &EngineOptions) -> Engine {
    let engine = if path == Path::new("embedded") { Engine::embedded(o) } else { Engine::load(path, o, &|_, _| ()) };
    engine.unwrap_or_else(|e| panic!("{e}"))
}

/// Tokens that differ for each seed, so that nothing is shared and experts are chosen anew.
fn tokens(engine: &Engine, n: usize, seed: usize) -> Vec<u32> {
    let n_vocab = engine.config().n_vocab as u64;
    let number = |i: usize| ((seed * 100_003 + i) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    (0..n).map(|i| (number(i) % n_vocab) as u32).collect()
}

/// `n` sequences write together: from when all have begun until the first has ended.
fn decode(engine: &Engine, n: usize, predict: usize, seed: usize) -> Run {
    let sampling = SamplingParams { temp: 0.0, ..SamplingParams::default() };
    write(engine, n, seed, &GenerationParams { sampling, n_predict: Some(predict), ..GenerationParams::default() })
}

/// As [`decode`], with these parameters.
fn write(engine: &Engine, n: usize, seed: usize, params: &GenerationParams) -> Run {
    let (queue, begun) = (Queue::new(engine, n), Arc::new(AtomicUsize::new(0)));
    for i in 0..n {
        let mut params = GenerationParams { ignore_eos: params.grammar.is_none(), ..params.clone() };
        params.sampling.seed = Some(i as u64);
        let request = Request { prompt: tokens(engine, N_PROMPT, seed * n + i), params, priority: 0 };
        let (begun, mut first) = (begun.clone(), true);
        let on_event = move |_| {
            if std::mem::take(&mut first) {
                begun.fetch_add(1, Relaxed);
            }
        };
        queue.submit(request, on_event).expect("the request fits");
    }
    while begun.load(Relaxed) < n {
        queue.step();
    }
    let (first, before, began) = (queue.stats().n_written, engine.account(), Instant::now());
    while queue.stats().n_finished == 0 {
        queue.step();
    }
    let seconds = began.elapsed().as_secs_f64();
    let phase = engine.account().since(&before).decode;
    Run {
        rate: (queue.stats().n_written - first) as f64 / seconds,
        compute_s: phase.compute_s / phase.tokens.max(1) as f64,
        hit_rate: phase.store.hit_rate(),
        bytes_per_token: phase.bytes_per_token(),
    }
}

fn together(a: &Args, name: &str, path: &Path, budget: &str, n: usize) {
    let row = match budget {
        "all" => resident(a, name, path, n),
        percent => paged(a, name, path, percent, n),
    };
    if a.json {
        return println!("{}", serde_json::to_string(&row).expect("plain numbers"));
    }
    let theirs = row.theirs.map_or(String::new(), |t| format!(", llama.cpp {t:.1}"));
    let bound = row.bound.map_or(String::new(), |b| format!(", {:.0} % of the bound", 100.0 * b));
    let read = row.hit_rate.zip(row.mb_per_token).filter(|_| row.bound.is_some());
    let read = read.map_or(String::new(), |(h, mb)| format!(", {:.1} % cache hits, {mb:.1} MB a token", 100.0 * h));
    println!(
        "{} {} {} sequences: {:.1} tokens/s, one {:.2}, ratio {:.2}{theirs}{bound}{read}, peak {} MiB",
        row.model, row.budget, n, row.ours, row.single, row.ratio, row.peak_mib
    );
}

/// With everything in memory.
fn resident(a: &Args, name: &str, path: &Path, n: usize) -> Row {
    let engine = load(path, a, n, SINGLE_LONGER * a.predict, Memory::Bytes(u64::MAX));
    decode(&engine, n, a.predict, 0);
    let mut reference = reference(a, path, n);
    let (mut ours, mut single, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for i in 1..=a.runs {
        single.push(decode(&engine, 1, SINGLE_LONGER * a.predict, i));
        ours.push(decode(&engine, n, a.predict, i));
        theirs.extend(reference());
    }
    let theirs = (!theirs.is_empty()).then(|| median(theirs.into_iter()));
    Row { theirs, peak_mib: peak_mib(), ..row(a, name, "all", n, &ours, &single) }
}

/// In a share of the file's size.
fn paged(a: &Args, name: &str, path: &Path, budget: &str, n: usize) -> Row {
    let file = std::fs::metadata(path).expect("the model's file").len();
    let percent: f64 = budget.trim_end_matches('%').parse().expect("a budget as 25%");
    let bytes = (percent / 100.0 * file as f64) as u64;
    let whole = load(path, a, n, a.predict, Memory::Bytes(u64::MAX));
    decode(&whole, n, 2, 0);
    let compute_s = decode(&whole, n, a.predict.min(8), 1).compute_s;
    drop(whole);
    let (mut ours, mut single, mut bounds, mut peak) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for _ in 0..a.runs {
        single.push(child(a, path, bytes, 1, SINGLE_LONGER * a.predict).0);
        // The disk is asked right before, at the size of an expert's part.
        let disk = DiskProbe::open(path, Mode::Direct)
            .and_then(|p| p.rate(1 << 20, 3, Duration::from_millis(300), &|_, _| ()));
        let (run, held) = child(a, path, bytes, n, a.predict);
        peak = peak.max(held);
        bounds.push(run.rate * (run.bytes_per_token / disk.expect("a disk that can be read").again).max(compute_s));
        ours.push(run);
    }
    Row { bound: Some(median(bounds.into_iter())), peak_mib: peak >> 20, ..row(a, name, budget, n, &ours, &single) }
}

fn row(a: &Args, name: &str, budget: &str, n: usize, ours: &[Run], single: &[Run]) -> Row {
    let rate = |runs: &[Run]| median(runs.iter().map(|r| r.rate));
    let hits: Vec<f64> = ours.iter().filter_map(|r| r.hit_rate).collect();
    Row {
        model: name.into(),
        format: a.format.clone(),
        budget: budget.into(),
        sequences: n,
        ours: rate(ours),
        single: rate(single),
        theirs: None,
        ratio: median(ours.iter().zip(single).map(|(o, s)| o.rate / s.rate)),
        bound: None,
        mb_per_token: (!hits.is_empty()).then(|| median(ours.iter().map(|r| r.bytes_per_token)) / 1e6),
        hit_rate: (!hits.is_empty()).then(|| median(hits.into_iter())),
        peak_mib: 0,
    }
}

/// Runs `n` sequences in a group of the budget and 32 MiB; with the group's peak.
fn child(a: &Args, path: &Path, bytes: u64, n: usize, predict: usize) -> (Run, u64) {
    in_group(bytes + (32 << 20), path, |c| {
        c.args(["--child", &n.to_string(), "--bytes", &bytes.to_string(), "--threads", &a.threads.to_string()]);
        c.args(["--predict", &predict.to_string(), "--model"]).arg(path);
    })
}

/// A schema that a text can follow for as long as it's wanted to.
const SCHEMA: &str = r#"{"type": "array", "minItems": 1000, "items": {"type": "object", "additionalProperties": false,
    "required": ["name", "kind", "age", "tags"], "properties": {"name": {"type": "string", "maxLength": 20},
    "kind": {"enum": ["dragon", "girl", "cat"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3}}}}"#;

/// What following a schema costs.
fn schema(a: &Args, name: &str, path: &Path, n: usize) {
    let engine = load(path, a, n, a.predict, Memory::Bytes(u64::MAX));
    let grammar = Grammar::json_schema(SCHEMA).expect("a sound schema");
    let params = |grammar| GenerationParams { n_predict: Some(a.predict), grammar, ..GenerationParams::default() };
    let (schema, free) = (params(Some(grammar)), params(None));
    write(&engine, n, 0, &schema);
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for i in 1..=a.runs {
        without.push(write(&engine, n, i, &free).rate);
        with.push(write(&engine, n, i, &schema).rate);
    }
    let cost = median(with.iter().zip(&without).map(|(w, f)| 1.0 - w / f));
    let (with, without) = (median(with.into_iter()), median(without.into_iter()));
    if a.json {
        let row = serde_json::json!({ "model": name, "sequences": n, "schema": with, "free": without, "cost": cost });
        return println!("{row}");
    }
    println!(
        "{name} {n} sequences: {with:.1} tokens/s after a schema, {without:.1} freely: it costs {:.1} %",
        100.0 * cost
    );
}

/// What a common beginning saves.
fn prefix(a: &Args, name: &str, path: &Path, n: usize) {
    const N_COMMON: usize = 1000;
    const N_OWN: usize = 8;
    let n_ctx = Some(N_COMMON + N_OWN + a.predict);
    let memory = Memory::Bytes(u64::MAX);
    let o = EngineOptions { n_ctx, n_sessions: n, n_threads: Some(a.threads), memory, ..EngineOptions::default() };
    let engine = load_with(path, &o);
    let run = |seed: usize, common: bool| -> (f64, QueueStats) {
        let queue = Queue::new(&engine, n);
        for i in 0..n {
            let mut prompt = tokens(&engine, N_COMMON, if common { seed } else { seed + i });
            prompt.extend(tokens(&engine, N_OWN, seed + n + i));
            let params = GenerationParams { n_predict: Some(a.predict), ..GenerationParams::default() };
            queue.submit(Request { prompt, params, priority: 0 }, |_| ()).expect("the request fits");
        }
        let began = Instant::now();
        queue.drive();
        (began.elapsed().as_secs_f64(), queue.stats())
    };
    run(1, true);
    let (alike, one) = run(1000, true);
    let (apart, all) = run(2000, false);
    if a.json {
        let row = serde_json::json!({ "model": name, "sequences": n, "seconds_alike": alike, "seconds_apart": apart,
            "queue_alike": one, "queue_apart": all });
        return println!("{row}");
    }
    let computed = |s: &QueueStats| s.n_computed - s.n_written;
    println!(
        "{name} {n} sequences of {} tokens: {alike:.2} s with {N_COMMON} in common ({} tokens of prompts computed), {apart:.2} s without ({})",
        N_COMMON + N_OWN,
        computed(&one),
        computed(&all)
    );
}

/// llama.cpp's rate for the same work, in the better of its two modes.
#[cfg(feature = "llama-cpp")]
fn reference(a: &Args, path: &Path, n: usize) -> Box<dyn FnMut() -> Option<f64>> {
    use common::llama::{Kv, Mode, Model, Options, require};
    require(oncall::cpu::Isa::get().expect("an instruction set"));
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
fn reference(_: &Args, _: &Path, _: usize) -> Box<dyn FnMut() -> Option<f64>> {
    Box::new(|| None)
}

fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
