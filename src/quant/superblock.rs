//! What the formats with superblocks of 256 weights share: from a superblock taken apart to f32.
//!
//! A superblock has one or two half-precision scales; its N sub-blocks have small integers that
//! multiply those, a product that f32 holds exactly. A format says how its superblock comes apart (`unpack`).

use super::ActRow;
use super::block32::{blocks_with, isum, whole_blocks};

/// Weights of a superblock.
pub(super) const LEN: usize = 256;

/// A superblock whose weights are `w * (d * sc)`, `sc` being its sub-block's.
pub(super) struct Scaled<const N: usize> {
    pub w: [i8; LEN],
    pub d: f32,
    pub sc: [i8; N],
}

/// A superblock whose weights are `w * (d * sc) - dmin * m`, `sc` and `m` being its sub-block's.
pub(super) struct Affine<const N: usize> {
    pub w: [i8; LEN],
    pub d: f32,
    pub sc: [u8; N],
    pub dmin: f32,
    pub m: [u8; N],
}

/// Rows of superblocks of `B` bytes that are [`Scaled`].
#[inline]
pub(super) fn dequantize_scaled<const B: usize, const N: usize>(
    src: &[u8],
    dst: &mut [f32],
    unpack: impl Fn(&[u8; B]) -> Scaled<N>,
) {
    let (blocks, out) = whole_blocks::<B, LEN>(src, dst);
    for (block, out) in blocks.iter().zip(out) {
        let s = unpack(block);
        for j in 0..N {
            let sub = j * (LEN / N)..(j + 1) * (LEN / N);
            let d = s.d * f32::from(s.sc[j]);
            for (out, w) in out[sub.clone()].iter_mut().zip(&s.w[sub]) {
                *out = f32::from(*w) * d;
            }
        }
    }
}

/// Rows of superblocks of `B` bytes that are [`Affine`].
#[inline]
pub(super) fn dequantize_affine<const B: usize, const N: usize>(
    src: &[u8],
    dst: &mut [f32],
    unpack: impl Fn(&[u8; B]) -> Affine<N>,
) {
    let (blocks, out) = whole_blocks::<B, LEN>(src, dst);
    for (block, out) in blocks.iter().zip(out) {
        let s = unpack(block);
        for j in 0..N {
            let sub = j * (LEN / N)..(j + 1) * (LEN / N);
            let (d, m) = (s.d * f32::from(s.sc[j]), s.dmin * f32::from(s.m[j]));
            for (out, w) in out[sub.clone()].iter_mut().zip(&s.w[sub]) {
                *out = f32::from(*w) * d - m;
            }
        }
    }
}

/// The dot product of a row of [`Scaled`] superblocks with Q8K activations, in the order that every kernel keeps: a superblock's
/// sum is one exact integer (below 2^28 in size), which one fused multiply-add adds to the total.
#[inline]
pub(super) fn dot_scaled<const B: usize, const N: usize>(
    row: &[u8],
    x: ActRow<'_>,
    unpack: impl Fn(&[u8; B]) -> Scaled<N>,
) -> f32 {
    blocks_with::<B, LEN>(row, x).fold(0.0, |acc, (block, q, da)| {
        let s = unpack(block);
        let mut sum = 0;
        for j in 0..N {
            let sub = j * (LEN / N)..(j + 1) * (LEN / N);
            sum += i32::from(s.sc[j]) * isum(&s.w[sub.clone()], &q[sub]);
        }
        (sum as f32).mul_add(s.d * da, acc)
    })
}

/// As [`dot_scaled`], for [`Affine`] superblocks: a second integer, of the offsets times the activations' sums, is taken away by
/// a second fused multiply-add.
#[inline]
pub(super) fn dot_affine<const B: usize, const N: usize>(
    row: &[u8],
    x: ActRow<'_>,
    unpack: impl Fn(&[u8; B]) -> Affine<N>,
) -> f32 {
    blocks_with::<B, LEN>(row, x).fold(0.0, |acc, (block, q, da)| {
        let s = unpack(block);
        let (mut sum, mut offsets) = (0, 0);
        for j in 0..N {
            let sub = j * (LEN / N)..(j + 1) * (LEN / N);
            let asum: i32 = q[sub.clone()].iter().map(|q| i32::from(*q)).sum();
            sum += i32::from(s.sc[j]) * isum(&s.w[sub.clone()], &q[sub]);
            offsets -= i32::from(s.m[j]) * asum;
        }
        let acc = (sum as f32).mul_add(s.d * da, acc);
        (offsets as f32).mul_add(s.dmin * da, acc)
    })
}

/// 256 codes of two bits: byte 32 h + l holds codes 128 h + l, + 32, + 64 and + 96, from the low bits up.
#[inline]
pub(super) fn two_bits(qs: &[u8; 64]) -> [i8; LEN] {
    let mut codes = [0; LEN];
    let runs = codes.as_chunks_mut::<32>().0;
    for (j, run) in runs.iter_mut().enumerate() {
        for (code, q) in run.iter_mut().zip(&qs[j / 4 * 32..]) {
            *code = (q >> (j % 4 * 2) & 3) as i8;
        }
    }
    codes
}

/// 256 codes of four bits: byte 32 c + l holds codes 64 c + l (low nibble) and 64 c + 32 + l (high nibble).
#[inline]
pub(super) fn four_bits(qs: &[u8; 128]) -> [i8; LEN] {
    let mut codes = [0; LEN];
    let runs = codes.as_chunks_mut::<32>().0;
    for (j, run) in runs.iter_mut().enumerate() {
        for (code, q) in run.iter_mut().zip(&qs[j / 2 * 32..]) {
            *code = (q >> (j % 2 * 4) & 15) as i8;
        }
    }
    codes
}

/// The inverse of [`two_bits`], for codes below 4.
pub(super) fn pack_two_bits(codes: &[u8; LEN]) -> [u8; 64] {
    let mut qs = [0; 64];
    for (j, run) in codes.as_chunks::<32>().0.iter().enumerate() {
        for (q, code) in qs[j / 4 * 32..].iter_mut().zip(run) {
            *q |= code << (j % 4 * 2);
        }
    }
    qs
}

/// The inverse of [`four_bits`], for codes below 16.
pub(super) fn pack_four_bits(codes: &[u8; LEN]) -> [u8; 128] {
    let mut qs = [0; 128];
    for (j, run) in codes.as_chunks::<32>().0.iter().enumerate() {
        for (q, code) in qs[j / 2 * 32..].iter_mut().zip(run) {
            *q |= code << (j % 2 * 4);
        }
    }
    qs
}

/// One bit of each code as 32 bytes: bit k / 32 of byte k % 32 is code k's.
pub(super) fn pack_bit_plane(codes: &[u8; LEN], bit: u32) -> [u8; 32] {
    let mut plane = [0; 32];
    for (j, run) in codes.as_chunks::<32>().0.iter().enumerate() {
        for (p, code) in plane.iter_mut().zip(run) {
            *p |= (code >> bit & 1) << j;
        }
    }
    plane
}
