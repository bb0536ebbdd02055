//! Granite 3 with experts: embeddings, residuals, scores and logits have scales; a shared expert in some.

use super::decoder::{Decoder, Layers};
use super::ffn::MoeOptions;
use super::gqa::GqaOptions;
use super::{Config, Keys, Loader, ModelError};
use crate::moe::Gating;
use crate::ops::RopeStyle;

pub(super) fn load(l: &mut Loader<'_>, mut c: Config) -> Result<Decoder, ModelError> {
    c.read_moe(l.metadata(), Gating::Softmax, true)?;
    let meta = l.metadata();
    let k = Keys::new(meta, "granitemoe");
    c.logit_scale = k.f32("logit_scale")?.ok_or_else(|| ModelError::MissingKey { key: k.name("logit_scale") })?;
    if c.logit_scale == 0.0 {
        return Err(ModelError::Impossible { key: k.name("logit_scale"), why: "logits can't be divided by 0".into() });
    }
    // A scale of 0 stands for none, as in llama.cpp.
    let scale = |key, none| Ok::<_, ModelError>(k.f32(key)?.filter(|&s| s != 0.0).unwrap_or(none));
    c.residual_scale = scale("residual_scale", 1.0)?;
    c.embedding_scale = scale("embedding_scale", 1.0)?;
    c.attn_scale = scale("attention.scale", c.attn_scale)?;
    let n_ff_shared = k.size("expert_shared_feed_forward_length", 1 << 20)?.unwrap_or(0);
    let layers = Layers {
        rope_style: RopeStyle::Norm,
        attn: &|_| GqaOptions::PLAIN,
        ffn_norm: "ffn_norm",
        moe: MoeOptions { n_ff_shared, ..MoeOptions::PLAIN },
    };
    Decoder::load_gqa(l, c, &layers)
}
