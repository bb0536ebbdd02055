//! The kernels of all formats with superblocks of 256 weights.

use std::marker::PhantomData;

use super::job::{Act, Job, MAX_TOKENS};
use super::layout::{Block, Layout};
use super::vector::Vector;
use super::{Kernel, NO_SCALE};

/// How the superblocks of a format come apart in registers: eight times 32 integers, less `ZERO`, times the scale of
/// their sub-block, less perhaps its offset.
pub(crate) trait Superblock: Layout {
    /// Codes are unsigned and less than `1 << BITS`; with 8 they are signed and pass through [`Vector::signed`].
    const BITS: u32;
    /// The code that stands for zero; 0 if `BITS` is 8.
    const ZERO: i32;
    /// Weights of a sub-block: 16 or 32.
    const SUB: usize;
    /// Whether sub-blocks have an offset.
    const MIN: bool = false;
    /// What the codes and scales of all sub-blocks need.
    type Head<V: Vector>: Copy;
    /// Loads it.
    fn head<V: Vector>(v: V, b: Block<V, Self>) -> Self::Head<V>
    where
        Self: Sized;
    /// The `s`-th 32 codes: vector j holds weights 4 j to 4 j + 3 of them.
    fn codes<V: Vector>(v: V, b: Block<V, Self>, head: &Self::Head<V>, s: usize) -> [V::I; 8]
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

/// The kernels of a [`Superblock`].
pub(super) struct Superblocks<L>(PhantomData<L>);

/// 32 weights of a group in registers: one sub-block, or two of 16.
#[derive(Clone, Copy)]
struct Open<V: Vector> {
    codes: [V::I; 8],
    scale: [V::F; 2],
    min: [V::F; 2],
}

/// Repeats a statement for the eight times 32 weights of a superblock, with the number known when it is compiled:
/// the shifts that take them apart are then immediate.
macro_rules! eight_times {
    ($s:ident => $body:block) => {
        eight_times!(@ $s $body 0 1 2 3 4 5 6 7)
    };
    (@ $s:ident $body:block $($n:literal)*) => {
        $({ let $s: usize = $n; $body })*
    };
}

impl<L: Superblock> Superblocks<L> {
    #[inline(always)]
    fn open<V: Vector>(v: V, b: Block<V, L>, head: &L::Head<V>, s: usize) -> Open<V> {
        let none = v.splat_f32(NO_SCALE);
        let codes = L::codes(v, b, head, s);
        if L::SUB == 32 {
            let min = if L::MIN { L::min(v, head, s) } else { none };
            Open { codes, scale: [L::scale(v, head, s), none], min: [min, none] }
        } else {
            let scale = [L::scale(v, head, 2 * s), L::scale(v, head, 2 * s + 1)];
            let min = if L::MIN { [L::min(v, head, 2 * s), L::min(v, head, 2 * s + 1)] } else { [none; 2] };
            Open { codes, scale, min }
        }
    }

    /// Adds the part of 32 weights, the `i`-th of the row, to a superblock's inner sum.
    ///
    /// # Safety
    /// The token has an `i`-th 32 activations.
    #[inline(always)]
    unsafe fn step<V: Vector>(v: V, w: &Open<V>, x: &Act, i: usize, inner: V::F) -> V::F {
        let zero = if L::BITS == 8 { V::SIGNED_ZERO } else { L::ZERO };
        let n_subs = 32 / L::SUB;
        let mut inner = inner;
        let mut j = 0;
        while j < n_subs {
            let sub = i * n_subs + j;
            // SAFETY: the token has this sub-block, by the caller's promise.
            unsafe {
                let start = if zero == 0 { 0 } else { (*x.sum.add(sub)).wrapping_mul(-zero) };
                let start = v.splat(start.cast_unsigned());
                let q = x.q.add(L::SUB * sub);
                let isum = if L::SUB == 32 {
                    v.dot(start, &w.codes, q, L::BITS)
                } else {
                    let c = &w.codes[4 * j..];
                    v.dot(start, &[c[0], c[1], c[2], c[3]], q, L::BITS)
                };
                inner = v.fma(v.to_f32(isum), w.scale[j], inner);
                if L::MIN {
                    inner = v.fnma(v.splat_f32(*x.offset.add(sub)), w.min[j], inner);
                }
            }
            j += 1;
        }
        inner
    }
}

impl<L: Superblock> Kernel for Superblocks<L> {
    type Layout = L;
    const SUB: usize = L::SUB;

    #[inline(always)]
    unsafe fn gemv<V: Vector, const T: usize>(v: V, job: &Job<'_>) {
        let x: &[Act; T] = job.x.try_into().expect("as many tokens as the kernel is for");
        let bytes = L::BYTES * V::LANES;
        let zero = v.splat_f32(0.0);
        for g in 0..job.n_groups {
            let mut acc = [zero; T];
            for i in 0..job.n_blocks {
                // SAFETY: the job's promise: the groups' blocks and the tokens' blocks are there.
                unsafe {
                    let b = Block::new(v, job.w.add((g * job.n_blocks + i) * bytes));
                    let head = L::head(v, b);
                    let mut inner = [zero; T];
                    eight_times!(s => {
                        let w = Self::open(v, b, &head, s);
                        for t in 0..T {
                            inner[t] = Self::step(v, &w, &x[t], 8 * i + s, inner[t]);
                        }
                    });
                    for t in 0..T {
                        acc[t] = v.fma(inner[t], v.splat_f32(*x[t].d.add(i)), acc[t]);
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
    unsafe fn gemm<V: Vector, const N: usize>(v: V, job: &Job<'_>) {
        /// Superblocks that are unpacked at once: with 16 lanes 8 KiB of codes, a quarter of the L1 cache.
        const DEPTH: usize = 2;
        let bytes = L::BYTES * V::LANES;
        let zero = v.splat_f32(0.0);
        for g in 0..job.n_groups {
            let mut acc = [zero; MAX_TOKENS];
            let mut panel = [[Open::<V> { codes: [v.splat(0); 8], scale: [zero; 2], min: [zero; 2] }; 8]; DEPTH];
            for first in (0..job.n_blocks).step_by(DEPTH) {
                let n = DEPTH.min(job.n_blocks - first);
                for (i, w) in panel[..n].iter_mut().enumerate() {
                    // SAFETY: the job's promise.
                    let b = unsafe { Block::new(v, job.w.add((g * job.n_blocks + first + i) * bytes)) };
                    let head = L::head(v, b);
                    eight_times!(s => { w[s] = Self::open(v, b, &head, s); });
                }
                for t0 in (0..job.x.len()).step_by(N) {
                    // Past the last token the last is computed again: cheaper than a kernel for each remainder.
                    let mut x = [job.x[job.x.len() - 1]; N];
                    let n_tokens = N.min(job.x.len() - t0);
                    x[..n_tokens].copy_from_slice(&job.x[t0..t0 + n_tokens]);
                    for (i, w) in panel[..n].iter().enumerate() {
                        let mut inner = [zero; N];
                        for (s, w) in w.iter().enumerate() {
                            for t in 0..N {
                                // SAFETY: the job's promise.
                                inner[t] = unsafe { Self::step(v, w, &x[t], 8 * (first + i) + s, inner[t]) };
                            }
                        }
                        for t in 0..N {
                            // SAFETY: the job's promise.
                            let d = unsafe { v.splat_f32(*x[t].d.add(first + i)) };
                            acc[t0 + t] = v.fma(inner[t], d, acc[t0 + t]);
                        }
                    }
                }
            }
            for t in 0..job.x.len() {
                // SAFETY: the job's promise.
                unsafe { v.store_f32(job.out(t, g * V::LANES), acc[t]) };
            }
        }
    }
}
