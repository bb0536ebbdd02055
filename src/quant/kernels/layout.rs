//! How a group of rows lies in memory for the kernels.
//!
//! Rows are taken in groups of as many as a vector has lanes. Within a group, the rows' first blocks come first, then their
//! second blocks, and so on; and within these, the rows' first fields (a scale, or four bytes of codes), then their second
//! fields. So each field of a block can be loaded for all rows at once, a row a lane. A group takes the place of its rows
//! exactly, so it is made in place, and the field at byte `at` of a block is found at `at * LANES`.

use std::marker::PhantomData;

use super::vector::Vector;

/// A run of fields of a block, in the file's order.
pub(crate) enum Field {
    /// One byte.
    Byte,
    /// That many numbers of two bytes.
    Halves(usize),
    /// That many times four bytes.
    Words(usize),
    /// 32 bits, one a weight. Interleaved, bit u of byte i is weight 4 u + i's, so that one shift and one mask give the bits
    /// of four neighbours, each in the byte where its other bits are.
    FifthBits,
}

/// A format's block, as fields.
pub(crate) trait Layout: 'static {
    /// Bytes of a block.
    const BYTES: usize;
    /// Its fields; their widths add up to `BYTES`.
    const FIELDS: &'static [Field];
}

/// The blocks of a group of rows at one position.
pub(crate) struct Block<V, L> {
    v: V,
    at: *const u8,
    layout: PhantomData<L>,
}

impl<V: Copy, L> Clone for Block<V, L> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<V: Copy, L> Copy for Block<V, L> {}

impl<V: Vector, L: Layout> Block<V, L> {
    /// # Safety
    /// `L::BYTES * V::LANES` bytes at `at` can be read for as long as this lives.
    #[inline(always)]
    pub(super) unsafe fn new(v: V, at: *const u8) -> Self {
        Self { v, at, layout: PhantomData }
    }

    #[inline(always)]
    fn field(self, at: usize, width: usize) -> *const u8 {
        assert!(at + width <= L::BYTES);
        // SAFETY: a whole field of all lanes lies within what `new` was promised.
        unsafe { self.at.add(at * V::LANES) }
    }

    /// The four bytes at byte `at` of each row's block.
    #[inline(always)]
    pub(crate) fn word(self, at: usize) -> V::I {
        // SAFETY: `field` has checked that the lanes' 4 bytes are inside.
        unsafe { self.v.load(self.field(at, 4)) }
    }

    /// The `N` times four bytes from byte `at`.
    #[inline(always)]
    pub(crate) fn words<const N: usize>(self, at: usize) -> [V::I; N] {
        let mut words = [self.v.splat(0); N];
        let mut j = 0;
        while j < N {
            words[j] = self.word(at + 4 * j);
            j += 1;
        }
        words
    }

    /// The half-precision number at byte `at`.
    #[inline(always)]
    pub(crate) fn f16(self, at: usize) -> V::F {
        // SAFETY: `field` has checked that the lanes' 2 bytes are inside.
        unsafe { self.v.load_f16(self.field(at, 2)) }
    }

    /// The unsigned number of two bytes at byte `at`.
    #[inline(always)]
    pub(crate) fn u16(self, at: usize) -> V::I {
        // SAFETY: `field` has checked that the lanes' 2 bytes are inside.
        unsafe { self.v.load_u16(self.field(at, 2)) }
    }

    /// The byte at byte `at`.
    #[inline(always)]
    pub(crate) fn byte(self, at: usize) -> V::I {
        // SAFETY: `field` has checked that the lanes' bytes are inside.
        unsafe { self.v.load_u8(self.field(at, 1)) }
    }
}

/// Interleaves a group of `lanes` rows in place; `scratch` holds as many bytes.
pub(super) fn pack<L: Layout>(lanes: usize, group: &mut [u8], scratch: &mut [u8]) {
    scratch.copy_from_slice(group);
    let row_bytes = group.len() / lanes;
    for (b, group) in group.chunks_exact_mut(lanes * L::BYTES).enumerate() {
        for lane in 0..lanes {
            let block = &scratch[lane * row_bytes + b * L::BYTES..][..L::BYTES];
            let mut at = 0;
            for field in L::FIELDS {
                let (n, width) = match field {
                    Field::Byte => (1, 1),
                    Field::Halves(n) => (*n, 2),
                    Field::Words(n) => (*n, 4),
                    Field::FifthBits => {
                        let bits =
                            u32::from_le_bytes(*block[at..].first_chunk().expect("the layout has four bytes here"));
                        group[at * lanes + lane * 4..][..4].copy_from_slice(&transpose(bits).to_le_bytes());
                        at += 4;
                        continue;
                    }
                };
                for _ in 0..n {
                    group[at * lanes + lane * width..][..width].copy_from_slice(&block[at..at + width]);
                    at += width;
                }
            }
        }
    }
}

/// Bit 4 u + i goes to bit u of byte i.
fn transpose(bits: u32) -> u32 {
    (0..32).fold(0, |out, k| out | (bits >> k & 1) << (8 * (k % 4) + k / 4))
}
