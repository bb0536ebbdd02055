//! IQ4_NL: 32 weights of 4 bits through a codebook, and a scale: 4.5 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..2 | scale d, f16 |
//! | 2..18 | codes: byte j holds weight j (low nibble) and weight j + 16 (high nibble) |
//!
//! A weight is d * CODEBOOK\[code\]. Weights are roughly normal, so the codebook's steps are narrow near
//! zero and wide at the ends. It has 16 signed bytes: one byte shuffle looks up a register of codes.

use super::block32::{dequantize_scaled, dot_scaled, f16_at, nibbles};
use super::{ActKind, Format};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 20,
    name: "iq4_nl",
    block_len: 32,
    block_bytes: BYTES,
    act: ActKind::Q8_0,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: None,
    vec_dot: |row, x| dot_scaled(row, x, unpack),
};

const BYTES: usize = 18;

/// The value of each code, also IQ4_XS's.
pub(super) const CODEBOOK: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The integer weights (the codebook's values) and their scale.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> ([i8; 32], f32) {
    let (_, qs) = block.split_last_chunk::<16>().expect("a block has its codes");
    (nibbles(qs).map(|q| CODEBOOK[q as usize]), f16_at(block, 0))
}
