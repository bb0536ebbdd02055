//! The kernels of all formats with superblocks of 256 weights.

use std::hint::black_box;
use std::marker::PhantomData;

use super::job::{Act, Job, MAX_TOKENS};
use super::layout::{Ahead, Block, Layout};
use super::vector::Vector;
use super::{Kernel, NO_SCALE, start};

/// How the superblocks of a format come apart in registers: eight times 32 integers, less `ZERO`, times the scale of
/// their sub-block, less perhaps its offset.
pub(crate) trait Superblock: Layout {
    /// Codes are unsigned and less than `1 << BITS`; with 8 they are signed and pass through [`Vector::signed`].
    const BITS: u32;
    /// The code that stands for zero, 0 or a power of two; 0 if `BITS` is 8.
    const ZERO: i32;
    /// Weights of a sub-block: 16 or 32.
    const SUB: usize;
    /// Whether sub-blocks have an offset.
    const MIN: bool = false;
    /// What the scales of all sub-blocks need.
    type Head<V: Vector>: Copy;
    /// Loads it.
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
    /// The scale of sub-block `j`.
    fn scale<V: Vector>(v: V, head: &Self::Head<V>, j: usize) -> V::F
    where
        Self: Sized;
    /// The offset of sub-block `j`.
    fn min<V: Vector>(v: V, head: &Self::Head<V>, j: usize) -> V::F
    where
        Self: Sized,
    {
        let _ = (head, j);
        v.splat_f32(NO_SCALE)
    }
}

/// Superblocks that are unpacked at once: with their scales at most 12 KiB, a third of the L1 cache.
const DEPTH: usize = 2;

/// The kernels of a [`Superblock`].
pub(super) struct Superblocks<L>(PhantomData<L>);

/// 32 weights of a group in registers: one sub-block, or two of 16.
#[derive(Clone, Copy)]
struct Open<V: Vector> {
    codes: [V::I; 8],
    scale: [V::F; 2],
    min: [V::F; 2],
}

impl<V: Vector> Open<V> {
    #[inline(always)]
    fn nothing(v: V) -> Self {
        let none = v.splat_f32(NO_SCALE);
        Self { codes: [v.splat(0); 8], scale: [none; 2], min: [none; 2] }
    }
}

/// The dot products of `N` tokens with `R` groups of rows, so far.
type Sums<V, const N: usize, const R: usize> = [[<V as Vector>::F; R]; N];

/// A superblock of a group, taken apart.
type Panel<V> = [Open<V>; 8];

/// The number of columns in half of a sub-block, which is 4, such that the compiler doesn't know: it would lay a superblock's
/// columns out one after the other, load them all, and keep on the stack what doesn't fit into registers (Q6_K: half the speed).
#[inline(always)]
fn four() -> usize {
    black_box(4)
}

impl<L: Superblock> Superblocks<L> {
    #[inline(always)]
    fn open<V: Vector>(v: V, b: Block<V, L>, columns: usize, ahead: bool, panel: &mut Panel<V>) {
        let head = L::head(v, b);
        for half in 0..2 {
            for j in 0..columns {
                if ahead {
                    b.prefetch(4 * half + j % 4, 8);
                }
                let column = L::column(v, b, half, j % 4);
                for s in 0..8 {
                    panel[s].codes[4 * half + j % 4] = column[s];
                }
            }
        }
        let n_subs = 32 / L::SUB;
        for s in 0..8 {
            for i in 0..n_subs {
                panel[s].scale[i] = L::scale(v, &head, n_subs * s + i);
                if L::MIN {
                    panel[s].min[i] = L::min(v, &head, n_subs * s + i);
                }
            }
        }
    }

    /// Adds superblock `i`'s part to the dot products with some tokens, without storing its codes.
    ///
    /// # Safety
    /// The tokens have a superblock `i`.
    #[inline(always)]
    unsafe fn fused<V: Vector, const N: usize>(
        v: V,
        b: Block<V, L>,
        columns: usize,
        x: &[Act; N],
        i: usize,
        acc: &mut [V::F; N],
    ) {
        let zero = if L::BITS == 8 { V::SIGNED_ZERO } else { L::ZERO };
        let n_subs = 32 / L::SUB;
        // The sums of sub-block `n_subs * s + k` are at [k][s].
        let mut isums = [[[v.splat(0); N]; 8]; 2];
        for half in 0..2 {
            let k = half % n_subs;
            let mut sums = isums[k];
            if half == k {
                for s in 0..8 {
                    for t in 0..N {
                        // SAFETY: the token has this sub-block, by the caller's promise.
                        sums[s][t] = unsafe { start(v, &x[t], n_subs * (8 * i + s) + k, zero) };
                    }
                }
            }
            for j in 0..columns {
                let j = j % 4;
                b.prefetch(4 * half + j, 8);
                let column = L::column(v, b, half, j);
                for s in 0..8 {
                    for t in 0..N {
                        // SAFETY: the token has these four activations, by the caller's promise.
                        unsafe {
                            let q = x[t].q.add(256 * i + 32 * s + 16 * half + 4 * j);
                            sums[s][t] = v.dot(sums[s][t], &[column[s]], q, L::BITS);
                        }
                    }
                }
            }
            isums[k] = sums;
        }
        let head = L::head(v, b);
        let mut inner = [v.splat_f32(0.0); N];
        for s in 0..8 {
            for k in 0..n_subs {
                let sub = n_subs * s + k;
                let scale = L::scale(v, &head, sub);
                let min = if L::MIN { L::min(v, &head, sub) } else { scale };
                for t in 0..N {
                    inner[t] = v.fma(v.to_f32(isums[k][s][t]), scale, inner[t]);
                    if L::MIN {
                        // SAFETY: the token has this sub-block, by the caller's promise.
                        let asum = unsafe { v.splat_f32(*x[t].offset.add(8 * n_subs * i + sub)) };
                        inner[t] = v.fnma(asum, min, inner[t]);
                    }
                }
            }
        }
        for t in 0..N {
            // SAFETY: the token has this superblock, by the caller's promise.
            acc[t] = v.fma(inner[t], unsafe { v.splat_f32(*x[t].d.add(i)) }, acc[t]);
        }
    }

    /// Adds the part of 32 weights, the `i`-th of each row, to superblocks' inner sums.
    ///
    /// # Safety
    /// The tokens have an `i`-th 32 activations.
    #[inline(always)]
    unsafe fn step<V: Vector, const N: usize, const R: usize>(
        v: V,
        w: &[&Open<V>; R],
        x: &[Act; N],
        i: usize,
        inner: &mut Sums<V, N, R>,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if L::SUB == 32 {
                Self::sub(v, w, 0, w.map(|w| &w.codes), x, i, inner);
            } else {
                let low = w.map(|w| w.codes.first_chunk::<4>().expect("of 8"));
                let high = w.map(|w| w.codes.last_chunk::<4>().expect("of 8"));
                Self::sub(v, w, 0, low, x, 2 * i, inner);
                Self::sub(v, w, 1, high, x, 2 * i + 1, inner);
            }
        }
    }

    /// Adds the part of sub-block `j` of each row, `codes`, which is number `k` in `w`.
    ///
    /// # Safety
    /// The tokens have a sub-block `j`.
    #[inline(always)]
    unsafe fn sub<V: Vector, const K: usize, const N: usize, const R: usize>(
        v: V,
        w: &[&Open<V>; R],
        k: usize,
        codes: [&[V::I; K]; R],
        x: &[Act; N],
        j: usize,
        inner: &mut Sums<V, N, R>,
    ) {
        let zero = if L::BITS == 8 { V::SIGNED_ZERO } else { L::ZERO };
        // SAFETY: the tokens have this sub-block, by the caller's promise.
        unsafe {
            let mut isums = [[v.splat(0); R]; N];
            for t in 0..N {
                isums[t] = [start(v, &x[t], j, zero); R];
            }
            let isums = v.dots(isums, codes, std::array::from_fn(|t| x[t].q.add(4 * K * j)), L::BITS);
            for t in 0..N {
                for r in 0..R {
                    inner[t][r] = v.fma(v.to_f32(isums[t][r]), w[r].scale[k], inner[t][r]);
                }
                if L::MIN {
                    let offset = v.splat_f32(*x[t].offset.add(j));
                    for r in 0..R {
                        inner[t][r] = v.fnma(offset, w[r].min[k], inner[t][r]);
                    }
                }
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
        acc: &mut Sums<V, N, R>,
    ) {
        for (i, w) in panel.iter().enumerate() {
            let mut inner = [[v.splat_f32(0.0); R]; N];
            for s in 0..8 {
                // SAFETY: the caller's promise.
                unsafe { Self::step(v, &std::array::from_fn(|r| &w[r][s]), x, 8 * (first + i) + s, &mut inner) };
            }
            for t in 0..N {
                // SAFETY: the caller's promise.
                let d = unsafe { v.splat_f32(*x[t].d.add(first + i)) };
                for r in 0..R {
                    acc[t][r] = v.fma(inner[t][r], d, acc[t][r]);
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
        columns: usize,
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
                    Self::open(v, b, columns, false, &mut w[r]);
                }
            }
            let next: [*const u8; R] =
                std::array::from_fn(|r| job.w.wrapping_add(((g + r) * job.n_blocks + first + panel.len()) * bytes));
            let mut ahead = Ahead::new(next, panel.len() * bytes, job.x.len());
            let (x, rest) = job.x.as_chunks::<N>();
            let (a, acc) = acc.as_chunks_mut::<N>();
            for (x, acc) in x.iter().zip(a) {
                ahead.ask(v, N);
                // SAFETY: the job's promise.
                unsafe { Self::tile(v, panel, first, x, acc) };
            }
            let (x, rest) = rest.as_chunks::<2>();
            let (a, acc) = acc.as_chunks_mut::<2>();
            for (x, acc) in x.iter().zip(a) {
                ahead.ask(v, 2);
                // SAFETY: the job's promise.
                unsafe { Self::tile(v, panel, first, x, acc) };
            }
            for (x, acc) in rest.iter().zip(acc) {
                ahead.ask(v, 1);
                // SAFETY: the job's promise.
                unsafe { Self::tile(v, panel, first, &[*x], std::array::from_mut(acc)) };
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for r in 0..R {
                // SAFETY: the job's promise.
                unsafe { v.store_f32(job.out(t, (g + r) * V::LANES), acc[r]) };
            }
        }
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
        let columns = four();
        let zero = v.splat_f32(0.0);
        let mut panel = [[Open::nothing(v); 8]];
        for g in 0..job.n_groups {
            let mut acc = [zero; T];
            for i in 0..job.n_blocks {
                // SAFETY: the job's promise: the groups' blocks and the tokens' blocks are there.
                unsafe {
                    let b = Block::new(v, job.w.add((g * job.n_blocks + i) * bytes));
                    if T == 1 || V::MANY_REGISTERS && (L::SUB == 32 || T == 2) {
                        let (pairs, odd) = x.as_chunks::<2>();
                        let (pair_acc, odd_acc) = acc.as_chunks_mut::<2>();
                        for (x, acc) in pairs.iter().zip(pair_acc) {
                            Self::fused(v, b, columns, x, i, acc);
                        }
                        if let ([x], [acc]) = (odd, odd_acc) {
                            Self::fused(v, b, columns, &[*x], i, std::array::from_mut(acc));
                        }
                    } else {
                        Self::open(v, b, columns, true, &mut panel[0]);
                        let mut sums = acc.map(|sum| [sum]);
                        Self::tile(v, std::slice::from_ref(&panel), i, x, &mut sums);
                        acc = sums.map(|[sum]| sum);
                    }
                }
            }
            for t in 0..T {
                // SAFETY: the job's promise: each token's row has room for the groups' rows.
                unsafe { v.store_f32(job.out(t, g * V::LANES), acc[t]) };
            }
        }
    }

    #[inline(always)]
    unsafe fn gemm<V: Vector, const N: usize, const R: usize>(v: V, job: &Job<'_>) {
        let (columns, zero) = (four(), v.splat_f32(NO_SCALE));
        let nothing = [Open::nothing(v); 8];
        let (mut panel, mut acc) = ([[nothing; R]; DEPTH], [[zero; R]; MAX_TOKENS]);
        let together = job.n_groups / R * R;
        for g in (0..together).step_by(R) {
            // SAFETY: the job's promise.
            unsafe { Self::groups::<V, N, R>(v, job, g, columns, &mut panel, &mut acc) };
        }
        if together < job.n_groups {
            let (mut panel, mut acc) = ([[nothing]; DEPTH], [[zero]; MAX_TOKENS]);
            for g in together..job.n_groups {
                // SAFETY: as above.
                unsafe { Self::groups::<V, N, 1>(v, job, g, columns, &mut panel, &mut acc) };
            }
        }
    }
}
