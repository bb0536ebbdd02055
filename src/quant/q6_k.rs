//! Q6_K: superblocks of 256 weights of 6 bits, sub-blocks of 16 with 8-bit scales: 6.5625 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..128 | the codes' low bits: byte 64 h + l (l < 64) holds weight 128 h + l (low nibble) and weight 128 h + 64 + l (high) |
//! | 128..192 | the codes' high bits: byte 32 h + l holds weights 128 h + l, + 32, + 64, + 96, two bits each from the low bits up |
//! | 192..208 | the sub-blocks' scales, signed bytes |
//! | 208..210 | d, f16: a sub-block's scale is d * its byte |
//!
//! A weight is scale * (code - 32). Each half of 128 weights is packed by itself: 64 bytes of nibbles and 32 bytes of
//! bit pairs give 128 weights with shifts and masks alone.

use half::f16;

use super::act::{largest, nearest};
use super::block32::{f16_at, join, quantize};
use super::fit::{NOTHING, recode_signed, signed_6_bits};
use super::kernels::{Block, Field, Layout, Scales, Superblock, Vector, unpack};
use super::superblock::{LEN, Scaled, dequantize_scaled, dot_scaled, pack_two_bits, two_bits};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 14,
    name: "q6_k",
    block_len: LEN,
    block_bytes: BYTES,
    act: ActKind::Q8K,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_scaled(row, x, unpack),
    kernels: kernels::superblock::<Q6K>,
};

const BYTES: usize = 210;

/// The integer weights (code - 32) and the scales of the 16 sub-blocks.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> Scaled<16> {
    let (ql, rest) = block.split_first_chunk::<128>().expect("128 bytes of low bits");
    let (qh, rest) = rest.split_first_chunk::<64>().expect("64 bytes of high bits");
    let (scales, _) = rest.split_first_chunk::<16>().expect("16 scales");
    let mut w = two_bits(qh);
    let halves = w.as_chunks_mut::<128>().0;
    for (w, ql) in halves.iter_mut().zip(ql.as_chunks::<64>().0) {
        for (l, q) in ql.iter().enumerate() {
            w[l] = (w[l] << 4 | (q & 15) as i8) - 32;
            w[l + 64] = (w[l + 64] << 4 | (q >> 4) as i8) - 32;
        }
    }
    Scaled { w, d: f16_at(block, 208), sc: scales.map(u8::cast_signed) }
}

/// Each sub-block is fitted by itself. Then the scales are rounded to eight bits such that the one of largest size becomes
/// -128, and the codes are chosen anew for what they became.
fn pack(w: &[f32; LEN]) -> [u8; BYTES] {
    let (fits, mut codes) = signed_6_bits(w);
    let max = largest(&fits);
    if max.abs() < NOTHING {
        return [0; BYTES];
    }
    let inverse = -128.0 / max;
    let d = f16::from_f32(1.0 / inverse);
    let sc = fits.map(|s| nearest(inverse * s).clamp(-128, 127) as i8);
    for (j, (w, codes)) in w.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut::<16>().0).enumerate() {
        recode_signed(w, d.to_f32() * f32::from(sc[j]), 32, codes);
    }
    let high = codes.map(|code| code >> 4);
    join(&[&pack_low(&codes), &pack_two_bits(&high), &sc.map(|s| s as u8), &d.to_le_bytes()])
}

/// The low four bits of the codes, each half of 128 by itself.
fn pack_low(codes: &[u8; LEN]) -> [u8; 128] {
    let mut ql = [0; 128];
    for (ql, codes) in ql.as_chunks_mut::<64>().0.iter_mut().zip(codes.as_chunks::<128>().0) {
        for (l, q) in ql.iter_mut().enumerate() {
            *q = codes[l] & 15 | (codes[l + 64] & 15) << 4;
        }
    }
    ql
}

/// The layout for the kernels.
struct Q6K;

impl Layout for Q6K {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] =
        &[Field::Halves(208, 1), Field::Words(192, 4), Field::Columns(8, &[128, 0, 32, 160, 64, 96])];
}

impl Superblock for Q6K {
    const BITS: u32 = 6;
    const ZERO: i32 = 32;
    const SUB: usize = 16;
    type Head<V: Vector> = ScalesQ6K<V>;

    #[inline(always)]
    fn head<V: Vector>(_: V, b: Block<V, Self>) -> Self::Head<V> {
        ScalesQ6K { d: b.f16(0), scales: b.words(2) }
    }

    #[inline(always)]
    fn column<V: Vector>(v: V, b: Block<V, Self>, half: usize, j: usize) -> [V::I; 8] {
        let mut codes = [v.splat(0); 8];
        let mask = v.splat(0x3030_3030);
        for h in 0..2 {
            let [top, low, high] = b.words(18 + 24 * (4 * half + j) + 12 * h);
            codes[4 * h] = v.or(unpack::low(v, low), v.and(v.shl(top, 4), mask));
            codes[4 * h + 1] = v.or(unpack::low(v, high), v.and(v.shl(top, 2), mask));
            codes[4 * h + 2] = v.or(unpack::high(v, low), v.and(top, mask));
            codes[4 * h + 3] = v.or(unpack::high(v, high), v.and(v.shr(top, 2), mask));
        }
        codes
    }
}

#[derive(Clone, Copy)]
struct ScalesQ6K<V: Vector> {
    d: V::F,
    /// Four a word.
    scales: [V::I; 4],
}

impl<V: Vector> Scales<V> for ScalesQ6K<V> {
    #[inline(always)]
    fn d(&self) -> V::F {
        self.d
    }

    #[inline(always)]
    fn scale(&self, v: V, j: usize) -> V::I {
        unpack::signed_byte(v, self.scales[j / 4], j % 4)
    }
}
