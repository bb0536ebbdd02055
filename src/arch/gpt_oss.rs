//! gpt-oss (OpenAI 2025): biases everywhere, sinks, every other layer sees a sliding window, a clamped SwiGLU.

use super::decoder::{Decoder, Layers};
use super::ffn::{Activation, MoeOptions};
use super::gqa::{Bias, GqaOptions, QkNorm};
use super::{Config, Keys, Loader, ModelError};
use crate::moe::Gating;
use crate::ops::RopeStyle;

pub(super) fn load(l: &mut Loader<'_>, mut c: Config) -> Result<Decoder, ModelError> {
    c.require_moe(l.metadata(), Gating::SoftmaxOfChosen, false)?;
    let window = Keys::new(l.metadata(), "gpt-oss").required_size("attention.sliding_window", u32::MAX)?;
    let layers = Layers {
        rope_style: RopeStyle::Neox,
        attn: &|il| GqaOptions {
            bias: Bias::All,
            qk_norm: QkNorm::None,
            sinks: true,
            window: (il % 2 == 0).then_some(window),
        },
        ffn_norm: "post_attention_norm",
        moe: MoeOptions {
            router_bias: true,
            expert_biases: true,
            activation: Activation::SwigluOai,
            ..MoeOptions::PLAIN
        },
    };
    Decoder::load_gqa(l, c, &layers)
}
