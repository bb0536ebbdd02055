//! Q5_K: superblocks of 256 weights of 5 bits, sub-blocks of 32 with 6-bit scales and offsets: 5.5 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..2 | d, f16: a sub-block's scale is d * its six bits |
//! | 2..4 | dmin, f16: a sub-block's offset is dmin * its six bits |
//! | 4..16 | the sub-blocks' scales and offsets, see [`k4::unpack_scales`] |
//! | 16..48 | the codes' fifth bits: bit k / 32 of byte k % 32 belongs to weight k |
//! | 48..176 | the codes' low bits: byte 32 c + l holds weight 64 c + l (low nibble) and weight 64 c + 32 + l (high) |
//!
//! A weight is scale * code - offset. It is Q4_K with a plane of fifth bits put in between; bit j of those 32
//! bytes is sub-block j's.

use super::block32::{f16_at, join, quantize};
use super::fit::AffineSearch;
use super::k4;
use super::kernels::unpack::{self, ScalesK4};
use super::kernels::{Block, Field, Layout, Superblock, Vector};
use super::superblock::{Affine, LEN, dequantize_affine, dot_affine, four_bits, pack_bit_plane, pack_four_bits};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 13,
    name: "q5_k",
    block_len: LEN,
    block_bytes: BYTES,
    act: ActKind::Q8K,
    dequantize_row: |src, dst| dequantize_affine(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_affine(row, x, unpack),
    kernels: kernels::superblock::<Q5K>,
};

const BYTES: usize = 176;

/// The integer weights (the codes), scales and offsets of the 8 sub-blocks.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> Affine<8> {
    let (_, qs) = block.split_last_chunk::<128>().expect("128 bytes of low bits");
    let (head, rest) = block.split_first_chunk::<16>().expect("16 bytes of scales");
    let (_, packed) = head.split_last_chunk::<12>().expect("12 of them packed");
    let (qh, _) = rest.split_first_chunk::<32>().expect("32 bytes of fifth bits");
    let mut w = four_bits(qs);
    for (j, w) in w.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (w, h) in w.iter_mut().zip(qh) {
            *w += (h >> j & 1) as i8 * 16;
        }
    }
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let (sc, m) = k4::unpack_scales(packed);
    Affine { w, d, sc, dmin, m }
}

const SEARCH: AffineSearch = AffineSearch { n_max: 31, first: -0.5, more: 15, absolute: false };

fn pack(w: &[f32; LEN]) -> [u8; BYTES] {
    let (head, codes) = k4::quantize(w, &SEARCH);
    let low = codes.map(|code| code & 15);
    join(&[&head, &pack_bit_plane(&codes, 4), &pack_four_bits(&low)])
}

/// The layout for the kernels.
struct Q5K;

impl Layout for Q5K {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] =
        &[Field::Halves(0, 2), Field::Words(4, 3), Field::Columns(8, &[16, 48, 80, 112, 144])];
}

impl Superblock for Q5K {
    const BITS: u32 = 5;
    const ZERO: i32 = 0;
    const SUB: usize = 32;
    const MIN: bool = true;
    type Head<V: Vector> = ScalesK4<V>;

    #[inline(always)]
    fn head<V: Vector>(v: V, b: Block<V, Self>) -> Self::Head<V> {
        ScalesK4::load(v, b)
    }

    #[inline(always)]
    fn column<V: Vector>(v: V, b: Block<V, Self>, half: usize, j: usize) -> [V::I; 8] {
        let mut codes = [v.splat(0); 8];
        let [fifth, pairs @ ..]: [V::I; 5] = b.words(16 + 20 * (4 * half + j));
        for c in 0..4 {
            codes[2 * c] = v.or(unpack::low(v, pairs[c]), unpack::bit(v, fifth, 2 * c, 4));
            codes[2 * c + 1] = v.or(unpack::high(v, pairs[c]), unpack::bit(v, fifth, 2 * c + 1, 4));
        }
        codes
    }
}
