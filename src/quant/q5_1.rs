//! Q5_1: 32 weights of 5 bits with a scale and an offset, 6 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..2 | scale d, f16 |
//! | 2..4 | offset m (the block's smallest weight), f16 |
//! | 4..8 | the codes' fifth bits: bit k of this little-endian u32 belongs to weight k |
//! | 8..24 | the codes' low bits: byte j holds weight j (low nibble) and weight j + 16 (high nibble) |
//!
//! A weight is d * code + m, as in Q4_1; the fifth bits are where Q5_0 has them.

use super::block32::{
    codes_from_least, dequantize_affine, dot_affine, f16_at, f16_bytes, fifth_bits, join, nibbles, pack_fifth_bits,
    pack_nibbles, quantize,
};
use super::kernels::{Block, Block32, Field, Layout, Vector, unpack};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 7,
    name: "q5_1",
    block_len: 32,
    block_bytes: BYTES,
    act: ActKind::Q8_0,
    dequantize_row: |src, dst| dequantize_affine(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_affine(row, x, unpack),
    kernels: kernels::block32::<Q5_1>,
};

const BYTES: usize = 24;

/// The integer weights (the codes), their scale and their offset.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> ([i8; 32], f32, f32) {
    let (head, qs) = block.split_last_chunk::<16>().expect("a block has its codes");
    let (_, qh) = head.split_last_chunk::<4>().expect("and their fifth bits");
    let codes = fifth_bits(nibbles(qs), qh);
    (codes.map(|q| q as i8), f16_at(block, 0), f16_at(block, 2))
}

/// The grid spans the block's range.
fn pack(w: &[f32; 32]) -> [u8; BYTES] {
    let (codes, d, m) = codes_from_least(w, 31);
    join(&[&f16_bytes(d), &f16_bytes(m), &pack_fifth_bits(&codes), &pack_nibbles(&codes)])
}

/// The layout for the kernels.
struct Q5_1;

impl Layout for Q5_1 {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] = &[Field::Halves(0, 2), Field::FifthBits(4), Field::Words(8, 4)];
}

impl Block32 for Q5_1 {
    const BITS: u32 = 5;
    const ZERO: i32 = 0;
    const MIN: bool = true;

    #[inline(always)]
    fn codes<V: Vector>(v: V, b: Block<V, Self>) -> [V::I; 8] {
        unpack::fifth_bits(v, b, 4, unpack::nibbles(v, b, 8))
    }

    #[inline(always)]
    fn scale<V: Vector>(_: V, b: Block<V, Self>) -> V::F {
        b.f16(0)
    }

    #[inline(always)]
    fn min<V: Vector>(_: V, b: Block<V, Self>) -> V::F {
        b.f16(2)
    }
}
