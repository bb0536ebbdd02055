//! DeepSeek-V2, V3 and their like: latent attention, leading dense layers, shared experts, groups of experts.

use super::decoder::{Attention, Decoder, Layer, Shape, moe_or_dense};
use super::ffn::MoeOptions;
use super::mla::{Mla, MlaConfig};
use super::{Config, Keys, Loader, ModelError};
use crate::moe::Gating;
use crate::ops::RopeStyle;

pub(super) fn load(l: &mut Loader<'_>, mut c: Config) -> Result<Decoder, ModelError> {
    c.require_moe(l.metadata(), Gating::Softmax, false)?;
    let mla = MlaConfig::read(l.metadata(), &c)?;
    let k = Keys::new(l.metadata(), "deepseek2");
    let n_ff_exp = c.moe.as_ref().map_or(0, |m| m.n_ff_exp);
    let n_ff_shared = n_ff_exp * k.required_size("expert_shared_count", 1 << 10)?;
    if k.f32("attention.temperature_scale")?.is_some_and(|s| s != 0.0) {
        let why = "oncall doesn't know how to scale attention by position".into();
        return Err(ModelError::Impossible { key: k.name("attention.temperature_scale"), why });
    }
    let moe = MoeOptions { n_ff_shared, ..MoeOptions::PLAIN };
    Decoder::load(l, Shape { config: c, rope_style: RopeStyle::Norm }, |l, c, il| {
        Ok(Layer {
            attn_norm: l.vector(&format!("blk.{il}.attn_norm.weight"), &[c.n_embd])?,
            attn: Attention::Mla(Box::new(Mla::load(l, c, &mla, il)?)),
            ffn_norm: l.vector(&format!("blk.{il}.ffn_norm.weight"), &[c.n_embd])?,
            ffn: moe_or_dense(l, c, il, &moe)?,
        })
    })
}
