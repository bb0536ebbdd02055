//! Q4_0: 32 weights of 4 bits and a scale, 4.5 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..2 | scale d, f16 |
//! | 2..18 | codes: byte j holds weight j (low nibble) and weight j + 16 (high nibble) |
//!
//! A weight is d * (code - 8). The nibbles of a byte are 16 weights apart, not neighbours, so that
//! a mask and a shift of one 16-byte register give the weights in order.

use super::block32::{
    codes_around_zero, dequantize_scaled, dot_scaled, f16_at, f16_bytes, join, nibbles, pack_nibbles, quantize,
};
use super::kernels::{Block, Block32, Field, Layout, Vector, unpack};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 2,
    name: "q4_0",
    block_len: 32,
    block_bytes: BYTES,
    act: ActKind::Q8_0,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_scaled(row, x, unpack),
    kernels: kernels::block32::<Q4_0>,
};

const BYTES: usize = 18;

/// The integer weights (code - 8) and their scale.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> ([i8; 32], f32) {
    let (_, qs) = block.split_last_chunk::<16>().expect("a block has its codes");
    (nibbles(qs).map(|q| q as i8 - 8), f16_at(block, 0))
}

/// The weight of largest size becomes code 0; the others are rounded to the grid that it defines.
fn pack(w: &[f32; 32]) -> [u8; BYTES] {
    let (codes, d) = codes_around_zero(w, 8);
    join(&[&f16_bytes(d), &pack_nibbles(&codes)])
}

/// The layout for the kernels.
struct Q4_0;

impl Layout for Q4_0 {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] = &[Field::Halves(0, 1), Field::Words(2, 4)];
}

impl Block32 for Q4_0 {
    const BITS: u32 = 4;
    const ZERO: i32 = 8;

    #[inline(always)]
    fn codes<V: Vector>(v: V, b: Block<V, Self>) -> [V::I; 8] {
        unpack::nibbles(v, b, 2)
    }

    #[inline(always)]
    fn scale<V: Vector>(_: V, b: Block<V, Self>) -> V::F {
        b.f16(0)
    }
}
