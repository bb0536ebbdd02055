//! Grouped-query attention (Ainslie et al. 2023), with the options that architectures add: biases, a norm on
//! queries and keys, a sliding window, sinks.

use super::ModelError;
use super::config::Config;
use super::pass::{Block, Buffers, Machine};
use super::weights::{Loader, Matrix};
use crate::ops;
use crate::ops::RopeTable;
use crate::ops::attention::AttnParams;
use crate::ops::kv::KvLayer;

/// Which norm queries and keys get before they rotate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself (Qwen 3).
    Head,
    /// All heads as one row (OLMoE).
    Row,
}

/// Whether the projections have biases.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bias {
    /// Those that the file has.
    Optional,
    /// Those of queries, keys and values must be there.
    Qkv,
    /// All four must be there.
    All,
}

/// What an architecture's attention has besides the usual matrices.
#[derive(Clone, Copy, Debug)]
pub struct GqaOptions {
    /// Biases of the projections.
    pub bias: Bias,
    /// Norm on queries and keys.
    pub qk_norm: QkNorm,
    /// A learned score for each head that takes part in the softmax (gpt-oss).
    pub sinks: bool,
    /// Positions that a token sees, itself included; `None` for all.
    pub window: Option<usize>,
}

impl GqaOptions {
    /// The usual matrices, and biases if the file has them.
    pub const PLAIN: GqaOptions =
        GqaOptions { bias: Bias::Optional, qk_norm: QkNorm::None, sinks: false, window: None };
}

/// A layer's attention.
pub struct Gqa {
    wq: Matrix,
    wk: Matrix,
    wv: Matrix,
    wo: Matrix,
    bq: Option<Vec<f32>>,
    bk: Option<Vec<f32>>,
    bv: Option<Vec<f32>>,
    bo: Option<Vec<f32>>,
    norms: Option<[Vec<f32>; 2]>,
    sinks: Option<Vec<f32>>,
    window: Option<usize>,
    rms_eps: f32,
    scale: f32,
    shape: KvLayer,
    n_head: usize,
}

impl Gqa {
    /// Declares a layer's attention weights.
    pub fn load(l: &mut Loader<'_>, c: &Config, layer: usize, o: &GqaOptions) -> Result<Self, ModelError> {
        let name = |part: &str| format!("blk.{layer}.attn_{part}");
        let (nq, nk, nv) = (c.n_head * c.head_dim_k, c.n_head_kv * c.head_dim_k, c.n_head_kv * c.head_dim_v);
        let mut bias = |part: &str, n: usize, needed: bool| {
            let name = name(&format!("{part}.bias"));
            if needed { l.vector(&name, &[n]).map(Some) } else { l.optional_vector(&name, &[n]) }
        };
        let qkv = o.bias != Bias::Optional;
        let (bq, bk, bv) = (bias("q", nq, qkv)?, bias("k", nk, qkv)?, bias("v", nv, qkv)?);
        let bo = bias("output", c.n_embd, o.bias == Bias::All)?;
        let norms = match o.qk_norm {
            QkNorm::None => None,
            QkNorm::Head => Some([c.head_dim_k; 2]),
            QkNorm::Row => Some([nq, nk]),
        };
        let norms = match norms {
            None => None,
            Some([q, k]) => Some([l.vector(&name("q_norm.weight"), &[q])?, l.vector(&name("k_norm.weight"), &[k])?]),
        };
        Ok(Gqa {
            wq: l.matrix(&name("q.weight"), c.n_embd, nq)?,
            wk: l.matrix(&name("k.weight"), c.n_embd, nk)?,
            wv: l.matrix(&name("v.weight"), c.n_embd, nv)?,
            wo: l.matrix(&name("output.weight"), c.n_head * c.head_dim_v, c.n_embd)?,
            bq,
            bk,
            bv,
            bo,
            norms,
            sinks: if o.sinks { Some(l.vector(&name("sinks.weight"), &[c.n_head])?) } else { None },
            window: o.window,
            rms_eps: c.rms_eps,
            scale: c.attn_scale,
            shape: KvLayer { n_head_kv: c.n_head_kv, head_dim_k: c.head_dim_k, head_dim_v: c.head_dim_v },
            n_head: c.n_head,
        })
    }

    /// What it keeps for each position.
    pub fn kv_layer(&self) -> KvLayer {
        self.shape
    }

    /// Reads `b.h` (n_tokens, n_embd), writes `b.o`.
    pub fn forward(&self, m: &Machine<'_>, b: &mut Buffers, block: &mut Block<'_>, rope: &RopeTable, layer: usize) {
        let n_tokens = block.tokens.len();
        let Buffers { h, o, q, k, v, attn, acts, rows, .. } = b;
        q.resize(n_tokens * self.wq.n_rows);
        k.resize(n_tokens * self.wk.n_rows);
        v.resize(n_tokens * self.wv.n_rows);
        m.activate(acts, h, self.wq.n_cols, &[&self.wq, &self.wk, &self.wv]);
        m.matmul(acts, rows, &mut [(&self.wq, &mut *q), (&self.wk, &mut *k), (&self.wv, &mut *v)]);
        m.each_row(q, self.wq.n_rows, &|t, row| self.finish_heads(row, &self.bq, 0, rope, t));
        m.each_row(k, self.wk.n_rows, &|t, row| self.finish_heads(row, &self.bk, 1, rope, t));
        if let Some(bias) = &self.bv {
            m.each_row(v, self.wv.n_rows, &|_, row| ops::add(row, bias));
        }
        block.kv.write(m.team, layer, k, v);
        attn.resize(n_tokens * self.wo.n_cols);
        let sinks = self.sinks.as_deref();
        let params = AttnParams { n_head: self.n_head, scale: self.scale, n_swa: self.window, sinks };
        block.kv.attend(m.team, layer, &params, q, attn);
        o.resize(n_tokens * self.wo.n_rows);
        m.activate(acts, attn, self.wo.n_cols, &[&self.wo]);
        m.matmul(acts, rows, &mut [(&self.wo, &mut *o)]);
        if let Some(bias) = &self.bo {
            m.each_row(o, self.wo.n_rows, &|_, row| ops::add(row, bias));
        }
    }

    /// Bias, norm and rotation of a token's queries (`which` 0) or keys (1).
    fn finish_heads(&self, row: &mut [f32], bias: &Option<Vec<f32>>, which: usize, rope: &RopeTable, token: usize) {
        if let Some(bias) = bias {
            ops::add(row, bias);
        }
        if let Some(norms) = &self.norms {
            // The weight's length says whether a head or the whole row is normalised.
            ops::rms_norm_heads(row, &norms[which], self.rms_eps);
        }
        rope.apply(token, row, self.shape.head_dim_k);
    }
}
