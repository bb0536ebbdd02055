//! Q3_K: superblocks of 256 weights of 3 bits, sub-blocks of 16 with 6-bit scales: 3.4375 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..32 | the codes' third bits: bit k / 32 of byte k % 32 belongs to weight k |
//! | 32..96 | the codes' low bits: byte 32 h + l holds weights 128 h + l, + 32, + 64, + 96, from the low bits up |
//! | 96..108 | the sub-blocks' scales, 6 bits each, see [`scales`] |
//! | 108..110 | d, f16: a sub-block's scale is d * (its six bits - 32) |
//!
//! A weight is scale * (code - 4). Third bits and low bits are laid out so that shifts and masks of 32 bytes give
//! 32 weights in order.

use half::f16;

use super::act::{largest, nearest};
use super::block32::{f16_at, join, quantize};
use super::fit::{recode_signed, signed_3_bits};
use super::kernels::{Block, Field, Layout, Scales, Superblock, Vector, unpack};
use super::superblock::{LEN, Scaled, dequantize_scaled, dot_scaled, pack_bit_plane, pack_two_bits, two_bits};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 11,
    name: "q3_k",
    block_len: LEN,
    block_bytes: BYTES,
    act: ActKind::Q8K,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_scaled(row, x, unpack),
    kernels: kernels::superblock::<Q3K>,
};

const BYTES: usize = 110;

/// The integer weights (code - 4) and the scales of the 16 sub-blocks.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> Scaled<16> {
    let (hmask, rest) = block.split_first_chunk::<32>().expect("32 bytes of third bits");
    let (qs, rest) = rest.split_first_chunk::<64>().expect("64 bytes of low bits");
    let (packed, _) = rest.split_first_chunk::<12>().expect("12 bytes of scales");
    let mut w = two_bits(qs);
    for (j, w) in w.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (w, h) in w.iter_mut().zip(hmask) {
            *w += (h >> j & 1) as i8 * 4 - 4;
        }
    }
    Scaled { w, d: f16_at(block, 108), sc: scales(packed) }
}

/// The 16 scales, -32..=31: byte j holds the low four bits of scales j (below) and j + 8 (above) for j < 8;
/// byte 8 + i holds the high two bits of scales i, i + 4, i + 8 and i + 12, from the low bits up.
#[inline]
pub(super) fn scales(packed: &[u8; 12]) -> [i8; 16] {
    std::array::from_fn(|j| {
        let low = packed[j % 8] >> (j / 8 * 4) & 15;
        let high = packed[8 + j % 4] >> (j / 4 * 2) & 3;
        (low | high << 4) as i8 - 32
    })
}

/// Each sub-block is fitted by itself. Then the scales are rounded to six bits such that the one of largest size becomes
/// -32, and the codes are chosen anew for what they became.
fn pack(w: &[f32; LEN]) -> [u8; BYTES] {
    let (subs, mut codes) = (w.as_chunks::<16>().0, [0; LEN]);
    let mut fits = [0.0f32; 16];
    for (j, (w, codes)) in subs.iter().zip(codes.as_chunks_mut().0).enumerate() {
        (fits[j], *codes) = signed_3_bits(w);
    }
    let max = largest(&fits);
    // With nothing to scale, ggml leaves the packed bits zero, which mean -32.
    let (mut d, mut sc) = (f16::ZERO, [-32i8; 16]);
    if max != 0.0 {
        let inverse = -32.0 / max;
        d = f16::from_f32(1.0 / inverse);
        sc = fits.map(|s| nearest(inverse * s).clamp(-32, 31) as i8);
    }
    for (j, (w, codes)) in subs.iter().zip(codes.as_chunks_mut::<16>().0).enumerate() {
        recode_signed(w, d.to_f32() * f32::from(sc[j]), 4, codes);
    }
    let low = codes.map(|code| code & 3);
    join(&[&pack_bit_plane(&codes, 2), &pack_two_bits(&low), &pack_scales(&sc), &d.to_le_bytes()])
}

/// The inverse of [`scales`].
fn pack_scales(sc: &[i8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (j, s) in sc.iter().enumerate() {
        let bits = (s + 32) as u8;
        packed[j % 8] |= (bits & 15) << (j / 8 * 4);
        packed[8 + j % 4] |= (bits >> 4) << (j / 4 * 2);
    }
    packed
}

/// The layout for the kernels.
struct Q3K;

impl Layout for Q3K {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] = &[Field::Halves(108, 1), Field::Words(96, 3), Field::Columns(8, &[0, 32, 64])];
}

impl Superblock for Q3K {
    const BITS: u32 = 3;
    const ZERO: i32 = 4;
    const SUB: usize = 16;
    type Head<V: Vector> = ScalesQ3K<V>;

    #[inline(always)]
    fn head<V: Vector>(v: V, b: Block<V, Self>) -> Self::Head<V> {
        let [a, c, top] = b.words(2);
        let (low, high) = (unpack::low::<V>, unpack::high::<V>);
        let mut scales = [low(v, a), low(v, c), high(v, a), high(v, c)];
        let mut i = 0;
        while i < 4 {
            scales[i] = v.or(scales[i], v.shl(unpack::pair(v, top, i), 4));
            i += 1;
        }
        ScalesQ3K { d: b.f16(0), scales }
    }

    #[inline(always)]
    fn column<V: Vector>(v: V, b: Block<V, Self>, half: usize, j: usize) -> [V::I; 8] {
        let mut codes = [v.splat(0); 8];
        let [third, low @ ..]: [V::I; 3] = b.words(14 + 12 * (4 * half + j));
        for h in 0..2 {
            for i in 0..4 {
                codes[4 * h + i] = v.or(unpack::pair(v, low[h], i), unpack::bit(v, third, 4 * h + i, 2));
            }
        }
        codes
    }
}

#[derive(Clone, Copy)]
struct ScalesQ3K<V: Vector> {
    d: V::F,
    /// Plus 32, four a word.
    scales: [V::I; 4],
}

impl<V: Vector> Scales<V> for ScalesQ3K<V> {
    #[inline(always)]
    fn d(&self) -> V::F {
        self.d
    }

    #[inline(always)]
    fn scale(&self, v: V, j: usize) -> V::I {
        v.add_i32(unpack::byte(v, self.scales[j / 4], j % 4), v.splat((-32i32).cast_unsigned()))
    }
}
