//! F32: IEEE single precision, little-endian.

use super::kernels::{Block, Field, Layout, Number, Vector};
use super::{ActKind, Format, block1, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 0,
    name: "f32",
    block_len: 1,
    block_bytes: 4,
    act: ActKind::F32,
    dequantize_row: |src, dst| block1::dequantize(src, dst, f32::from_le_bytes),
    quantize_row: |src, dst| block1::quantize(src, dst, f32::to_le_bytes),
    vec_dot: |row, x| block1::dot(row, x, f32::from_le_bytes),
    kernels: kernels::number::<F32>,
};

/// The layout for the kernels.
struct F32;

impl Layout for F32 {
    const BYTES: usize = 4;
    const FIELDS: &'static [Field] = &[Field::Words(0, 1)];
}

impl Number for F32 {
    #[inline(always)]
    fn value<V: Vector>(v: V, b: Block<V, Self>) -> V::F {
        v.as_f32(b.word(0))
    }
}
