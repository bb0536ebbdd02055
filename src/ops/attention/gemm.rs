//! The small matrix product inside attention: a few rows against a tile.

use super::source::Source;
use crate::cpu::simd::{Kernel, LANES, Lanes};

/// Rows that are multiplied together, at most: what the registers hold of sums.
const MAX_ROWS: usize = 6;

/// What a [`Gemm`] multiplies, but for `b`.
#[derive(Clone, Copy)]
pub struct Operands {
    pub a: *const f32,
    pub a_stride: usize,
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

/// `c = a b`, or `c = c * rescale + a b` with a factor for each row. Each element of `c` is one chain of fused multiply-adds
/// in the order of `inner`, however rows and columns are grouped.
#[derive(Clone, Copy)]
pub struct Gemm<S> {
    o: Operands,
    b: S,
}

impl<S: Source> Gemm<S> {
    /// # Safety
    /// `n_cols` is a multiple of [`LANES`]. Until the product has run: `n_rows` rows of `a` with the columns `inner`, as many factors of
    /// `rescale`, and the rows `inner` of `b` with `n_cols` columns can be read; `n_rows` rows of `c` with `n_cols` columns are held, can
    /// be written, and are apart from the others.
    #[inline(always)]
    pub unsafe fn new(o: Operands, b: S) -> Self {
        Gemm { o, b }
    }
}

impl<S: Source> Kernel for Gemm<S> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let n_chunks = self.o.n_rows.div_ceil(MAX_ROWS);
        let mut row = 0;
        for chunk in 0..n_chunks {
            // Even chunks: 8 rows are 4 and 4, so that the tile isn't walked for 2 rows alone.
            let n = (self.o.n_rows - row).div_ceil(n_chunks - chunk);
            // SAFETY: the rows are in range.
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
    /// All columns of `R` rows.
    ///
    /// # Safety
    /// `row + R <= n_rows`
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
            while col + wide * LANES <= self.o.n_cols {
                match wide {
                    4 => self.block::<V, R, 4>(row, col),
                    2 => self.block::<V, R, 2>(row, col),
                    _ => self.block::<V, R, 1>(row, col),
                }
                col += wide * LANES;
            }
            while col < self.o.n_cols {
                self.block::<V, R, 1>(row, col);
                col += LANES;
            }
        }
    }

    /// `R` rows by `C` times 16 columns, sums in registers.
    ///
    /// # Safety
    /// `row + R <= n_rows`, `col + 16 * C <= n_cols`
    #[inline(always)]
    unsafe fn block<V: Lanes, const R: usize, const C: usize>(self, row: usize, col: usize) {
        let mut acc = [[V::splat(0.0); C]; R];
        let o = &self.o;
        // SAFETY: rows and columns are in range by the caller's promise, and what is in range can be used by that of `new`.
        unsafe {
            let (a, c) = (o.a.add(row * o.a_stride), o.c.add(row * o.c_stride + col));
            if let Some(rescale) = o.rescale {
                for r in 0..R {
                    let factor = V::splat(*rescale.add(row + r));
                    for j in 0..C {
                        acc[r][j] = V::load(c.add(r * o.c_stride + j * LANES)).mul(factor);
                    }
                }
            }
            for i in o.inner.0..o.inner.1 {
                let mut b = [V::splat(0.0); C];
                for j in 0..C {
                    b[j] = self.b.load(i, col + j * LANES);
                }
                if o.ahead != 0 && row == 0 {
                    V::prefetch(self.b.at(i, col).wrapping_offset(o.ahead));
                    V::prefetch(self.b.at(i, col + (C - 1) * LANES).wrapping_offset(o.ahead));
                }
                for r in 0..R {
                    let x = V::splat(*a.add(r * o.a_stride + i));
                    for j in 0..C {
                        acc[r][j] = x.fma(b[j], acc[r][j]);
                    }
                }
            }
            for r in 0..R {
                for j in 0..C {
                    acc[r][j].store(c.add(r * o.c_stride + j * LANES));
                }
            }
        }
    }
}
