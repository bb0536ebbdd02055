//! F16: IEEE half precision, little-endian. What a scale of every other format is stored as, too.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::kernels::{Block, Field, Layout, Number, Vector};
use super::{ActKind, Format, block1, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 1,
    name: "f16",
    block_len: 1,
    block_bytes: 2,
    act: ActKind::F32,
    dequantize_row,
    quantize_row,
    vec_dot: |row, x| block1::dot(row, x, |w| f16::from_le_bytes(w).to_f32()),
    kernels: kernels::number::<F16>,
};

/// Numbers converted at once: bytes in a file aren't aligned for `f16`, so they pass through a buffer.
const GROUP: usize = 16;

fn dequantize_row(src: &[u8], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len() * 2);
    let mut group = [f16::ZERO; GROUP];
    for (s, d) in src.chunks(2 * GROUP).zip(dst.chunks_mut(GROUP)) {
        for (g, s) in group.iter_mut().zip(s.as_chunks::<2>().0) {
            *g = f16::from_le_bytes(*s);
        }
        group[..d.len()].convert_to_f32_slice(d);
    }
}

fn quantize_row(src: &[f32], dst: &mut [u8]) {
    assert_eq!(dst.len(), src.len() * 2);
    let mut group = [f16::ZERO; GROUP];
    for (d, s) in dst.chunks_mut(2 * GROUP).zip(src.chunks(GROUP)) {
        group[..s.len()].convert_from_f32_slice(s);
        for (d, g) in d.as_chunks_mut::<2>().0.iter_mut().zip(group) {
            *d = g.to_le_bytes();
        }
    }
}

/// The layout for the kernels.
struct F16;

impl Layout for F16 {
    const BYTES: usize = 2;
    const FIELDS: &'static [Field] = &[Field::Halves(0, 1)];
}

impl Number for F16 {
    #[inline(always)]
    fn value<V: Vector>(_: V, b: Block<V, Self>) -> V::F {
        b.f16(0)
    }
}
