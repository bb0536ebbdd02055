//! llama (Touvron et al. 2023), dense, or with experts as in Mixtral (Jiang et al. 2024).

use super::decoder::{Decoder, Layers};
use super::ffn::MoeOptions;
use super::gqa::GqaOptions;
use super::{Config, Keys, Loader, ModelError};
use crate::moe::Gating;
use crate::ops::RopeStyle;

pub(super) fn load(l: &mut Loader<'_>, mut c: Config) -> Result<Decoder, ModelError> {
    c.read_moe(l.metadata(), Gating::Softmax, true)?;
    if let Some(scale) = Keys::new(l.metadata(), "llama").f32("attention.scale")? {
        c.attn_scale = scale;
    }
    let layers = Layers {
        rope_style: RopeStyle::Norm,
        attn: &|_| GqaOptions::PLAIN,
        ffn_norm: "ffn_norm",
        moe: MoeOptions::PLAIN,
    };
    Decoder::load_gqa(l, c, &layers)
}
