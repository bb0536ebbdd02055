//! Rotary position embedding (Su et al. 2021) with linear scaling, YaRN (Peng et al. 2023) and llama 3's factors.
//!
//! The angles are computed as ggml computes them, in f32 and by repeated multiplication: at position 30000 a more exact angle
//! would differ from the one that the models' other engines use by more than all other roundings together.

/// Which values of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Neighbours: 0 and 1, 2 and 3 (llama, deepseek2).
    Norm,
    /// Halves: 0 and n_rot/2, 1 and n_rot/2 + 1 (GPT-NeoX, Qwen, OLMoE, gpt-oss).
    Neox,
}

/// YaRN's parameters, as in the metadata of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// The context that the model was first trained for, in tokens.
    pub orig_ctx: u32,
    /// How much of the extrapolation is mixed in: 1 for YaRN.
    pub ext_factor: f32,
    /// Turns in the original context above which a frequency isn't scaled at all.
    pub beta_fast: f32,
    /// Turns below which it is only scaled.
    pub beta_slow: f32,
}

/// What a [`Rope`] is made from.
#[derive(Clone, Debug)]
pub struct RopeConfig<'a> {
    /// Which values are paired.
    pub style: RopeStyle,
    /// How many of a head's values are rotated, from its first: even.
    pub n_rot: usize,
    /// The base of the frequencies.
    pub freq_base: f32,
    /// What angles are multiplied by: 1 over the context's stretch, 1 if there is none.
    pub freq_scale: f32,
    /// What the rotated values are multiplied by (`attn_factor`), 1 if nothing. With YaRN the factor
    /// 1 + 0.1 ln(1 / freq_scale) comes on top, as in ggml.
    pub attn_factor: f32,
    /// YaRN, if the file asks for it.
    pub yarn: Option<Yarn>,
    /// llama 3's divisors (`rope_freqs.weight`), one for each pair.
    pub freq_factors: Option<&'a [f32]>,
}

/// How positions turn into angles; made once for a model (or for a kind of layer).
#[derive(Clone, Debug)]
pub struct Rope {
    style: RopeStyle,
    theta_scale: f32,
    freq_scale: f32,
    /// What cosine and sine are multiplied by.
    magnitude: f32,
    /// For each pair, how much of the unscaled angle is mixed in; empty without YaRN.
    mix: Vec<f32>,
    /// For each pair, the divisor of its angle.
    factors: Vec<f32>,
}

impl Rope {
    /// # Panics
    /// If `n_rot` is odd or there are fewer factors than pairs: whoever reads the file checks that.
    pub fn new(c: &RopeConfig) -> Self {
        assert!(c.n_rot.is_multiple_of(2), "n_rot is odd");
        let n_pairs = c.n_rot / 2;
        let factors = c.freq_factors.map_or_else(|| vec![1.0; n_pairs], |f| f[..n_pairs].to_vec());
        let (mut magnitude, mut mix) = (c.attn_factor, Vec::new());
        if let Some(y) = c.yarn.filter(|y| y.ext_factor != 0.0) {
            magnitude *= 1.0 + 0.1 * (1.0 / c.freq_scale).ln();
            let (low, high) = y.ramp(c.n_rot, c.freq_base);
            mix.extend((0..n_pairs).map(|i| {
                let t = (i as f32 - low) / (high - low).max(0.001);
                (1.0 - t.clamp(0.0, 1.0)) * y.ext_factor
            }));
        }
        Rope {
            style: c.style,
            theta_scale: c.freq_base.powf(-2.0 / c.n_rot as f32),
            freq_scale: c.freq_scale,
            magnitude,
            mix,
            factors,
        }
    }

    /// Cosines and sines for a block of tokens at these positions, for use in all heads and layers.
    pub fn table(&self, positions: &[u32]) -> RopeTable {
        let mut table = RopeTable { style: self.style, n_pairs: self.factors.len(), cos: Vec::new(), sin: Vec::new() };
        table.cos.reserve(positions.len() * table.n_pairs);
        table.sin.reserve(positions.len() * table.n_pairs);
        for &pos in positions {
            let mut theta = pos as f32;
            for (i, factor) in self.factors.iter().enumerate() {
                let (sin, cos) = self.angle(theta / factor, i).sin_cos();
                table.cos.push(cos * self.magnitude);
                table.sin.push(sin * self.magnitude);
                theta *= self.theta_scale;
            }
        }
        table
    }

    /// The angle of pair `i`, from the one that it has without scaling.
    fn angle(&self, extrapolated: f32, i: usize) -> f32 {
        let interpolated = self.freq_scale * extrapolated;
        match self.mix.get(i) {
            Some(mix) => interpolated * (1.0 - mix) + extrapolated * mix,
            None => interpolated,
        }
    }
}

impl Yarn {
    /// The pairs between which scaling comes in.
    fn ramp(&self, n_rot: usize, freq_base: f32) -> (f32, f32) {
        let pair = |turns: f32| {
            let wave = self.orig_ctx as f32 / (turns * 2.0 * std::f32::consts::PI);
            n_rot as f32 * wave.ln() / (2.0 * freq_base.ln())
        };
        let (low, high) = (pair(self.beta_fast).floor(), pair(self.beta_slow).ceil());
        (low.max(0.0), high.min(n_rot as f32 - 1.0))
    }
}

/// Cosines and sines of a block of tokens.
#[derive(Clone, Debug)]
pub struct RopeTable {
    style: RopeStyle,
    n_pairs: usize,
    cos: Vec<f32>, // (n_tokens, n_pairs)
    sin: Vec<f32>, // (n_tokens, n_pairs)
}

impl RopeTable {
    /// Rotates the first `n_rot` values of each head in `x`, shape `(n_head, head_dim)`, as the block's `token`-th token.
    pub fn apply(&self, token: usize, x: &mut [f32], head_dim: usize) {
        let range = token * self.n_pairs..(token + 1) * self.n_pairs;
        let (cos, sin) = (&self.cos[range.clone()], &self.sin[range]);
        assert!(head_dim > 0 && x.len().is_multiple_of(head_dim), "whole heads");
        for head in x.chunks_mut(head_dim) {
            let head = &mut head[..2 * self.n_pairs];
            match self.style {
                RopeStyle::Norm => {
                    for ((pair, &c), &s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                        let [x0, x1] = *pair;
                        *pair = [x0 * c - x1 * s, x0 * s + x1 * c];
                    }
                }
                RopeStyle::Neox => {
                    let (lo, hi) = head.split_at_mut(self.n_pairs);
                    for (((lo, hi), &c), &s) in lo.iter_mut().zip(hi).zip(cos).zip(sin) {
                        let (x0, x1) = (*lo, *hi);
                        (*lo, *hi) = (x0 * c - x1 * s, x0 * s + x1 * c);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::noise;

    fn config(style: RopeStyle, n_rot: usize) -> RopeConfig<'static> {
        RopeConfig {
            style,
            n_rot,
            freq_base: 10000.0,
            freq_scale: 1.0,
            attn_factor: 1.0,
            yarn: None,
            freq_factors: None,
        }
    }

    /// Rotation as the paper writes it, in f64; `angles` has one for each pair.
    fn reference(x: &[f32], angles: &[f64], magnitude: f64, style: RopeStyle) -> Vec<f64> {
        let mut y: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        for (i, a) in angles.iter().enumerate() {
            let (p, q) = match style {
                RopeStyle::Norm => (2 * i, 2 * i + 1),
                RopeStyle::Neox => (i, i + angles.len()),
            };
            let (x0, x1) = (f64::from(x[p]), f64::from(x[q]));
            y[p] = (x0 * a.cos() - x1 * a.sin()) * magnitude;
            y[q] = (x0 * a.sin() + x1 * a.cos()) * magnitude;
        }
        y
    }

    fn nmse(a: &[f32], b: &[f64]) -> f64 {
        let err: f64 = a.iter().zip(b).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
        err / b.iter().map(|b| b * b).sum::<f64>()
    }

    #[test]
    fn both_styles_partial_rotation_many_heads() {
        for style in [RopeStyle::Norm, RopeStyle::Neox] {
            let table = Rope::new(&config(style, 48)).table(&[0, 7, 1000]);
            for (token, pos) in [(0, 0.0), (1, 7.0), (2, 1000.0)] {
                let x = noise(3 * 64, 1 + token as u64);
                let mut y = x.clone();
                table.apply(token, &mut y, 64);
                let angles: Vec<f64> = (0..24).map(|i| pos * 10000f64.powf(-2.0 * f64::from(i) / 48.0)).collect();
                for h in 0..3 {
                    let r = reference(&x[h * 64..][..64], &angles, 1.0, style);
                    assert!(nmse(&y[h * 64..][..64], &r) < 1e-9);
                    assert_eq!(y[h * 64 + 48..][..16], x[h * 64 + 48..][..16], "values past n_rot stay");
                }
            }
        }
    }

    #[test]
    fn linear_scaling_and_factors_change_the_angles() {
        let factors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32 * 0.25).collect();
        let c = RopeConfig { freq_scale: 0.25, freq_factors: Some(&factors), ..config(RopeStyle::Neox, 64) };
        let x = noise(64, 9);
        let mut y = x.clone();
        Rope::new(&c).table(&[321]).apply(0, &mut y, 64);
        let angles: Vec<f64> =
            (0..32).map(|i| 321.0 * 10000f64.powf(-2.0 * i as f64 / 64.0) / f64::from(factors[i]) * 0.25).collect();
        assert!(nmse(&y, &reference(&x, &angles, 1.0, RopeStyle::Neox)) < 1e-10);
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_scales_slow_ones() {
        let yarn = Yarn { orig_ctx: 4096, ext_factor: 1.0, beta_fast: 32.0, beta_slow: 1.0 };
        let c = RopeConfig {
            freq_base: 150_000.0,
            freq_scale: 1.0 / 32.0,
            yarn: Some(yarn),
            ..config(RopeStyle::Neox, 64)
        };
        let x = noise(64, 9);
        let mut y = x.clone();
        Rope::new(&c).table(&[100]).apply(0, &mut y, 64);
        // floor(64 ln(4096 / (32 * 2 pi)) / (2 ln 150000)) = 8, ceil(64 ln(4096 / 2 pi) / (2 ln 150000)) = 18
        let angles: Vec<f64> = (0..32)
            .map(|i| {
                let full = 100.0 * 150_000f64.powf(-2.0 * f64::from(i) / 64.0);
                let keep = 1.0 - ((f64::from(i) - 8.0) / 10.0).clamp(0.0, 1.0);
                full / 32.0 * (1.0 - keep) + full * keep
            })
            .collect();
        let magnitude = 1.0 + 0.1 * 32f64.ln();
        assert!(nmse(&y, &reference(&x, &angles, magnitude, RopeStyle::Neox)) < 1e-10);
    }

    #[test]
    fn far_positions_stay_within_f32_of_the_exact_angle() {
        let x = noise(128, 9);
        let mut y = x.clone();
        Rope::new(&RopeConfig { freq_base: 500_000.0, ..config(RopeStyle::Norm, 128) })
            .table(&[32767])
            .apply(0, &mut y, 128);
        let angles: Vec<f64> = (0..64).map(|i| 32767.0 * 500_000f64.powf(-2.0 * f64::from(i) / 128.0)).collect();
        assert!(nmse(&y, &reference(&x, &angles, 1.0, RopeStyle::Norm)) < 1e-4);
    }
}
