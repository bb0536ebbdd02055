//! F32: IEEE single precision, little-endian.

use super::{ActKind, Format};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 0,
    name: "f32",
    block_len: 1,
    block_bytes: 4,
    act: ActKind::F32,
    dequantize_row,
    quantize_row: Some(quantize_row),
};

fn dequantize_row(src: &[u8], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len() * 4);
    for (d, s) in dst.iter_mut().zip(src.as_chunks::<4>().0) {
        *d = f32::from_le_bytes(*s);
    }
}

fn quantize_row(src: &[f32], dst: &mut [u8]) {
    assert_eq!(dst.len(), src.len() * 4);
    for (d, s) in dst.as_chunks_mut::<4>().0.iter_mut().zip(src) {
        *d = s.to_le_bytes();
    }
}
