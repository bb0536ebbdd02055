//! `oncall show --kernels`: which kernels each kind of tensor is multiplied by on this machine.

use super::super::output;
use super::part_of;
use crate::cpu::Isa;
use crate::gguf::{Gguf, Tensor, printable};
use crate::ops::matmul::Chosen;
use serde::Serialize;
use std::fmt::Write as _;

/// A kind of tensor: the same part of every layer, in the same format and shape.
#[derive(Serialize)]
pub(super) struct Row {
    tensor: String,
    /// How many the file has.
    n: usize,
    shape: String,
    format: &'static str,
    isa: String,
    /// How its rows lie in memory.
    layout: String,
    /// Activations as its products read them; none where it isn't multiplied.
    #[serde(skip_serializing_if = "Option::is_none")]
    activations: Option<String>,
    /// The kernel for one to four tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    gemv: Option<String>,
    /// The kernel for many tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    gemm: Option<String>,
}

/// The kinds of tensor, in the file's order.
pub(super) fn rows(gguf: &Gguf, isa: Isa) -> Vec<Row> {
    let tied = gguf.tensor("output.weight").is_none();
    let mut rows: Vec<Row> = Vec::new();
    for t in gguf.tensors() {
        let row = row(t, isa, tied);
        let same = |r: &&mut Row| (&r.tensor, &r.shape, r.format) == (&row.tensor, &row.shape, row.format);
        match rows.iter_mut().find(same) {
            Some(r) => r.n += 1,
            None => rows.push(row),
        }
    }
    rows
}

fn row(t: &Tensor, isa: Isa, tied: bool) -> Row {
    let shape: Vec<String> = t.shape().iter().map(u64::to_string).collect();
    let mut row = Row {
        tensor: kind_of(&t.name).into(),
        n: 1,
        shape: shape.join(" x "),
        format: t.format.name,
        isa: isa.to_string(),
        layout: "as numbers".into(),
        activations: None,
        gemv: None,
        gemm: None,
    };
    let part = part_of(&t.name);
    if part == "token embedding" && !tied {
        row.layout = "in the file, read by the row".into();
    } else if t.shape().len() >= 2 && part != "norms" && !t.name.ends_with(".bias") {
        let Some(c) = Chosen::of(t.format, isa) else { return row };
        row.layout = match t.dim(1) as usize {
            n if n < c.lanes => "row by row".into(),
            n if n.is_multiple_of(c.lanes) => format!("{} rows interleaved", c.lanes),
            n => format!("{} rows interleaved, the last {} row by row", c.lanes, n % c.lanes),
        };
        row.activations = Some(format!("{:?}", t.format.act).to_lowercase());
        if t.dim(1) as usize >= c.lanes {
            row.gemv = Some(format!("gemv {} {isa}, to {} tokens (to {} repeated)", c.kind, c.gemv, c.few));
            row.gemm = Some(format!("gemm {} {isa}, tiles of {} x {}", c.kind, c.tile.0, c.tile.1 * c.lanes));
        } else {
            row.gemv = Some(format!("dot {isa}"));
            row.gemm = row.gemv.clone();
        }
    }
    row
}

/// A tensor's name without its layer.
fn kind_of(name: &str) -> &str {
    name.strip_prefix("blk.").and_then(|n| n.split_once('.')).map_or(name, |n| n.1)
}

/// A tensor a line, and below it what multiplies it.
pub(super) fn print(out: &mut String, rows: &[Row], width: usize) -> std::fmt::Result {
    writeln!(out, "\nKernels")?;
    for r in rows {
        let what = format!("  {} ({} of {}): {}, {}", printable(&r.tensor), r.n, r.shape, r.format, r.layout);
        writeln!(out, "{}", output::wrap_at(&what, 6, width))?;
        if let (Some(acts), Some(gemv), Some(gemm)) = (&r.activations, &r.gemv, &r.gemm) {
            let how = format!("      {gemv}; {gemm}; activations {acts}");
            writeln!(out, "{}", output::wrap_at(&how, 6, width))?;
        }
    }
    Ok(())
}
