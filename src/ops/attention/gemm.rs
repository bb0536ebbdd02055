//! The small matrix product inside attention: a few rows against a tile.

use super::source::Source;
use crate::ops::simd::{Kernel, LANES, Lanes};

/// Rows that are multiplied together, at most: what the registers hold of sums.
const MAX_ROWS: usize = 6;

/// `c = a b`, or `c = c * rescale + a b` with a factor for each row. Each element of `c` is one chain of fused multiply-adds
/// in the order of `inner`, however rows and columns are grouped.
#[derive(Clone, Copy)]
pub struct Gemm<S> {
    pub a: *const f32,
    pub a_stride: usize,
    pub b: S,
    pub c: *mut f32,
    pub c_stride: usize,
    pub n_rows: usize,
    /// A multiple of [`LANES`].
    pub n_cols: usize,
    /// Columns of `a` and rows of `b`: from, to.
    pub inner: (usize, usize),
    pub rescale: Option<*const f32>,
    /// The distance in bytes from `b` to what will be read in the same way next, 0 if nothing: fetched ahead, since the
    /// processor's own prefetching starts anew in every tile.
    pub ahead: isize,
}

impl<S: Source> Kernel for Gemm<S> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let n_chunks = self.n_rows.div_ceil(MAX_ROWS);
        let mut row = 0;
        for chunk in 0..n_chunks {
            // Even chunks: 8 rows are 4 and 4, so that the tile isn't walked for 2 rows alone.
            let n = (self.n_rows - row).div_ceil(n_chunks - chunk);
            // SAFETY: the rows are in range, by the promise made to `compute`.
            unsafe {
                match n {
                    1 => self.rows::<V, 1>(row),
                    2 => self.rows::<V, 2>(row),
                    3 => self.rows::<V, 3>(row),
                    4 => self.rows::<V, 4>(row),
                    5 => self.rows::<V, 5>(row),
                    _ => self.rows::<V, 6>(row),
                }
            }
            row += n;
        }
    }
}

impl<S: Source> Gemm<S> {
    /// # Safety
    /// The pointers are valid for the shapes, `c` for writing and apart from the others.
    #[inline(always)]
    pub unsafe fn compute<V: Lanes>(self) {
        V::call(self);
    }

    #[inline(always)]
    unsafe fn rows<V: Lanes, const R: usize>(self, row: usize) {
        let wide = if V::MANY_REGISTERS || R == 1 {
            4
        } else if R == 2 {
            2
        } else {
            1
        };
        let mut col = 0;
        // SAFETY: the columns are in range.
        unsafe {
            while col + wide * LANES <= self.n_cols {
                match wide {
                    4 => self.block::<V, R, 4>(row, col),
                    2 => self.block::<V, R, 2>(row, col),
                    _ => self.block::<V, R, 1>(row, col),
                }
                col += wide * LANES;
            }
            while col < self.n_cols {
                self.block::<V, R, 1>(row, col);
                col += LANES;
            }
        }
    }

    /// `R` rows by `C` times 16 columns, sums in registers.
    #[inline(always)]
    unsafe fn block<V: Lanes, const R: usize, const C: usize>(self, row: usize, col: usize) {
        let mut acc = [[V::splat(0.0); C]; R];
        // SAFETY: rows and columns are in range by the caller's promise.
        unsafe {
            let (a, c) = (self.a.add(row * self.a_stride), self.c.add(row * self.c_stride + col));
            if let Some(rescale) = self.rescale {
                for r in 0..R {
                    let factor = V::splat(*rescale.add(row + r));
                    for j in 0..C {
                        acc[r][j] = V::load(c.add(r * self.c_stride + j * LANES)).mul(factor);
                    }
                }
            }
            for i in self.inner.0..self.inner.1 {
                let mut b = [V::splat(0.0); C];
                for j in 0..C {
                    b[j] = self.b.load(i, col + j * LANES);
                }
                if self.ahead != 0 && row == 0 {
                    V::prefetch(self.b.at(i, col).wrapping_offset(self.ahead));
                    V::prefetch(self.b.at(i, col + (C - 1) * LANES).wrapping_offset(self.ahead));
                }
                for r in 0..R {
                    let x = V::splat(*a.add(r * self.a_stride + i));
                    for j in 0..C {
                        acc[r][j] = x.fma(b[j], acc[r][j]);
                    }
                }
            }
            for r in 0..R {
                for j in 0..C {
                    acc[r][j].store(c.add(r * self.c_stride + j * LANES));
                }
            }
        }
    }
}
