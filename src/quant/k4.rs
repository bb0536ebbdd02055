//! What Q4_K and Q5_K share: eight sub-blocks of 32 with 6-bit scales and offsets, how those are packed and chosen.

use half::f16;

use super::fit::{AffineFit, AffineSearch, affine, recode_affine, side_by_side};
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
///
/// Each sub-block is fitted by itself, a weight counting as much as its size plus their root mean square. Then scales
/// and offsets are rounded to six bits of the largest, and the codes chosen anew for what they became.
pub(super) fn quantize(w: &[f32; LEN], search: &AffineSearch) -> ([u8; 16], [u8; LEN]) {
    let groups = side_by_side::<32, 8>(w);
    let mut squares = [0.0; 8];
    for x in &groups {
        for l in 0..8 {
            squares[l] += x[l] * x[l];
        }
    }
    let rms = squares.map(|sum| (sum / 32.0).sqrt());
    let importance = groups.map(|x| std::array::from_fn(|l| rms[l] + x[l].abs()));
    let AffineFit { scale, offset, mut codes } = affine(&groups, &importance, search);
    let (d, sc) = to_6_bits(&scale);
    let (dmin, m) = to_6_bits(&offset);
    for (j, (w, codes)) in w.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<32>().0).enumerate() {
        let (d, offset) = (d.to_f32() * f32::from(sc[j]), dmin.to_f32() * f32::from(m[j]));
        recode_affine(w, d, offset, search.n_max, codes);
    }
    let mut head = [0; 16];
    head[..2].copy_from_slice(&d.to_le_bytes());
    head[2..4].copy_from_slice(&dmin.to_le_bytes());
    head[4..].copy_from_slice(&pack_scales(&sc, &m));
    (head, codes)
}

/// Numbers of at least zero as `d` times six bits.
fn to_6_bits(numbers: &[f32; 8]) -> (f16, [u8; 8]) {
    let max = numbers.iter().fold(0.0, |max, x| if *x > max { *x } else { max });
    let inverse = if max > 0.0 { 63.0 / max } else { 0.0 };
    let bits = numbers.map(|x| super::act::nearest(inverse * x).clamp(0, 63) as u8);
    (f16::from_f32(max / 63.0), bits)
}
