//! A model from its header alone: what it needs of memory and what a token costs, for the planner.

use super::budget::needs;
use super::{EngineError, EngineOptions};
use crate::arch::{self, Config};
use crate::cpu::{Isa, Pages, Team};
use crate::gguf::{Gguf, Tensor};
use crate::moe::planner::Needs;
use crate::ops::kv::{KV_BLOCK, KvPool};
use crate::ops::matmul::{Acts, OutRows, Packed, matmul_groups};
use crate::quant::Format;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What the planner wants to know of a model.
pub struct Outline {
    /// Sizes.
    pub config: Config,
    /// Memory.
    pub needs: Needs,
    /// Positions that a session can hold.
    pub n_ctx: usize,
    /// Bytes of the KV cache for 1024 positions.
    pub kv_per_1k: u64,
    /// Bytes of one expert, on average over the layers; 0 for a dense model.
    pub expert_bytes: u64,
    /// Bytes of experts that a token uses.
    pub used_expert_bytes: u64,
    /// Weight bytes that a token reads in each format, with all bytes of the model in it.
    pub active: Vec<Active>,
    /// The size of a read: one matrix of an expert.
    pub read_bytes: usize,
    /// Threads that compute.
    pub n_threads: usize,
}

/// Weights of one format.
#[derive(Clone, Copy, Debug)]
pub struct Active {
    /// The format.
    pub format: &'static Format,
    /// Bytes that a token reads.
    pub bytes: u64,
    /// Bytes of all weights in it.
    pub all: u64,
}

impl Outline {
    /// Of a model that need not be all there.
    ///
    /// # Errors
    /// Whatever the header gets wrong.
    pub fn new(gguf: &Gguf, o: &EngineOptions) -> Result<Self, EngineError> {
        let of_model = |source| EngineError::Model { file: gguf.name().into(), source };
        let (model, dense) = arch::describe(gguf, Isa::get()?, o.n_expert_used).map_err(of_model)?;
        let n_ctx = o.n_ctx_of(&model.config);
        let (n, used) =
            model.config.moe.as_ref().map_or((1, 0), |m| (m.router.n_expert as u64, m.router.n_expert_used as u64));
        let block = KvPool::bytes_per_block(&model.kv_layers(), o.type_k, o.type_v).unwrap_or(usize::MAX) as u64;
        let experts: Vec<&Tensor> = gguf.tensors().iter().filter(|t| is_expert(t)).collect();
        let all: u64 = experts.iter().map(|t| t.n_bytes).sum();
        let n_layers = experts.iter().filter(|t| t.name.contains("ffn_down_exps")).count() as u64;
        Ok(Outline {
            needs: needs(o, &model, dense, n_ctx),
            n_ctx,
            kv_per_1k: block.saturating_mul(1024) / KV_BLOCK as u64,
            expert_bytes: all / (n * n_layers).max(1),
            used_expert_bytes: all / n * used,
            active: active(gguf, n, used),
            read_bytes: experts.iter().map(|t| (t.n_bytes / n) as usize).max().unwrap_or(0),
            n_threads: o.n_threads_here(),
            config: model.config,
        })
    }

    /// Seconds that a token's matrices take here with everything at hand, measured on made-up matrices of the same formats:
    /// as large as the model's, or large enough that no cache holds them.
    ///
    /// # Errors
    /// When the system refuses threads or memory.
    pub fn measure_compute(&self) -> Result<f64, EngineError> {
        let system = |source| EngineError::System { what: "threads, or memory for a measurement", source };
        let team = Team::new(self.n_threads).map_err(system)?;
        let isa = Isa::get()?;
        let mut seconds = 0.0;
        for a in &self.active {
            seconds += a.bytes as f64 / rate(a, isa, &team).map_err(system)?;
        }
        Ok(seconds)
    }
}

fn is_expert(t: &Tensor) -> bool {
    t.name.contains("_exps.weight")
}

/// Bytes of one expert of each layer, and of the layer's other weights.
pub(super) fn layer_bytes(gguf: &Gguf, n_layer: usize, n_expert: usize) -> Vec<(u64, u64)> {
    let mut layers = vec![(0, 0); n_layer];
    for t in gguf.tensors() {
        let layer = t.name.strip_prefix("blk.").and_then(|n| n.split_once('.')).and_then(|n| n.0.parse::<usize>().ok());
        let Some(bytes) = layer.and_then(|l| layers.get_mut(l)) else { continue };
        match is_expert(t) {
            true => bytes.0 += t.n_bytes / n_expert as u64,
            false => bytes.1 += t.n_bytes,
        }
    }
    layers
}

/// What a token reads: every matrix once, of the experts those that are used, of the embedding a row.
fn active(gguf: &Gguf, n: u64, used: u64) -> Vec<Active> {
    let tied = gguf.tensor("output.weight").is_none();
    let mut formats: BTreeMap<u32, Active> = BTreeMap::new();
    for t in gguf.tensors() {
        let bytes = match &*t.name {
            "token_embd.weight" if !tied => continue,
            _ if is_expert(t) => t.n_bytes / n * used,
            _ => t.n_bytes,
        };
        let a = formats.entry(t.format.id).or_insert(Active { format: t.format, bytes: 0, all: 0 });
        (a.bytes, a.all) = (a.bytes + bytes, a.all + t.n_bytes);
    }
    formats.into_values().collect()
}

/// Columns of the made-up matrices: whole blocks of every format.
const COLUMNS: usize = 2048;
/// More than last-level caches hold of one program's data.
const MAX_BYTES: u64 = 96 << 20;
/// How long a format is measured.
const TIME: Duration = Duration::from_millis(120);

/// Bytes a second at which one token goes through matrices of a format.
fn rate(a: &Active, isa: Isa, team: &Team) -> std::io::Result<f64> {
    let row_bytes = COLUMNS / a.format.block_len * a.format.block_bytes;
    let n_rows = (a.all.min(MAX_BYTES) as usize / row_bytes).next_multiple_of(64).max(64);
    let mut pages = Pages::new(n_rows * row_bytes)?;
    // Zeros are as much work as anything: no kernel looks for them, and no denormal slows it. Packed they are the same zeros.
    pages.chunks_mut(4096).for_each(|p| p[0] = 0);
    let w = Packed::new(a.format, isa, n_rows, COLUMNS, &pages);
    let mut acts = Acts::default();
    acts.reset(1, COLUMNS, &[a.format.act]);
    acts.put(0, &vec![1.0; COLUMNS]);
    let mut out = vec![0.0; n_rows];
    let step = w.n_groups().div_ceil(8 * team.n_threads()).max(1);
    let mut once = || {
        let out = OutRows::new(&mut out, n_rows);
        team.run(w.n_groups().div_ceil(step), &|i| {
            matmul_groups(w, i * step..((i + 1) * step).min(w.n_groups()), &acts, &[0], out);
        });
    };
    once();
    let (began, mut best, mut n) = (Instant::now(), f64::INFINITY, 0);
    // The best of a few: what disturbs a measurement only makes it slower.
    while n < 3 || began.elapsed() < TIME {
        let t = Instant::now();
        once();
        best = best.min(t.elapsed().as_secs_f64());
        n += 1;
    }
    Ok((n_rows * row_bytes) as f64 / best.max(1e-9))
}
