//! Quantises rows of activations faster than [`act`](crate::quant::act), with the same integers and scales, and sums the integers.
//!
//! By the lane: of plain loops the compiler makes dozens of shuffles, two numbers at a time, or gathers over several blocks. So Zen 4
//! quantises 2.4 G activations a second to Q8_0 and 3.5 to Q8_K on AVX-512, where loops did 1.4 and 1.8; 2.1 and 4.5 on AVX2.

use crate::cpu::Isa;
use crate::cpu::simd::{Kernel, Lanes, load, run_on};
use crate::quant::act::{or_exact, scales_of_k};

/// A row quantised to blocks of 32 and what the kernels want to know of it.
pub(super) struct Q8_0<'a> {
    pub q: &'a mut [i8],
    /// A scale for each 32.
    pub d: &'a mut [f32],
    /// The integers' sum over each 32, negated.
    pub negated_sum: &'a mut [i32],
    /// The sums of the activations, as [`ActRow`](crate::quant::ActRow) has them.
    pub offset: &'a mut [f32],
}

/// A row quantised to blocks of 256 and what the kernels want to know of it.
pub(super) struct Q8K<'a> {
    pub q: &'a mut [i8],
    /// A scale for each 256.
    pub d: &'a mut [f32],
    /// The integers' sum over each 16 and each 32, negated.
    pub negated_sum: (&'a mut [i16], &'a mut [i16]),
}

/// As [`quantize_q8_0`](crate::quant::act::quantize_q8_0).
pub(super) fn q8_0(isa: Isa, src: &[f32], to: Q8_0<'_>) {
    let n = src.len() / 32;
    assert!(src.len() == 32 * n && to.q.len() == 32 * n);
    assert!(to.d.len() == n && to.negated_sum.len() == n && to.offset.len() == n);
    run_on(isa, (src, to));
}

/// As [`quantize_q8_k`](crate::quant::act::quantize_q8_k).
pub(super) fn q8_k(isa: Isa, src: &[f32], to: Q8K<'_>) {
    let n = src.len() / 256;
    assert!(src.len() == 256 * n && to.q.len() == 256 * n && to.d.len() == n);
    assert!(to.negated_sum.0.len() == 16 * n && to.negated_sum.1.len() == 8 * n);
    run_on(isa, (src, to));
}

impl Kernel for (&[f32], Q8_0<'_>) {
    type Out = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (src, to) = self;
        for (i, (block, q)) in src.as_chunks::<32>().0.iter().zip(to.q.as_chunks_mut().0).enumerate() {
            let amax = largest_size::<V, _>(block);
            let exact = amax / 127.0;
            let d = through_half(exact);
            let id = if d > 0.0 { 127.0 / amax } else { 0.0 };
            let [low, high] = scale_and_sum::<V>(block, id, q);
            let sum = (low + high) as f32 * exact;
            to.d[i] = d;
            to.negated_sum[i] = -(low + high);
            to.offset[i] = or_exact(through_half(sum), sum);
        }
    }
}

impl Kernel for (&[f32], Q8K<'_>) {
    type Out = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (src, to) = self;
        for (b, block) in src.as_chunks::<256>().0.iter().enumerate() {
            let amax = largest_size::<V, _>(block);
            // The scale has the sign of the first that is so large.
            let has_it = |chunk: &&[f32; 16]| chunk.iter().fold(false, |found, x| found | (x.abs() == amax));
            let chunk = block.as_chunks::<16>().0.iter().find(has_it);
            let first = chunk.and_then(|chunk| chunk.iter().find(|x| x.abs() == amax));
            let negative = first.is_some_and(|x| x.is_sign_negative());
            let id;
            (id, to.d[b]) = scales_of_k(if negative { -amax } else { amax });
            let q = to.q[256 * b..][..256].as_chunks_mut().0;
            for (s, (sub, q)) in block.as_chunks::<32>().0.iter().zip(q).enumerate() {
                let at = 8 * b + s;
                let [low, high] = scale_and_sum::<V>(sub, id, q);
                // At most 32 * 127 in size.
                to.negated_sum.0[2 * at..2 * at + 2].copy_from_slice(&[-low as i16, -high as i16]);
                to.negated_sum.1[at] = -(low + high) as i16;
            }
        }
    }
}

/// The size of the number that is largest in size; what isn't a number is larger than all. `N` is a multiple of 16.
#[inline(always)]
fn largest_size<V: Lanes, const N: usize>(x: &[f32; N]) -> f32 {
    let mut max = V::splat(0.0);
    for x in x.as_chunks().0 {
        max = load::<V>(x).larger_size(max);
    }
    max.largest_size()
}

/// The integers nearest to `x * id`; the sums of the first and of the second 16.
#[inline(always)]
fn scale_and_sum<V: Lanes>(x: &[f32; 32], id: f32, q: &mut [i8; 32]) -> [i32; 2] {
    let mut sums = [0; 2];
    for ((sum, x), q) in sums.iter_mut().zip(x.as_chunks().0).zip(q.as_chunks_mut().0) {
        *sum = load::<V>(x).quantize(id, q);
    }
    sums
}

/// Rounded to half precision, as [`half::f16`] does it.
///
/// One by one: scales that were gathered to be rounded together were loaded before they had reached the cache, a wait that took
/// 40% of the time in which a row was quantised.
#[inline(always)]
fn through_half(x: f32) -> f32 {
    let (size, bits) = (x.abs(), x.to_bits());
    // Thirteen bits go, to the nearest, ties to even.
    let normal = f32::from_bits(bits.wrapping_add(0xfff + (bits >> 13 & 1)) & !0x1fff);
    // Where a unit in the last place is 2^-24, that of half precision's subnormal numbers.
    const SHIFT: f32 = 0.75;
    let subnormal = ((size + SHIFT) - SHIFT).copysign(x);
    if size < 6.103_515_6e-5 {
        subnormal
    } else if size < 65520.0 {
        normal
    } else {
        x * f32::INFINITY
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::act::{quantize_q8_0, quantize_q8_k};

    fn check(src: &[f32]) {
        let n = src.len();
        for isa in Isa::available() {
            let (mut q, mut d, mut s) = (vec![0; n], vec![0.0; n / 32], vec![0.0; n / 32]);
            quantize_q8_0(src, &mut q, &mut d, &mut s);
            let (mut fast_q, mut fast_d) = (vec![9; n], vec![9.0; n / 32]);
            let (mut sum, mut offset) = (vec![9; n / 32], vec![9.0; n / 32]);
            let to = Q8_0 { q: &mut fast_q, d: &mut fast_d, negated_sum: &mut sum, offset: &mut offset };
            q8_0(isa, src, to);
            assert_eq!((&q, bits(&d)), (&fast_q, bits(&fast_d)), "q8_0 on {isa}");
            assert_eq!(sum, negated_sums(&q, 32));
            assert_eq!(bits(&offset), bits(&s), "q8_0's sums on {isa}");

            let (mut q, mut d) = (vec![0; n], vec![0.0; n / 256]);
            quantize_q8_k(src, &mut q, &mut d);
            let (mut fast_q, mut fast_d) = (vec![9; n], vec![9.0; n / 256]);
            let (mut sum, mut sum32) = (vec![9; n / 16], vec![9; n / 32]);
            let negated_sum = (&mut sum[..], &mut sum32[..]);
            q8_k(isa, src, Q8K { q: &mut fast_q, d: &mut fast_d, negated_sum });
            assert_eq!((&q, bits(&d)), (&fast_q, bits(&fast_d)), "q8_k on {isa}");
            let wide = |sums: Vec<i16>| sums.into_iter().map(i32::from).collect::<Vec<_>>();
            assert_eq!((wide(sum), wide(sum32)), (negated_sums(&q, 16), negated_sums(&q, 32)));
        }
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    fn negated_sums(q: &[i8], n: usize) -> Vec<i32> {
        q.chunks(n).map(|q| -q.iter().map(|q| i32::from(*q)).sum::<i32>()).collect()
    }

    #[test]
    fn halves_are_those_of_the_library() {
        // Every 251st number, which meets every exponent with every kind of rest.
        for bits in (0..=u32::MAX).step_by(251).chain([0x477f_efff, 0x477f_f000, 0x387f_ffff, 0x3880_0000, 0x3300_0000])
        {
            let x = f32::from_bits(bits);
            let (ours, theirs) = (through_half(x), half::f16::from_f32(x).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || x.is_nan() && ours.is_nan(), "{x:e}: {ours:e}, {theirs:e}");
        }
    }

    #[test]
    fn edges_are_the_definitions() {
        let mut src = vec![0.0; 256 * 8];
        src[256] = 1e-30;
        src[512..768].fill(-3.0);
        src[768] = 4.0;
        src[769] = -4.0;
        src[1024 + 255] = -1e-38;
        src[1280..1536].iter_mut().enumerate().for_each(|(i, x)| *x = i as f32 * 0.5 - 63.5);
        src[1536..1792].fill(1e-6);
        src[1792] = f32::MAX;
        src[1824..1856].fill(-5e3);
        check(&src);
    }

    #[test]
    fn what_is_not_finite_stays_so_on_every_isa() {
        for isa in Isa::available() {
            for (at, bad) in (0..256).flat_map(|i| [f32::NAN, -f32::NAN, f32::INFINITY].map(|bad| (i, bad))) {
                let mut src = vec![1.0; 256];
                src[at] = bad;
                let (mut q, mut d) = (vec![0; 256], vec![0.0; 8]);
                let to = Q8_0 { q: &mut q, d: &mut d, negated_sum: &mut [0; 8], offset: &mut [0.0; 8] };
                q8_0(isa, &src, to);
                assert!((0..8).all(|i| d[i].is_finite() != (at / 32 == i)), "q8_0 on {isa}, {bad} at {at}: {d:?}");
                let to = Q8K { q: &mut q, d: &mut d[..1], negated_sum: (&mut [0; 16], &mut [0; 8]) };
                q8_k(isa, &src, to);
                assert!(!d[0].is_finite(), "q8_k on {isa}, {bad} at {at}: {}", d[0]);
            }
        }
    }

    proptest! {
        #[test]
        fn any_row_gives_the_definitions_bits(
            src in prop::collection::vec((-1.0f32..1.0, -30i32..30).prop_map(|(x, e)| x * 2f32.powi(e / 3)), 256 * 5)
        ) {
            check(&src);
        }
    }
}
