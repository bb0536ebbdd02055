//! Rows of activations, quantised for dot products with quantised weights: the definition in scalar code.
//!
//! Both ways are ggml's, so that llama.cpp can serve as the reference. A kernel that quantises faster has to
//! give the same integers and the same scales, bit for bit, for finite activations. A block with one that is infinite or not a number
//! has a scale that isn't finite: so every product with it shows that, up to the logits, instead of looking like an answer.

pub(super) use crate::cpu::simd::nearest;
use half::f16;

/// A row of activations in the form that a format's [`ActKind`](super::ActKind) names; the other slices are empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct ActRow<'a> {
    /// The activations themselves: for F32.
    pub f32: &'a [f32],
    /// Integers, -127..=127, one for each activation: for Q8_0 and Q8K.
    pub q: &'a [i8],
    /// Scales, one for each block of 32 (Q8_0) or 256 (Q8K).
    pub d: &'a [f32],
    /// The sums of each 32 activations, for weights with an offset: only for Q8_0.
    pub s: &'a [f32],
}

/// Quantises to blocks of 32: `q.len() == src.len() == 32 * d.len() == 32 * s.len()`, else it panics.
///
/// The scale is amax / 127, rounded to half precision and back (that's how ggml stores it); the integers are
/// `src * (127 / amax)`, the product rounded to nearest, ties to even. A block whose scale rounds to zero
/// (amax below 3.8e-6) is zero.
///
/// A block's sum is that of its integers times the scale as it was *before* it was rounded, rounded to half precision and back: ggml's
/// Q8_1, which Q4_1 and Q5_1 are multiplied with. The product of sum and rounded scale would be as good, but another number, and
/// on a tiny Q5_1 model that alone took the logits ten times as far from llama.cpp's as its own scatter is wide.
pub fn quantize_q8_0(src: &[f32], q: &mut [i8], d: &mut [f32], s: &mut [f32]) {
    assert!(src.len() == q.len() && src.len() == 32 * d.len() && src.len() == 32 * s.len());
    let (src, q) = (src.as_chunks::<32>().0, q.as_chunks_mut::<32>().0);
    for (((src, q), d), s) in src.iter().zip(q).zip(d).zip(s) {
        let amax = src.iter().map(|x| x.abs()).fold(0.0, |max, x| if is_larger(x, max) { x } else { max });
        let exact = amax / 127.0;
        *d = f16::from_f32(exact).to_f32();
        let id = if *d > 0.0 { 127.0 / amax } else { 0.0 };
        scale_to_i8(src, id, q);
        let sum = q.iter().map(|q| i32::from(*q)).sum::<i32>() as f32 * exact;
        *s = or_exact(f16::from_f32(sum).to_f32(), sum);
    }
}

/// A number through half precision and back, unless that overflowed: ggml then goes on with infinity, which no answer survives.
#[inline(always)]
pub(super) fn or_exact(half: f32, exact: f32) -> f32 {
    if half.is_infinite() { exact } else { half }
}

/// Quantises to blocks of 256: `q.len() == src.len() == 256 * d.len()`, else it panics.
///
/// With max the first of the activations that are largest in size, the integers are `src * (-127 / max)`, the product
/// rounded to nearest, ties to even, and the scale is `1 / (-127 / max)`. The sign is ggml's; it changes no dot product.
/// A block so small that -127 / max overflows (below 3.8e-37) is zero.
pub fn quantize_q8_k(src: &[f32], q: &mut [i8], d: &mut [f32]) {
    assert!(src.len() == q.len() && src.len() == 256 * d.len());
    let (src, q) = (src.as_chunks::<256>().0, q.as_chunks_mut::<256>().0);
    for ((src, q), d) in src.iter().zip(q).zip(d) {
        let max = src.iter().fold(0.0, |max, &x| if is_larger(x, max) { x } else { max });
        let id;
        (id, *d) = scales_of_k(max);
        scale_to_i8(src, id, q);
    }
}

/// What a block of 256 is multiplied by, and its scale.
#[inline(always)]
pub(super) fn scales_of_k(max: f32) -> (f32, f32) {
    let id = -127.0 / max;
    if id.is_infinite() { (0.0, 0.0) } else { (id, 1.0 / id) }
}

/// Whether a number is larger in size. What isn't one is larger than all: sizes are compared by their bits.
fn is_larger(x: f32, than: f32) -> bool {
    x.abs().to_bits() > than.abs().to_bits()
}

/// The first of the numbers that are largest in size, with its sign; zero if all are.
pub(super) fn largest(src: &[f32]) -> f32 {
    src.iter().fold(0.0f32, |max, &x| if x.abs() > max.abs() { x } else { max })
}

/// `src * id` rounded to nearest (ties to even) and held within -127..=127, so that -128 never occurs.
fn scale_to_i8(src: &[f32], id: f32, q: &mut [i8]) {
    for (q, x) in q.iter_mut().zip(src) {
        *q = nearest(x * id).clamp(-127, 127) as i8;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn q8_0(src: &[f32]) -> (Vec<i8>, Vec<f32>) {
        let (q, d, _) = q8_0_with_sums(src);
        (q, d)
    }

    fn q8_0_with_sums(src: &[f32]) -> (Vec<i8>, Vec<f32>, Vec<f32>) {
        let n = src.len() / 32;
        let (mut q, mut d, mut s) = (vec![99; src.len()], vec![f32::NAN; n], vec![f32::NAN; n]);
        quantize_q8_0(src, &mut q, &mut d, &mut s);
        (q, d, s)
    }

    fn q8_k(src: &[f32]) -> (Vec<i8>, Vec<f32>) {
        let (mut q, mut d) = (vec![99; src.len()], vec![f32::NAN; src.len() / 256]);
        quantize_q8_k(src, &mut q, &mut d);
        (q, d)
    }

    /// A block of one size: from below f32's normal range to a little below its end.
    fn block(len: usize) -> impl Strategy<Value = Vec<f32>> {
        (-148i32..120, prop::collection::vec(-1.0f32..=1.0, len))
            .prop_map(|(e, x)| x.iter().map(|x| x * 2f32.powi(e / 2) * 2f32.powi(e - e / 2)).collect())
    }

    #[test]
    fn the_largest_activation_becomes_the_largest_integer() {
        let mut x = [0.5f32; 256];
        x[17] = -2.0;
        x[40] = 2.0;
        let (q, d) = q8_0(&x);
        assert_eq!((q[17], q[0], q[40], q[64]), (-127, 32, 127, 127));
        // Both scales are halves: 2 / 127 and 0.5 / 127, rounded.
        assert_eq!((d[0], d[1], d[2]), (0.01574707, 0.01574707, 0.0039367676));
        // The first of the two that are largest is negative, and -127 / -2 positive.
        let (q, d) = q8_k(&x);
        assert_eq!((q[17], q[0], q[40]), (-127, 32, 127));
        assert_eq!(d[0], 1.0 / 63.5);
        x[3] = 2.0;
        let (q, d) = q8_k(&x);
        assert_eq!((q[17], q[0], q[3]), (127, -32, -127));
        assert_eq!(d[0], -1.0 / 63.5);
    }

    #[test]
    fn sums_are_of_the_exact_scale_and_halves() {
        // 3 / 127 isn't a half: times 32 * 127 it is 96, while the rounded scale would give 95.99.
        let (_, d, s) = q8_0_with_sums(&[3.0; 32]);
        assert_eq!((s[0], 32.0 * 127.0 * d[0]), (96.0, 95.99414));
        assert_eq!(q8_0_with_sums(&[1e-7; 32]).2, [0.0]);
        // Beyond what a half holds the sum is kept in single precision.
        let s = q8_0_with_sums(&[4000.0; 32]).2[0];
        assert!((s - 128e3).abs() < 0.1, "{s}");
    }

    #[test]
    fn ties_go_to_the_even_integer() {
        let mut x = [0.0f32; 32];
        x[..6].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]);
        assert_eq!(q8_0(&x).0[..6], [127, 0, 2, 2, 0, -2]);
    }

    #[test]
    fn blocks_too_small_to_scale_are_zero() {
        for size in [0.0, f32::from_bits(1), 1e-40, 3e-6] {
            assert_eq!(q8_0(&[size; 32]), (vec![0; 32], vec![0.0]), "{size}");
        }
        for size in [0.0, f32::from_bits(1), -1e-40, 3e-37] {
            assert_eq!(q8_k(&[size; 256]), (vec![0; 256], vec![0.0]), "{size}");
        }
        assert!(q8_0(&[4e-6; 32]).1[0] > 0.0);
        assert!(q8_k(&[4e-37; 256]).1[0] < 0.0);
    }

    #[test]
    fn nearest_agrees_with_the_library() {
        for i in -40_000..40_000 {
            let x = i as f32 / 16.0;
            assert_eq!(nearest(x), x.round_ties_even() as i32, "{x}");
        }
    }

    proptest! {
        /// Half a step, and what rounding the scale to a half moves: 2^-11 of the activation (a fixed step where halves
        /// are subnormal).
        #[test]
        fn q8_0_is_near(x in block(32)) {
            let (q, d) = q8_0(&x);
            let amax = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            prop_assert_eq!(d[0], f16::from_f32(d[0]).to_f32());
            for (x, q) in x.iter().zip(&q) {
                prop_assert!((-127..=127).contains(q));
                let off = (f64::from(*x) - f64::from(*q) * f64::from(d[0])).abs();
                prop_assert!(!d[0].is_finite() || off <= f64::from(amax) * (0.5 / 127.0 + 4.9e-4) + 127.0 * 3e-8);
            }
        }

        #[test]
        fn q8_k_is_near(x in block(256)) {
            let (q, d) = q8_k(&x);
            let amax = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            for (x, q) in x.iter().zip(&q) {
                prop_assert!((-127..=127).contains(q));
                let off = (f64::from(*x) - f64::from(*q) * f64::from(d[0])).abs();
                prop_assert!(off <= f64::from(amax) * (0.5 / 127.0 + 1e-6) + 4e-37);
            }
        }

        /// Whatever the bits: no panic, and integers in range.
        #[test]
        fn any_bits_will_do(x in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 256)) {
            prop_assert!(q8_0(&x).0.iter().chain(&q8_k(&x).0).all(|q| *q >= -127));
        }

        /// No scale hides that there was such an activation.
        #[test]
        fn what_is_not_finite_stays_so(mut x in block(256), at in 0usize..256, bad in 0usize..3) {
            x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][bad];
            let (q, d) = q8_0(&x);
            prop_assert!(!(d[at / 32] * f32::from(q[at])).is_finite());
            let (q, d) = q8_k(&x);
            prop_assert!(!(d[0] * f32::from(q[at])).is_finite());
        }
    }
}
