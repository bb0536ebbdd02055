//! The kernels of formats without blocks: f32 and what becomes f32 exactly.

use std::marker::PhantomData;

use super::job::{Act, Job, MAX_TOKENS};
use super::layout::{Ahead, Block, Layout};
use super::vector::Vector;
use super::{Kernel, for_each_tile};
use crate::cpu::Isa;
use crate::cpu::simd::{self, Lanes};
use crate::quant::Format;

/// How a weight becomes f32.
pub(crate) trait Number: Layout {
    /// The weights of a column.
    fn value<V: Vector>(v: V, b: Block<V, Self>) -> V::F
    where
        Self: Sized;
}

/// The kernels of a [`Number`].
pub(super) struct Numbers<L>(PhantomData<L>);

/// The four partial sums of a row, weight k in k % 4.
type Partial<V> = [<V as Vector>::F; 4];

impl<L: Number> Numbers<L> {
    /// The sum of the partial sums.
    #[inline(always)]
    fn total<V: Vector>(v: V, p: Partial<V>) -> V::F {
        v.add(v.add(p[0], p[1]), v.add(p[2], p[3]))
    }

    /// # Safety
    /// The token has an activation `k`.
    #[inline(always)]
    unsafe fn step<V: Vector>(v: V, w: V::F, x: &Act, k: usize, p: V::F) -> V::F {
        // SAFETY: the caller's promise.
        v.fma(w, unsafe { v.splat_f32(*x.x.add(k)) }, p)
    }

    /// Adds some columns' part, from column `first` (a multiple of 4) on, to the dot products with some tokens.
    ///
    /// # Safety
    /// The tokens have these columns.
    #[inline(always)]
    unsafe fn tile<V: Vector, const N: usize>(
        v: V,
        panel: &[V::F],
        first: usize,
        x: &[Act; N],
        acc: &mut [Partial<V>; N],
    ) {
        let mut p = *acc;
        let (fours, rest) = panel.as_chunks::<4>();
        for (i, w) in fours.iter().enumerate() {
            for part in 0..4 {
                for t in 0..N {
                    // SAFETY: the caller's promise.
                    p[t][part] = unsafe { Self::step(v, w[part], &x[t], first + 4 * i + part, p[t][part]) };
                }
            }
        }
        for (part, w) in rest.iter().enumerate() {
            for t in 0..N {
                // SAFETY: the caller's promise.
                p[t][part] = unsafe { Self::step(v, *w, &x[t], first + 4 * fours.len() + part, p[t][part]) };
            }
        }
        *acc = p;
    }
}

impl<L: Number> Kernel for Numbers<L> {
    type Layout = L;
    const KIND: &'static str = "number";
    const GROUPED: bool = false;
    const SUB: usize = 0;

    #[inline(always)]
    unsafe fn gemv<V: Vector, const T: usize>(v: V, job: &Job<'_>) {
        let x: &[Act; T] = job.x.try_into().expect("as many tokens as the kernel is for");
        let bytes = L::BYTES * V::LANES;
        let ask = job.ask::<V>();
        for g in 0..job.n_groups {
            let mut p: [Partial<V>; T] = [[v.splat_f32(0.0); 4]; T];
            for k0 in (0..job.n_blocks).step_by(4) {
                for k in 0..4 {
                    if k0 + k < job.n_blocks {
                        // SAFETY: the job's promise: the groups' columns and the tokens' activations are there.
                        unsafe {
                            let b = Block::new(v, job.w.add((g * job.n_blocks + k0 + k) * bytes));
                            b.prefetch(ask, 0, 1);
                            let w = L::value(v, b);
                            for t in 0..T {
                                p[t][k] = Self::step(v, w, &x[t], k0 + k, p[t][k]);
                            }
                        }
                    }
                }
            }
            for t in 0..T {
                // SAFETY: the job's promise: each token's row has room for the groups' rows.
                unsafe { v.store_f32(job.out(t, g * V::LANES), Self::total(v, p[t])) };
            }
        }
    }

    #[inline(always)]
    unsafe fn gemm<V: Vector, const N: usize, const R: usize>(v: V, job: &Job<'_>) {
        /// Columns that are unpacked at once: with 16 lanes 8 KiB, a quarter of the L1 cache.
        const DEPTH: usize = 128;
        let bytes = L::BYTES * V::LANES;
        let zero = v.splat_f32(0.0);
        let mut panel = [zero; DEPTH];
        let mut acc = [[zero; 4]; MAX_TOKENS];
        let acc = &mut acc[..job.x.len()];
        for g in 0..job.n_groups {
            acc.fill([zero; 4]);
            for first in (0..job.n_blocks).step_by(DEPTH) {
                let panel = &mut panel[..DEPTH.min(job.n_blocks - first)];
                for (k, w) in panel.iter_mut().enumerate() {
                    // SAFETY: the job's promise.
                    let b = unsafe { Block::new(v, job.w.add((g * job.n_blocks + first + k) * bytes)) };
                    *w = L::value(v, b);
                }
                let next = job.w.wrapping_add((g * job.n_blocks + first + panel.len()) * bytes);
                let mut ahead = Ahead::new([next], panel.len() * bytes, job.x.len());
                for_each_tile!(N, (job.x, acc), |x, acc| {
                    ahead.ask(v, x.len());
                    // SAFETY: the job's promise.
                    unsafe { Self::tile(v, panel, first, x, acc) }
                });
            }
            for (t, acc) in acc.iter().enumerate() {
                // SAFETY: the job's promise.
                unsafe { v.store_f32(job.out(t, g * V::LANES), Self::total(v, *acc)) };
            }
        }
    }
}

/// The dot products of some rows in the file's layout: the format's `vec_dot` of each, several times faster where fused multiply-add
/// is an instruction that plain code may not assume. A router of eight experts has no full group of rows.
pub(super) fn dot_rows(isa: Isa, format: &Format, rows: &[u8], x: &[f32], out: &mut [f32]) {
    assert_eq!(rows.len(), out.len() * x.len() * format.block_bytes);
    simd::run_on(isa, Rows { format, rows, x, out });
}

struct Rows<'a> {
    format: &'a Format,
    rows: &'a [u8],
    x: &'a [f32],
    out: &'a mut [f32],
}

/// Rows side by side, so that their sums needn't wait for each other.
const ROWS: usize = 8;
/// Columns that are unpacked at once.
const COLUMNS: usize = 256;

impl simd::Kernel for Rows<'_> {
    type Out = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let row_bytes = self.x.len() * self.format.block_bytes;
        let mut w = [[0.0; COLUMNS]; ROWS];
        for (n, out) in self.out.chunks_mut(ROWS).enumerate() {
            let rows = &self.rows[n * ROWS * row_bytes..][..out.len() * row_bytes];
            let mut p = [[0.0f32; 4]; ROWS];
            for (c, x) in self.x.chunks(COLUMNS).enumerate() {
                for (row, w) in rows.chunks(row_bytes).zip(&mut w) {
                    let row = &row[c * COLUMNS * self.format.block_bytes..];
                    (self.format.dequantize_row)(&row[..x.len() * self.format.block_bytes], &mut w[..x.len()]);
                }
                let (fours, rest) = x.as_chunks::<4>();
                for (k, x) in fours.iter().enumerate() {
                    for (p, w) in p.iter_mut().zip(&w) {
                        for i in 0..4 {
                            p[i] = w[4 * k + i].mul_add(x[i], p[i]);
                        }
                    }
                }
                for (i, x) in rest.iter().enumerate() {
                    for (p, w) in p.iter_mut().zip(&w) {
                        p[i] = w[4 * fours.len() + i].mul_add(*x, p[i]);
                    }
                }
            }
            for (out, p) in out.iter_mut().zip(p) {
                *out = (p[0] + p[1]) + (p[2] + p[3]);
            }
        }
    }
}
