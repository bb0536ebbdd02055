//! Q3_K: superblocks of 256 weights of 3 bits, sub-blocks of 16 with 6-bit scales: 3.4375 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..32 | the codes' third bits: bit k / 32 of byte k % 32 belongs to weight k |
//! | 32..96 | the codes' low bits: byte 32 h + l holds weights 128 h + l, + 32, + 64, + 96, from the low bits up |
//! | 96..108 | the sub-blocks' scales, 6 bits each, see [`scales`] |
//! | 108..110 | d, f16: a sub-block's scale is d * (its six bits - 32) |
//!
//! A weight is scale * (code - 4). Third bits and low bits are laid out so that shifts and masks of 32 bytes give
//! 32 weights in order.

use super::block32::f16_at;
use super::superblock::{LEN, Scaled, dequantize_scaled, dot_scaled, two_bits};
use super::{ActKind, Format};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 11,
    name: "q3_k",
    block_len: LEN,
    block_bytes: BYTES,
    act: ActKind::Q8K,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: None,
    vec_dot: |row, x| dot_scaled(row, x, unpack),
};

const BYTES: usize = 110;

/// The integer weights (code - 4) and the scales of the 16 sub-blocks.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> Scaled<16> {
    let (hmask, rest) = block.split_first_chunk::<32>().expect("32 bytes of third bits");
    let (qs, rest) = rest.split_first_chunk::<64>().expect("64 bytes of low bits");
    let (packed, _) = rest.split_first_chunk::<12>().expect("12 bytes of scales");
    let mut w = two_bits(qs);
    for (j, w) in w.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (w, h) in w.iter_mut().zip(hmask) {
            *w += (h >> j & 1) as i8 * 4 - 4;
        }
    }
    let d = f16_at(block, 108);
    let d = scales(packed).map(|s| d * f32::from(s));
    Scaled { w, d }
}

/// The 16 scales, -32..=31: byte j holds the low four bits of scales j (below) and j + 8 (above) for j < 8;
/// byte 8 + i holds the high two bits of scales i, i + 4, i + 8 and i + 12, from the low bits up.
#[inline]
pub(super) fn scales(packed: &[u8; 12]) -> [i8; 16] {
    std::array::from_fn(|j| {
        let low = packed[j % 8] >> (j / 8 * 4) & 15;
        let high = packed[8 + j % 4] >> (j / 4 * 2) & 3;
        (low | high << 4) as i8 - 32
    })
}
