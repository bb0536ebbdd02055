//! BF16: the upper 16 bits of an f32, little-endian: its range with 8 bits of precision.

use half::bf16;

use super::{ActKind, Format};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 30,
    name: "bf16",
    block_len: 1,
    block_bytes: 2,
    act: ActKind::F32,
    dequantize_row,
    quantize_row: Some(quantize_row),
};

fn dequantize_row(src: &[u8], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len() * 2);
    for (d, s) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
        *d = f32::from_bits(u32::from(u16::from_le_bytes(*s)) << 16);
    }
}

/// Rounds to nearest, ties to even.
fn quantize_row(src: &[f32], dst: &mut [u8]) {
    assert_eq!(dst.len(), src.len() * 2);
    for (d, s) in dst.as_chunks_mut::<2>().0.iter_mut().zip(src) {
        *d = bf16::from_f32(*s).to_le_bytes();
    }
}
