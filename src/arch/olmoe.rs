//! OLMoE (Muennighoff et al. 2024): queries and keys are normalised over all heads, weights aren't normalised.

use super::decoder::{Decoder, Layers};
use super::ffn::MoeOptions;
use super::gqa::{GqaOptions, QkNorm};
use super::{Config, Loader, ModelError};
use crate::moe::Gating;
use crate::ops::RopeStyle;

pub(super) fn load(l: &mut Loader<'_>, mut c: Config) -> Result<Decoder, ModelError> {
    c.require_moe(l.metadata(), Gating::Softmax, false)?;
    let layers = Layers {
        rope_style: RopeStyle::Neox,
        attn: &|_| GqaOptions { qk_norm: QkNorm::Row, ..GqaOptions::PLAIN },
        ffn_norm: "ffn_norm",
        moe: MoeOptions::PLAIN,
    };
    Decoder::load_gqa(l, c, &layers)
}
