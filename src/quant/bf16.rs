//! BF16: the upper 16 bits of an f32, little-endian: its range with 8 bits of precision.

use super::kernels::{Block, Field, Layout, Number, Vector};
use super::{ActKind, Format, block1, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 30,
    name: "bf16",
    block_len: 1,
    block_bytes: 2,
    act: ActKind::F32,
    dequantize_row: |src, dst| block1::dequantize(src, dst, value),
    quantize_row: |src, dst| block1::quantize(src, dst, bytes),
    vec_dot: |row, x| block1::dot(row, x, value),
    kernels: kernels::number::<Bf16>,
};

fn value(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// Rounds to nearest, ties to even; a NaN stays one, made quiet so that its upper half says so.
fn bytes(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let kept = if value.is_nan() { bits | 1 << 22 } else { rounded };
    ((kept >> 16) as u16).to_le_bytes()
}

/// The layout for the kernels.
struct Bf16;

impl Layout for Bf16 {
    const BYTES: usize = 2;
    const FIELDS: &'static [Field] = &[Field::Halves(0, 1)];
}

impl Number for Bf16 {
    #[inline(always)]
    fn value<V: Vector>(v: V, b: Block<V, Self>) -> V::F {
        v.as_f32(v.shl(b.u16(0), 16))
    }
}
