//! Qwen1.5-MoE and Qwen2-57B-A14B: biases on queries, keys and values, a gated shared expert.

use super::decoder::{Decoder, Layers};
use super::ffn::MoeOptions;
use super::gqa::{Bias, GqaOptions};
use super::{Config, Keys, Loader, ModelError};
use crate::moe::Gating;
use crate::ops::RopeStyle;

pub(super) fn load(l: &mut Loader<'_>, mut c: Config) -> Result<Decoder, ModelError> {
    c.require_moe(l.metadata(), Gating::Softmax, false)?;
    let n_ff_shared = Keys::new(l.metadata(), "qwen2moe").size("expert_shared_feed_forward_length", 1 << 20)?;
    let layers = Layers {
        rope_style: RopeStyle::Neox,
        attn: &|_| GqaOptions { bias: Bias::Qkv, ..GqaOptions::PLAIN },
        ffn_norm: "ffn_norm",
        moe: MoeOptions { n_ff_shared: n_ff_shared.unwrap_or(c.n_ff), shared_gate: true, ..MoeOptions::PLAIN },
    };
    Decoder::load_gqa(l, c, &layers)
}
