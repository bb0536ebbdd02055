//! Root-mean-square normalisation (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight.
//!
//! Where the squares overflow, the results aren't numbers: as zeros they would look like an answer.

use super::elementwise::dot_lanes;
use crate::cpu::simd::{self, Kernel, Lanes};

/// Normalises the row `x` into `out`, both of `weight`'s length.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    out.copy_from_slice(x);
    rms_norm_in_place(out, weight, eps);
}

/// Normalises the row `x`, of `weight`'s length.
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    simd::run(RmsNorm { x, weight, eps });
}

/// Normalises each head of `x`, shape `(n_head, head_dim)` with `weight` of `head_dim`: the QK norm.
pub fn rms_norm_heads(x: &mut [f32], weight: &[f32], eps: f32) {
    assert!(!weight.is_empty() && x.len().is_multiple_of(weight.len()), "whole heads");
    simd::run(RmsNorm { x, weight, eps });
}

/// Each piece of `x` as long as `weight` is a row of its own.
struct RmsNorm<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for RmsNorm<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        if self.weight.is_empty() {
            assert!(self.x.is_empty());
            return;
        }
        for row in self.x.chunks_mut(self.weight.len()) {
            let mean = dot_lanes::<V>(row, row) / row.len() as f32;
            let scale = V::splat(if mean == f32::INFINITY { f32::NAN } else { 1.0 / (mean + self.eps).sqrt() });
            simd::zip_map::<V>(
                row,
                self.weight,
                #[inline(always)]
                |x, w| x.mul(scale).mul(w),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::noise;

    fn reference(x: &[f32], w: &[f32], eps: f32) -> Vec<f64> {
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = (mean + f64::from(eps)).sqrt().recip();
        x.iter().zip(w).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)).collect()
    }

    #[test]
    fn matches_the_definition_at_any_length() {
        for n in [1, 2, 15, 16, 17, 63, 64, 65, 80, 100, 576, 2048, 2879] {
            let (x, w) = (noise(n, 1), noise(n, 2));
            let mut out = vec![f32::NAN; n];
            rms_norm(&x, &w, 1e-5, &mut out);
            for (a, b) in out.iter().zip(reference(&x, &w, 1e-5)) {
                assert!((f64::from(*a) - b).abs() <= 4e-7 * b.abs().max(1e-3), "{n}: {a} {b}");
            }
            let mut y = x.clone();
            rms_norm_in_place(&mut y, &w, 1e-5);
            assert_eq!(y, out);
        }
    }

    #[test]
    fn what_overflows_has_no_norm() {
        for bad in [1e30, f32::INFINITY, f32::NAN] {
            let (mut x, w) = (noise(100, 1), noise(100, 2));
            x[77] = bad;
            rms_norm_in_place(&mut x, &w, 1e-5);
            assert!(x.iter().all(|x| x.is_nan()), "{bad}");
        }
    }

    #[test]
    fn heads_are_rows() {
        let (x, w) = (noise(3 * 96, 3), noise(96, 4));
        let mut y = x.clone();
        rms_norm_heads(&mut y, &w, 1e-6);
        for h in 0..3 {
            let mut one = vec![0.0; 96];
            rms_norm(&x[h * 96..][..96], &w, 1e-6, &mut one);
            assert_eq!(one, y[h * 96..][..96]);
        }
    }

    #[test]
    fn same_bits_on_every_isa() {
        for n in [1, 16, 33, 64, 100, 700] {
            let (x, w) = (noise(n, 1), noise(n, 2));
            simd::tests::same_bits_on_every_isa(|| {
                let mut out = vec![0.0; n];
                rms_norm(&x, &w, 1e-5, &mut out);
                out
            });
        }
    }
}
