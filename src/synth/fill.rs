//! Random weights in any format, quantised by the format itself, so that every block is a valid one.
//!
//! Quantising takes seconds for each hundred million weights. Small tensors are drawn afresh; large ones are
//! put together from pools of blocks, one for each format and spread, read at random offsets: a file of any
//! size is then written as fast as the disk takes it, and its weights still look independent to an engine.

use std::collections::HashMap;

use rayon::prelude::*;

use super::preset::Preset;
use super::rng::Rng;
use super::tensors::{Fill, Spec};
use super::{SynthError, router};
use crate::quant::Format;

/// Tensors of up to this many weights are drawn afresh: all of a tiny model's.
const FRESH: u64 = 1 << 21;
/// Bytes of a pool, as long as that is no more than `POOL_WEIGHTS`.
const POOL_BYTES: usize = 16 << 20;
/// Weights of a pool.
const POOL_WEIGHTS: usize = 8 << 20;
/// Weights that are drawn as one task.
const TASK: usize = 1 << 16;
/// Different beginnings of rows that begin with the same constant.
const HEADS: u64 = 4096;

/// Writes tensors' bytes.
pub(super) struct Filler<'a> {
    preset: &'a Preset,
    seed: u64,
    router_skew: f32,
    pools: HashMap<(u32, u32), Vec<u8>>,
}

/// Takes bytes in the file's order.
pub(super) type Sink<'s> = dyn FnMut(&[u8]) -> Result<(), SynthError> + 's;

impl<'a> Filler<'a> {
    pub(super) fn new(preset: &'a Preset, seed: u64, router_skew: f32) -> Self {
        Self { preset, seed, router_skew, pools: HashMap::new() }
    }

    /// Hands the bytes of a tensor to `sink`, in order.
    pub(super) fn fill(&mut self, spec: &Spec, sink: &mut Sink<'_>) -> Result<(), SynthError> {
        let rng = Rng::new(self.seed, &spec.name);
        let n: u64 = spec.shape.iter().product();
        match &spec.fill {
            Fill::Values(values) => sink(&quantised(spec.format, values)),
            Fill::Router { layer } => {
                let values = router::weights(self.preset, *layer, self.router_skew, rng);
                sink(&quantised(spec.format, &values))
            }
            &Fill::Normal { mean, std } if n <= FRESH => sink(&normal(spec.format, mean, std, n as usize, &rng)),
            &Fill::Normal { std, .. } => self.draw(spec.format, std, n, rng, sink),
            &Fill::Headed { std, head } => self.headed(spec, std, head, rng, sink),
        }
    }

    /// The pool of weights with this spread.
    fn pool(&mut self, format: &'static Format, std: f32) -> &[u8] {
        let blocks = (POOL_BYTES / format.block_bytes).min(POOL_WEIGHTS / format.block_len);
        let seed = self.seed;
        self.pools.entry((format.id, std.to_bits())).or_insert_with(|| {
            let rng = Rng::new(seed, &format!("pool {} {std}", format.name));
            normal(format, 0.0, std, blocks * format.block_len, &rng)
        })
    }

    /// `n` weights in pieces of an eighth of the pool.
    fn draw(
        &mut self,
        format: &'static Format,
        std: f32,
        n: u64,
        mut rng: Rng,
        sink: &mut Sink<'_>,
    ) -> Result<(), SynthError> {
        let pool = self.pool(format, std);
        let mut left = n / format.block_len as u64;
        let piece = (pool.len() / format.block_bytes / 8) as u64;
        while left > 0 {
            let blocks = piece.min(left);
            sink(slice(pool, format, blocks, &mut rng))?;
            left -= blocks;
        }
        Ok(())
    }

    /// Rows that begin with a constant and go on with weights from the pool.
    fn headed(
        &mut self,
        spec: &Spec,
        std: f32,
        head: fn(&Preset, u64) -> f32,
        rng: Rng,
        sink: &mut Sink<'_>,
    ) -> Result<(), SynthError> {
        let (format, preset) = (spec.format, self.preset);
        let n_cols = spec.shape[0] as usize;
        let n_rows: u64 = spec.shape[1..].iter().product();
        // whole blocks that hold the constant columns, and what's left of the row
        let head_len = router::N_CONSTANT.next_multiple_of(format.block_len).min(n_cols);
        let tail_blocks = ((n_cols - head_len) / format.block_len) as u64;
        let make_head = |value: f32, which: u64| {
            let mut rng = rng.part(which);
            let mut values: Vec<f32> = (0..head_len).map(|_| rng.normal() * std).collect();
            values[..router::N_CONSTANT].fill(value);
            quantised(format, &values)
        };
        let mut heads_of: HashMap<u32, Vec<Vec<u8>>> = HashMap::new();
        let mut pick = rng.part(u64::MAX);
        let pool = self.pool(format, std);
        let mut rows = Vec::new();
        for row in 0..n_rows {
            let value = head(preset, row);
            let heads = heads_of
                .entry(value.to_bits())
                .or_insert_with(|| (0..HEADS).into_par_iter().map(|i| make_head(value, i)).collect());
            rows.extend_from_slice(&heads[pick.below(HEADS) as usize]);
            rows.extend_from_slice(slice(pool, format, tail_blocks, &mut pick));
            if rows.len() > 1 << 20 {
                sink(&rows)?;
                rows.clear();
            }
        }
        sink(&rows)
    }
}

/// Blocks of a pool from a random place on.
fn slice<'p>(pool: &'p [u8], format: &Format, blocks: u64, rng: &mut Rng) -> &'p [u8] {
    let last = (pool.len() / format.block_bytes) as u64 - blocks;
    let at = rng.below(last + 1) as usize * format.block_bytes;
    &pool[at..][..blocks as usize * format.block_bytes]
}

/// Values as whole blocks.
pub(super) fn quantised(format: &Format, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0; values.len() / format.block_len * format.block_bytes];
    (format.quantize_row)(values, &mut out);
    out
}

/// `n` normal weights, the same for any number of threads: each task draws from its own stream.
fn normal(format: &Format, mean: f32, std: f32, n: usize, rng: &Rng) -> Vec<u8> {
    let mut out = vec![0; n / format.block_len * format.block_bytes];
    let task_bytes = TASK / format.block_len * format.block_bytes;
    out.par_chunks_mut(task_bytes).enumerate().for_each(|(i, out)| {
        let mut rng = rng.part(i as u64);
        let n = out.len() / format.block_bytes * format.block_len;
        let values: Vec<f32> = (0..n).map(|_| mean + std * rng.normal()).collect();
        (format.quantize_row)(&values, out);
    });
    out
}
