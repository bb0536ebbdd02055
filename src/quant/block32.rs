//! What the formats with 32 weights a block share: from a block taken apart to f32.
//!
//! A format says how its block comes apart (`unpack`): 32 integers and the numbers that scale them.
//! Everything else follows from that.

use half::f16;

use super::ActRow;
use super::act::largest;

/// The half-precision number at byte `at` of a block.
#[inline]
pub(super) fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The 4-bit codes of a block of 32: byte j holds code j below and code j + 16 above, so that one
/// mask and one shift of 16 bytes give both halves in order.
#[inline]
pub(super) fn nibbles(qs: &[u8; 16]) -> [u8; 32] {
    let mut codes = [0; 32];
    for (j, q) in qs.iter().enumerate() {
        codes[j] = q & 15;
        codes[j + 16] = q >> 4;
    }
    codes
}

/// Adds the fifth bits to 4-bit codes: bit k of the little-endian `qh` belongs to code k.
#[inline]
pub(super) fn fifth_bits(mut codes: [u8; 32], qh: &[u8; 4]) -> [u8; 32] {
    let qh = u32::from_le_bytes(*qh);
    for (k, code) in codes.iter_mut().enumerate() {
        *code |= (qh >> k & 1) as u8 * 16;
    }
    codes
}

/// The inverse of [`nibbles`] for codes below 16; of larger ones the low four bits.
pub(super) fn pack_nibbles(codes: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|j| codes[j] & 15 | (codes[j + 16] & 15) << 4)
}

/// The inverse of [`fifth_bits`].
pub(super) fn pack_fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    codes.iter().enumerate().fold(0, |qh, (k, code)| qh | u32::from(code >> 4 & 1) << k).to_le_bytes()
}

/// Rows of f32 to rows of blocks of `B` bytes and `L` weights, one by one.
#[inline]
pub(super) fn quantize<const B: usize, const L: usize>(
    src: &[f32],
    dst: &mut [u8],
    pack: impl Fn(&[f32; L]) -> [u8; B],
) {
    let (weights, tail) = src.as_chunks();
    let (blocks, odd) = dst.as_chunks_mut();
    assert!(odd.is_empty() && tail.is_empty() && blocks.len() == weights.len());
    for (block, w) in blocks.iter_mut().zip(weights) {
        *block = pack(w);
    }
}

/// Codes 0..2 * zero and the scale d of `w` = d * (code - zero): the largest weight becomes exactly code 0,
/// the end of the range that reaches one step further from zero than the other.
pub(super) fn codes_around_zero(w: &[f32; 32], zero: u8) -> ([u8; 32], f32) {
    let zero_f = f32::from(zero);
    let d = largest(w) / -zero_f;
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    (w.map(|x| ((x * id + (zero_f + 0.5)) as u8).min(2 * zero - 1)), d)
}

/// Codes 0..=n_max, the scale d and the offset m (the least weight) of `w` = d * code + m.
pub(super) fn codes_from_least(w: &[f32; 32], n_max: u8) -> ([u8; 32], f32, f32) {
    let min = w.iter().fold(f32::MAX, |min, x| if *x < min { *x } else { min });
    let max = w.iter().fold(f32::MIN, |max, x| if *x > max { *x } else { max });
    let d = (max - min) / f32::from(n_max);
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    (w.map(|x| (((x - min) * id + 0.5) as u8).min(n_max)), d, min)
}

/// Puts the parts of a block together, in order.
pub(super) fn join<const B: usize>(parts: &[&[u8]]) -> [u8; B] {
    let mut block = [0; B];
    let mut at = 0;
    for part in parts {
        block[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    assert_eq!(at, B);
    block
}

/// A number as the two bytes of a half.
pub(super) fn f16_bytes(x: f32) -> [u8; 2] {
    f16::from_f32(x).to_le_bytes()
}

/// Rows of blocks whose weights are `w * d`.
#[inline]
pub(super) fn dequantize_scaled<const B: usize>(
    src: &[u8],
    dst: &mut [f32],
    unpack: impl Fn(&[u8; B]) -> ([i8; 32], f32),
) {
    let (blocks, out) = whole_blocks::<B, 32>(src, dst);
    for (block, out) in blocks.iter().zip(out) {
        let (w, d) = unpack(block);
        for (out, w) in out.iter_mut().zip(w) {
            *out = f32::from(w) * d;
        }
    }
}

/// Rows of blocks whose weights are `w * d + m`. The product is exact (at most 5 bits times 11),
/// so it makes no difference whether a machine fuses it with the sum.
#[inline]
pub(super) fn dequantize_affine<const B: usize>(
    src: &[u8],
    dst: &mut [f32],
    unpack: impl Fn(&[u8; B]) -> ([i8; 32], f32, f32),
) {
    let (blocks, out) = whole_blocks::<B, 32>(src, dst);
    for (block, out) in blocks.iter().zip(out) {
        let (w, d, m) = unpack(block);
        for (out, w) in out.iter_mut().zip(w) {
            *out = f32::from(w) * d + m;
        }
    }
}

/// The dot product of a row whose weights are `w * d` with Q8_0 activations, in the order that every kernel
/// keeps: a block's integer sum is exact, and one fused multiply-add adds it, times both scales, to the total.
#[inline]
pub(super) fn dot_scaled<const B: usize>(
    row: &[u8],
    x: ActRow<'_>,
    unpack: impl Fn(&[u8; B]) -> ([i8; 32], f32),
) -> f32 {
    blocks_with::<B, 32>(row, x).fold(0.0, |acc, (block, q, da)| {
        let (w, d) = unpack(block);
        (isum(&w, q) as f32).mul_add(d * da, acc)
    })
}

/// As [`dot_scaled`], for weights that are `w * d + m`: a second fused multiply-add follows for the offset.
#[inline]
pub(super) fn dot_affine<const B: usize>(
    row: &[u8],
    x: ActRow<'_>,
    unpack: impl Fn(&[u8; B]) -> ([i8; 32], f32, f32),
) -> f32 {
    assert_eq!(x.s.len(), x.d.len());
    blocks_with::<B, 32>(row, x).zip(x.s).fold(0.0, |acc, ((block, q, da), s)| {
        let (w, d, m) = unpack(block);
        let acc = (isum(&w, q) as f32).mul_add(d * da, acc);
        s.mul_add(m, acc)
    })
}

/// The exact integer dot product of weights and activations.
#[inline]
pub(super) fn isum(w: &[i8], q: &[i8]) -> i32 {
    w.iter().zip(q).map(|(w, q)| i32::from(*w) * i32::from(*q)).sum()
}

/// Each block of `B` bytes and `L` weights with the activations that it meets and their scale.
pub(super) fn blocks_with<'a, const B: usize, const L: usize>(
    row: &'a [u8],
    x: ActRow<'a>,
) -> impl Iterator<Item = (&'a [u8; B], &'a [i8; L], f32)> {
    let (blocks, odd) = row.as_chunks();
    let (q, tail) = x.q.as_chunks();
    assert!(odd.is_empty() && tail.is_empty());
    assert!(blocks.len() == q.len() && q.len() == x.d.len());
    blocks.iter().zip(q).zip(x.d).map(|((b, q), d)| (b, q, *d))
}

/// The blocks of `B` bytes of a row and the places of their `L` weights.
pub(super) fn whole_blocks<'s, 'd, const B: usize, const L: usize>(
    src: &'s [u8],
    dst: &'d mut [f32],
) -> (&'s [[u8; B]], &'d mut [[f32; L]]) {
    let (blocks, odd) = src.as_chunks();
    let (out, tail) = dst.as_chunks_mut();
    assert!(odd.is_empty() && tail.is_empty() && blocks.len() == out.len());
    (blocks, out)
}
