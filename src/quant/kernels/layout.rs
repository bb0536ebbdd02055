//! How a group of rows lies in memory for the kernels.
//!
//! Rows are taken in groups of as many as a vector has lanes. Within a group, the rows' first blocks come first, then their
//! second blocks, and so on; and within these, the rows' first fields (a scale, or four bytes of codes), then their second
//! fields. So each field of a block can be loaded for all rows at once, a row a lane. Fields come in the order in which the
//! kernels read them (scales before codes), since memory is read fastest straight on: with the file's order Q6_K, whose scales
//! come last, reached half the bandwidth. A group takes exactly as many bytes as its rows.

use std::marker::PhantomData;

use super::job::Ask;
use super::vector::Vector;

/// A run of fields of a block, and the byte of the file's block where it begins.
pub(crate) enum Field {
    /// One byte.
    Byte(usize),
    /// Numbers of two bytes: where, and how many.
    Halves(usize, usize),
    /// Four bytes: where, and how many times.
    Words(usize, usize),
    /// Columns of codes, four bytes of each plane side by side: how many columns, and where the planes begin.
    Columns(usize, &'static [usize]),
    /// 32 bits, one a weight. Interleaved, bit u of byte i is weight 4 u + i's, so that one shift and one mask give the bits
    /// of four neighbours, each in the byte where its other bits are. At least twelve more bytes follow in the block.
    FifthBits(usize),
}

/// A format's block, as fields.
pub(crate) trait Layout: 'static {
    /// Bytes of a block.
    const BYTES: usize;
    /// All of its fields, in the order in which they are packed. Block offsets below are offsets in this order.
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

    /// Prefetches part `part` of `n_parts` of as many bytes as these, `ask.ahead` bytes after them.
    #[inline(always)]
    pub(super) fn prefetch(self, ask: Option<Ask>, part: usize, n_parts: usize) {
        let Some(ask) = ask else { return };
        let bytes = L::BYTES * V::LANES;
        let (start, end) = (bytes * part / n_parts, bytes * (part + 1) / n_parts);
        let mut at = start + 64 * ask.line;
        while at < end {
            self.v.prefetch(self.at.wrapping_add(ask.ahead + at));
            at += 64 * ask.n_lines;
        }
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

/// Weights that will be read next, prefetched little by little while something else is computed: the processor would wait for many lines
/// at once.
pub(super) struct Ahead<const R: usize> {
    at: [*const u8; R],
    /// Lines that have been prefetched of each.
    asked: u32,
    /// Lines that should be prefetched by now, and those that a step adds, in parts of 65536.
    due: u32,
    step: u32,
}

impl<const R: usize> Ahead<R> {
    /// `n_bytes`, at most 2 MiB, from each `at`, which may be anything, over `n_steps` steps.
    #[inline(always)]
    pub(super) fn new(at: [*const u8; R], n_bytes: usize, n_steps: usize) -> Self {
        Self { at, asked: 0, due: 0, step: (n_bytes.div_ceil(64) << 16).div_ceil(n_steps) as u32 }
    }

    /// Nothing.
    #[inline(always)]
    pub(super) fn nothing() -> Self {
        Self { at: [std::ptr::null(); R], asked: 0, due: 0, step: 0 }
    }

    /// Does `n` of the steps: prefetches `n / n_steps` of the bytes.
    #[inline(always)]
    pub(super) fn ask<V: Vector>(&mut self, v: V, n: usize) {
        if V::ASKS_FROM.is_none() {
            return;
        }
        self.due = self.due.wrapping_add(self.step.wrapping_mul(n as u32));
        while self.asked < self.due >> 16 {
            let line = 64 * self.asked as usize;
            self.at.iter().for_each(|start| v.prefetch(start.wrapping_add(line)));
            self.asked += 1;
        }
    }
}

/// Interleaves a group of rows, which lie one after the other.
///
/// Experts are packed on their way from the disk, on cores that also compute. So rows are read where the disk's bytes came to lie and
/// written where the kernels read them, sixteen bytes of all rows at a time through registers (AVX2, in the cache, GiB/s: Q4_0 5.0 to
/// 23.6, Q4_K 7.2 to 25.0, Q6_K 7.3 to 25.0). Into memory that no cache holds it's 8 to 10, which is memory's own limit; stores past the
/// cache made that 13 for Q4_K, but then computing had to fetch from memory what was just packed, and a paged run gained nothing.
///
/// # Panics
/// If these aren't `V::LANES` rows of whole blocks, or the group isn't as long.
#[inline(always)]
pub(super) fn pack<V: Vector, L: Layout>(v: V, rows: &[u8], group: &mut [u8]) {
    const { assert!(L::FIELDS.len() <= 3 && fields_fill_the_block(L::FIELDS, L::BYTES)) };
    let stride = rows.len() / V::LANES;
    assert!(stride.is_multiple_of(L::BYTES) && rows.len() == V::LANES * stride && group.len() == rows.len());
    for (b, group) in group.chunks_exact_mut(V::LANES * L::BYTES).enumerate() {
        let mut out = Interleaved { v, rows: rows[b * L::BYTES..].as_ptr(), stride, to: group.as_mut_ptr() };
        // SAFETY: all rows have a block here (asserted), whose bytes the fields are, each once (asserted at compile time).
        unsafe {
            out.field::<L, 0>();
            out.field::<L, 1>();
            out.field::<L, 2>();
        }
    }
}

/// Whether fields are inside a block and as many bytes as it has.
const fn fields_fill_the_block(fields: &[Field], n_bytes: usize) -> bool {
    let (mut sum, mut inside, mut i) = (0, true, 0);
    while i < fields.len() {
        let (n, end) = match fields[i] {
            Field::Byte(from) => (1, from + 1),
            Field::Halves(from, n) => (2 * n, from + 2 * n),
            Field::Words(from, n) => (4 * n, from + 4 * n),
            // It is read with the twelve bytes after it.
            Field::FifthBits(from) => (4, from + 16),
            Field::Columns(n, planes) => {
                let (mut last, mut p) = (0, 0);
                while p < planes.len() {
                    last = if planes[p] > last { planes[p] } else { last };
                    p += 1;
                }
                (4 * n * planes.len(), last + 4 * n)
            }
        };
        (sum, inside) = (sum + n, inside && end <= n_bytes);
        i += 1;
    }
    inside && sum == n_bytes
}

/// The blocks of as many rows at one position, and where their next field goes, side by side.
struct Interleaved<V> {
    v: V,
    /// The first row's block. The next row's is `stride` bytes after it, and so on.
    rows: *const u8,
    stride: usize,
    to: *mut u8,
}

impl<V: Vector> Interleaved<V> {
    /// Puts down field `I`, if there is one. One function a field, which the compiler knows: a loop over them it doesn't take apart,
    /// and asks for each block what its fields are (Q4_0: 6.6 for 23.6 GiB/s).
    ///
    /// # Safety
    /// The rows have a block of `L`, and there is room for it.
    #[inline(always)]
    unsafe fn field<L: Layout, const I: usize>(&mut self) {
        let Some(field) = L::FIELDS.get(I) else { return };
        // SAFETY: the caller's promise.
        unsafe {
            match *field {
                Field::Byte(from) => self.put::<1>(from, 1),
                Field::Halves(from, n) => self.put::<2>(from, n),
                Field::Words(from, n) => self.columns(n, &[from]),
                Field::Columns(n, planes) => self.columns(n, planes),
                Field::FifthBits(from) => self.fifth_bits(from),
            }
        }
    }

    /// Puts down `n` times the `N` bytes from byte `from` of each row's block on.
    ///
    /// # Safety
    /// The blocks have them, and there is room.
    #[inline(always)]
    unsafe fn put<const N: usize>(&mut self, from: usize, n: usize) {
        for i in 0..n {
            for lane in 0..V::LANES {
                // SAFETY: the caller's promise.
                unsafe {
                    let bytes = self.rows.add(lane * self.stride + from + N * i).cast::<[u8; N]>().read();
                    self.to.cast::<[u8; N]>().add(lane).write(bytes);
                }
            }
            self.to = self.to.wrapping_add(N * V::LANES);
        }
    }

    /// Puts down `n` times four bytes of each plane, side by side.
    ///
    /// # Safety
    /// As for [`Self::put`].
    #[inline(always)]
    unsafe fn columns(&mut self, n: usize, planes: &[usize]) {
        let whole = n / 4 * 4;
        for j in (0..whole).step_by(4) {
            for (p, from) in planes.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let words = self.v.load_columns(self.rows.add(from + 4 * j), self.stride);
                    for (k, word) in words.into_iter().enumerate() {
                        self.v.store(self.to.add(4 * (k * planes.len() + p) * V::LANES), word);
                    }
                }
            }
            self.to = self.to.wrapping_add(16 * planes.len() * V::LANES);
        }
        for j in whole..n {
            for from in planes {
                // SAFETY: the caller's promise.
                unsafe { self.put::<4>(from + 4 * j, 1) };
            }
        }
    }

    /// Puts down the 32 bits at byte `from`: bit 4 u + i becomes bit u of byte i.
    ///
    /// # Safety
    /// As for [`Self::put`], and twelve more bytes follow in the block.
    #[inline(always)]
    unsafe fn fifth_bits(&mut self, from: usize) {
        let v = self.v;
        // SAFETY: the caller's promise.
        let [bits, ..] = unsafe { v.load_columns(self.rows.add(from), self.stride) };
        let mut transposed = v.splat(0);
        for i in 0..4 {
            let x = v.and(v.shr(bits, i), v.splat(0x1111_1111));
            let x = v.and(v.or(x, v.shr(x, 3)), v.splat(0x0303_0303));
            let x = v.and(v.or(x, v.shr(x, 6)), v.splat(0x000f_000f));
            let x = v.and(v.or(x, v.shr(x, 12)), v.splat(0xff));
            transposed = v.or(transposed, v.shl(x, 8 * i));
        }
        // SAFETY: the caller's promise.
        unsafe { v.store(self.to, transposed) };
        self.to = self.to.wrapping_add(4 * V::LANES);
    }
}
