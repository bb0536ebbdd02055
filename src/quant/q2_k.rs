//! Q2_K: superblocks of 256 weights of 2 bits, sub-blocks of 16 with 4-bit scales and offsets: 2.625 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..16 | byte j: scale (low nibble) and offset (high nibble) of sub-block j |
//! | 16..80 | codes: byte 32 h + l holds weights 128 h + l, + 32, + 64, + 96, from the low bits up |
//! | 80..82 | d, f16: a sub-block's scale is d * its nibble |
//! | 82..84 | dmin, f16: a sub-block's offset is dmin * its nibble |
//!
//! A weight is scale * code - offset. The four codes of a byte are 32 weights apart: a shift and a mask of 32
//! bytes give 32 weights in order.

use super::block32::f16_at;
use super::superblock::{Affine, LEN, dequantize_affine, dot_affine, two_bits};
use super::{ActKind, Format};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 10,
    name: "q2_k",
    block_len: LEN,
    block_bytes: BYTES,
    act: ActKind::Q8K,
    dequantize_row: |src, dst| dequantize_affine(src, dst, unpack),
    quantize_row: None,
    vec_dot: |row, x| dot_affine(row, x, unpack),
};

const BYTES: usize = 84;

/// The integer weights (the codes), scales and offsets of the 16 sub-blocks.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> Affine<16> {
    let (scales, rest) = block.split_first_chunk::<16>().expect("16 scales");
    let (qs, _) = rest.split_first_chunk::<64>().expect("64 bytes of codes");
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    Affine { w: two_bits(qs), d: scales.map(|s| d * f32::from(s & 15)), m: scales.map(|s| dmin * f32::from(s >> 4)) }
}
