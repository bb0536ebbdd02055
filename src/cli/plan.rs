//! `oncall plan`: what fits where, and how fast it will be, before anything is loaded.

use super::args::{CacheType, model_of_env, parse_memory, parse_threads};
use super::replay::read_trace;
use super::{Failure, output};
use crate::cpu::probe::{self, DiskProbe, Mode};
use crate::engine::outline::{Outline, experts_file};
use crate::engine::{DEFAULT_CHUNK, EMBEDDED_NAME, EngineError, EngineOptions, Memory};
use crate::gguf::{Gguf, GgufError, printable};
use crate::moe::planner::{Cost, Forecast, Reading, Routing, forecast, typical_trace};
use crate::moe::trace::{self, TraceHeader};
use crate::ops::kv::KV_BLOCK;
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

/// Flags of `plan`.
#[derive(Args)]
#[command(
    after_help = "Only the file's header is read (of a split model each file's), so a download that isn't finished will do. The machine is measured for about two \
seconds: matrices of the model's formats and random reads of an expert's size on the model's disk, each alone and both together \
(`oncall doctor` shows more). Computing and reading go on together and slow each other down, layer by layer. How often an expert is \
resident (in memory) when a token needs it, a cache hit, is a forecast: from simulated routing, in which some experts are as much more \
popular than others as in trained models, from a trace of a real run (--trace), or for the worst case (--routing uniform).

Examples:
  oncall plan -m model.gguf                     a table of budgets
  oncall plan -m model.gguf --memory 6GiB -c 8192
  oncall run -m model.gguf --record run.csv \"…\" && oncall plan -m model.gguf --trace run.csv"
)]
pub(super) struct PlanArgs {
    /// A GGUF file, or the first of a split model's files [default: $ONCALL_MODEL, or the tiny model that
    /// is built in]
    #[arg(short, long, value_name = "FILE", default_values = model_of_env(), hide_default_value = true)]
    model: Option<PathBuf>,
    /// Add this budget to the table, as 4GiB; auto is what the machine can spare
    #[arg(long, value_name = "SIZE|auto", value_parser = parse_memory, default_value = "auto")]
    memory: Memory,
    /// Context in tokens; 0 for the model's own [default: the model's own, up to 4096]
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Threads that compute [default: one for each core]
    #[arg(short, long, value_name = "N", value_parser = parse_threads)]
    threads: Option<u16>,
    /// How keys are stored (-ctk)
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    cache_type_k: CacheType,
    /// How values are stored (-ctv)
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    cache_type_v: CacheType,
    /// A trace of this model's routing, as --record writes it
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Which routing to assume without a trace
    #[arg(long, value_name = "KIND", default_value = "typical", conflicts_with = "trace")]
    routing: Assumption,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What the hit rates are taken from.
#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Assumption {
    /// Some experts are popular, and what was used comes again, as in trained models
    Typical,
    /// All experts alike: the worst case
    Uniform,
    /// A trace
    #[value(skip)]
    Trace,
}

/// The plan.
#[derive(Serialize)]
struct Plan {
    model: String,
    /// Whether the file is shorter than its header says.
    incomplete: bool,
    n_ctx: usize,
    smallest_bytes: u64,
    no_reads_bytes: u64,
    /// The budget below which a token's experts don't all fit; `None` where that isn't between the two.
    cycle_bytes: Option<u64>,
    base_bytes: u64,
    dense_bytes: u64,
    kv_bytes: u64,
    kv_bytes_per_1k: u64,
    activation_bytes: u64,
    all_slots_bytes: u64,
    expert_bytes: u64,
    routing: Assumption,
    #[serde(flatten)]
    cost: Cost,
    /// Bytes a second at which all threads read memory; `None` where there's too little of it to measure.
    memory_rate: Option<f64>,
    /// Why the disk's rate isn't known.
    #[serde(skip_serializing_if = "Option::is_none")]
    no_disk_rate: Option<String>,
    budgets: Vec<Forecast>,
}

pub(super) fn run(a: PlanArgs) -> Result<(), Failure> {
    let gguf = match &a.model {
        Some(path) => Gguf::open_header(path).map_err(|e| match e {
            GgufError::MissingShard { .. } => Failure::new(format!(
                "{e}. For a plan the beginning of each will do: a download that has only begun, under the file's own name"
            )),
            e => e.into(),
        })?,
        None => Gguf::from_static(EMBEDDED_NAME, crate::engine::embedded_bytes())?,
    };
    let options = EngineOptions {
        n_ctx: a.ctx_size,
        n_threads: a.threads.map(usize::from),
        chunk: DEFAULT_CHUNK,
        type_k: a.cache_type_k.into(),
        type_v: a.cache_type_v.into(),
        ..EngineOptions::default()
    };
    let outline = Outline::new(&gguf, &options)?;
    let (routing, assumption) = routing(&a, gguf.name(), &outline)?;
    let budgets = Budgets::new(&outline, &options, a.memory)?;
    let plan = plan(&gguf, &outline, &routing, assumption, budgets)?;
    if a.json { output::json(&plan) } else { output::text(&print(&plan, &outline, budgets)?) }
}

/// Budgets of this machine and of the user's, which have rows of their own.
#[derive(Clone, Copy)]
struct Budgets {
    /// What the machine can spare, where that's known.
    spare: Option<u64>,
    asked: Option<u64>,
}

impl Budgets {
    fn new(o: &Outline, options: &EngineOptions, memory: Memory) -> Result<Self, Failure> {
        let asked = match memory {
            Memory::Auto => None,
            Memory::Bytes(_) => o.budget(options, memory)?.bytes,
        };
        Ok(Budgets { spare: Memory::Auto.resolve().map(|m| m.0), asked })
    }

    /// The table's rows, from the smallest budget to the whole model.
    fn with_steps(self, smallest: u64, whole: u64, has_experts: bool) -> Vec<u64> {
        // Without experts there is nothing to choose between.
        let steps = if has_experts { 8 } else { 1 };
        let between = (0..=steps).map(|i| smallest + (u128::from(whole - smallest) * i / steps) as u64);
        // More than it can use changes nothing, but who asks gets an answer.
        let own = self.asked.or(self.spare.filter(|b| (smallest..whole).contains(b)));
        let mut budgets: Vec<u64> = between.chain(own).collect();
        budgets.sort_unstable();
        budgets.dedup();
        budgets
    }

    /// The one that is marked in the table.
    fn marked(self) -> Option<u64> {
        self.asked.or(self.spare)
    }
}

/// What is assumed about which experts are used.
fn routing(a: &PlanArgs, name: &str, o: &Outline) -> Result<(Routing, Assumption), Failure> {
    let Some(moe) = &o.config.moe else { return Ok((Routing::Uniform, Assumption::Uniform)) };
    let (n, used) = (moe.router.n_expert, moe.router.n_expert_used);
    let Some(path) = &a.trace else {
        return Ok(match a.routing {
            Assumption::Uniform => (Routing::Uniform, Assumption::Uniform),
            _ => (Routing::Typical(typical_trace(n, used)), Assumption::Typical),
        });
    };
    let trace = read_trace(path)?;
    check_trace(&trace.header, name, o, (n, used)).map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
    Ok((Routing::Recorded(trace), Assumption::Trace))
}

/// Whether a trace is of a model like this one, which is called `name` and uses `used` of `n` experts.
fn check_trace(h: &TraceHeader, name: &str, o: &Outline, (n, used): (usize, usize)) -> Result<(), String> {
    if (h.n_expert, h.n_expert_used) != (n, used) {
        let lossy = h.n_expert == n && h.n_expert_used < used;
        return Err(format!(
            "it was recorded with {} of {} experts, but this model uses {used} of {n}{}",
            h.n_expert_used,
            h.n_expert,
            if lossy { "; record a run without --experts" } else { "" }
        ));
    }
    if h.n_layer != o.config.n_layer {
        let layers = output::counted(h.n_layer, "layer");
        return Err(format!("it was recorded with {layers}, but this model has {}", o.config.n_layer));
    }
    // Other tools may leave the sizes out. Another quantisation of the model routes nearly alike.
    let same = |(trace, model): (&(u64, u64), &(u64, u64))| trace.0 == 0 || trace.0 == model.0;
    let sizes =
        if h.layer_bytes.iter().zip(&o.layer_bytes).all(same) { "" } else { ", whose experts have other sizes" };
    if h.model != trace::word(name) || !sizes.is_empty() {
        let model = if h.model.is_empty() { "an unnamed model" } else { &h.model };
        output::note(&format!("the trace is of {model}{sizes}: hits are as good as that is like {name}"));
    }
    Ok(())
}

/// Tokens in the context for which speeds are told: a question and half of its answer.
const SEEN: usize = 512;
const MEMORY_TIME: Duration = Duration::from_millis(100);

fn plan(gguf: &Gguf, o: &Outline, routing: &Routing, assumption: Assumption, own: Budgets) -> Result<Plan, Failure> {
    let needs = &o.needs;
    let bar = output::bar("measuring and forecasting", "steps");
    // The memory, the matrices, the disk; and the budgets when their number is known.
    bar.set_length(3 + 10);
    let memory_rate = probe::memory_rate(o.n_threads, MEMORY_TIME)?;
    bar.inc(1);
    let n_seen = o.n_ctx.min(SEEN);
    let kv_s = memory_rate.map(|rate| (o.kv_per_1k as f64 * n_seen as f64 / 1024.0) / rate);
    let n_kv_blocks = n_seen.div_ceil(KV_BLOCK) as u64;
    let compute_s = o.measure_compute()?.zip(kv_s).map(|(matrices, kv)| matrices + kv);
    bar.inc(1);
    let reading = reading(gguf, o, compute_s);
    bar.inc(1);
    let used = o.config.moe.as_ref().map(|m| (m.router.n_expert, m.router.n_expert_used));
    let cost = Cost {
        compute_s,
        used_expert_bytes: o.used_expert_bytes,
        n_moe_layer: o.n_moe_layer,
        n_expert_used: used.map_or(0, |u| u.1),
        reading: reading.as_ref().ok().copied(),
    };
    let (smallest, whole) = (needs.smallest(), needs.no_reads());
    let budgets = own.with_steps(smallest, whole, used.is_some());
    bar.set_length(3 + budgets.len() as u64);
    let forecast = |b| {
        bar.inc(1);
        forecast(needs, &cost, routing, b, n_kv_blocks)
    };
    let budgets = budgets.into_iter().filter_map(forecast).collect();
    bar.finish_and_clear();
    Ok(Plan {
        model: gguf.name().into(),
        incomplete: gguf.tensors().iter().any(|t| t.offset + t.n_bytes > gguf.files()[t.file].n_bytes()),
        n_ctx: o.n_ctx,
        smallest_bytes: smallest,
        no_reads_bytes: whole,
        cycle_bytes: used.map(|u| needs.one_cycle(u, n_kv_blocks)).filter(|b| (smallest + 1..whole).contains(b)),
        base_bytes: needs.base,
        dense_bytes: needs.dense,
        kv_bytes: needs.kv,
        kv_bytes_per_1k: o.kv_per_1k,
        activation_bytes: needs.buffers.of(needs.chunk),
        all_slots_bytes: needs.all_slots,
        expert_bytes: o.expert_bytes,
        routing: assumption,
        cost,
        memory_rate,
        no_disk_rate: reading.err(),
        budgets,
    })
}

/// Computing and reading at once, with direct reads if the disk allows them; or why that isn't known.
fn reading(gguf: &Gguf, o: &Outline, compute_s: Option<f64>) -> Result<Reading, String> {
    if o.config.moe.is_none() {
        return Err("the model has no experts to read".into());
    }
    let file = experts_file(gguf).filter(|f| f.in_memory().is_none());
    let path = file.ok_or("the model is in the program, not on a disk")?.path();
    let of_file = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let probe = DiskProbe::open(path, Mode::Direct).or_else(|_| DiskProbe::open(path, Mode::Buffered));
    let probe = probe.map_err(|e| of_file(&e))?;
    let reading = compute_s.map_or(Ok(None), |s| o.measure_reading(&probe, s)).map_err(|e| match e {
        // It's too short, which is no refusal.
        EngineError::System { source, .. } if source.kind() == ErrorKind::InvalidInput => of_file(&source),
        e => of_file(&e),
    })?;
    reading.ok_or("too little memory to measure".into())
}

fn print(p: &Plan, o: &Outline, budgets: Budgets) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    // Memory as --memory takes it; what is read as speeds are told.
    let (memory, size) = (output::memory, output::size);
    let mut line = |name: &str, value: String| writeln!(out, "{name:<16} {value}");
    line("model", format!("{}{}", printable(&p.model), if p.incomplete { " (not all there yet)" } else { "" }))?;
    line("dense weights", format!("{}, always in memory", memory(p.dense_bytes)))?;
    line(
        "KV cache",
        format!(
            "{} for {}, {} for each 1024",
            memory(p.kv_bytes),
            output::counted(p.n_ctx, "token"),
            memory(p.kv_bytes_per_1k)
        ),
    )?;
    line(
        "buffers",
        format!("{} where there's room, and {} for the program", memory(p.activation_bytes), memory(p.base_bytes)),
    )?;
    if let Some(moe) = &o.config.moe {
        let (n, used) = (moe.router.n_expert, moe.router.n_expert_used);
        line(
            "experts",
            format!(
                "{} in all, {} each, {used} of {n} a layer for each token",
                memory(p.all_slots_bytes),
                size(p.expert_bytes)
            ),
        )?;
        line("a token uses", format!("{} of experts", size(p.cost.used_expert_bytes)))?;
    }
    line("smallest budget", output::at_least(p.smallest_bytes))?;
    if o.config.moe.is_some() {
        line("no more reads", format!("from {} on", output::at_least(p.no_reads_bytes)))?;
    }
    let spare = budgets.spare.map_or("unknown".into(), memory);
    let threads = output::counted(o.n_threads, "thread");
    let speed = p.memory_rate.map(|r| format!("{} by {threads}", rate(r)));
    let speed = speed.unwrap_or("too little to measure how fast it is".into());
    line("this machine", format!("{spare} of memory to spare, {speed}"))?;
    if budgets.spare.is_some_and(|n| n < p.smallest_bytes) {
        line("", "which is less than the smallest budget: the model can't run here as things are".into())?;
    }
    if o.config.moe.is_none() {
        let speed = p.budgets.last().and_then(|f| f.tokens_per_s);
        line("experts", "none: the model is dense and always whole in memory, so more of that doesn't help".into())?;
        line("tokens/s", speed.map_or("?".into(), |s| format!("{s:.1}")))?;
        return Ok(out);
    }
    for (name, about) in disk(p) {
        line(name, about)?;
    }
    if let Some(asked) = budgets.asked {
        let more = budgets.spare.is_some_and(|spare| asked > spare);
        let more = if more { ", more than this machine can spare" } else { "" };
        line("budget asked for", format!("{}{more}", memory(asked)))?;
    }
    let assumed = match p.routing {
        Assumption::Typical => "simulated routing, as uneven as a trained model's",
        Assumption::Uniform => "all experts used alike: the worst case",
        Assumption::Trace => "the trace",
    };
    line("hit rates from", assumed.into())?;
    let seen = p.n_ctx.min(SEEN);
    let seen = output::counted(seen, "token");
    line("table", format!("for writing with {seen} in the context; a longer one takes"))?;
    line("", "memory from the slots. At first: with the disk's cache cold".into())?;
    table(p, budgets, &mut out)?;
    Ok(out)
}

fn table(p: &Plan, budgets: Budgets, out: &mut String) -> std::fmt::Result {
    // Within 80 columns; what is left out is in the JSON.
    writeln!(
        out,
        "\n{:>10} {:>7} {:>7} {:>8} {:>9} {:>9} {:>9} {:>9}",
        "memory", "experts", "hits", "read", "compute", "disk", "tokens/s", "at first"
    )?;
    let mut shown: Option<&Forecast> = None;
    for f in &p.budgets {
        // More memory that changes nothing is no row.
        let marked = Some(f.bytes) == budgets.marked();
        if !marked && shown.is_some_and(|s| Forecast { bytes: s.bytes, chunk: s.chunk, ..*f } == *s) {
            continue;
        }
        shown = Some(f);
        let [compute, disk] = [f.compute_s, f.disk_s].map(|s| s.map_or("?".into(), |s| format!("{:.1} ms", 1e3 * s)));
        let [speed, first] =
            [f.tokens_per_s, f.first_tokens_per_s].map(|t| t.map_or("?".into(), |t| format!("{t:.1}")));
        let mark = if marked { " <" } else { "" };
        writeln!(
            out,
            "{:>10} {:>5.1} % {:>5.1} % {:>8} {compute:>9} {disk:>9} {speed:>9} {first:>9}{mark}",
            output::at_least(f.bytes),
            100.0 * f.slot_share,
            100.0 * f.hit_rate,
            output::size(f.bytes_per_token)
        )?;
    }
    if let Some(bytes) = p.cycle_bytes {
        let bytes = output::at_least(bytes);
        writeln!(out, "\nBelow {bytes} a token's experts don't all fit: plain LRU would never hit.")?;
    }
    Ok(())
}

/// What was measured of the disk, in lines.
fn disk(p: &Plan) -> Vec<(&'static str, String)> {
    let Some(r) = p.cost.reading else {
        return vec![("disk", format!("no disk rate: {}", p.no_disk_rate.as_deref().unwrap_or("")))];
    };
    let alone = format!("experts at {}; {} at first", rate(r.disk_rate), rate(r.first_rate));
    let both = format!("{}, while computing takes {:.1} ms a token", rate(r.disk_rate_beside), 1e3 * r.beside_s);
    vec![("disk", alone), ("beside computing", both)]
}

fn rate(bytes_per_s: f64) -> String {
    format!("{}/s", output::size(bytes_per_s as u64))
}
