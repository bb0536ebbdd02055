//! `oncall show`: what is in a model file.

mod kernels;

use super::args::model_of_env;
use super::{Failure, output};
use crate::arch;
use crate::cpu::Isa;
use crate::engine::EMBEDDED_NAME;
use crate::gguf::{Gguf, Tensor, Value, printable};
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

/// Flags of `show`.
#[derive(Args)]
#[command(
    after_help = "--kernels shows what this processor would use; ONCALL_ISA (scalar, avx2, avxvnni, avx512vnni, avx512amx, neon, neondot, \
neoni8mm) forces another instruction set, here as in every command. Which one is used changes no logit by a bit."
)]
pub(super) struct ShowArgs {
    /// The file, or the first of a split model's files [default: $ONCALL_MODEL, or the model that is built in]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// The file, as in the other commands
    #[arg(short, long = "model", value_name = "FILE", conflicts_with = "file", default_values = model_of_env(), hide_default_value = true)]
    model: Option<PathBuf>,
    /// List every metadata key
    #[arg(long)]
    metadata: bool,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// List which kernels each kind of tensor is multiplied by
    #[arg(long)]
    kernels: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is in a file.
#[derive(Serialize)]
struct Summary {
    file: String,
    gguf_version: u32,
    bytes: u64,
    architecture: String,
    name: Option<String>,
    parameters: u64,
    /// Parameters that one token uses.
    active_parameters: u64,
    n_layer: usize,
    n_embd: usize,
    n_head: usize,
    n_head_kv: usize,
    n_vocab: usize,
    n_ctx_train: usize,
    n_expert: usize,
    n_expert_used: usize,
    n_ff_exp: usize,
    chat_template: bool,
    /// Bytes of each part of the model.
    parts: BTreeMap<&'static str, u64>,
    /// Bytes of one expert of a layer, on average.
    bytes_per_expert: u64,
    /// Bytes of a KV cache in f16, for 1024 tokens.
    kv_bytes_per_1k: u64,
    /// Bytes and tensors in each number format.
    formats: BTreeMap<&'static str, (u64, u64)>,
    /// With `--kernels`.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<Vec<kernels::Row>>,
    /// With `--metadata`.
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<serde_json::Map<String, serde_json::Value>>,
    /// With `--tensors`.
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<TensorRow>>,
}

/// What is said of a tensor.
#[derive(Serialize)]
struct TensorRow {
    name: String,
    format: &'static str,
    shape: Vec<u64>,
    bytes: u64,
}

pub(super) fn run(a: ShowArgs) -> Result<(), Failure> {
    let gguf = match a.file.or(a.model) {
        Some(path) => Gguf::open(&path)?,
        None => Gguf::from_static(EMBEDDED_NAME, crate::engine::embedded_bytes())?,
    };
    let mut s = summary(&gguf)?;
    if a.kernels {
        s.kernels = Some(kernels::rows(&gguf, Isa::get()?));
    }
    if a.json {
        s.metadata = a.metadata.then(|| gguf.metadata().iter().map(|(key, v)| (key.into(), to_json(&v))).collect());
        s.tensors = a.tensors.then(|| gguf.tensors().iter().map(tensor_row).collect());
        return output::json(&s);
    }
    let mut out = String::new();
    print(&mut out, &s)?;
    if let Some(rows) = &s.kernels {
        kernels::print(&mut out, rows, output::width())?;
    }
    if a.metadata {
        out.push('\n');
        for (key, value) in gguf.metadata().iter() {
            writeln!(out, "{} = {}", printable(key), shorten(&value))?;
        }
    }
    if a.tensors {
        out.push('\n');
        list_tensors(&mut out, gguf.tensors())?;
    }
    output::text(&out)
}

/// A line for each tensor: columns as wide as what stands in them, so that names of the usual lengths fit into 80.
fn list_tensors(out: &mut String, tensors: &[Tensor]) -> std::fmt::Result {
    let row = |t: &Tensor| {
        let shape: Vec<String> = t.shape().iter().map(u64::to_string).collect();
        [printable(&t.name), t.format.name.to_string(), shape.join(" x "), output::size(t.n_bytes)]
    };
    let rows: Vec<[String; 4]> = tensors.iter().map(row).collect();
    let widest = |i: usize| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
    // One long name doesn't move all others' columns.
    let [name_w, format_w, shape_w, size_w] = [widest(0).min(40), widest(1), widest(2), widest(3)];
    for [name, format, shape, size] in &rows {
        writeln!(out, "{name:<name_w$} {format:<format_w$} {shape:>shape_w$} {size:>size_w$}")?;
    }
    Ok(())
}

fn summary(gguf: &Gguf) -> Result<Summary, Failure> {
    let of_file = |e: &dyn std::fmt::Display| Failure::new(format!("{}: {e}", gguf.name()));
    let (model, _) = arch::declare(gguf, Isa::get()?, None).map_err(|e| of_file(&e))?;
    let c = &model.config;
    let (n_expert, n_expert_used, n_ff_exp) =
        c.moe.as_ref().map_or((0, 0, 0), |m| (m.router.n_expert, m.router.n_expert_used, m.n_ff_exp));
    let (mut parts, mut formats) = (BTreeMap::new(), BTreeMap::new());
    let (mut parameters, mut active, mut n_moe_layers) = (0, 0, 0u64);
    for t in gguf.tensors() {
        let part = part_of(&t.name);
        *parts.entry(part).or_insert(0) += t.n_bytes;
        let f: &mut (u64, u64) = formats.entry(t.format.name).or_insert((0, 0));
        *f = (f.0 + t.n_bytes, f.1 + 1);
        let n = elements(t);
        parameters += n;
        active += if part == "experts" { n * n_expert_used as u64 / (n_expert as u64).max(1) } else { n };
        n_moe_layers += u64::from(t.name.ends_with("ffn_down_exps.weight"));
    }
    let kv = model.kv_layers().iter().map(|l| 2 * l.n_head_kv * (l.head_dim_k + l.head_dim_v)).sum::<usize>();
    let experts = parts.get("experts").copied().unwrap_or(0);
    Ok(Summary {
        file: gguf.name().into(),
        gguf_version: gguf.version(),
        bytes: gguf.total_bytes(),
        architecture: c.arch.clone(),
        name: gguf.metadata().str("general.name").map_err(|e| of_file(&e))?.map(Into::into),
        parameters,
        active_parameters: active,
        n_layer: c.n_layer,
        n_embd: c.n_embd,
        n_head: c.n_head,
        n_head_kv: c.n_head_kv,
        n_vocab: c.n_vocab,
        n_ctx_train: c.n_ctx_train,
        n_expert,
        n_expert_used,
        n_ff_exp,
        chat_template: gguf.metadata().contains("tokenizer.chat_template"),
        bytes_per_expert: experts / (n_moe_layers * n_expert as u64).max(1),
        kv_bytes_per_1k: 1024 * kv as u64,
        parts,
        formats,
        kernels: None,
        metadata: None,
        tensors: None,
    })
}

fn elements(t: &Tensor) -> u64 {
    t.shape().iter().product()
}

/// Which part of a model a tensor belongs to.
fn part_of(name: &str) -> &'static str {
    let within = name.strip_prefix("blk.").and_then(|n| n.split_once('.')).map_or(name, |n| n.1);
    match within {
        n if n.contains("_exps.") => "experts",
        n if n.contains("_shexp") => "shared experts",
        n if n.starts_with("ffn_gate_inp") || n.starts_with("exp_probs") => "routers",
        n if n.contains("norm") => "norms",
        n if n.starts_with("attn") => "attention",
        n if n.starts_with("ffn") => "dense feed-forward",
        n if n.starts_with("token_embd") => "token embedding",
        n if n.starts_with("output") => "output",
        _ => "other",
    }
}

fn print(out: &mut String, s: &Summary) -> Result<(), std::fmt::Error> {
    let width = output::width();
    let mut line =
        |name: &str, value: String| writeln!(out, "{}", output::wrap_at(&format!("{name:<16} {value}"), 17, width));
    line("file", format!("{}, GGUF v{}, {}", printable(&s.file), s.gguf_version, output::size(s.bytes)))?;
    line("model", format!("{}{}", s.architecture, s.name.as_ref().map_or(String::new(), |n| format!(", {n:?}"))))?;
    line(
        "parameters",
        format!("{}, of which a token uses {}", output::count(s.parameters), output::count(s.active_parameters)),
    )?;
    line("layers", format!("{}, {} wide", s.n_layer, s.n_embd))?;
    line("heads", format!("{} for queries, {} for keys and values", s.n_head, s.n_head_kv))?;
    if s.n_expert > 0 {
        line(
            "experts",
            format!(
                "{} a layer, {} used for each token, {} wide, {} each",
                s.n_expert,
                s.n_expert_used,
                s.n_ff_exp,
                output::size(s.bytes_per_expert)
            ),
        )?;
    } else {
        line("experts", "none: every token uses the whole model".into())?;
    }
    line("vocabulary", output::counted(s.n_vocab, "token"))?;
    line(
        "context",
        format!(
            "{}; the KV cache takes {} for each 1024 (f16)",
            output::counted(s.n_ctx_train, "token"),
            output::memory(s.kv_bytes_per_1k)
        ),
    )?;
    line("chat template", if s.chat_template { "yes" } else { "no: it continues text" }.into())?;
    writeln!(out, "\nWhat it weighs")?;
    let total: u64 = s.parts.values().sum();
    let mut parts: Vec<_> = s.parts.iter().collect();
    parts.sort_by_key(|p| std::cmp::Reverse(p.1));
    for (part, bytes) in parts {
        writeln!(
            out,
            "  {part:<20} {:>10}  {:>5.1} %",
            output::size(*bytes),
            100.0 * *bytes as f64 / total.max(1) as f64
        )?;
    }
    writeln!(out, "\nNumber formats")?;
    let mut formats: Vec<_> = s.formats.iter().collect();
    formats.sort_by_key(|f| std::cmp::Reverse(f.1.0));
    for (format, (bytes, n)) in formats {
        writeln!(out, "  {format:<20} {:>10}  in {}", output::size(*bytes), output::counted(*n as usize, "tensor"))?;
    }
    Ok(())
}

fn tensor_row(t: &Tensor) -> TensorRow {
    TensorRow { name: t.name.to_string(), format: t.format.name, shape: t.shape().to_vec(), bytes: t.n_bytes }
}

/// A value as JSON, whole; a float that JSON has no number for is null.
fn to_json(value: &Value<'_>) -> serde_json::Value {
    match *value {
        Value::Array(a) => a.iter().map(|v| to_json(&v)).collect(),
        Value::Str(s) => s.into(),
        Value::Bool(b) => b.into(),
        Value::F32(f) => f.into(),
        Value::F64(f) => f.into(),
        Value::U64(n) => n.into(),
        v => v.as_integer().and_then(|n| i64::try_from(n).ok()).into(),
    }
}

/// A value on one line.
fn shorten(value: &Value<'_>) -> String {
    let cut = |s: String| if s.chars().count() > 100 { s.chars().take(100).collect::<String>() + " …" } else { s };
    match value {
        Value::Array(a) => {
            let first: Vec<String> = a.iter().take(6).map(|v| shorten(&v)).collect();
            let n = output::counted(a.len(), "value");
            format!("[{}{}] ({n})", first.join(", "), if a.len() > 6 { ", …" } else { "" })
        }
        v => match (v.as_str(), v.as_bool(), v.as_integer(), v.as_float()) {
            (Some(s), ..) => cut(format!("{s:?}")),
            (_, Some(b), ..) => b.to_string(),
            (_, _, Some(i), _) => i.to_string(),
            (.., Some(f)) => f.to_string(),
            _ => String::new(),
        },
    }
}
