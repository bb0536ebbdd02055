//! A model from its header alone: what it needs of memory and what a token costs, for the planner.

use super::budget::needs;
use super::{Budget, EngineError, EngineOptions, Memory};
use crate::arch::{self, Config};
use crate::cpu::Isa;
use crate::gguf::{Gguf, ModelFile, Tensor};
use crate::moe::Part;
use crate::moe::planner::Needs;
use crate::ops::kv::{KV_BLOCK, KvPool};
use crate::quant::Format;
use std::collections::BTreeMap;

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
    /// Layers with experts.
    pub n_moe_layer: usize,
    /// Bytes of experts that a token uses.
    pub used_expert_bytes: u64,
    /// Weight bytes that a token reads in each format, with all bytes of the model in it.
    pub active: Vec<Active>,
    /// Bytes of one expert of each layer, and of the layer's other weights. (n_layer)
    pub layer_bytes: Vec<(u64, u64)>,
    /// The largest matrix of an expert; `None` for a dense model.
    pub part: Option<Part>,
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
    /// Columns of the matrix of which a token reads most.
    pub n_cols: usize,
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
        let (n, used) = n_experts(&model.config);
        let block = KvPool::bytes_per_block(&model.kv_layers(), o.type_k, o.type_v).unwrap_or(usize::MAX) as u64;
        let experts: Vec<&Tensor> = gguf.tensors().iter().filter(|t| is_expert(t)).collect();
        let all: u64 = experts.iter().map(|t| t.n_bytes).sum();
        let n_layers = experts.iter().filter(|t| t.name.contains("ffn_down_exps")).count() as u64;
        Ok(Outline {
            needs: needs(o, &model, dense, n_ctx)?,
            n_ctx,
            kv_per_1k: block.saturating_mul(1024) / KV_BLOCK as u64,
            expert_bytes: all / (n * n_layers).max(1),
            n_moe_layer: n_layers as usize,
            used_expert_bytes: all / n * used,
            active: active(gguf, n, used),
            layer_bytes: layer_bytes(gguf, model.config.n_layer, n as usize),
            part: largest_part(gguf, n),
            n_threads: o.n_threads_here(),
            config: model.config,
        })
    }
}

impl Outline {
    /// How a budget would be divided.
    ///
    /// # Errors
    /// When it's too small.
    pub fn budget(&self, o: &EngineOptions, memory: Memory) -> Result<Budget, EngineError> {
        Budget::new(&self.needs, o, memory)
    }
}

/// The file with most of a model's experts, as far as they are there: the first of a split model's may hold metadata alone.
pub fn experts_file(gguf: &Gguf) -> Option<&ModelFile> {
    let experts = |i| gguf.tensors().iter().filter(|t| t.file == i && is_expert(t)).map(|t| t.n_bytes).sum::<u64>();
    let there = |(i, file): &(usize, &ModelFile)| (experts(*i).min(file.n_bytes()), file.n_bytes());
    gguf.files().iter().enumerate().max_by_key(there).map(|f| f.1)
}

fn is_expert(t: &Tensor) -> bool {
    t.name.contains("_exps.weight")
}

/// The largest matrix of one of `n` experts.
pub(super) fn largest_part(gguf: &Gguf, n: u64) -> Option<Part> {
    gguf.tensors().iter().filter(|t| is_expert(t)).max_by_key(|t| t.n_bytes).map(|t| part(t, n))
}

/// Bytes of an expert, in the mean of all layers; 0 for a dense model.
pub(super) fn expert_bytes(gguf: &Gguf, n: u64) -> f64 {
    let experts = || gguf.tensors().iter().filter(|t| is_expert(t));
    let n_layers = experts().filter(|t| t.name.contains("ffn_down_exps")).count();
    experts().map(|t| t.n_bytes as f64).sum::<f64>() / (n as f64 * n_layers as f64).max(1.0)
}

/// One of `n` experts' matrices, in a file of its own.
fn part(t: &Tensor, n: u64) -> Part {
    let [n_cols, n_rows] = [t.dim(0), t.dim(1)].map(|n| n as usize);
    Part { tensor: 0, offset: 0, stride: 0, n_bytes: (t.n_bytes / n) as usize, format: t.format, n_rows, n_cols }
}

/// The layer that a tensor belongs to.
pub(super) fn layer_of(t: &Tensor) -> Option<usize> {
    t.name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

/// Bytes of one expert of each layer, and of the layer's other weights.
pub(super) fn layer_bytes(gguf: &Gguf, n_layer: usize, n_expert: usize) -> Vec<(u64, u64)> {
    let mut layers = vec![(0, 0); n_layer];
    for t in gguf.tensors() {
        let Some(bytes) = layer_of(t).and_then(|l| layers.get_mut(l)) else { continue };
        match is_expert(t) {
            true => bytes.0 += t.n_bytes / n_expert as u64,
            false => bytes.1 += t.n_bytes,
        }
    }
    layers
}

/// Experts in a layer, and those of them that a token uses.
pub(super) fn n_experts(config: &Config) -> (u64, u64) {
    config.moe.as_ref().map_or((1, 0), |m| (m.router.n_expert as u64, m.router.n_expert_used as u64))
}

/// What a token reads: every matrix once, of the experts those that are used. Its row of the embedding isn't counted.
pub(super) fn active(gguf: &Gguf, n: u64, used: u64) -> Vec<Active> {
    let tied = gguf.tensor("output.weight").is_none();
    let mut formats: BTreeMap<u32, (u64, Active)> = BTreeMap::new();
    for t in gguf.tensors() {
        let bytes = match &*t.name {
            "token_embd.weight" if !tied => continue,
            _ if is_expert(t) => t.n_bytes / n * used,
            _ => t.n_bytes,
        };
        let start = (0, Active { format: t.format, bytes: 0, all: 0, n_cols: 0 });
        let (most, a) = formats.entry(t.format.id).or_insert(start);
        (a.bytes, a.all) = (a.bytes + bytes, a.all + t.n_bytes);
        if bytes > *most {
            (*most, a.n_cols) = (bytes, t.dim(0) as usize);
        }
    }
    formats.into_values().map(|f| f.1).collect()
}
