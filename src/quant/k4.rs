//! What Q4_K and Q5_K share: eight sub-blocks of 32 with 6-bit scales and offsets, how those are packed and chosen.

use super::block32::join;
use super::fit::{AffineSearch, Groups, Stored, stored};
use super::superblock::LEN;

/// The 6-bit scales and offsets, eight of each, out of 12 bytes.
///
/// Bytes 0..4 hold scales 0..4 and bytes 4..8 offsets 0..4 in their low six bits. Bytes 8..12 hold
/// the low four bits of scales 4..8 (below) and offsets 4..8 (above); their high two bits are the
/// high two bits of bytes 0..4 and 4..8. So the first four need one mask, which matters to SIMD.
#[inline]
pub(super) fn unpack_scales(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut sc, mut m) = ([0; 8], [0; 8]);
    for j in 0..4 {
        sc[j] = packed[j] & 63;
        m[j] = packed[j + 4] & 63;
        sc[j + 4] = packed[j + 8] & 15 | ((packed[j] >> 6) << 4);
        m[j + 4] = packed[j + 8] >> 4 | ((packed[j + 4] >> 6) << 4);
    }
    (sc, m)
}

/// The inverse of [`unpack_scales`].
fn pack_scales(sc: &[u8; 8], m: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        packed[j] = sc[j] | ((sc[j + 4] >> 4) << 6);
        packed[j + 4] = m[j] | ((m[j + 4] >> 4) << 6);
        packed[j + 8] = sc[j + 4] & 15 | ((m[j + 4] & 15) << 4);
    }
    packed
}

/// Quantises a superblock: the 16 bytes that both formats begin with (d, dmin, packed scales), and the codes.
pub(super) fn quantize(w: &[f32; LEN], search: &AffineSearch) -> ([u8; 16], [u8; LEN]) {
    let Stored { d, sc, dmin, m, codes } = stored(w, importance, search, 63);
    (join(&[&d.to_le_bytes(), &dmin.to_le_bytes(), &pack_scales(&sc, &m)]), codes)
}

/// A weight counts as much as its size plus the root mean square of its sub-block.
fn importance(w: &Groups<32, 8>) -> Groups<32, 8> {
    let mut squares = [0.0; 8];
    for x in w {
        for l in 0..8 {
            squares[l] += x[l] * x[l];
        }
    }
    let rms = squares.map(|sum: f32| (sum / 32.0).sqrt());
    w.map(|x| std::array::from_fn(|l| rms[l] + x[l].abs()))
}
