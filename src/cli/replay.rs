//! `oncall replay`: what a cache of experts would have hit in a recorded run.

use super::{Failure, output, unreadable};
use crate::gguf::printable;
use crate::moe::policy::{self, POLICIES};
use crate::moe::replay::{Outcome, Sharing, optimum, replay};
use crate::moe::trace::{Trace, TraceHeader};
use clap::Args;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// Flags of `replay`.
#[derive(Args)]
#[command(
    after_help = "A trace says which experts each token used; `--record FILE` on any command that loads a model writes one. Slots are \
counted for each layer. They are shared by all layers as when the model runs (global), or each layer keeps its own (layer). `belady` \
knows the future: no policy can do better. Tokens of the prompt fill the slots, those that were written count.

Examples:
  oncall run -m model.gguf --record run.csv \"Why is the sky blue?\"
  oncall replay --trace run.csv --slots 8,16,32
  oncall replay --trace run.csv --slots 16 --policy stay --sharing global --json"
)]
pub(super) struct ReplayArgs {
    /// The trace
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Slots for each layer [default: from one more than a token uses to three eighths of the experts]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=4096))]
    slots: Vec<u16>,
    /// Policies; belady is the optimum [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = policy_name)]
    policy: Vec<&'static str>,
    /// Who shares slots [default: first one, then the other]
    #[arg(long, value_name = "global|layer", value_parser = sharing)]
    sharing: Option<Sharing>,
    /// Print one JSON object a line, for each policy and number of slots
    #[arg(long)]
    json: bool,
}

const BELADY: &str = "belady";

fn policy_name(name: &str) -> Result<&'static str, String> {
    let names = || POLICIES.iter().map(|p| p.0).chain([BELADY]);
    names().find(|n| *n == name).ok_or_else(|| format!("there are {}", names().collect::<Vec<_>>().join(", ")))
}

fn sharing(name: &str) -> Result<Sharing, String> {
    match name {
        "global" => Ok(Sharing::Global),
        "layer" => Ok(Sharing::Layer),
        _ => Err("slots are shared by all layers (global) or each layer keeps its own (layer)".into()),
    }
}

#[derive(Serialize)]
struct Row {
    policy: &'static str,
    sharing: Sharing,
    slots: u16,
    hit_rate: f64,
    /// Bytes that a token reads; absent where the trace doesn't know the experts' sizes.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_per_token: Option<u64>,
    #[serde(flatten)]
    outcome: Outcome,
}

/// Opens and reads a trace that has tokens; the errors name the file.
pub(super) fn read_trace(path: &Path) -> Result<Trace, Failure> {
    let fail = |e: &dyn std::fmt::Display| Failure::new(format!("{}: {e}", path.display()));
    let file = std::fs::File::open(path).map_err(|e| fail(&unreadable(&e)))?;
    let trace = Trace::read(BufReader::new(file)).map_err(|e| fail(&e))?;
    if trace.n_tokens() == 0 {
        return Err(fail(&"there are no tokens in it: record a run that reads or writes some"));
    }
    Ok(trace)
}

pub(super) fn run(a: ReplayArgs) -> Result<(), Failure> {
    let trace = read_trace(&a.trace)?;
    let slots = if a.slots.is_empty() { usual_slots(&trace.header) } else { a.slots };
    let names: Vec<&'static str> =
        if a.policy.is_empty() { POLICIES.iter().map(|p| p.0).chain([BELADY]).collect() } else { a.policy };
    let shared = a.sharing.map_or(vec![Sharing::Global, Sharing::Layer], |s| vec![s]);
    if !a.json {
        output::text(&heading(&trace, &slots)?)?;
    }
    for sharing in shared {
        for name in &names {
            let rows: Vec<Row> = slots.iter().map(|&slots| row(&trace, name, slots, sharing)).collect();
            if a.json {
                rows.iter().try_for_each(output::json)?;
                continue;
            }
            let who = if sharing == Sharing::Global { "shared by all layers" } else { "each layer its own" };
            let cells: String = rows.iter().map(|r| format!(" {:>10.1}", 100.0 * r.hit_rate)).collect();
            output::text(&format!("{name:<8}{who:<22}{cells}\n"))?;
        }
    }
    Ok(())
}

/// Where a cache begins to make a difference, up to three eighths of a layer's experts: 9, 12, 24 and 48 where 8 of 128 are used.
fn usual_slots(h: &TraceHeader) -> Vec<u16> {
    let (n, used) = (h.n_expert, h.n_expert_used);
    let mut slots = vec![used + 1, used + used / 2, n * 3 / 16, n * 3 / 8];
    if n < 16 {
        slots.extend([n / 2, n * 3 / 4]);
    }
    slots.retain(|&s| s > used && s < n);
    slots.push(if slots.is_empty() { n } else { used + 1 });
    slots.sort_unstable();
    slots.dedup();
    slots.into_iter().filter_map(|s| u16::try_from(s).ok()).collect()
}

fn row(trace: &Trace, name: &'static str, slots: u16, sharing: Sharing) -> Row {
    let outcome = match policy::by_name(name) {
        Some(make) => replay(trace, make, slots.into(), sharing),
        None => optimum(trace, slots.into(), sharing),
    };
    let known = trace.header.layer_bytes.iter().any(|b| b.0 > 0);
    let bytes_per_token = (known && outcome.tokens > 0).then(|| outcome.bytes_read / outcome.tokens);
    Row { policy: name, sharing, slots, hit_rate: outcome.hit_rate(), bytes_per_token, outcome }
}

/// What the trace is of, what the numbers of slots would weigh, and the table's head.
fn heading(trace: &Trace, slots: &[u16]) -> Result<String, std::fmt::Error> {
    let h = &trace.header;
    let mut out = String::new();
    let written = trace.tokens().filter(|t| t.0 == crate::moe::trace::Phase::Decode).count();
    writeln!(
        out,
        "{}: {} of {}, {} used; {} read, {written} written",
        printable(&h.model),
        output::counted(h.n_layer, "layer"),
        output::counted(h.n_expert, "expert"),
        h.n_expert_used,
        output::counted(trace.n_tokens() - written, "token")
    )?;
    writeln!(
        out,
        "One token's cycle is {} a layer: with fewer, lru shared by all layers never hits.\n",
        output::counted(h.n_expert_used, "slot")
    )?;
    let cells: String = slots.iter().map(|s| format!(" {s:>10}")).collect();
    writeln!(out, "{:<30}{cells}", "slots a layer")?;
    let bytes: u64 = h.layer_bytes.iter().map(|b| b.0).sum();
    if bytes > 0 {
        let cells: String = slots.iter().map(|&s| format!(" {:>10}", output::memory(u64::from(s) * bytes))).collect();
        writeln!(out, "{:<30}{cells}", "they take")?;
    }
    writeln!(out, "\nhits in %")?;
    Ok(out)
}
