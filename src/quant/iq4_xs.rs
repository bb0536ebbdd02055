//! IQ4_XS: superblocks of 256 weights of 4 bits through IQ4_NL's codebook, sub-blocks of 32 with 6-bit scales:
//! 4.25 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..2 | d, f16: a sub-block's scale is d * (its six bits - 32) |
//! | 2..4 | high two bits of the scales: bits 2 j and 2 j + 1 of this little-endian u16 are sub-block j's |
//! | 4..8 | low four bits of the scales: byte i holds sub-blocks 2 i (low nibble) and 2 i + 1 (high nibble) |
//! | 8..136 | codes: sub-block j's 16 bytes, each byte i holds its weight i (low nibble) and i + 16 (high nibble) |
//!
//! A weight is scale * codebook\[code\]. Each sub-block is laid out as a block of IQ4_NL without its scale.

use super::act::{largest, nearest};
use super::block32::{f16_at, f16_bytes, join, nibbles, pack_nibbles, quantize};
use super::iq4_nl::{CODEBOOK, codes, fit};
use super::kernels::{Block, Field, Layout, Scales, Superblock, Vector, unpack};
use super::superblock::{LEN, Scaled, dequantize_scaled, dot_scaled};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 23,
    name: "iq4_xs",
    block_len: LEN,
    block_bytes: BYTES,
    act: ActKind::Q8K,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_scaled(row, x, unpack),
    kernels: kernels::superblock::<Iq4Xs>,
};

const BYTES: usize = 136;

/// The integer weights (the codebook's values) and the scales of the 8 sub-blocks.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> Scaled<8> {
    let (_, qs) = block.split_last_chunk::<128>().expect("128 bytes of codes");
    let mut w = [0; LEN];
    let subs = w.as_chunks_mut::<32>().0;
    for (w, qs) in subs.iter_mut().zip(qs.as_chunks::<16>().0) {
        *w = nibbles(qs).map(|q| CODEBOOK[q as usize]);
    }
    Scaled { w, d: f16_at(block, 0), sc: scales(block) }
}

/// The 8 scales, -32..=31.
#[inline]
pub(super) fn scales(block: &[u8; BYTES]) -> [i8; 8] {
    let high = u16::from_le_bytes([block[2], block[3]]);
    std::array::from_fn(|j| {
        let low = block[4 + j / 2] >> (j % 2 * 4) & 15;
        (low | ((high >> (2 * j) & 3) as u8) << 4) as i8 - 32
    })
}

/// Each sub-block is fitted by itself as in IQ4_NL. Then the scales are rounded to six bits such that the one of largest size
/// becomes -32, and the codes are chosen for what they became (before d is rounded to a half, as ggml does).
fn pack(w: &[f32; LEN]) -> [u8; BYTES] {
    let subs = w.as_chunks::<32>().0;
    let mut fits = [0.0f32; 8];
    for (fitted, w) in fits.iter_mut().zip(subs) {
        *fitted = fit(w);
    }
    let d = -largest(&fits) / 32.0;
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    let sc = fits.map(|s| nearest(id * s).clamp(-32, 31));
    let (mut high, mut low, mut qs) = (0u16, [0; 4], [0; 128]);
    for (j, (w, qs)) in subs.iter().zip(qs.as_chunks_mut().0).enumerate() {
        let scale = d * sc[j] as f32;
        let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
        *qs = pack_nibbles(&codes(w, inverse));
        let bits = (sc[j] + 32) as u8;
        low[j / 2] |= (bits & 15) << (j % 2 * 4);
        high |= u16::from(bits >> 4) << (2 * j);
    }
    join(&[&f16_bytes(d), &high.to_le_bytes(), &low, &qs])
}

/// The layout for the kernels.
struct Iq4Xs;

impl Layout for Iq4Xs {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] =
        &[Field::Halves(0, 2), Field::Words(4, 1), Field::Columns(4, &[8, 24, 40, 56, 72, 88, 104, 120])];
}

impl Superblock for Iq4Xs {
    const BITS: u32 = 8;
    const ZERO: i32 = 0;
    const SUB: usize = 32;
    type Head<V: Vector> = ScalesIq4Xs<V>;

    #[inline(always)]
    fn head<V: Vector>(_: V, b: Block<V, Self>) -> Self::Head<V> {
        ScalesIq4Xs { d: b.f16(0), high: b.u16(2), low: b.word(4) }
    }

    #[inline(always)]
    fn column<V: Vector>(v: V, b: Block<V, Self>, half: usize, j: usize) -> [V::I; 8] {
        let mut codes = [v.splat(0); 8];
        let pairs: [V::I; 8] = b.words(8 + 32 * j);
        for s in 0..8 {
            let code = unpack::nibble(v, pairs[s], half);
            codes[s] = v.signed(v.lookup(&CODEBOOK, code));
        }
        codes
    }
}

#[derive(Clone, Copy)]
struct ScalesIq4Xs<V: Vector> {
    d: V::F,
    /// Two bits a scale, and four.
    high: V::I,
    low: V::I,
}

impl<V: Vector> Scales<V> for ScalesIq4Xs<V> {
    #[inline(always)]
    fn d(&self) -> V::F {
        self.d
    }

    #[inline(always)]
    fn scale(&self, v: V, j: usize) -> V::I {
        let low = v.and(v.shr(self.low, 4 * j as u32), v.splat(15));
        let high = v.and(v.shr(self.high, 2 * j as u32), v.splat(3));
        v.add_i32(v.or(low, v.shl(high, 4)), v.splat((-32i32).cast_unsigned()))
    }
}
