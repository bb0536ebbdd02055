//! The kernels of all formats with superblocks of 256 weights.

use std::hint::black_box;
use std::marker::PhantomData;

use super::job::{Act, Ask, Job, MAX_TOKENS};
use super::layout::{Ahead, Block, Layout};
use super::vector::Vector;
use super::{Kernel, NO_SCALE, for_each_tile};

/// How the superblocks of a format come apart in registers: eight times 32 integers, less `ZERO`, times the integer scale of
/// their sub-block and `d`, less perhaps its integer offset times `dmin`.
pub(crate) trait Superblock: Layout {
    /// Codes are unsigned and less than `1 << BITS`; with 8 they are signed and pass through [`Vector::signed`].
    const BITS: u32;
    /// The code that stands for zero, 0 or a power of two; 0 if `BITS` is 8.
    const ZERO: i32;
    /// Weights of a sub-block: 16 or 32.
    const SUB: usize;
    /// Whether sub-blocks have an offset.
    const MIN: bool = false;
    /// The scales of all sub-blocks.
    type Head<V: Vector>: Scales<V>;
    /// Loads them.
    fn head<V: Vector>(v: V, b: Block<V, Self>) -> Self::Head<V>
    where
        Self: Sized;
    /// A column of four weights of each of the eight times 32: weights `16 * half + 4 * j` and on, for `half` 0 or 1 and `j` 0 to 3.
    ///
    /// By columns, since the formats put the weights of several sub-blocks into a byte: each is loaded once, and shifts are
    /// immediate while `j` runs.
    fn column<V: Vector>(v: V, b: Block<V, Self>, half: usize, j: usize) -> [V::I; 8]
    where
        Self: Sized;
}

/// The scales and offsets of a superblock in registers.
pub(crate) trait Scales<V: Vector>: Copy {
    /// What the scales are multiplied by.
    fn d(&self) -> V::F;
    /// What the offsets are multiplied by.
    #[inline(always)]
    fn dmin(&self, v: V) -> V::F {
        v.splat_f32(NO_SCALE)
    }
    /// The scale of sub-block `j`, -128..=127.
    fn scale(&self, v: V, j: usize) -> V::I;
    /// The offset of sub-block `j`, at most 255.
    #[inline(always)]
    fn min(&self, v: V, j: usize) -> V::I {
        let _ = j;
        v.splat(0)
    }
}

/// Superblocks that are unpacked at once: with their scales at most 12 KiB, a third of the L1 cache.
const DEPTH: usize = 2;

/// The kernels of a [`Superblock`].
pub(super) struct Superblocks<L>(PhantomData<L>);

/// A superblock of a group, taken apart.
#[derive(Clone, Copy)]
struct Panel<V: Vector> {
    /// Eight times 32 weights.
    codes: [[V::I; 8]; 8],
    /// The sub-blocks' scales, as [`Vector::factor`]s.
    factors: [V::I; 16],
    /// What the sums of the activations of two sub-blocks are multiplied by, see [`Superblocks::pair`].
    pairs: [V::I; 8],
    d: V::F,
    dmin: V::F,
}

impl<V: Vector> Panel<V> {
    #[inline(always)]
    fn nothing(v: V) -> Self {
        let (zero, none) = (v.splat(0), v.splat_f32(NO_SCALE));
        Self { codes: [[zero; 8]; 8], factors: [zero; 16], pairs: [zero; 8], d: none, dmin: none }
    }
}

/// Sums of `N` tokens with `R` groups of rows.
type Sums<T, const N: usize, const R: usize> = [[T; R]; N];

/// How a superblock's codes are read.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    /// The columns of each half, which are 4, such that the compiler doesn't know: it would lay a superblock's columns out one after the
    /// other, load them all, and keep on the stack what doesn't fit into registers (Q6_K: half the speed).
    pub(super) n_columns: usize,
    /// What is prefetched meanwhile.
    ask: Option<Ask>,
}

impl Reading {
    #[inline(always)]
    pub(super) fn new<V: Vector>(ask: Option<Ask>) -> Self {
        // A vector of `BY_LANE` takes four columns at once anyway.
        Self { n_columns: if V::BY_LANE { 4 } else { black_box(4) }, ask }
    }
}

impl<L: Superblock> Superblocks<L> {
    /// Sub-blocks of 32 weights: one, or two.
    pub(super) const SUBS: usize = 32 / L::SUB;

    /// The code that stands for zero, as the vectors multiply it.
    #[inline(always)]
    pub(super) const fn zero<V: Vector>() -> i32 {
        if L::BITS == 8 { V::SIGNED_ZERO } else { L::ZERO }
    }

    /// The same in a panel.
    #[inline(always)]
    const fn panel_zero<V: Vector>() -> i32 {
        if L::BITS != 8 && V::PANEL_SIGNED { 0 } else { Self::zero::<V>() }
    }

    /// Whether `fused` begins a sub-block's sum with what codes less zero differ from codes by, as blocks of 32 do.
    #[inline(always)]
    const fn begins_with_zero<V: Vector>() -> bool {
        V::BY_LANE && L::SUB == 16 && !L::MIN && Self::zero::<V>() != 0
    }

    /// What the activations' sums are multiplied by in sub-blocks `j` and `j + 1`, as two numbers of 16 bits: the offsets, or, where
    /// zero is a code, the scales.
    #[inline(always)]
    pub(super) fn pair<V: Vector>(v: V, head: &L::Head<V>, j: usize) -> V::I {
        let of = |j| if L::MIN { head.min(v, j) } else { head.scale(v, j) };
        v.pair(of(j), of(j + 1))
    }

    #[inline(always)]
    fn open<V: Vector>(v: V, b: Block<V, L>, reading: Reading, panel: &mut Panel<V>) {
        let head = L::head(v, b);
        for half in 0..2 {
            for j in 0..reading.n_columns {
                b.prefetch(reading.ask, 4 * half + j % 4, 8);
                let column = L::column(v, b, half, j % 4);
                for s in 0..8 {
                    panel.codes[s][4 * half + j % 4] = column[s];
                }
            }
        }
        for j in 0..8 * Self::SUBS {
            panel.factors[j] = v.factor(head.scale(v, j));
        }
        if V::PANEL_SIGNED {
            for codes in &mut panel.codes {
                *codes = v.panel(*codes, L::ZERO);
            }
        }
        if L::MIN || Self::panel_zero::<V>() != 0 {
            for j in 0..4 * Self::SUBS {
                panel.pairs[j] = Self::pair(v, &head, 2 * j);
            }
        }
        (panel.d, panel.dmin) = (head.d(), head.dmin(v));
    }

    /// `sums` and the products of weights `16 * half` and on, sixteen, of each 32 of superblock `i` with some tokens.
    ///
    /// # Safety
    /// The tokens have a superblock `i`.
    #[inline(always)]
    unsafe fn half<V: Vector, const N: usize>(
        v: V,
        b: Block<V, L>,
        reading: Reading,
        x: &[Act; N],
        i: usize,
        half: usize,
        mut sums: [[V::I; N]; 8],
    ) -> [[V::I; N]; 8] {
        let first = 256 * i + 16 * half;
        if V::BY_LANE {
            b.prefetch(reading.ask, half, 2);
            let w: [_; 4] = std::array::from_fn(|j| L::column(v, b, half, j));
            for s in 0..8 {
                for t in 0..N {
                    let w = w.map(|column| column[s]);
                    // SAFETY: the token has these sixteen activations, by the caller's promise.
                    sums[s][t] = unsafe { v.dot(sums[s][t], &w, x[t].q.add(first + 32 * s), L::BITS) };
                }
            }
            return sums;
        }
        for j in 0..reading.n_columns {
            let j = j % 4;
            b.prefetch(reading.ask, 4 * half + j, 8);
            let column = L::column(v, b, half, j);
            for s in 0..8 {
                for t in 0..N {
                    // SAFETY: the token has these four activations, by the caller's promise.
                    sums[s][t] =
                        unsafe { v.dot(sums[s][t], &[column[s]], x[t].q.add(first + 32 * s + 4 * j), L::BITS) };
                }
            }
        }
        sums
    }

    /// Adds superblock `i`'s part to the dot products with some tokens, without storing its codes.
    ///
    /// # Safety
    /// The tokens have a superblock `i`.
    #[inline(always)]
    unsafe fn fused<V: Vector, const N: usize>(
        v: V,
        b: Block<V, L>,
        reading: Reading,
        x: &[Act; N],
        i: usize,
        acc: &mut [V::F; N],
    ) {
        // The sums of sub-block `SUBS * s + k` are at [k][s].
        let mut dots = [[[v.splat(0); N]; 8]; 2];
        for half in 0..2 {
            let k = half % Self::SUBS;
            let mut sums = dots[k];
            if Self::begins_with_zero::<V>() && half < Self::SUBS {
                for t in 0..N {
                    // SAFETY: the token has these sub-blocks, by the caller's promise.
                    let zeros =
                        unsafe { v.splat_sums(Self::sums_at(&x[t], i, 0), k, Self::zero::<V>().trailing_zeros()) };
                    for s in 0..8 {
                        sums[s][t] = zeros[s];
                    }
                }
            }
            // SAFETY: the caller's promise.
            dots[k] = unsafe { Self::half(v, b, reading, x, i, half, sums) };
        }
        let head = L::head(v, b);
        let (mut sums, mut offsets) = ([v.splat(0); N], [v.splat(0); N]);
        for j in 0..8 * Self::SUBS {
            let scale = head.scale(v, j);
            for t in 0..N {
                sums[t] = v.mul_add_i32(dots[j % Self::SUBS][j / Self::SUBS][t], scale, sums[t]);
            }
        }
        let zero = if Self::begins_with_zero::<V>() { 0 } else { Self::zero::<V>() };
        if L::MIN || zero != 0 {
            for j in 0..4 * Self::SUBS {
                let pair = Self::pair(v, &head, 2 * j);
                for t in 0..N {
                    // SAFETY: the token has these two sub-blocks, by the caller's promise.
                    offsets[t] = unsafe { v.dot_pairs(offsets[t], pair, Self::sums_at(&x[t], i, j)) };
                }
            }
        }
        let (d, dmin) = (head.d(), head.dmin(v));
        for t in 0..N {
            // SAFETY: the token has this superblock, by the caller's promise.
            let da = unsafe { *x[t].d.add(i) };
            acc[t] = Self::total(v, zero, (sums[t], offsets[t]), (d, dmin), da, acc[t]);
        }
    }

    /// Whether `gemv` multiplies the codes of `n_tokens` tokens as it unpacks them, rather than store them in a panel first.
    #[inline(always)]
    const fn is_fused<V: Vector>(n_tokens: usize) -> bool {
        // Two tokens have twice the sums, too many for 16 registers. Sub-blocks of 16 have twice as many again, so that beyond two tokens
        // pairs were tried in vain (docs/performance.md).
        let pairs_pay = V::MANY_REGISTERS && (L::SUB == 32 || n_tokens == 2);
        n_tokens <= V::FUSED && (n_tokens == 1 || pairs_pay)
    }

    /// [`fused`](Self::fused) of two tokens at a time; only the first two prefetch.
    ///
    /// # Safety
    /// The tokens have a superblock `i`.
    #[inline(always)]
    unsafe fn fused_pairs<V: Vector, const T: usize>(
        v: V,
        b: Block<V, L>,
        mut reading: Reading,
        x: &[Act; T],
        i: usize,
        acc: &mut Sums<V::F, T, 1>,
    ) {
        let (pairs, odd) = x.as_chunks::<2>();
        let (pair_acc, odd_acc) = acc.as_flattened_mut().as_chunks_mut::<2>();
        for (x, acc) in pairs.iter().zip(pair_acc) {
            // SAFETY: the caller's promise.
            unsafe { Self::fused(v, b, reading, x, i, acc) };
            reading.ask = None;
        }
        if let ([x], [acc]) = (odd, odd_acc) {
            // SAFETY: as above.
            unsafe { Self::fused(v, b, reading, &[*x], i, std::array::from_mut(acc)) };
        }
    }

    /// Where the sums of the `j`-th two sub-blocks of superblock `i` are.
    ///
    /// # Safety
    /// The token has them.
    #[inline(always)]
    pub(super) unsafe fn sums_at(x: &Act, i: usize, j: usize) -> *const i16 {
        // SAFETY: the caller's promise.
        unsafe { x.negated_sub_sum.add(8 * Self::SUBS * i + 2 * j) }
    }

    /// `acc` and a superblock's part: its integers, which are exact, times its scales and the activations'.
    #[inline(always)]
    fn total<V: Vector>(
        v: V,
        zero: i32,
        (sum, offset): (V::I, V::I),
        (d, dmin): (V::F, V::F),
        da: f32,
        acc: V::F,
    ) -> V::F {
        let da = v.splat_f32(da);
        let sum = if zero == 0 { sum } else { v.add_i32(sum, v.shl(offset, zero.trailing_zeros())) };
        let acc = v.fma(v.to_f32(sum), v.mul(d, da), acc);
        if L::MIN { v.fma(v.to_f32(offset), v.mul(dmin, da), acc) } else { acc }
    }

    /// Adds the dot products of 32 weights, the `s`-th of superblock `i`, times their scales.
    ///
    /// # Safety
    /// The tokens have a superblock `i`.
    #[inline(always)]
    unsafe fn step<V: Vector, const N: usize, const R: usize>(
        v: V,
        w: &[Panel<V>; R],
        x: &[Act; N],
        i: usize,
        s: usize,
        sums: &mut Sums<V::I, N, R>,
    ) {
        // SAFETY: the tokens have these 32 activations, by the caller's promise.
        unsafe {
            let q: [*const i8; N] = std::array::from_fn(|t| x[t].q.add(256 * i + 32 * s));
            let codes: [_; R] = std::array::from_fn(|r| &w[r].codes[s]);
            if Self::SUBS == 1 {
                *sums = v.scaled_dots(*sums, codes, q, L::BITS, std::array::from_fn(|r| w[r].factors[s]));
            } else {
                let low = codes.map(|codes| codes.first_chunk::<4>().expect("of 8"));
                let high = codes.map(|codes| codes.last_chunk::<4>().expect("of 8"));
                let factor = |k: usize| std::array::from_fn(|r| w[r].factors[2 * s + k]);
                *sums = v.scaled_dots(*sums, low, q, L::BITS, factor(0));
                *sums = v.scaled_dots(*sums, high, q.map(|q| q.add(16)), L::BITS, factor(1));
            }
        }
    }

    /// Adds some superblocks' part, from superblock `first` on, to the dot products of some groups of rows with some tokens.
    ///
    /// # Safety
    /// The tokens have these superblocks.
    #[inline(always)]
    unsafe fn tile<V: Vector, const N: usize, const R: usize>(
        v: V,
        panel: &[[Panel<V>; R]],
        first: usize,
        x: &[Act; N],
        acc: &mut Sums<V::F, N, R>,
        ahead: &mut Ahead<R>,
    ) {
        for (i, w) in (first..).zip(panel) {
            ahead.ask(v, N);
            let mut sums = [[v.splat(0); R]; N];
            for s in 0..8 {
                // SAFETY: the caller's promise.
                unsafe { Self::step(v, w, x, i, s, &mut sums) };
            }
            let mut offsets = [[v.splat(0); R]; N];
            if L::MIN || Self::panel_zero::<V>() != 0 {
                for j in 0..4 * Self::SUBS {
                    for t in 0..N {
                        for r in 0..R {
                            // SAFETY: the caller's promise.
                            let sums = unsafe { Self::sums_at(&x[t], i, j) };
                            // SAFETY: as above.
                            offsets[t][r] = unsafe { v.dot_pairs(offsets[t][r], w[r].pairs[j], sums) };
                        }
                    }
                }
            }
            for t in 0..N {
                for r in 0..R {
                    // SAFETY: the caller's promise.
                    let da = unsafe { *x[t].d.add(i) };
                    let (sums, scales) = ((sums[t][r], offsets[t][r]), (w[r].d, w[r].dmin));
                    acc[t][r] = Self::total(v, Self::panel_zero::<V>(), sums, scales, da, acc[t][r]);
                }
            }
        }
    }

    /// `gemm` of `R` groups from group `g` on.
    ///
    /// # Safety
    /// The job's promise, and these groups are within it.
    #[inline(always)]
    unsafe fn groups<V: Vector, const N: usize, const R: usize>(
        v: V,
        job: &Job<'_>,
        g: usize,
        reading: Reading,
        panel: &mut [[Panel<V>; R]; DEPTH],
        acc: &mut [[V::F; R]; MAX_TOKENS],
    ) {
        let bytes = L::BYTES * V::LANES;
        let acc = &mut acc[..job.x.len()];
        acc.fill([v.splat_f32(0.0); R]);
        for first in (0..job.n_blocks).step_by(DEPTH) {
            let panel = &mut panel[..DEPTH.min(job.n_blocks - first)];
            for r in 0..R {
                for (i, w) in panel.iter_mut().enumerate() {
                    // SAFETY: the job's promise.
                    let b = unsafe { Block::new(v, job.w.add(((g + r) * job.n_blocks + first + i) * bytes)) };
                    Self::open(v, b, reading, &mut w[r]);
                }
            }
            let next: [*const u8; R] =
                std::array::from_fn(|r| job.w.wrapping_add(((g + r) * job.n_blocks + first + panel.len()) * bytes));
            let mut ahead = Ahead::new(next, panel.len() * bytes, job.x.len() * panel.len());
            for_each_tile!(N, (job.x, acc), |x, acc| {
                // SAFETY: the job's promise.
                unsafe { Self::tile(v, panel, first, x, acc, &mut ahead) }
            });
        }
        // SAFETY: the job's promise.
        unsafe { job.store(v, g, acc) };
    }
}

impl<L: Superblock> Kernel for Superblocks<L> {
    type Layout = L;
    const KIND: &'static str = "superblock";
    const SUB: usize = L::SUB;
    // Twice the sums make `gemv` dearer (Q6_K: 12 tokens 13% slower than `gemm`).
    const FEW: usize = if L::SUB == 16 { 8 } else { 16 };

    #[inline(always)]
    unsafe fn gemv<V: Vector, const T: usize>(v: V, job: &Job<'_>) {
        let x: &[Act; T] = job.x.try_into().expect("as many tokens as the kernel is for");
        let bytes = L::BYTES * V::LANES;
        let reading = Reading::new::<V>(job.ask::<V>());
        let zero = v.splat_f32(0.0);
        let mut panel = [Panel::nothing(v)];
        for g in 0..job.n_groups {
            let mut acc = [[zero]; T];
            for i in 0..job.n_blocks {
                // SAFETY: the job's promise: the groups' blocks and the tokens' blocks are there.
                unsafe {
                    let b = Block::new(v, job.w.add((g * job.n_blocks + i) * bytes));
                    if Self::is_fused::<V>(T) {
                        Self::fused_pairs(v, b, reading, x, i, &mut acc);
                    } else {
                        Self::open(v, b, reading, &mut panel[0]);
                        Self::tile(v, std::slice::from_ref(&panel), i, x, &mut acc, &mut Ahead::nothing());
                    }
                }
            }
            // SAFETY: the job's promise: each token's row has room for the groups' rows.
            unsafe { job.store(v, g, &acc) };
        }
    }

    #[inline(always)]
    unsafe fn gemm<V: Vector, const N: usize, const R: usize>(v: V, job: &Job<'_>) {
        let (reading, zero) = (Reading::new::<V>(None), v.splat_f32(NO_SCALE));
        let nothing = Panel::nothing(v);
        let (mut panel, mut acc) = ([[nothing; R]; DEPTH], [[zero; R]; MAX_TOKENS]);
        let together = job.n_groups / R * R;
        for g in (0..together).step_by(R) {
            // SAFETY: the job's promise.
            unsafe { Self::groups::<V, N, R>(v, job, g, reading, &mut panel, &mut acc) };
        }
        if together < job.n_groups {
            let (mut panel, mut acc) = ([[nothing]; DEPTH], [[zero]; MAX_TOKENS]);
            for g in together..job.n_groups {
                // SAFETY: as above.
                unsafe { Self::groups::<V, N, 1>(v, job, g, reading, &mut panel, &mut acc) };
            }
        }
    }
}
