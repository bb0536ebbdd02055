//! The kernels of all formats with blocks of 32 weights.

use std::marker::PhantomData;

use super::job::{Act, Job, MAX_TOKENS};
use super::layout::{Ahead, Block, Layout};
use super::vector::Vector;
use super::{Kernel, NO_SCALE, for_each_tile, start};

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

/// Blocks that are unpacked at once: at most 10 KiB, a third of the L1 cache.
pub(super) const DEPTH: usize = 16;

/// The kernels of a [`Block32`].
pub(super) struct Blocks<L>(PhantomData<L>);

/// One block of a group in registers.
#[derive(Clone, Copy)]
pub(super) struct Open<V: Vector> {
    pub(super) codes: [V::I; 8],
    scale: V::F,
    min: V::F,
}

impl<V: Vector> Open<V> {
    /// A block of zeros.
    #[inline(always)]
    pub(super) fn nothing(v: V) -> Self {
        let none = v.splat_f32(NO_SCALE);
        Open { codes: [v.splat(0); 8], scale: none, min: none }
    }
}

/// Panels of one depth: what is left of 18 blocks after 16 would have sums loaded and stored for two.
pub(super) fn even_depth(n_blocks: usize) -> usize {
    n_blocks.div_ceil(n_blocks.div_ceil(DEPTH).max(1)).max(1)
}

/// The dot products of `N` tokens with `R` groups of rows, so far.
type Sums<V, const N: usize, const R: usize> = [[<V as Vector>::F; R]; N];

impl<L: Block32> Blocks<L> {
    /// With `PANEL`, for many tokens.
    #[inline(always)]
    fn open<V: Vector, const PANEL: bool>(v: V, b: Block<V, L>) -> Open<V> {
        let min = if L::MIN { L::min(v, b) } else { v.splat_f32(NO_SCALE) };
        let codes = L::codes(v, b);
        Open { codes: if PANEL { v.panel(codes, L::ZERO) } else { codes }, scale: L::scale(v, b), min }
    }

    /// Unpacks blocks of `R` groups for many tokens, from group `g` and block `first` on.
    ///
    /// # Safety
    /// The job's promise, and they are within it.
    #[inline(always)]
    pub(super) unsafe fn unpack<V: Vector, const R: usize>(
        v: V,
        job: &Job<'_>,
        g: usize,
        first: usize,
        panel: &mut [[Open<V>; R]],
    ) {
        let bytes = L::BYTES * V::LANES;
        for r in 0..R {
            for (i, w) in panel.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                let b = unsafe { Block::new(v, job.w.add(((g + r) * job.n_blocks + first + i) * bytes)) };
                w[r] = Self::open::<_, true>(v, b);
            }
        }
    }

    /// Adds a block's part to a dot product: the integers' sum, with the scales of both sides, then the offset.
    #[inline(always)]
    pub(super) fn add<V: Vector>(v: V, isum: V::I, w: &Open<V>, d: V::F, offset: V::F, sum: V::F) -> V::F {
        let sum = v.fma(v.to_f32(isum), v.mul(w.scale, d), sum);
        if L::MIN { v.fma(offset, w.min, sum) } else { sum }
    }

    /// Adds a block's part of the dot products of some groups of rows with block `i` of some tokens.
    ///
    /// # Safety
    /// The tokens have a block `i`.
    #[inline(always)]
    unsafe fn step<V: Vector, const PANEL: bool, const N: usize, const R: usize>(
        v: V,
        w: &[Open<V>; R],
        x: &[Act; N],
        i: usize,
        sums: &mut Sums<V, N, R>,
    ) {
        let zero = match L::BITS {
            8 => V::SIGNED_ZERO,
            _ if PANEL && V::PANEL_SIGNED => 0,
            _ => L::ZERO,
        };
        // SAFETY: the tokens have a block `i`, by the caller's promise, of 32 integers.
        unsafe {
            let mut isums = [[v.splat(0); R]; N];
            for t in 0..N {
                if V::MANY_REGISTERS {
                    isums[t] = [start(v, &x[t], i, zero); R];
                }
            }
            let q = std::array::from_fn(|t| x[t].q.add(32 * i));
            let codes = std::array::from_fn(|r| &w[r].codes);
            let mut isums =
                if PANEL { v.panel_dots(isums, codes, q, L::BITS) } else { v.dots(isums, codes, q, L::BITS) };
            for t in 0..N {
                // Where registers are few, what the sums begin with would be moved to the stack and back.
                if !V::MANY_REGISTERS {
                    let start = start(v, &x[t], i, zero);
                    isums[t] = isums[t].map(|sum| v.add_i32(sum, start));
                }
                let d = v.splat_f32(*x[t].d.add(i));
                let offset = v.splat_f32(if L::MIN { *x[t].offset.add(i) } else { NO_SCALE });
                for r in 0..R {
                    sums[t][r] = Self::add(v, isums[t][r], &w[r], d, offset, sums[t][r]);
                }
            }
        }
    }

    /// Adds some blocks' part, from block `first` on, to the dot products with some tokens.
    ///
    /// # Safety
    /// The tokens have these blocks.
    #[inline(always)]
    pub(super) unsafe fn tile<V: Vector, const N: usize, const R: usize>(
        v: V,
        panel: &[[Open<V>; R]],
        first: usize,
        x: &[Act; N],
        acc: &mut Sums<V, N, R>,
    ) {
        let mut sums = *acc;
        for (i, w) in panel.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { Self::step::<_, true, N, R>(v, w, x, first + i, &mut sums) };
        }
        *acc = sums;
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
        panel: &mut [[Open<V>; R]; DEPTH],
        acc: &mut [[V::F; R]; MAX_TOKENS],
    ) {
        let bytes = L::BYTES * V::LANES;
        let acc = &mut acc[..job.x.len()];
        acc.fill([v.splat_f32(0.0); R]);
        let depth = even_depth(job.n_blocks);
        for first in (0..job.n_blocks).step_by(depth) {
            let panel = &mut panel[..depth.min(job.n_blocks - first)];
            // SAFETY: the job's promise.
            unsafe { Self::unpack(v, job, g, first, panel) };
            let next: [*const u8; R] =
                std::array::from_fn(|r| job.w.wrapping_add(((g + r) * job.n_blocks + first + panel.len()) * bytes));
            let mut ahead = Ahead::new(next, panel.len() * bytes, job.x.len());
            for_each_tile!(N, (job.x, acc), |x, acc| {
                ahead.ask(v, x.len());
                // SAFETY: the job's promise.
                unsafe { Self::tile(v, panel, first, x, acc) }
            });
        }
        // SAFETY: the job's promise.
        unsafe { job.store(v, g, acc) };
    }
}

impl<L: Block32> Kernel for Blocks<L> {
    type Layout = L;
    const KIND: &'static str = "block32";
    const SUB: usize = 32;

    #[inline(always)]
    unsafe fn gemv<V: Vector, const T: usize>(v: V, job: &Job<'_>) {
        let x: &[Act; T] = job.x.try_into().expect("as many tokens as the kernel is for");
        let bytes = L::BYTES * V::LANES;
        let ask = job.ask::<V>();
        for g in 0..job.n_groups {
            let mut acc = [[v.splat_f32(0.0)]; T];
            for i in 0..job.n_blocks {
                // SAFETY: the job's promise: the groups' blocks and the tokens' blocks are there.
                unsafe {
                    let at = job.w.add((g * job.n_blocks + i) * bytes);
                    let b = Block::new(v, at);
                    b.prefetch(ask, 0, 1);
                    Self::step::<_, false, T, 1>(v, &[Self::open::<_, false>(v, b)], x, i, &mut acc);
                }
            }
            // SAFETY: the job's promise: each token's row has room for the groups' rows.
            unsafe { job.store(v, g, &acc) };
        }
    }

    #[inline(always)]
    unsafe fn gemm<V: Vector, const N: usize, const R: usize>(v: V, job: &Job<'_>) {
        let (nothing, zero) = (Open::nothing(v), v.splat_f32(0.0));
        let (mut panel, mut acc) = ([[nothing; R]; DEPTH], [[zero; R]; MAX_TOKENS]);
        let together = job.n_groups / R * R;
        for g in (0..together).step_by(R) {
            // SAFETY: the job's promise.
            unsafe { Self::groups::<V, N, R>(v, job, g, &mut panel, &mut acc) };
        }
        if together < job.n_groups {
            let (mut panel, mut acc) = ([[nothing]; DEPTH], [[zero]; MAX_TOKENS]);
            for g in together..job.n_groups {
                // SAFETY: as above.
                unsafe { Self::groups::<V, N, 1>(v, job, g, &mut panel, &mut acc) };
            }
        }
    }
}
