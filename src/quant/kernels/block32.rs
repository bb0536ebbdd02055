//! The kernels of all formats with blocks of 32 weights.

use std::marker::PhantomData;

use super::job::{Act, Job, MAX_TOKENS};
use super::layout::{Block, Layout};
use super::vector::Vector;
use super::{Kernel, NO_SCALE};

/// How the blocks of a format come apart in registers: 32 integers, less `ZERO`, times a scale, plus perhaps an offset.
pub(crate) trait Block32: Layout {
    /// Codes are unsigned and less than `1 << BITS`; with 8 they are signed and pass through [`Vector::signed`].
    const BITS: u32;
    /// The code that stands for zero; 0 if `BITS` is 8.
    const ZERO: i32;
    /// Whether there is an offset.
    const MIN: bool = false;
    /// The codes: vector j holds weights 4 j to 4 j + 3.
    fn codes<V: Vector>(v: V, b: Block<V, Self>) -> [V::I; 8]
    where
        Self: Sized;
    /// What a code less `ZERO` is multiplied by.
    fn scale<V: Vector>(v: V, b: Block<V, Self>) -> V::F
    where
        Self: Sized;
    /// What is added.
    fn min<V: Vector>(v: V, b: Block<V, Self>) -> V::F
    where
        Self: Sized,
    {
        let _ = b;
        v.splat_f32(NO_SCALE)
    }
}

/// The kernels of a [`Block32`].
pub(super) struct Blocks<L>(PhantomData<L>);

/// One block of a group in registers.
#[derive(Clone, Copy)]
struct Open<V: Vector> {
    codes: [V::I; 8],
    scale: V::F,
    min: V::F,
}

impl<L: Block32> Blocks<L> {
    #[inline(always)]
    fn open<V: Vector>(v: V, b: Block<V, L>) -> Open<V> {
        let min = if L::MIN { L::min(v, b) } else { v.splat_f32(NO_SCALE) };
        Open { codes: L::codes(v, b), scale: L::scale(v, b), min }
    }

    /// Adds a block's part of the dot product with block `i` of a token.
    ///
    /// # Safety
    /// The token has a block `i`.
    #[inline(always)]
    unsafe fn step<V: Vector>(v: V, w: &Open<V>, x: &Act, i: usize, acc: V::F) -> V::F {
        let zero = if L::BITS == 8 { V::SIGNED_ZERO } else { L::ZERO };
        // SAFETY: the token has a block `i`, by the caller's promise, of 32 integers.
        unsafe {
            let start = if zero == 0 { 0 } else { (*x.sum.add(i)).wrapping_mul(-zero) };
            let isum = v.dot(v.splat(start.cast_unsigned()), &w.codes, x.q.add(32 * i), L::BITS);
            let scale = v.mul(w.scale, v.splat_f32(*x.d.add(i)));
            let acc = v.fma(v.to_f32(isum), scale, acc);
            if L::MIN { v.fma(v.splat_f32(*x.offset.add(i)), w.min, acc) } else { acc }
        }
    }
}

impl<L: Block32> Kernel for Blocks<L> {
    type Layout = L;
    const SUB: usize = 32;

    #[inline(always)]
    unsafe fn gemv<V: Vector, const T: usize>(v: V, job: &Job<'_>) {
        let x: &[Act; T] = job.x.try_into().expect("as many tokens as the kernel is for");
        let bytes = L::BYTES * V::LANES;
        for g in 0..job.n_groups {
            let mut acc = [v.splat_f32(0.0); T];
            for i in 0..job.n_blocks {
                // SAFETY: the job's promise: the groups' blocks and the tokens' blocks are there.
                unsafe {
                    let at = job.w.add((g * job.n_blocks + i) * bytes);
                    let w = Self::open(v, Block::new(v, at));
                    for t in 0..T {
                        acc[t] = Self::step(v, &w, &x[t], i, acc[t]);
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
        /// Blocks that are unpacked at once: with 16 lanes 8 KiB, a quarter of the L1 cache.
        const DEPTH: usize = 16;
        let bytes = L::BYTES * V::LANES;
        let zero = v.splat_f32(0.0);
        for g in 0..job.n_groups {
            let mut acc = [zero; MAX_TOKENS];
            let mut panel = [Open::<V> { codes: [v.splat(0); 8], scale: zero, min: zero }; DEPTH];
            for first in (0..job.n_blocks).step_by(DEPTH) {
                let n = DEPTH.min(job.n_blocks - first);
                for (i, w) in panel[..n].iter_mut().enumerate() {
                    // SAFETY: the job's promise.
                    *w = unsafe { Self::open(v, Block::new(v, job.w.add((g * job.n_blocks + first + i) * bytes))) };
                }
                for t0 in (0..job.x.len()).step_by(N) {
                    // Past the last token the last is computed again: cheaper than a kernel for each remainder.
                    let mut x = [job.x[job.x.len() - 1]; N];
                    let n_tokens = N.min(job.x.len() - t0);
                    x[..n_tokens].copy_from_slice(&job.x[t0..t0 + n_tokens]);
                    let mut tile = [zero; N];
                    tile.copy_from_slice(&acc[t0..t0 + N]);
                    for (i, w) in panel[..n].iter().enumerate() {
                        for t in 0..N {
                            // SAFETY: the job's promise.
                            tile[t] = unsafe { Self::step(v, w, &x[t], first + i, tile[t]) };
                        }
                    }
                    acc[t0..t0 + N].copy_from_slice(&tile);
                }
            }
            for t in 0..job.x.len() {
                // SAFETY: the job's promise.
                unsafe { v.store_f32(job.out(t, g * V::LANES), acc[t]) };
            }
        }
    }
}
