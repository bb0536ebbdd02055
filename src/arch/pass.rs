//! What a forward pass works with: the token block, the buffers, and named operations that split their work over
//! the thread team. An operation's result for a token depends on that token and its sequence alone.

use super::PassError;
use super::weights::{Dense, Matrix};
use crate::cpu::{Scratch, Team};
use crate::moe::recorder::Recorder;
use crate::moe::{ExpertStore, Lossy};
use crate::ops;
use crate::ops::attention::KvBatch;
use crate::ops::matmul::{Acts, OutRows, Product, matmul};
use crate::quant::ActKind;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Tokens that go through the layers together: many of one sequence (prefill), one (decode), or some of each of
/// many sequences (a batch).
pub struct Block<'a> {
    /// The tokens, a sequence's together and in order.
    pub tokens: &'a [u32],
    /// Their sequences' part of the KV cache.
    pub kv: KvBatch<'a>,
    /// The tokens whose logits are wanted, as indices into `tokens`.
    pub wanted: &'a [u32],
}

/// What stays the same over a pass.
pub struct Machine<'a> {
    /// The threads.
    pub team: &'a Team,
    /// The dense weights.
    pub dense: &'a Dense,
    /// The experts; `None` for a dense model.
    pub experts: Option<&'a ExpertStore>,
    /// What may be given up of the answer to read less.
    pub lossy: Lossy,
    /// Who is told what the routers choose.
    pub recorder: Option<&'a Recorder>,
    /// Once this is true the pass ends before the next layer, or the next experts.
    pub stop: Option<&'a AtomicBool>,
}

/// A pass's buffers, kept from pass to pass. Rows are tokens.
#[derive(Default)]
pub struct Buffers {
    /// The residual stream. (n_tokens, n_embd)
    pub x: Scratch,
    /// What a layer's part reads, normalised. (n_tokens, n_embd)
    pub h: Scratch,
    /// What a layer's part adds. (n_tokens, n_embd)
    pub o: Scratch,
    /// Queries, keys, values. (n_tokens, heads x head_dim)
    pub q: Scratch,
    /// Keys.
    pub k: Scratch,
    /// Values.
    pub v: Scratch,
    /// Attention's output before its projection. (n_tokens, n_head x head_dim_v)
    pub attn: Scratch,
    /// More room for an architecture's own intermediate values.
    pub latent: Scratch,
    /// Gate of the feed-forward network, (n_tokens or n_pairs, n_ff); before that free for attention's intermediate values.
    pub gate: Scratch,
    /// Up, likewise.
    pub up: Scratch,
    /// The router's scores. (n_tokens, n_expert)
    pub scores: Scratch,
    /// The experts' partial results. (n_pairs, n_embd)
    pub partial: Scratch,
    /// Quantised inputs of matrices: of the layer's parts, and of their second matrices.
    pub acts: Acts,
    /// As `acts`, for what comes in between.
    pub inner: Acts,
    /// For guessing the next layer's experts: its input, quantised, and its scores.
    pub guess: Guess,
    /// (n_wanted, n_vocab)
    pub logits: Scratch,
    /// 0, 1, 2 …: every row of a block.
    pub rows: Vec<u32>,
}

/// What guessing the next layer's experts needs. Rows are a sample of the tokens.
#[derive(Default)]
pub struct Guess {
    /// (n_sample, n_embd)
    pub h: Scratch,
    /// The same, quantised.
    pub acts: Acts,
    /// (n_sample, n_expert)
    pub scores: Scratch,
}

impl Machine<'_> {
    /// # Errors
    /// When the pass is to stop.
    pub fn go_on(&self) -> Result<(), PassError> {
        if self.stop.is_some_and(|stop| stop.load(Relaxed)) { Err(PassError::Stopped) } else { Ok(()) }
    }

    /// Calls `f` with each row of `out`, rows shared out among the threads.
    pub fn each_row(&self, out: &mut [f32], width: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        // A row or two are done before another thread has woken.
        if out.len() <= 2 * width {
            out.chunks_mut(width).enumerate().for_each(|(i, row)| f(i, row));
        } else {
            self.team.each_row(out, width, f);
        }
    }

    /// Quantises the rows of `x` (n_rows, width) for the matrices that will read them.
    pub fn activate(&self, acts: &mut Acts, x: &[f32], width: usize, readers: &[&Matrix]) {
        let kinds: Vec<ActKind> = readers.iter().map(|m| m.format.act).collect();
        self.activate_as(acts, x, width, &kinds);
    }

    /// As [`Machine::activate`], for readers known by what they need.
    pub fn activate_as(&self, acts: &mut Acts, x: &[f32], width: usize, kinds: &[ActKind]) {
        let n_rows = x.len() / width;
        acts.reset(n_rows, width, kinds);
        let put = |t: usize| acts.put(t, &x[t * width..(t + 1) * width]);
        // A row or two are done before another thread has woken.
        if n_rows <= 2 { (0..n_rows).for_each(put) } else { self.team.run(n_rows, &put) }
    }

    /// `out[t] = w x[t]` for each matrix and its output, one parallel region for all of them.
    pub fn matmul(&self, acts: &Acts, rows: &[u32], list: &mut [(&Matrix, &mut [f32])]) {
        let mut products: Vec<Product<'_>> = list.iter_mut().map(|(m, out)| self.product(m, acts, rows, out)).collect();
        matmul(self.team, &mut products);
    }

    /// A dense matrix times these rows of activations, into `out` (n_rows, m.n_rows).
    pub fn product<'x>(&'x self, m: &Matrix, acts: &'x Acts, rows: &'x [u32], out: &'x mut [f32]) -> Product<'x> {
        Product::new(self.dense.packed(m), acts, rows, OutRows::new(out, m.n_rows))
    }

    /// `x += scale * y`.
    pub fn add_scaled(&self, x: &mut [f32], y: &[f32], scale: f32, width: usize) {
        self.each_row(x, width, &|t, row| {
            let y = &y[t * width..(t + 1) * width];
            if scale == 1.0 {
                ops::add(row, y);
            } else {
                ops::add_scaled(row, y, scale);
            }
        });
    }

    /// RMSNorm of each row of `x` into `out`.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut Scratch) {
        out.resize(x.len());
        let n = weight.len();
        self.each_row(out, n, &|t, row| ops::rms_norm(&x[t * n..(t + 1) * n], weight, eps, row));
    }
}
