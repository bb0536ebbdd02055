//! Rows of activations, quantised for dot products with quantised weights: the definition in scalar code.
//!
//! Both ways are ggml's, so that llama.cpp can serve as the reference. A kernel that quantises faster has to
//! give the same integers and the same scales, bit for bit, for finite activations.

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
}

/// Quantises to blocks of 32: `q.len() == src.len() == 32 * d.len()`, else it panics.
///
/// The scale is amax / 127, rounded to half precision and back (that's how ggml stores it); the integers are
/// `src * (127 / amax)`, the product rounded to nearest, ties to even. A block whose scale rounds to zero
/// (amax below 3.8e-6) is zero.
pub fn quantize_q8_0(src: &[f32], q: &mut [i8], d: &mut [f32]) {
    assert!(src.len() == q.len() && src.len() == 32 * d.len());
    let (src, q) = (src.as_chunks::<32>().0, q.as_chunks_mut::<32>().0);
    for ((src, q), d) in src.iter().zip(q).zip(d) {
        let amax = src.iter().map(|x| x.abs()).fold(0.0, f32::max);
        *d = f16::from_f32(amax / 127.0).to_f32();
        let id = if *d > 0.0 { 127.0 / amax } else { 0.0 };
        scale_to_i8(src, id, q);
    }
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
        let id = -127.0 / largest(src);
        let id = if id.is_finite() { id } else { 0.0 };
        *d = if id != 0.0 { 1.0 / id } else { 0.0 };
        scale_to_i8(src, id, q);
    }
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

/// The nearest integer, ties to even, of a number below 2^22 in size (anything else gives some integer in that
/// range). Adding 1.5 * 2^23 leaves no bits for a fraction, which is faster than asking libm where SSE4.1 isn't assumed.
#[inline]
pub(super) fn nearest(x: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0;
    ((x + SHIFT).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}
