//! Models larger than their memory: oncall against llama.cpp's mapping under the same limit, side by side in one run.
//!
//! `benches/native cargo bench --features llama-cpp --bench paging -- --model olmoe-1b-7b --budget 25%,50%` (needs clang and cmake; root, for
//! memory control groups and the device's read-ahead). Each engine runs in a process of its own inside a control group of the
//! budget, with nothing of the model in the page cache, in turn; medians of the runs count.

#[path = "../tests/common/mod.rs"]
mod common;
mod shared;

use clap::Parser;
use common::llama::{self, Kv, Mode, Model, Options};
use oncall::cpu::Isa;
use oncall::engine::{Engine, EngineOptions, Input, Memory, Want};
use serde::{Deserialize, Serialize};
use shared::{in_group, median, model, run_in_group};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// oncall against llama.cpp's mapping, in less memory than the model is large.
#[derive(Parser)]
struct Args {
    /// smolmoe, a shape of the synth example (olmoe-1b-7b, qwen3-30b-a3b, ...), or a file
    #[arg(long, default_values = ["olmoe-1b-7b"], value_delimiter = ',')]
    model: Vec<String>,
    /// The mixture of formats of shapes that are made here
    #[arg(long, default_value = "q4_k_m")]
    format: String,
    /// Memory for everything, in percent of the file
    #[arg(long, default_values = ["25%", "50%"], value_delimiter = ',')]
    budget: Vec<String>,
    /// The device's read-ahead in KiB while it runs; Linux's default is 128
    #[arg(long, default_values_t = [128], value_delimiter = ',')]
    readahead: Vec<u32>,
    /// Threads that compute
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 16)]
    prompt: usize,
    /// Tokens that are written
    #[arg(long, default_value_t = 32)]
    predict: usize,
    /// Runs of each
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Runs one engine here: what the parent starts inside the control group
    #[arg(long, hide = true)]
    child: Option<String>,
    /// The child's budget in bytes
    #[arg(long, hide = true, default_value_t = 0)]
    bytes: u64,
    /// cargo gives it
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a child says of its run.
#[derive(Serialize, Deserialize, Default)]
struct Run {
    /// Seconds until the model was loaded: llama.cpp reads what it maps ahead then, oncall only the dense weights.
    load_s: f64,
    /// Tokens a second.
    prefill: f64,
    decode: f64,
    /// Of decoding; 0 where nobody counts.
    hit_rate: f64,
    bytes_per_token: f64,
    /// Seconds of decoding a token that weren't waiting, and in which a lane read or packed.
    compute_s: f64,
    disk_s: f64,
}

#[derive(Serialize)]
struct Row {
    model: String,
    format: String,
    budget: String,
    threads: usize,
    readahead: u32,
    phase: &'static str,
    ours: f64,
    theirs: f64,
    ratio: f64,
    /// Of what the longer of computing and reading allows, the share that was reached: computing as with everything resident, reading
    /// as long as at least one lane read or packed what it had read.
    #[serde(skip_serializing_if = "Option::is_none")]
    bound: Option<f64>,
    /// Tokens a second that `oncall plan` foretold in the same group: for experts that the disk has read before, and at first.
    #[serde(skip_serializing_if = "Option::is_none")]
    forecast: Option<(f64, f64)>,
    /// Seconds from the command to the first token after a short prompt, and those in which the disk reads the dense weights once.
    #[serde(skip_serializing_if = "Option::is_none")]
    start: Option<(f64, f64)>,
    /// Seconds that loading took before the prompt, ours and llama.cpp's.
    #[serde(skip_serializing_if = "Option::is_none")]
    load: Option<(f64, f64)>,
    hit_rate: f64,
    mb_per_token: f64,
    peak_mib: u64,
}

fn main() {
    let a = Args::parse();
    if let Some(engine) = &a.child {
        let run = if engine == "ours" { ours(&a) } else { theirs(&a) };
        return println!("{}", serde_json::to_string(&run).expect("plain numbers"));
    }
    llama::require(Isa::get().expect("an instruction set"));
    for name in &a.model {
        let path = model(name, &a.format);
        for budget in &a.budget {
            for &readahead in &a.readahead {
                compare(&a, name, &path, budget, readahead).iter().for_each(|r| report(&a, r));
            }
        }
    }
}

fn report(a: &Args, r: &Row) {
    if a.json {
        return println!("{}", serde_json::to_string(r).expect("plain numbers"));
    }
    let bound = r.bound.map_or(String::new(), |b| format!(", {:.0} % of the bound", 100.0 * b));
    let forecast = r.forecast.map_or(String::new(), |f| format!(", forecast {:.2} ({:.2} at first)", f.0, f.1));
    let start = r.start.map_or(String::new(), |(s, dense)| format!(", starts in {s:.2} s, dense weights {dense:.2} s"));
    let load = r.load.map_or(String::new(), |(us, them)| format!(", after loading for {us:.2} and {them:.2} s"));
    println!(
        "{} {} {} read-ahead {} KiB: ours {:.2}, llama.cpp {:.2} tokens/s{load}, ratio {:.2}{bound}{forecast}, {:.1} % cache hits, {:.0} MB a token, peak {} MiB{start}",
        r.model,
        r.budget,
        r.phase,
        r.readahead,
        r.ours,
        r.theirs,
        r.ratio,
        100.0 * r.hit_rate,
        r.mb_per_token,
        r.peak_mib
    );
}

fn tokens(n: usize, n_vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % n_vocab as u64) as u32).collect()
}

fn ours(a: &Args) -> Run {
    let memory = if a.bytes == 0 { Memory::Auto } else { Memory::Bytes(a.bytes) };
    let n_ctx = Some(a.prompt + a.predict);
    let o = EngineOptions { n_ctx, n_threads: Some(a.threads), memory, ..EngineOptions::default() };
    let began = Instant::now();
    let engine = Engine::load(Path::new(&a.model[0]), &o, &|_, _| ()).unwrap_or_else(|e| panic!("{e}"));
    let load_s = began.elapsed().as_secs_f64();
    let tokens = tokens(a.prompt + a.predict, engine.config().n_vocab);
    let mut session = engine.session();
    let began = Instant::now();
    session.feed(&tokens[..a.prompt], &mut |_| true).expect("a prompt");
    let prefill = a.prompt as f64 / began.elapsed().as_secs_f64();
    let began = Instant::now();
    for token in tokens[a.prompt..].chunks(1) {
        let input = Input { session: &mut session, tokens: token, written: true, want: Want::Last };
        engine.forward(&mut [input]).expect("a token");
    }
    let decode = a.predict as f64 / began.elapsed().as_secs_f64();
    let phase = engine.account().decode;
    Run {
        load_s,
        prefill,
        decode,
        hit_rate: phase.store.hit_rate().unwrap_or(1.0),
        bytes_per_token: phase.bytes_per_token(),
        compute_s: phase.compute_s / phase.tokens.max(1) as f64,
        disk_s: phase.store.busy_ns as f64 / 1e9 / phase.tokens.max(1) as f64,
    }
}

fn theirs(a: &Args) -> Run {
    let n_ctx = (a.prompt + a.predict) as u32;
    let options = Options { n_ctx, n_batch: 512, n_threads: a.threads as i32, kv: Kv::F16, flash_attn: true, n_seq: 1 };
    // Repacked it keeps a second copy of the weights: mapped and plain is what fits.
    let began = Instant::now();
    let model = Model::load(&a.model[0], Mode::Plain);
    let load_s = began.elapsed().as_secs_f64();
    let tokens = tokens(a.prompt + a.predict, model.n_vocab());
    let mut context = model.context(options);
    let began = Instant::now();
    context.decode(&tokens[..a.prompt]);
    let prefill = a.prompt as f64 / began.elapsed().as_secs_f64();
    let began = Instant::now();
    tokens[a.prompt..].iter().for_each(|&t| drop(context.decode(&[t])));
    Run { load_s, prefill, decode: a.predict as f64 / began.elapsed().as_secs_f64(), ..Run::default() }
}

/// Runs an engine in a group of `limit` bytes; with the group's peak.
fn child(a: &Args, engine: &str, path: &Path, bytes: u64, limit: u64) -> (Run, u64) {
    in_group(limit, path, |c| {
        c.args(["--child", engine, "--bytes", &bytes.to_string(), "--threads", &a.threads.to_string()]);
        c.args(["--prompt", &a.prompt.to_string(), "--predict", &a.predict.to_string(), "--model"]).arg(path);
    })
}

fn compare(a: &Args, name: &str, path: &Path, budget: &str, readahead: u32) -> Vec<Row> {
    let file = std::fs::metadata(path).expect("the model").len();
    let percent: f64 = budget.trim_end_matches('%').parse().expect("a budget as 25%");
    let bytes = (file as f64 * percent / 100.0) as u64;
    let _restore = ReadAhead::set(readahead);
    let (mut resident, mut plans, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    let (mut us, mut them, mut peak) = (Vec::new(), Vec::new(), 0);
    for _ in 0..a.runs {
        resident.push(child(a, "ours", path, 0, 64 << 30).0);
        plans.push(planned(a, path, bytes));
        starts.push(start(a, path, bytes));
        let (run, held) = child(a, "ours", path, bytes, bytes + (32 << 20));
        us.push(run);
        peak = peak.max(held);
        them.push(child(a, "theirs", path, bytes, bytes + (32 << 20)).0);
    }
    let of = |f: fn(&Run) -> f64, runs: &[Run]| median(runs.iter().map(f));
    let row = |phase, f: fn(&Run) -> f64| Row {
        model: name.into(),
        format: a.format.clone(),
        budget: budget.into(),
        threads: a.threads,
        readahead,
        phase,
        ours: of(f, &us),
        theirs: of(f, &them),
        ratio: median(us.iter().zip(&them).map(|(o, t)| f(o) / f(t))),
        bound: None,
        forecast: None,
        start: None,
        load: None,
        hit_rate: of(|r| r.hit_rate, &us),
        mb_per_token: of(|r| r.bytes_per_token, &us) / 1e6,
        peak_mib: peak >> 20,
    };
    // The time in which a lane was at work, not bytes over a probe's rate: what lies below a virtual disk caches what is read
    // again, and a probe of other places was five times slower than the run itself.
    let bound = of(|r| r.decode, &us) * of(|r| r.disk_s, &us).max(of(|r| r.compute_s, &resident));
    let of_plans = |f: fn(&Plan) -> f64| median(plans.iter().map(f));
    let start = (median(starts.into_iter()), of_plans(|p| p.dense_s));
    let decode = Row {
        bound: Some(bound),
        forecast: Some((of_plans(|p| p.tokens_per_s), of_plans(|p| p.first_tokens_per_s))),
        start: Some(start),
        ..row("decode", |r| r.decode)
    };
    let load = Some((of(|r| r.load_s, &us), of(|r| r.load_s, &them)));
    vec![Row { load, ..row("prefill", |r| r.prefill) }, decode]
}

/// The program's command of this name, with what the runs have.
fn oncall(a: &Args, command: &str, path: &Path, bytes: u64) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    c.arg(command).arg("-m").arg(path).args(["--memory", &bytes.to_string(), "-t", &a.threads.to_string()]);
    c.args(["-c", &(a.prompt + a.predict).to_string()]);
    c
}

/// What `oncall plan` says of a budget.
struct Plan {
    tokens_per_s: f64,
    first_tokens_per_s: f64,
    dense_s: f64,
}

fn planned(a: &Args, path: &Path, bytes: u64) -> Plan {
    let ran = run_in_group(bytes + (32 << 20), path, oncall(a, "plan", path, bytes).arg("--json"));
    let plan: serde_json::Value = serde_json::from_slice(&ran.stdout).expect("JSON");
    let budgets = plan["budgets"].as_array().expect("a table");
    // From the budget on that holds everything the table has no more lines.
    let of = budgets.iter().find(|b| b["bytes"] == bytes).or(budgets.last()).expect("a line for the budget");
    let number = |v: &serde_json::Value| v.as_f64().expect("a number");
    Plan {
        tokens_per_s: number(&of["tokens_per_s"]),
        first_tokens_per_s: number(&of["first_tokens_per_s"]),
        dense_s: number(&plan["dense_bytes"]) / number(&plan["first_rate"]),
    }
}

/// Seconds from the command to the end of an answer of one token after a prompt of a letter.
fn start(a: &Args, path: &Path, bytes: u64) -> f64 {
    let mut c = oncall(a, "run", path, bytes);
    run_in_group(bytes + (32 << 20), path, c.args(["--raw", "--no-heat", "-n", "1", "a"])).seconds
}

/// The read-ahead of every block device, set for a while.
struct ReadAhead(Vec<(PathBuf, String)>);

impl ReadAhead {
    fn set(kib: u32) -> Self {
        let devices = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let files = devices.map(|d| d.path().join("queue/read_ahead_kb"));
        let before = files.filter_map(|f| Some((f.clone(), std::fs::read_to_string(f).ok()?))).collect();
        let this = ReadAhead(before);
        this.0.iter().for_each(|(f, _)| drop(std::fs::write(f, kib.to_string())));
        this
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.0.iter().for_each(|(f, before)| drop(std::fs::write(f, before.trim())));
    }
}
