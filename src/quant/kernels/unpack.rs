//! Steps of unpacking that several formats share.

use super::layout::{Block, Layout};
use super::superblock::Scales;
use super::vector::Vector;

/// The low nibbles of each byte.
#[inline(always)]
pub(crate) fn low<V: Vector>(v: V, a: V::I) -> V::I {
    v.and(a, v.splat(0x0f0f_0f0f))
}

/// The high nibbles of each byte.
#[inline(always)]
pub(crate) fn high<V: Vector>(v: V, a: V::I) -> V::I {
    v.high_nibbles(a)
}

/// Nibble `n` (0 low, 1 high) of each byte.
#[inline(always)]
pub(crate) fn nibble<V: Vector>(v: V, a: V::I, n: usize) -> V::I {
    if n == 0 { low(v, a) } else { high(v, a) }
}

/// Bit pair `n` (0..4) of each byte.
#[inline(always)]
pub(crate) fn pair<V: Vector>(v: V, a: V::I, n: usize) -> V::I {
    v.and(v.shr(a, 2 * n as u32), v.splat(0x0303_0303))
}

/// Bit `from` of each byte, as bit `to`.
#[inline(always)]
pub(crate) fn bit<V: Vector>(v: V, a: V::I, from: usize, to: usize) -> V::I {
    let moved = if from < to { v.shl(a, (to - from) as u32) } else { v.shr(a, (from - to) as u32) };
    v.and(moved, v.splat(0x0101_0101 << to))
}

/// Byte `n` (0..4) of each lane, zero-extended.
#[inline(always)]
pub(crate) fn byte<V: Vector>(v: V, a: V::I, n: usize) -> V::I {
    v.and(v.shr(a, 8 * n as u32), v.splat(0xff))
}

/// Byte `n` (0..4) of each lane, sign-extended.
#[inline(always)]
pub(crate) fn signed_byte<V: Vector>(v: V, a: V::I, n: usize) -> V::I {
    v.sar(v.shl(a, 24 - 8 * n as u32), 24)
}

/// 32 codes of four bits in the 16 bytes from `at`: low nibbles first, then high ones.
#[inline(always)]
pub(crate) fn nibbles<V: Vector, L: Layout>(v: V, b: Block<V, L>, at: usize) -> [V::I; 8] {
    let mut codes = [v.splat(0); 8];
    let mut j = 0;
    while j < 4 {
        let q = b.word(at + 4 * j);
        codes[j] = low(v, q);
        codes[j + 4] = high(v, q);
        j += 1;
    }
    codes
}

/// The fifth bits of 32 codes, from a [`Field::FifthBits`](super::Field) at `at`, put above them.
#[inline(always)]
pub(crate) fn fifth_bits<V: Vector, L: Layout>(v: V, b: Block<V, L>, at: usize, codes: [V::I; 8]) -> [V::I; 8] {
    let bits = b.word(at);
    let mut codes = codes;
    let mut j = 0;
    while j < 8 {
        codes[j] = v.or(codes[j], bit(v, bits, j, 4));
        j += 1;
    }
    codes
}

/// Codes looked up in a codebook.
#[inline(always)]
pub(crate) fn codebook<V: Vector>(v: V, table: &[i8; 16], codes: [V::I; 8]) -> [V::I; 8] {
    let mut codes = codes;
    let mut j = 0;
    while j < 8 {
        codes[j] = v.lookup(table, codes[j]);
        j += 1;
    }
    codes
}

/// Signed bytes as [`Vector::dot`] takes them.
#[inline(always)]
pub(crate) fn signed<V: Vector>(v: V, codes: [V::I; 8]) -> [V::I; 8] {
    let mut codes = codes;
    let mut j = 0;
    while j < 8 {
        codes[j] = v.signed(codes[j]);
        j += 1;
    }
    codes
}

/// The upper two bits of each byte, as bits 4 and 5.
#[inline(always)]
fn top_pair<V: Vector>(v: V, a: V::I) -> V::I {
    v.and(v.shr(a, 2), v.splat(0x3030_3030))
}

/// Scales and offsets of Q4_K and Q5_K: four sub-blocks a word.
#[derive(Clone, Copy)]
pub(crate) struct ScalesK4<V: Vector> {
    d: V::F,
    dmin: V::F,
    scales: [V::I; 2],
    mins: [V::I; 2],
}

impl<V: Vector> ScalesK4<V> {
    /// From a block that begins with d, dmin and the 12 bytes of [`unpack_scales`](super::super::k4::unpack_scales).
    #[inline(always)]
    pub(crate) fn load<L: Layout>(v: V, b: Block<V, L>) -> Self {
        let [s, m, h] = b.words(4);
        let six = v.splat(0x3f3f_3f3f);
        Self {
            d: b.f16(0),
            dmin: b.f16(2),
            scales: [v.and(s, six), v.or(low(v, h), top_pair(v, s))],
            mins: [v.and(m, six), v.or(high(v, h), top_pair(v, m))],
        }
    }
}

impl<V: Vector> Scales<V> for ScalesK4<V> {
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
        byte(v, self.scales[j / 4], j % 4)
    }

    #[inline(always)]
    fn min(&self, v: V, j: usize) -> V::I {
        byte(v, self.mins[j / 4], j % 4)
    }
}
