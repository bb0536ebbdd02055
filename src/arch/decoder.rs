//! The decoder-only transformer that all architectures here are: embed; for each layer norm, attention, residual,
//! norm, feed-forward network, residual; norm; logits.

use super::config::Config;
use super::ffn::{DenseFfn, Ffn, MoeFfn, MoeOptions, Next, SOME_PAIRS};
use super::gqa::{Gqa, GqaOptions};
use super::mla::Mla;
use super::pass::{Block, Buffers, Machine};
use super::weights::{Loader, Matrix};
use super::{ModelError, PassError};
use crate::gguf::Gguf;
use crate::moe::planner::BufferBytes;
use crate::moe::{LayerParts, StoreLayout};
use crate::ops;
use crate::ops::kv::KvLayer;
use crate::ops::{Rope, RopeStyle, Yarn};

/// A model's passes and small weights. Large matrices are in [`super::weights::Dense`], experts in the store.
pub struct Decoder {
    /// Sizes and scales.
    pub config: Config,
    /// The token embedding's index among the file's tensors: rows are read when they are looked up.
    embedding: usize,
    layers: Vec<Layer>,
    output_norm: Vec<f32>,
    /// (n_vocab, n_embd): `output.weight`, or the token embedding where they are tied.
    output: Matrix,
    rope: Rope,
}

/// One layer.
pub struct Layer {
    /// (n_embd)
    pub attn_norm: Vec<f32>,
    /// Attention.
    pub attn: Attention,
    /// (n_embd)
    pub ffn_norm: Vec<f32>,
    /// Feed-forward network.
    pub ffn: Ffn,
}

/// The kinds of attention.
pub enum Attention {
    /// Grouped queries.
    Gqa(Box<Gqa>),
    /// Multi-head latent attention.
    Mla(Box<Mla>),
}

/// What an architecture says of itself besides its layers.
pub struct Shape {
    /// Sizes and scales.
    pub config: Config,
    /// Which values of a head rotate together.
    pub rope_style: RopeStyle,
}

impl Decoder {
    /// Declares the weights of a model whose layers `layer` declares.
    pub fn load(
        l: &mut Loader<'_>,
        shape: Shape,
        mut layer: impl FnMut(&mut Loader<'_>, &Config, usize) -> Result<Layer, ModelError>,
    ) -> Result<Self, ModelError> {
        let Shape { config: c, rope_style } = shape;
        let embedding = l.index("token_embd.weight", &[c.n_embd, c.n_vocab])?;
        let output = if l.has("output.weight") { "output.weight" } else { "token_embd.weight" };
        let output = l.matrix(output, c.n_embd, c.n_vocab)?;
        let output_norm = l.vector("output_norm.weight", &[c.n_embd])?;
        let factors = l.optional_vector("rope_freqs.weight", &[c.rope.n_rot / 2])?;
        let layers = (0..c.n_layer).map(|il| layer(l, &c, il)).collect::<Result<_, _>>()?;
        let rope = Rope::new(&ops::RopeConfig {
            style: rope_style,
            n_rot: c.rope.n_rot,
            freq_base: c.rope.freq_base,
            freq_scale: c.rope.freq_scale,
            attn_factor: c.rope.attn_factor,
            yarn: (c.rope.ext_factor != 0.0).then_some(Yarn {
                orig_ctx: c.rope.n_ctx_orig as u32,
                ext_factor: c.rope.ext_factor,
                beta_fast: c.rope.beta_fast,
                beta_slow: c.rope.beta_slow,
            }),
            freq_factors: factors.as_deref(),
        });
        Ok(Decoder { config: c, embedding, layers, output_norm, output, rope })
    }

    /// What each layer keeps in the KV cache for a position.
    pub fn kv_layers(&self) -> Vec<KvLayer> {
        self.layers
            .iter()
            .map(|l| match &l.attn {
                Attention::Gqa(a) => a.kv_layer(),
                Attention::Mla(a) => a.kv_layer(),
            })
            .collect()
    }

    /// The sizes of the expert store; `None` for a dense model.
    pub fn store_layout(&self) -> Option<StoreLayout> {
        let moe = self.config.moe.as_ref()?;
        let parts: Vec<Option<LayerParts>> =
            self.layers.iter().map(|l| if let Ffn::Moe(f) = &l.ffn { Some(f.parts()) } else { None }).collect();
        Some(StoreLayout::new(parts, moe.router.n_expert))
    }

    /// Bytes of buffers for a block of tokens of `n_sessions` sequences, roughly.
    pub fn buffer_bytes(&self, n_sessions: usize) -> BufferBytes {
        let c = &self.config;
        let attn = c.n_head * (c.head_dim_k + 2 * c.head_dim_v) + 2 * c.n_head_kv * (c.head_dim_k + c.head_dim_v);
        // Gate and up, and as much for what is quantised of them.
        let dense = self.layers.iter().map(|l| 4 * l.ffn.dense_width()).max().unwrap_or(0);
        let (used, n_ff_exp) = c.moe.as_ref().map_or((0, 0), |m| (m.router.n_expert_used, m.n_ff_exp));
        BufferBytes {
            // Logits, here and in their sessions.
            fixed: (c.n_vocab * 2 * 4).saturating_mul(n_sessions) as u64,
            per_token: (4 * (5 * c.n_embd + attn + dense + used * c.n_embd)) as u64,
            pairs_per_token: used,
            most_pairs: SOME_PAIRS,
            per_pair: (4 * 4 * n_ff_exp) as u64,
        }
    }

    /// Columns of its widest matrix.
    pub fn widest(&self) -> usize {
        let c = &self.config;
        let ffn = self.layers.iter().map(|l| l.ffn.dense_width()).max().unwrap_or(0);
        let expert = c.moe.as_ref().map_or(0, |m| m.n_ff_exp);
        [c.n_embd, c.n_head * c.head_dim_v, ffn, expert].into_iter().max().unwrap_or(0)
    }

    /// Runs a block through the layers; the logits of the wanted tokens are in `b.logits` (n_wanted, n_vocab).
    ///
    /// # Errors
    /// When the file can't be read any more, or the pass was to stop.
    pub fn forward(
        &self,
        m: &Machine<'_>,
        b: &mut Buffers,
        gguf: &Gguf,
        block: &mut Block<'_>,
    ) -> Result<(), PassError> {
        let (c, n_tokens) = (&self.config, block.tokens.len());
        b.rows.clear();
        b.rows.extend(0..n_tokens as u32);
        self.embed(b, gguf, block.tokens)?;
        let rope = self.rope.table(&block.kv.positions());
        for (il, layer) in self.layers.iter().enumerate() {
            m.go_on()?;
            m.rms_norm(&b.x, &layer.attn_norm, c.rms_eps, &mut b.h);
            match &layer.attn {
                Attention::Gqa(a) => a.forward(m, b, block, &rope, il),
                Attention::Mla(a) => a.forward(m, b, block, &rope, il),
            }
            m.add_scaled(&mut b.x, &b.o, c.residual_scale, c.n_embd);
            m.rms_norm(&b.x, &layer.ffn_norm, c.rms_eps, &mut b.h);
            let next = self.layers.get(il + 1).map(|l| Next { norm: &l.ffn_norm, eps: c.rms_eps, ffn: &l.ffn });
            layer.ffn.forward(m, b, il, n_tokens, next)?;
            m.add_scaled(&mut b.x, &b.o, c.residual_scale, c.n_embd);
        }
        self.logits(m, b, block.wanted);
        Ok(())
    }

    /// Looks the tokens' embeddings up, a row at a time, from the file. (n_tokens, n_embd)
    fn embed(&self, b: &mut Buffers, gguf: &Gguf, tokens: &[u32]) -> Result<(), PassError> {
        let n_embd = self.config.n_embd;
        let t = &gguf.tensors()[self.embedding];
        let row_bytes = n_embd / t.format.block_len * t.format.block_bytes;
        let mut raw = vec![0; row_bytes];
        b.x.resize(tokens.len() * n_embd);
        for (token, row) in tokens.iter().zip(b.x.chunks_mut(n_embd)) {
            gguf.read_at(t, u64::from(*token) * row_bytes as u64, &mut raw).map_err(ModelError::from)?;
            (t.format.dequantize_row)(&raw, row);
            if self.config.embedding_scale != 1.0 {
                ops::scale(row, self.config.embedding_scale);
            }
        }
        Ok(())
    }

    fn logits(&self, m: &Machine<'_>, b: &mut Buffers, wanted: &[u32]) {
        let (c, n_embd) = (&self.config, self.config.n_embd);
        let Buffers { x, h, acts, rows, logits, .. } = b;
        h.resize(wanted.len() * n_embd);
        m.each_row(h, n_embd, &|i, row| {
            let t = wanted[i] as usize;
            ops::rms_norm(&x[t * n_embd..(t + 1) * n_embd], &self.output_norm, c.rms_eps, row);
        });
        logits.resize(wanted.len() * c.n_vocab);
        m.activate(acts, h, n_embd, &[&self.output]);
        m.matmul(acts, &rows[..wanted.len()], &mut [(&self.output, logits)]);
        if c.logit_scale != 1.0 {
            m.each_row(logits, c.n_vocab, &|_, row| ops::scale(row, 1.0 / c.logit_scale));
        }
    }
}

/// What the layers of an architecture with grouped-query attention have.
pub struct Layers<'a> {
    /// Which values of a head rotate together.
    pub rope_style: RopeStyle,
    /// Attention's options, by layer.
    pub attn: &'a dyn Fn(usize) -> GqaOptions,
    /// The norm before the feed-forward network.
    pub ffn_norm: &'a str,
    /// The experts' options.
    pub moe: MoeOptions,
}

impl Decoder {
    /// Declares the weights of a model whose layers are grouped-query attention and a feed-forward network.
    pub fn load_gqa(l: &mut Loader<'_>, config: Config, layers: &Layers<'_>) -> Result<Self, ModelError> {
        Decoder::load(l, Shape { config, rope_style: layers.rope_style }, |l, c, il| {
            Ok(Layer {
                attn_norm: l.vector(&format!("blk.{il}.attn_norm.weight"), &[c.n_embd])?,
                attn: Attention::Gqa(Box::new(Gqa::load(l, c, il, &(layers.attn)(il))?)),
                ffn_norm: l.vector(&format!("blk.{il}.{}.weight", layers.ffn_norm), &[c.n_embd])?,
                ffn: moe_or_dense(l, c, il, &layers.moe)?,
            })
        })
    }
}

/// Experts, or a dense network in leading layers and models without experts.
pub fn moe_or_dense(l: &mut Loader<'_>, c: &Config, layer: usize, options: &MoeOptions) -> Result<Ffn, ModelError> {
    Ok(match &c.moe {
        Some(moe) if layer >= moe.n_layer_dense_lead => Ffn::Moe(Box::new(MoeFfn::load(l, c, moe, layer, options)?)),
        _ if c.n_ff == 0 => {
            return Err(ModelError::MissingKey { key: format!("{}.feed_forward_length", c.arch) });
        }
        _ => Ffn::Dense(DenseFfn::load(l, layer, "", c.n_embd, c.n_ff)?),
    })
}
