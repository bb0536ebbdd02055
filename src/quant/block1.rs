//! What the formats without blocks share: each weight is a number of `B` bytes.

use super::ActRow;

/// Rows of numbers to f32.
#[inline]
pub(super) fn dequantize<const B: usize>(src: &[u8], dst: &mut [f32], value: impl Fn([u8; B]) -> f32) {
    assert_eq!(src.len(), dst.len() * B);
    for (d, s) in dst.iter_mut().zip(src.as_chunks::<B>().0) {
        *d = value(*s);
    }
}

/// f32 to rows of numbers.
#[inline]
pub(super) fn quantize<const B: usize>(src: &[f32], dst: &mut [u8], bytes: impl Fn(f32) -> [u8; B]) {
    assert_eq!(dst.len(), src.len() * B);
    for (d, s) in dst.as_chunks_mut::<B>().0.iter_mut().zip(src) {
        *d = bytes(*s);
    }
}

/// The dot product with a row of f32 activations, in the order that every kernel keeps: weight k goes to the
/// partial sum k % 4 by a fused multiply-add, and the four are added in pairs.
#[inline]
pub(super) fn dot<const B: usize>(row: &[u8], x: ActRow<'_>, value: impl Fn([u8; B]) -> f32) -> f32 {
    assert_eq!(row.len(), x.f32.len() * B);
    let mut p = [0.0f32; 4];
    for (k, (w, x)) in row.as_chunks::<B>().0.iter().zip(x.f32).enumerate() {
        p[k % 4] = value(*w).mul_add(*x, p[k % 4]);
    }
    (p[0] + p[1]) + (p[2] + p[3])
}
