//! What the formats with 32 weights a block share: from a block taken apart to f32.
//!
//! A format says how its block comes apart (`unpack`): 32 integers and the numbers that scale them.
//! Everything else follows from that.

use half::f16;

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

/// Rows of blocks whose weights are `w * d`.
#[inline]
pub(super) fn dequantize_scaled<const B: usize>(
    src: &[u8],
    dst: &mut [f32],
    unpack: impl Fn(&[u8; B]) -> ([i8; 32], f32),
) {
    let (blocks, out) = whole_blocks(src, dst);
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
    let (blocks, out) = whole_blocks(src, dst);
    for (block, out) in blocks.iter().zip(out) {
        let (w, d, m) = unpack(block);
        for (out, w) in out.iter_mut().zip(w) {
            *out = f32::from(w) * d + m;
        }
    }
}

fn whole_blocks<'s, 'd, const B: usize>(
    src: &'s [u8],
    dst: &'d mut [f32],
) -> (&'s [[u8; B]], &'d mut [[f32; 32]]) {
    let (blocks, odd) = src.as_chunks();
    let (out, tail) = dst.as_chunks_mut();
    assert!(odd.is_empty() && tail.is_empty() && blocks.len() == out.len());
    (blocks, out)
}
