//! A model's sizes and options, read from its file's metadata and checked against each other.

use super::ModelError;
use crate::gguf::Metadata;
use crate::moe::{Gating, Router};

/// Sizes beyond these are a damaged or hostile file, not a model; products of them stay far below overflow.
const MAX_DIM: u32 = 1 << 20;
const MAX_VOCAB: u32 = 1 << 24;
const MAX_LAYER: u32 = 1 << 10;
const MAX_EXPERT: u32 = 1 << 12;

/// Sizes, scales and options of a model. Names are GGUF's.
#[derive(Clone, Debug)]
pub struct Config {
    /// `general.architecture`.
    pub arch: String,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Layers.
    pub n_layer: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads.
    pub n_head_kv: usize,
    /// Width of a query or key head.
    pub head_dim_k: usize,
    /// Width of a value head.
    pub head_dim_v: usize,
    /// Width of the dense feed-forward network.
    pub n_ff: usize,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// The context that the model was trained for.
    pub n_ctx_train: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// What scores are multiplied by before softmax.
    pub attn_scale: f32,
    /// What embeddings are multiplied by (Granite); 1 otherwise.
    pub embedding_scale: f32,
    /// What a layer's contribution is multiplied by (Granite); 1 otherwise.
    pub residual_scale: f32,
    /// What logits are divided by (Granite); 1 otherwise.
    pub logit_scale: f32,
    /// Experts and how they are chosen; `None` for a dense model.
    pub moe: Option<MoeConfig>,
    /// Lossy: experts that a token uses, if not as many as the model was trained with.
    pub fewer_experts: Option<usize>,
}

/// The expert part of a model.
#[derive(Clone, Debug)]
pub struct MoeConfig {
    /// How experts are chosen.
    pub router: Router,
    /// Width of an expert.
    pub n_ff_exp: usize,
    /// Layers at the start that are dense.
    pub n_layer_dense_lead: usize,
    /// Lossy: experts fewer than the model was trained with that a token uses.
    pub n_left_out: usize,
}

/// How positions are rotated in.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Dimensions of a head that rotate.
    pub n_rot: usize,
    /// The base of the frequencies.
    pub freq_base: f32,
    /// What positions are multiplied by: the inverse of the scaling factor.
    pub freq_scale: f32,
    /// The context before scaling.
    pub n_ctx_orig: usize,
    /// YaRN's mix of interpolation and extrapolation: 0 for none.
    pub ext_factor: f32,
    /// What cosines and sines are multiplied by, before YaRN's own correction.
    pub attn_factor: f32,
    /// YaRN: rotations above which a dimension isn't interpolated.
    pub beta_fast: f32,
    /// YaRN: rotations below which a dimension is interpolated fully.
    pub beta_slow: f32,
    /// `rope.scaling.yarn_log_multiplier` (DeepSeek), 0 if absent.
    pub yarn_log_mul: f32,
}

/// Reads an architecture's keys: `name("block_count")` is `llama.block_count`.
pub struct Keys<'a> {
    meta: &'a Metadata,
    arch: &'a str,
}

impl<'a> Keys<'a> {
    /// The keys of `arch` in `meta`.
    pub fn new(meta: &'a Metadata, arch: &'a str) -> Self {
        Keys { meta, arch }
    }

    /// The key's full name.
    pub fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    /// An optional size, at most `max`.
    pub fn size(&self, key: &str, max: u32) -> Result<Option<usize>, ModelError> {
        let name = self.name(key);
        match self.meta.u32(&name)? {
            Some(v) if v > max => Err(ModelError::Impossible { key: name, why: format!("{v} is more than {max}") }),
            v => Ok(v.map(|v| v as usize)),
        }
    }

    /// A size that must be there and be at least 1.
    pub fn required_size(&self, key: &str, max: u32) -> Result<usize, ModelError> {
        match self.size(key, max)? {
            None => Err(ModelError::MissingKey { key: self.name(key) }),
            Some(0) => Err(ModelError::Impossible { key: self.name(key), why: "it is 0".into() }),
            Some(v) => Ok(v),
        }
    }

    /// A size given once or for each layer; all layers must agree.
    fn uniform(&self, key: &str, n_layer: usize, max: u32) -> Result<Option<usize>, ModelError> {
        let name = self.name(key);
        let Some(each) = self.meta.u32_per_layer(&name, n_layer)? else { return Ok(None) };
        let first = each.first().copied().unwrap_or(0);
        if each.iter().any(|&v| v != first) {
            let why = "layers differ in it, which oncall can't run".into();
            return Err(ModelError::Impossible { key: name, why });
        }
        if first > max {
            return Err(ModelError::Impossible { key: name, why: format!("{first} is more than {max}") });
        }
        Ok(Some(first as usize))
    }

    /// An optional finite number.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, ModelError> {
        Ok(self.meta.f32(&self.name(key))?)
    }

    /// An optional flag.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        Ok(self.meta.bool(&self.name(key))?)
    }

    /// An optional string.
    pub fn str(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        Ok(self.meta.str(&self.name(key))?)
    }

    fn bad(&self, key: &str, why: impl Into<String>) -> ModelError {
        ModelError::Impossible { key: self.name(key), why: why.into() }
    }
}

impl Config {
    /// Reads and checks the keys that all architectures share.
    pub fn read(meta: &Metadata, arch: &str, n_vocab: usize) -> Result<Config, ModelError> {
        let k = Keys::new(meta, arch);
        let n_layer = k.required_size("block_count", MAX_LAYER)?;
        let n_embd = k.required_size("embedding_length", MAX_DIM)?;
        let n_head = match k.uniform("attention.head_count", n_layer, MAX_DIM)? {
            None => return Err(ModelError::MissingKey { key: k.name("attention.head_count") }),
            Some(0) => return Err(k.bad("attention.head_count", "it is 0")),
            Some(n) => n,
        };
        let n_head_kv = k.uniform("attention.head_count_kv", n_layer, MAX_DIM)?.unwrap_or(n_head);
        if n_head_kv == 0 || n_head % n_head_kv != 0 {
            return Err(k.bad("attention.head_count_kv", format!("{n_head_kv} doesn't divide {n_head} heads")));
        }
        let dim = |key| -> Result<usize, ModelError> {
            match k.size(key, MAX_DIM)? {
                Some(0) => Err(k.bad(key, "it is 0")),
                Some(v) => Ok(v),
                None if n_embd % n_head == 0 => Ok(n_embd / n_head),
                None => Err(k.bad("attention.head_count", format!("{n_head} doesn't divide a width of {n_embd}"))),
            }
        };
        let (head_dim_k, head_dim_v) = (dim("attention.key_length")?, dim("attention.value_length")?);
        if n_vocab == 0 || n_vocab > MAX_VOCAB as usize {
            return Err(ModelError::Impossible {
                key: "tokenizer.ggml.tokens".into(),
                why: format!("a vocabulary of {n_vocab} tokens"),
            });
        }
        let rms_eps = k.f32("attention.layer_norm_rms_epsilon")?;
        let rms_eps = rms_eps.ok_or(ModelError::MissingKey { key: k.name("attention.layer_norm_rms_epsilon") })?;
        if rms_eps < 0.0 {
            return Err(k.bad("attention.layer_norm_rms_epsilon", "it is negative"));
        }
        Ok(Config {
            arch: arch.into(),
            n_embd,
            n_layer,
            n_head,
            n_head_kv,
            head_dim_k,
            head_dim_v,
            n_ff: k.uniform("feed_forward_length", n_layer, MAX_DIM)?.unwrap_or(0),
            n_vocab,
            n_ctx_train: k.required_size("context_length", u32::MAX)?,
            rms_eps,
            rope: RopeConfig::read(&k, head_dim_k)?,
            attn_scale: 1.0 / (head_dim_k as f32).sqrt(),
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            moe: None,
            fewer_experts: None,
        })
    }

    /// As [`Config::read_moe`], for an architecture that always has experts.
    pub fn require_moe(&mut self, meta: &Metadata, gating: Gating, norm_weights: bool) -> Result<(), ModelError> {
        self.read_moe(meta, gating, norm_weights)?;
        if self.moe.is_none() {
            return Err(ModelError::MissingKey { key: format!("{}.expert_count", self.arch) });
        }
        Ok(())
    }

    /// Reads the keys of the expert part, with an architecture's defaults for what its files leave out.
    /// Leaves `moe` at `None` if there are no experts.
    pub fn read_moe(&mut self, meta: &Metadata, gating: Gating, norm_weights: bool) -> Result<(), ModelError> {
        let arch = self.arch.clone();
        let k = Keys::new(meta, &arch);
        let n_expert = k.size("expert_count", MAX_EXPERT)?.unwrap_or(0);
        if n_expert == 0 {
            return Ok(());
        }
        let has = k.required_size("expert_used_count", MAX_EXPERT)?;
        let n_expert_used = self.fewer_experts.unwrap_or(has);
        if n_expert_used == 0 || n_expert_used > has {
            return Err(ModelError::FewerExperts { wanted: n_expert_used, has });
        }
        if n_expert_used > n_expert {
            return Err(k.bad("expert_used_count", format!("{n_expert_used} of {n_expert} experts")));
        }
        let n_group = k.size("expert_group_count", MAX_EXPERT)?.unwrap_or(1).max(1);
        let n_group_used = k.size("expert_group_used_count", MAX_EXPERT)?.unwrap_or(n_group).max(1);
        if n_expert % n_group != 0 || n_group_used > n_group || n_expert / n_group * n_group_used < n_expert_used {
            let why = format!("{n_group_used} of {n_group} groups of {n_expert} experts can't give {n_expert_used}");
            return Err(k.bad("expert_group_count", why));
        }
        let gating = match k.size("expert_gating_func", 255)? {
            None | Some(0) => gating,
            Some(1) => Gating::Softmax,
            Some(2) => Gating::Sigmoid,
            Some(3) => Gating::SoftmaxOfChosen,
            Some(v) => return Err(k.bad("expert_gating_func", format!("{v} isn't 1 (softmax), 2 (sigmoid) or 3"))),
        };
        let n_ff_exp = k.uniform("expert_feed_forward_length", self.n_layer, MAX_DIM)?.unwrap_or(self.n_ff);
        if n_ff_exp == 0 {
            return Err(ModelError::MissingKey { key: k.name("expert_feed_forward_length") });
        }
        self.moe = Some(MoeConfig {
            router: Router {
                n_expert,
                n_expert_used,
                gating,
                norm_weights: k.flag("expert_weights_norm")?.unwrap_or(norm_weights),
                scale: k.f32("expert_weights_scale")?.unwrap_or(1.0),
                n_group,
                n_group_used,
            },
            n_ff_exp,
            n_layer_dense_lead: k.size("leading_dense_block_count", MAX_LAYER)?.unwrap_or(0),
            n_left_out: has - n_expert_used,
        });
        Ok(())
    }
}

impl RopeConfig {
    /// As llama.cpp reads and corrects them: YaRN's magnitude correction is cancelled here because the rotation
    /// itself applies it.
    fn read(k: &Keys<'_>, head_dim_k: usize) -> Result<RopeConfig, ModelError> {
        let n_rot = k.size("rope.dimension_count", MAX_DIM)?.unwrap_or(head_dim_k);
        if n_rot % 2 != 0 || n_rot > head_dim_k {
            let why = format!("{n_rot} isn't an even number up to the head's width of {head_dim_k}");
            return Err(k.bad("rope.dimension_count", why));
        }
        let freq_base = k.f32("rope.freq_base")?.unwrap_or(10000.0);
        if freq_base <= 0.0 {
            return Err(k.bad("rope.freq_base", format!("it is {freq_base}")));
        }
        let factor = match k.f32("rope.scaling.factor")? {
            Some(f) => f,
            None => k.f32("rope.scale_linear")?.unwrap_or(0.0),
        };
        if factor < 0.0 {
            return Err(k.bad("rope.scaling.factor", "it is negative"));
        }
        let scaling = k.str("rope.scaling.type")?.unwrap_or("linear");
        let (freq_scale, yarn) = match scaling {
            "none" => (1.0, false),
            "linear" | "yarn" => (if factor == 0.0 { 1.0 } else { 1.0 / factor }, scaling == "yarn"),
            other => return Err(k.bad("rope.scaling.type", format!("{other:?} isn't none, linear or yarn"))),
        };
        let n_ctx_orig = match k.size("rope.scaling.original_context_length", u32::MAX)? {
            Some(n) => n,
            None => k.required_size("context_length", u32::MAX)?,
        };
        let ext_factor = k.f32("rope.scaling.yarn_ext_factor")?.unwrap_or(if yarn { 1.0 } else { 0.0 });
        let yarn_log_mul = k.f32("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
        let mut rope = RopeConfig {
            n_rot,
            freq_base,
            freq_scale,
            n_ctx_orig,
            ext_factor,
            attn_factor: k.f32("rope.scaling.yarn_attn_factor")?.unwrap_or(1.0),
            beta_fast: k.f32("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: k.f32("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            yarn_log_mul,
        };
        if ext_factor != 0.0 {
            let factor = 1.0 / freq_scale;
            rope.attn_factor = if yarn_log_mul != 0.0 { 1.0 } else { mscale(factor) };
            rope.attn_factor *= 1.0 / (1.0 + 0.1 * factor.ln());
        }
        rope.attn_factor *= k.f32("rope.scaling.attn_factor")?.unwrap_or(1.0);
        Ok(rope)
    }
}

/// YaRN's magnitude of attention for a context `factor` times longer (arXiv 2309.00071, section 3.4).
fn mscale(factor: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}
