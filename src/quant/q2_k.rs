//! Q2_K: superblocks of 256 weights of 2 bits, sub-blocks of 16 with 4-bit scales and offsets: 2.625 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..16 | byte j: scale (low nibble) and offset (high nibble) of sub-block j |
//! | 16..80 | codes: byte 32 h + l holds weights 128 h + l, + 32, + 64, + 96, from the low bits up |
//! | 80..82 | d, f16: a sub-block's scale is d * its nibble |
//! | 82..84 | dmin, f16: a sub-block's offset is dmin * its nibble |
//!
//! A weight is scale * code - offset. The four codes of a byte are 32 weights apart: a shift and a mask of 32
//! bytes give 32 weights in order.

use super::block32::{f16_at, join, quantize};
use super::fit::{AffineSearch, Groups, Stored, stored};
use super::kernels::{Block, Field, Layout, Scales, Superblock, Vector, unpack};
use super::superblock::{Affine, LEN, dequantize_affine, dot_affine, pack_two_bits, two_bits};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 10,
    name: "q2_k",
    block_len: LEN,
    block_bytes: BYTES,
    act: ActKind::Q8K,
    dequantize_row: |src, dst| dequantize_affine(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_affine(row, x, unpack),
    kernels: kernels::superblock::<Q2K>,
};

const BYTES: usize = 84;

/// The integer weights (the codes), scales and offsets of the 16 sub-blocks.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> Affine<16> {
    let (scales, rest) = block.split_first_chunk::<16>().expect("16 scales");
    let (qs, _) = rest.split_first_chunk::<64>().expect("64 bytes of codes");
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    Affine { w: two_bits(qs), d, sc: scales.map(|s| s & 15), dmin, m: scales.map(|s| s >> 4) }
}

const SEARCH: AffineSearch = AffineSearch { n_max: 3, first: -0.5, more: 15, absolute: true };

/// A weight counts as much as its size.
fn pack(w: &[f32; LEN]) -> [u8; BYTES] {
    let importance = |w: &Groups<16, 16>| w.map(|x| x.map(f32::abs));
    let Stored { d, sc, dmin, m, codes } = stored(w, importance, &SEARCH, 15);
    let packed: [u8; 16] = std::array::from_fn(|j| sc[j] | m[j] << 4);
    join(&[&packed, &pack_two_bits(&codes), &d.to_le_bytes(), &dmin.to_le_bytes()])
}

/// The layout for the kernels.
struct Q2K;

impl Layout for Q2K {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] = &[Field::Halves(80, 2), Field::Words(0, 4), Field::Columns(8, &[16, 48])];
}

impl Superblock for Q2K {
    const BITS: u32 = 2;
    const ZERO: i32 = 0;
    const SUB: usize = 16;
    const MIN: bool = true;
    type Head<V: Vector> = ScalesQ2K<V>;

    #[inline(always)]
    fn head<V: Vector>(_: V, b: Block<V, Self>) -> Self::Head<V> {
        ScalesQ2K { d: b.f16(0), dmin: b.f16(2), nibbles: b.words(4) }
    }

    #[inline(always)]
    fn column<V: Vector>(v: V, b: Block<V, Self>, half: usize, j: usize) -> [V::I; 8] {
        let mut codes = [v.splat(0); 8];
        let fours: [V::I; 2] = b.words(20 + 8 * (4 * half + j));
        for h in 0..2 {
            for i in 0..4 {
                codes[4 * h + i] = unpack::pair(v, fours[h], i);
            }
        }
        codes
    }
}

#[derive(Clone, Copy)]
struct ScalesQ2K<V: Vector> {
    d: V::F,
    dmin: V::F,
    /// The scales and offsets of four sub-blocks a word.
    nibbles: [V::I; 4],
}

impl<V: Vector> Scales<V> for ScalesQ2K<V> {
    #[inline(always)]
    fn d(&self) -> V::F {
        self.d
    }

    #[inline(always)]
    fn dmin(&self, _: V) -> V::F {
        self.dmin
    }

    #[inline(always)]
    fn scale(&self, v: V, j: usize) -> V::I {
        unpack::byte(v, unpack::low(v, self.nibbles[j / 4]), j % 4)
    }

    #[inline(always)]
    fn min(&self, v: V, j: usize) -> V::I {
        unpack::byte(v, unpack::high(v, self.nibbles[j / 4]), j % 4)
    }
}
