//! Q8_0: 32 weights of 8 bits and a scale, 8.5 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..2 | scale d, f16 |
//! | 2..34 | the weights' integers, signed bytes in order |
//!
//! A weight is d * integer. A quantiser writes -127..=127, but a file may hold -128, and it counts.

use super::act::largest;
use super::block32::{dequantize_scaled, dot_scaled, f16_at, f16_bytes, join, quantize};
use super::kernels::{Block, Block32, Field, Layout, Vector, unpack};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 8,
    name: "q8_0",
    block_len: 32,
    block_bytes: BYTES,
    act: ActKind::Q8_0,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_scaled(row, x, unpack),
    kernels: kernels::block32::<Q8_0>,
};

const BYTES: usize = 34;

/// The integer weights and their scale.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> ([i8; 32], f32) {
    let (_, qs) = block.split_last_chunk::<32>().expect("a block has its integers");
    (qs.map(|q| q as i8), f16_at(block, 0))
}

/// The weight of largest size becomes 127 or -127; the others are rounded, ties away from zero.
fn pack(w: &[f32; 32]) -> [u8; BYTES] {
    let d = largest(w).abs() / 127.0;
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    let qs = w.map(|x| {
        // As f32::round does, but in instructions that every processor has.
        let x = (x * id).clamp(-127.0, 127.0);
        let whole = x as i32;
        let rest = x - whole as f32;
        (whole + i32::from(rest >= 0.5) - i32::from(rest <= -0.5)) as u8
    });
    join(&[&f16_bytes(d), &qs])
}

/// The layout for the kernels.
struct Q8_0;

impl Layout for Q8_0 {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] = &[Field::Halves(0, 1), Field::Words(2, 8)];
}

impl Block32 for Q8_0 {
    const BITS: u32 = 8;
    const ZERO: i32 = 0;

    #[inline(always)]
    fn codes<V: Vector>(v: V, b: Block<V, Self>) -> [V::I; 8] {
        unpack::signed(v, b.words(2))
    }

    #[inline(always)]
    fn scale<V: Vector>(_: V, b: Block<V, Self>) -> V::F {
        b.f16(0)
    }
}
