//! Routers whose experts are as unequal as real ones.
//!
//! In a trained model some experts of a layer are asked for again and again; that is what makes a cache of
//! experts worth having. A replay of real traces is met well by scores of the form
//! `mu[expert] + token-dependent part`, normal both, and the best `k` taken. A model of random weights gets
//! that from its forward pass so:
//!
//! - the first [`N_CONSTANT`] dimensions of every token's embedding hold the same value, so that each layer's
//!   input has a part that doesn't depend on the token (layers add little to the residual stream);
//! - a router's row has equal weights there, which turn that constant into the expert's `mu`, and random
//!   weights elsewhere, which see the token.
//!
//! The first layer's experts stay equal, as in real models.

use super::preset::Preset;
use super::rng::Rng;

/// Dimensions of the residual stream that hold a constant.
pub(super) const N_CONSTANT: usize = 32;

/// The constant's share of the residual stream's energy, against 1 for the rest.
const ENERGY: f32 = 0.25;

/// Spread of `mu` against the token-dependent part, for a skew of 1.
const SPREAD: f32 = 1.15;

/// Spread of the token-dependent part of a score.
fn score_std(skew: f32) -> f32 {
    // popular experts have large scores already: softmax would leave the others nothing
    if skew > 0.0 { 1.0 } else { 2.0 }
}

/// The value of the constant dimensions of an embedding whose others are of order one.
pub(super) fn constant(n_embd: u32) -> f32 {
    (ENERGY * n_embd as f32 / N_CONSTANT as f32).sqrt()
}

/// A router's weights, (n_expert, n_embd).
pub(super) fn weights(preset: &Preset, layer: u32, skew: f32, mut rng: Rng) -> Vec<f32> {
    let n_expert = preset.moe.as_ref().map_or(0, |moe| moe.n_expert);
    let n_embd = preset.n_embd as usize;
    let std = score_std(skew);
    let per_weight = std / (preset.n_embd as f32).sqrt();
    let mut weights = Vec::with_capacity(n_expert as usize * n_embd);
    for _ in 0..n_expert {
        let at = weights.len();
        weights.extend((0..n_embd).map(|_| rng.normal() * per_weight));
        if skew > 0.0 {
            let mu = if layer == 0 { 0.0 } else { rng.normal() * std * SPREAD * skew };
            weights[at..at + N_CONSTANT].fill(mu / (N_CONSTANT as f32 * constant(preset.n_embd)));
        }
    }
    weights
}
