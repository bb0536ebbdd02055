//! Qwen3 with experts (Qwen3-30B-A3B, 235B-A22B): each query and key head is normalised.

use super::decoder::{Decoder, Layers};
use super::ffn::MoeOptions;
use super::gqa::{GqaOptions, QkNorm};
use super::{Config, Loader, ModelError};
use crate::moe::Gating;
use crate::ops::RopeStyle;

pub(super) fn load(l: &mut Loader<'_>, mut c: Config) -> Result<Decoder, ModelError> {
    c.require_moe(l.metadata(), Gating::Softmax, true)?;
    let layers = Layers {
        rope_style: RopeStyle::Neox,
        attn: &|_| GqaOptions { qk_norm: QkNorm::Head, ..GqaOptions::PLAIN },
        ffn_norm: "ffn_norm",
        moe: MoeOptions::PLAIN,
    };
    Decoder::load_gqa(l, c, &layers)
}
