//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in its absorbed form: the cache keeps one compressed
//! row for each position, shared by all heads; queries are projected into its space, and outputs out of it.

use super::ModelError;
use super::config::{Config, Keys};
use super::pass::{Block, Buffers, Machine};
use super::weights::{Loader, Matrix};
use crate::gguf::Metadata;
use crate::ops::attention::AttnParams;
use crate::ops::kv::KvLayer;
use crate::ops::{self, RopeTable};
use std::iter::zip;

/// The sizes of latent attention.
#[derive(Clone, Debug)]
pub struct MlaConfig {
    /// Width of compressed queries; 0 where queries aren't compressed.
    pub q_lora_rank: usize,
    /// Width of the compressed keys and values.
    pub kv_lora_rank: usize,
    /// Dimensions of a head that rotate.
    pub n_rot: usize,
    /// Those that don't.
    pub n_nope: usize,
    /// Width of a value head.
    pub head_dim_v: usize,
    /// What scores are multiplied by.
    pub scale: f32,
}

impl MlaConfig {
    /// Reads the keys of latent attention.
    pub fn read(meta: &Metadata, c: &Config) -> Result<Self, ModelError> {
        const MAX: u32 = 1 << 20;
        let k = Keys::new(meta, &c.arch);
        if k.size("attention.key_length_mla", MAX)?.is_none() {
            return Err(ModelError::Impossible {
                key: k.name("attention.key_length_mla"),
                why: "it is missing: the file's attn_kv_b isn't split into attn_k_b and attn_v_b, \
                      so convert the model again with a current tool"
                    .into(),
            });
        }
        let head_dim_k = k.required_size("attention.key_length_mla", MAX)?;
        let (kv_lora_rank, n_rot) = (k.required_size("attention.kv_lora_rank", MAX)?, c.rope.n_rot);
        if n_rot >= head_dim_k || n_rot == 0 {
            let why = format!("{n_rot} of a head's {head_dim_k} dimensions can't rotate");
            return Err(ModelError::Impossible { key: k.name("rope.dimension_count"), why });
        }
        // YaRN's magnitude goes into the scale: `attn_factor` as it was before llama.cpp's correction is cancelled.
        let stretch = 0.1 * (1.0 / c.rope.freq_scale).ln();
        let mscale = c.rope.attn_factor * (1.0 + stretch) * (1.0 + stretch * c.rope.yarn_log_mul / 0.1);
        Ok(MlaConfig {
            q_lora_rank: k.size("attention.q_lora_rank", MAX)?.unwrap_or(0),
            kv_lora_rank,
            n_rot,
            n_nope: head_dim_k - n_rot,
            head_dim_v: k.required_size("attention.value_length_mla", MAX)?,
            scale: mscale * mscale / (head_dim_k as f32).sqrt(),
        })
    }
}

/// How queries come from the input.
enum Query {
    /// One matrix.
    Direct(Matrix),
    /// Down to `q_lora_rank`, a norm, up.
    Compressed { a: Matrix, norm: Vec<f32>, b: Matrix },
}

/// A layer's latent attention.
pub struct Mla {
    query: Query,
    /// Compressed keys and values, and the rotating part of the key. (kv_lora_rank + n_rot, n_embd)
    wkv_a: Matrix,
    kv_norm: Vec<f32>,
    /// Each head's map from the part of a query that doesn't rotate into the compressed space.
    wk_b: Vec<Matrix>,
    /// Each head's map from the compressed space to its value.
    wv_b: Vec<Matrix>,
    wo: Matrix,
    config: MlaConfig,
    rms_eps: f32,
    n_head: usize,
}

impl Mla {
    /// Declares a layer's attention weights.
    pub fn load(l: &mut Loader<'_>, c: &Config, mla: &MlaConfig, layer: usize) -> Result<Self, ModelError> {
        let name = |part: &str| format!("blk.{layer}.attn_{part}.weight");
        let (rank, heads) = (mla.kv_lora_rank, c.n_head);
        let q_width = heads * (mla.n_nope + mla.n_rot);
        let query = match mla.q_lora_rank {
            0 => Query::Direct(l.matrix(&name("q"), c.n_embd, q_width)?),
            r => Query::Compressed {
                a: l.matrix(&name("q_a"), c.n_embd, r)?,
                norm: l.vector(&name("q_a_norm"), &[r])?,
                b: l.matrix(&name("q_b"), r, q_width)?,
            },
        };
        Ok(Mla {
            query,
            wkv_a: l.matrix(&name("kv_a_mqa"), c.n_embd, rank + mla.n_rot)?,
            kv_norm: l.vector(&name("kv_a_norm"), &[rank])?,
            wk_b: l.matrices(&name("k_b"), mla.n_nope, rank, heads)?,
            wv_b: l.matrices(&name("v_b"), rank, mla.head_dim_v, heads)?,
            wo: l.matrix(&name("output"), heads * mla.head_dim_v, c.n_embd)?,
            config: mla.clone(),
            rms_eps: c.rms_eps,
            n_head: heads,
        })
    }

    /// What it keeps for each position: the compressed row with the rotating part as key, the compressed row as value.
    pub fn kv_layer(&self) -> KvLayer {
        let rank = self.config.kv_lora_rank;
        KvLayer { n_head_kv: 1, head_dim_k: rank + self.config.n_rot, head_dim_v: rank }
    }

    /// Reads `b.h` (n_tokens, n_embd), writes `b.o`.
    pub fn forward(&self, m: &Machine<'_>, b: &mut Buffers, block: &mut Block<'_>, rope: &RopeTable, layer: usize) {
        let n_tokens = block.tokens.len();
        self.project(m, b, n_tokens);
        self.keys_and_queries(m, b, rope, n_tokens);
        let shape = self.kv_layer();
        block.kv.write(m.team, layer, &b.k, &b.v);
        b.attn.resize(n_tokens * self.n_head * shape.head_dim_v);
        let (n_head, scale) = (self.n_head, self.config.scale);
        let params = AttnParams { n_head, scale, n_swa: None, sinks: None };
        block.kv.attend(m.team, layer, &params, &b.latent, &mut b.attn);
        self.output(m, b, n_tokens);
    }

    /// Queries into `b.q` (n_tokens, n_head, n_nope + n_rot), compressed keys and values into `b.gate`.
    fn project(&self, m: &Machine<'_>, b: &mut Buffers, n_tokens: usize) {
        let Buffers { h, q, gate, up, acts, inner, rows, .. } = b;
        gate.resize(n_tokens * self.wkv_a.n_rows);
        match &self.query {
            Query::Direct(wq) => {
                q.resize(n_tokens * wq.n_rows);
                m.activate(acts, h, wq.n_cols, &[wq, &self.wkv_a]);
                m.matmul(acts, rows, &mut [(wq, &mut *q), (&self.wkv_a, &mut *gate)]);
            }
            Query::Compressed { a, norm, b: wq_b } => {
                up.resize(n_tokens * a.n_rows);
                q.resize(n_tokens * wq_b.n_rows);
                m.activate(acts, h, a.n_cols, &[a, &self.wkv_a]);
                m.matmul(acts, rows, &mut [(a, &mut *up), (&self.wkv_a, &mut *gate)]);
                m.each_row(up, a.n_rows, &|_, row| ops::rms_norm_in_place(row, norm, self.rms_eps));
                m.activate(inner, up, wq_b.n_cols, &[wq_b]);
                m.matmul(inner, rows, &mut [(wq_b, &mut *q)]);
            }
        }
    }

    /// The cache's rows into `b.k` (rank + n_rot) and `b.v` (rank), queries in its space into `b.latent`
    /// (n_tokens, n_head, rank + n_rot).
    fn keys_and_queries(&self, m: &Machine<'_>, b: &mut Buffers, rope: &RopeTable, n_tokens: usize) {
        let c = &self.config;
        let (rank, n_rot, n_nope, heads) = (c.kv_lora_rank, c.n_rot, c.n_nope, self.n_head);
        let (width, head) = (rank + n_rot, n_nope + n_rot);
        let Buffers { q, k, v, gate, up, latent, inner, rows, .. } = b;
        k.resize(n_tokens * width);
        v.resize(n_tokens * rank);
        m.each_row(k, width, &|t, row| {
            row.copy_from_slice(&gate[t * width..(t + 1) * width]);
            ops::rms_norm_in_place(&mut row[..rank], &self.kv_norm, self.rms_eps);
            rope.apply(t, &mut row[rank..], n_rot);
        });
        m.each_row(v, rank, &|t, row| row.copy_from_slice(&k[t * width..t * width + rank]));
        // The parts that don't rotate, gathered by head: (n_head, n_tokens, n_nope), then into the compressed space.
        up.resize(heads * n_tokens * n_nope);
        m.each_row(up, n_nope, &|i, row| {
            let (h, t) = (i / n_tokens, i % n_tokens);
            row.copy_from_slice(&q[(t * heads + h) * head..][..n_nope]);
        });
        gate.resize(heads * n_tokens * rank);
        self.by_head(m, inner, up, n_nope, &self.wk_b, gate, rows, n_tokens);
        latent.resize(n_tokens * heads * width);
        m.each_row(latent, width, &|i, row| {
            let (t, h) = (i / heads, i % heads);
            row[..rank].copy_from_slice(&gate[(h * n_tokens + t) * rank..][..rank]);
            row[rank..].copy_from_slice(&q[i * head + n_nope..][..n_rot]);
            rope.apply(t, &mut row[rank..], n_rot);
        });
    }

    /// Attention's rows in the compressed space to values, by head, then the output projection.
    fn output(&self, m: &Machine<'_>, b: &mut Buffers, n_tokens: usize) {
        let (rank, dv, heads) = (self.config.kv_lora_rank, self.config.head_dim_v, self.n_head);
        let Buffers { o, attn, gate, up, latent, acts, inner, rows, .. } = b;
        up.resize(heads * n_tokens * rank);
        m.each_row(up, rank, &|i, row| {
            let (h, t) = (i / n_tokens, i % n_tokens);
            row.copy_from_slice(&attn[(t * heads + h) * rank..][..rank]);
        });
        gate.resize(heads * n_tokens * dv);
        self.by_head(m, inner, up, rank, &self.wv_b, gate, rows, n_tokens);
        latent.resize(n_tokens * heads * dv);
        m.each_row(latent, dv, &|i, row| {
            let (t, h) = (i / heads, i % heads);
            row.copy_from_slice(&gate[(h * n_tokens + t) * dv..][..dv]);
        });
        o.resize(n_tokens * self.wo.n_rows);
        m.activate(acts, latent, self.wo.n_cols, &[&self.wo]);
        m.matmul(acts, rows, &mut [(&self.wo, &mut *o)]);
    }

    /// Each head's matrix over its rows of `x` (n_head, n_tokens, width), into its rows of `out`.
    #[allow(clippy::too_many_arguments)]
    fn by_head(
        &self,
        m: &Machine<'_>,
        acts: &mut ops::matmul::Acts,
        x: &[f32],
        width: usize,
        heads: &[Matrix],
        out: &mut [f32],
        rows: &mut Vec<u32>,
        n_tokens: usize,
    ) {
        rows.clear();
        rows.extend(0..(heads.len() * n_tokens) as u32);
        m.activate(acts, x, width, &[&heads[0]]);
        let outs = out.chunks_mut(n_tokens * heads[0].n_rows);
        let rows_of_heads = rows.chunks(n_tokens);
        let mut products: Vec<_> =
            zip(heads, zip(rows_of_heads, outs)).map(|(w, (rows, out))| m.product(w, acts, rows, out)).collect();
        ops::matmul::matmul(m.team, &mut products);
        rows.truncate(n_tokens);
    }
}
