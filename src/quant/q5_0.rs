//! Q5_0: 32 weights of 5 bits and a scale, 5.5 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..2 | scale d, f16 |
//! | 2..6 | the codes' fifth bits: bit k of this little-endian u32 belongs to weight k |
//! | 6..22 | the codes' low bits: byte j holds weight j (low nibble) and weight j + 16 (high nibble) |
//!
//! A weight is d * (code - 16). The fifth bits stand apart so that the rest is Q4_0's layout.

use super::block32::{
    codes_around_zero, dequantize_scaled, dot_scaled, f16_at, f16_bytes, fifth_bits, join, nibbles, pack_fifth_bits,
    pack_nibbles, quantize,
};
use super::kernels::{Block, Block32, Field, Layout, Vector, unpack};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 6,
    name: "q5_0",
    block_len: 32,
    block_bytes: BYTES,
    act: ActKind::Q8_0,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_scaled(row, x, unpack),
    kernels: kernels::block32::<Q5_0>,
};

const BYTES: usize = 22;

/// The integer weights (code - 16) and their scale.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> ([i8; 32], f32) {
    let (head, qs) = block.split_last_chunk::<16>().expect("a block has its codes");
    let (_, qh) = head.split_last_chunk::<4>().expect("and their fifth bits");
    let codes = fifth_bits(nibbles(qs), qh);
    (codes.map(|q| q as i8 - 16), f16_at(block, 0))
}

/// The weight of largest size becomes code 0; the others are rounded to the grid that it defines.
fn pack(w: &[f32; 32]) -> [u8; BYTES] {
    let (codes, d) = codes_around_zero(w, 16);
    join(&[&f16_bytes(d), &pack_fifth_bits(&codes), &pack_nibbles(&codes)])
}

/// The layout for the kernels.
struct Q5_0;

impl Layout for Q5_0 {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] = &[Field::Halves(0, 1), Field::FifthBits(2), Field::Words(6, 4)];
}

impl Block32 for Q5_0 {
    const BITS: u32 = 5;
    const ZERO: i32 = 16;

    #[inline(always)]
    fn codes<V: Vector>(v: V, b: Block<V, Self>) -> [V::I; 8] {
        unpack::fifth_bits(v, b, 2, unpack::nibbles(v, b, 6))
    }

    #[inline(always)]
    fn scale<V: Vector>(_: V, b: Block<V, Self>) -> V::F {
        b.f16(0)
    }
}
