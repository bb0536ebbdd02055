//! Q4_K: superblocks of 256 weights of 4 bits, sub-blocks of 32 with 6-bit scales and offsets: 4.5 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..2 | d, f16: a sub-block's scale is d * its six bits |
//! | 2..4 | dmin, f16: a sub-block's offset is dmin * its six bits |
//! | 4..16 | the sub-blocks' scales and offsets, see [`k4::unpack_scales`] |
//! | 16..144 | codes: byte 32 c + l holds weight 64 c + l (low nibble) and weight 64 c + 32 + l (high nibble) |
//!
//! A weight is scale * code - offset. The two nibbles of a byte are 32 weights apart: a byte's low and high
//! nibbles belong to two sub-blocks, and 32 bytes hold two whole ones.

use super::block32::{f16_at, join, quantize};
use super::fit::AffineSearch;
use super::k4;
use super::kernels::unpack::{self, ScalesK4};
use super::kernels::{Block, Field, Layout, Superblock, Vector};
use super::superblock::{Affine, LEN, dequantize_affine, dot_affine, four_bits, pack_four_bits};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 12,
    name: "q4_k",
    block_len: LEN,
    block_bytes: BYTES,
    act: ActKind::Q8K,
    dequantize_row: |src, dst| dequantize_affine(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_affine(row, x, unpack),
    kernels: kernels::superblock::<Q4K>,
};

const BYTES: usize = 144;

/// The integer weights (the codes), scales and offsets of the 8 sub-blocks.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> Affine<8> {
    let (_, qs) = block.split_last_chunk::<128>().expect("128 bytes of codes");
    let (head, _) = block.split_first_chunk::<16>().expect("16 bytes of scales");
    let (_, packed) = head.split_last_chunk::<12>().expect("12 of them packed");
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let (sc, m) = k4::unpack_scales(packed);
    Affine { w: four_bits(qs), d, sc, dmin, m }
}

const SEARCH: AffineSearch = AffineSearch { n_max: 15, first: -1.0, more: 20, absolute: false };

fn pack(w: &[f32; LEN]) -> [u8; BYTES] {
    let (head, codes) = k4::quantize(w, &SEARCH);
    join(&[&head, &pack_four_bits(&codes)])
}

/// The layout for the kernels.
struct Q4K;

impl Layout for Q4K {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] = &[Field::Halves(0, 2), Field::Words(4, 3), Field::Columns(8, &[16, 48, 80, 112])];
}

impl Superblock for Q4K {
    const BITS: u32 = 4;
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
        let pairs: [V::I; 4] = b.words(16 + 16 * (4 * half + j));
        for c in 0..4 {
            codes[2 * c] = unpack::low(v, pairs[c]);
            codes[2 * c + 1] = unpack::high(v, pairs[c]);
        }
        codes
    }
}
