//! Routers whose experts are as unequal as real ones.
//!
//! In a trained model some experts of a layer are asked for again and again, and a token tends to ask for what the
//! tokens just before it asked for; that is what makes a cache of experts worth having. Recorded traces are met
//! well by scores of the form `mu[expert] + part of the recent tokens + part of this token`, normal all three, of
//! which the best `k` are taken. A model of random weights gets that from its forward pass:
//!
//! - **mu**: the first [`N_CONSTANT`] dimensions of every token's embedding hold the same value, and layers add
//!   little to them. A router's row has equal weights there, which turn that constant into the expert's `mu`, and
//!   random weights elsewhere, which see the token. The first layer's experts have no `mu`, as in real models.
//! - **recent tokens**: the first layer's attention looks at the tokens just before. Its queries and keys get a
//!   constant part, made from the constant dimensions, in a few of the rotated pairs; turned by RoPE, two such
//!   parts agree at the same position and less and less over the next few. What it gathers there goes through
//!   random values into the residual stream, about as large as the token's own embedding.
//!
//! A [`skew`](super::Options::router_skew) of 1 meets the hit rates of Qwen3-30B-A3B's trace, see the tests.

use super::preset::{Preset, Rope};
use super::rng::Rng;

/// Dimensions of the residual stream that hold a constant.
pub(super) const N_CONSTANT: usize = 32;

/// The constant's share of the residual stream's energy, against 1 for the token's embedding.
const ENERGY: f32 = 0.25;

/// Spread of `mu` against the rest of a score, for a skew of 1.
const SPREAD: f32 = 1.15;

/// Size of what the first layer's attention adds, against the token's embedding, before it averages.
const LISTENING_GAIN: f32 = 1.7;

/// What averaging over the window leaves of a gain of 1: the weights are about 0.5, 0.35, 0.12 and 0.02.
const AVERAGING: f32 = 0.63;

/// Slowest and fastest rotation, in radians a token, that the first layer tells positions by.
const ROTATIONS: std::ops::Range<f32> = 0.07..0.6;

/// What the first layer's attention scores a token's own position above distant ones, before softmax.
const CONTRAST: f32 = 10.0;

/// The value of the constant dimensions of an embedding whose others are of order one.
pub(super) fn constant(n_embd: u32) -> f32 {
    (ENERGY * n_embd as f32 / N_CONSTANT as f32).sqrt()
}

/// A router's weights, (n_expert, n_embd).
pub(super) fn weights(preset: &Preset, layer: u32, skew: f32, mut rng: Rng) -> Vec<f32> {
    let n_expert = preset.moe.as_ref().map_or(0, |moe| moe.n_expert);
    let n_embd = preset.n_embd as usize;
    // popular experts have large scores already: softmax would leave the others nothing
    let std = if skew > 0.0 { 1.0 } else { 2.0 };
    let per_weight = std / (preset.n_embd as f32).sqrt();
    let rest = if listens(preset) { (1.0 + (LISTENING_GAIN * AVERAGING).powi(2)).sqrt() } else { 1.0 };
    let mut weights = Vec::with_capacity(n_expert as usize * n_embd);
    for _ in 0..n_expert {
        let at = weights.len();
        weights.extend((0..n_embd).map(|_| rng.normal() * per_weight));
        if skew > 0.0 {
            let mu = if layer == 0 { 0.0 } else { rng.normal() * rest * std * SPREAD * skew };
            weights[at..at + N_CONSTANT].fill(mu / (N_CONSTANT as f32 * constant(preset.n_embd)));
        }
    }
    weights
}

/// Whether the first layer can be made to listen: behind a bottleneck the queries have no constant to use, and
/// granitemoe scales attention and residuals its own way.
pub(super) fn listens(preset: &Preset) -> bool {
    preset.arch != "granitemoe" && preset.mla.as_ref().is_none_or(|mla| mla.q_rank == 0)
}

/// The gain of the first layer's attention output, given that of the others.
pub(super) fn listening_gain(residual_gain: f32) -> f32 {
    residual_gain.max(LISTENING_GAIN)
}

/// The weight of the constant dimensions in a row of the first layer's query matrix.
pub(super) fn query_head(preset: &Preset, row: u64) -> f32 {
    // with latent attention the rotated part stands behind the other
    let plain = u64::from(preset.head_dim - preset.n_rot());
    (row % u64::from(preset.head_dim)).checked_sub(plain).map_or(0.0, |dim| rotated_head(preset, dim))
}

/// The same for the key matrix, or with latent attention for the matrix that makes the latent and the rotated part.
pub(super) fn key_head(preset: &Preset, row: u64) -> f32 {
    match &preset.mla {
        Some(mla) => row.checked_sub(mla.kv_rank.into()).map_or(0.0, |dim| rotated_head(preset, dim)),
        None => rotated_head(preset, row % u64::from(preset.head_dim)),
    }
}

/// Nothing: values don't see the constant, or it would make some experts popular at random.
pub(super) fn value_head(_: &Preset, _: u64) -> f32 {
    0.0
}

/// The weight for a dimension of a head's rotated part.
fn rotated_head(preset: &Preset, dim: u64) -> f32 {
    let n_rot = u64::from(preset.n_rot());
    let pair = if is_neox(preset.arch) { dim % (n_rot / 2) } else { dim / 2 };
    if !listening_pairs(preset).contains(&(pair as u32)) {
        return 0.0;
    }
    // after the norm the stream's constant is smaller by what its energy adds
    let constant = constant(preset.n_embd) / (1.0 + ENERGY).sqrt();
    query_size(preset) / (N_CONSTANT as f32 * constant)
}

/// Whether the two dimensions that turn together are half the rotated part apart, instead of neighbours.
fn is_neox(arch: &str) -> bool {
    matches!(arch, "qwen2moe" | "qwen3moe" | "olmoe" | "gpt-oss")
}

/// The rotated pairs whose speed tells near positions apart.
fn listening_pairs(preset: &Preset) -> std::ops::Range<u32> {
    let n_rot = preset.n_rot();
    let divisor = if let Rope::Linear(factor) = preset.rope { factor } else { 1.0 };
    let speed = |pair: u32| preset.rope_base.powf(-2.0 * pair as f32 / n_rot as f32) / divisor;
    let first = (0..n_rot / 2).find(|&pair| speed(pair) < ROTATIONS.end).unwrap_or(0);
    let end = (first..n_rot / 2).find(|&pair| speed(pair) < ROTATIONS.start).unwrap_or(n_rot / 2);
    first..end.max(first + 1)
}

/// The constant in each listening dimension of a query and a key, so that their product, scaled as attention
/// does, is [`CONTRAST`].
fn query_size(preset: &Preset) -> f32 {
    let head_dim = preset.head_dim as f32;
    let scale = match (preset.arch, &preset.rope) {
        // YaRN makes scores larger on its way
        ("deepseek2", Rope::Yarn { factor, log_multiplier, .. }) => {
            (1.0 + log_multiplier * factor.ln()).powi(2) / head_dim.sqrt()
        }
        (_, Rope::Yarn { factor, .. }) => (1.0 + 0.1 * factor.ln()).powi(2) / head_dim.sqrt(),
        _ => 1.0 / head_dim.sqrt(),
    };
    let n_dims = 2.0 * listening_pairs(preset).len() as f32;
    let normed = matches!(preset.arch, "olmoe" | "qwen3moe");
    if !normed {
        return (CONTRAST / scale / n_dims).sqrt();
    }
    // a norm over the head follows: of its energy, the constant can have a share only
    let share = (CONTRAST / scale / head_dim).min(0.75);
    let random = 1.0 / (1.0 + ENERGY);
    (share / (1.0 - share) * random * head_dim / n_dims).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slots per layer, and the hit rates in percent of Qwen3-30B-A3B's trace (48 layers, 128 experts, 6 used):
    /// least recently used, and least frequently used with a half-life of 8 tokens.
    const REAL: [(usize, f64, f64); 4] = [(9, 46.0, 49.6), (12, 53.1, 57.3), (24, 73.2, 75.9), (48, 91.9, 92.2)];

    const N_TOKENS: usize = 128;
    const N_USED: usize = 6;

    /// The experts of each token in one layer, from the layer's real router and inputs of the statistics that
    /// the forward pass has.
    fn choices(preset: &Preset, layer: u32, skew: f32) -> Vec<Vec<usize>> {
        let n = preset.n_embd as usize;
        let weights = weights(preset, layer, skew, Rng::new(1, &format!("layer {layer}")));
        let mut rng = Rng::new(2, &format!("tokens {layer}"));
        let mut vectors =
            || (0..N_TOKENS + 3).map(|_| (0..n).map(|_| rng.normal()).collect()).collect::<Vec<Vec<f32>>>();
        let (own, gathered) = (vectors(), vectors());
        let window = [0.51, 0.35, 0.12, 0.02];
        (3..N_TOKENS + 3)
            .map(|t| {
                let recent = |i: usize| (0..4).map(|d| window[d] * gathered[t - d][i]).sum::<f32>();
                let mut x: Vec<f32> = (0..n).map(|i| own[t][i] + LISTENING_GAIN * recent(i)).collect();
                x[..N_CONSTANT].fill(constant(preset.n_embd));
                let score = |e: &usize| weights[e * n..][..n].iter().zip(&x).map(|(w, x)| w * x).sum::<f32>();
                let mut experts: Vec<usize> = (0..weights.len() / n).collect();
                experts.sort_by_cached_key(|e| -(score(e) * 1e6) as i64);
                experts.truncate(N_USED);
                experts
            })
            .collect()
    }

    /// Share of hits in percent of a cache of `slots` that evicts what has the least `heat`; heat grows by use and
    /// is halved after so many tokens. A very short half-life is least recently used.
    fn hits(tokens: &[Vec<usize>], slots: usize, half_life: f64) -> f64 {
        let (mut heat, mut resident) = ([0f64; 128], Vec::new());
        let (mut hits, mut all) = (0, 0);
        for token in tokens {
            heat.iter_mut().for_each(|h| *h *= 0.5f64.powf(1.0 / half_life));
            token.iter().for_each(|&e| heat[e] += 1.0);
            for &e in token {
                all += 1;
                if resident.contains(&e) {
                    hits += 1;
                    continue;
                }
                if resident.len() == slots {
                    let evictable = (0..slots).filter(|&i| !token.contains(&resident[i]));
                    let coldest = evictable.min_by(|&a, &b| heat[resident[a]].total_cmp(&heat[resident[b]]));
                    resident.swap_remove(coldest.expect("more slots than a token uses"));
                }
                resident.push(e);
            }
        }
        100.0 * f64::from(hits) / f64::from(all)
    }

    #[test]
    fn hit_rates_are_those_of_a_real_trace() {
        let preset = Preset::by_name("qwen3-30b-a3b").unwrap();
        let layers: Vec<_> = (1..17).map(|layer| choices(preset, layer, 1.0)).collect();
        for (slots, lru, lfu) in REAL {
            let mean = |half_life| layers.iter().map(|l| hits(l, slots, half_life)).sum::<f64>() / layers.len() as f64;
            let ours = (mean(0.05), mean(8.0));
            println!("{slots} slots: LRU {:.1} (real {lru}), LFU {:.1} (real {lfu})", ours.0, ours.1);
            assert!((ours.0 - lru).abs() < 5.0 && (ours.1 - lfu).abs() < 5.0, "{slots} slots: {ours:?}");
        }
    }

    #[test]
    fn without_skew_and_in_the_first_layer_experts_are_alike() {
        let preset = Preset::by_name("qwen3-30b-a3b").unwrap();
        let slots = 24;
        let uniform = 100.0 * slots as f64 / 128.0;
        for (layer, skew, name) in [(0, 1.0, "first layer"), (5, 0.0, "no skew")] {
            let rate = hits(&choices(preset, layer, skew), slots, 8.0);
            println!("{name}: {rate:.1}");
            assert!(rate < uniform + 25.0, "{name}: {rate}");
        }
    }

    #[test]
    fn the_first_layer_listens_to_its_neighbours() {
        for preset in super::super::PRESETS.iter().filter(|p| listens(p) && !p.is_tiny()) {
            let pairs = listening_pairs(preset);
            let n_rot = preset.n_rot() as f32;
            let agreement = |distance: f32| {
                let angle = |pair: u32| distance * preset.rope_base.powf(-2.0 * pair as f32 / n_rot);
                pairs.clone().map(|pair| angle(pair).cos()).sum::<f32>() / pairs.len() as f32
            };
            let weight = |distance: f32| (CONTRAST * (agreement(distance) - 1.0)).exp();
            let all: f32 = (0..128).map(|d| weight(d as f32)).sum();
            let near: f32 = (0..5).map(|d| weight(d as f32)).sum();
            println!("{}: pairs {pairs:?}, weights {:.2?}", preset.name, [0., 1., 2., 3.].map(|d| weight(d) / all));
            assert!(near / all > 0.75, "{}: {near} of {all}", preset.name);
            let listening = |row| query_head(preset, row) != 0.0;
            assert_eq!((0..preset.head_dim.into()).filter(|&row| listening(row)).count(), 2 * pairs.len());
        }
    }
}
