//! The kernels of all formats with blocks of 32 weights.

use std::marker::PhantomData;

use super::job::{Act, Job, MAX_TOKENS};
use super::layout::{Ahead, Block, Layout};
use super::vector::Vector;
use super::{Kernel, NO_SCALE, start};

/// How the blocks of a format come apart in registers: 32 integers, less `ZERO`, times a scale, plus perhaps an offset.
pub(crate) trait Block32: Layout {
    /// Codes are unsigned and less than `1 << BITS`; with 8 they are signed and pass through [`Vector::signed`].
    const BITS: u32;
    /// The code that stands for zero, 0 or a power of two; 0 if `BITS` is 8.
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
            let isum = v.dot(start(v, x, i, zero), &w.codes, x.q.add(32 * i), L::BITS);
            let scale = v.mul(w.scale, v.splat_f32(*x.d.add(i)));
            let acc = v.fma(v.to_f32(isum), scale, acc);
            if L::MIN { v.fma(v.splat_f32(*x.offset.add(i)), w.min, acc) } else { acc }
        }
    }

    /// Adds some blocks' part, from block `first` on, to the dot products with some tokens.
    ///
    /// # Safety
    /// The tokens have these blocks.
    #[inline(always)]
    unsafe fn tile<V: Vector, const N: usize>(
        v: V,
        panel: &[Open<V>],
        first: usize,
        x: &[Act; N],
        acc: &mut [V::F; N],
    ) {
        let mut sum = *acc;
        for (i, w) in panel.iter().enumerate() {
            for t in 0..N {
                // SAFETY: the caller's promise.
                sum[t] = unsafe { Self::step(v, w, &x[t], first + i, sum[t]) };
            }
        }
        *acc = sum;
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
                    let b = Block::new(v, at);
                    b.prefetch(0, 1);
                    let w = Self::open(v, b);
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
        let zero = v.splat_f32(NO_SCALE);
        let mut panel = [Open::<V> { codes: [v.splat(0); 8], scale: zero, min: zero }; DEPTH];
        let mut acc = [zero; MAX_TOKENS];
        let acc = &mut acc[..job.x.len()];
        for g in 0..job.n_groups {
            acc.fill(zero);
            for first in (0..job.n_blocks).step_by(DEPTH) {
                let panel = &mut panel[..DEPTH.min(job.n_blocks - first)];
                for (i, w) in panel.iter_mut().enumerate() {
                    // SAFETY: the job's promise.
                    let b = unsafe { Block::new(v, job.w.add((g * job.n_blocks + first + i) * bytes)) };
                    *w = Self::open(v, b);
                }
                // SAFETY: only an address is made, of bytes to ask for.
                let ahead = unsafe { job.w.add((g * job.n_blocks + first) * bytes) }.wrapping_add(panel.len() * bytes);
                let mut ahead = Ahead::new(ahead, panel.len() * bytes, job.x.len());
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
                // SAFETY: the job's promise.
                unsafe { v.store_f32(job.out(t, g * V::LANES), *acc) };
            }
        }
    }
}
