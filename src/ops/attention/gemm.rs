//! The small matrix product inside attention: a few rows against a tile.

use crate::ops::simd::{Kernel, LANES, Lanes};

/// Rows that are multiplied together, at most: what the registers hold of sums.
const MAX_ROWS: usize = 6;

/// A matrix of the cache, as lanes: exact in f32, whatever it is stored as.
pub trait Source: Copy {
    /// The lanes from `col` on of row `row`.
    ///
    /// # Safety
    /// They lie in the matrix.
    unsafe fn load<V: Lanes>(self, row: usize, col: usize) -> V;
}

/// Single precision; rows are `stride` apart.
#[derive(Clone, Copy)]
pub struct F32 {
    pub ptr: *const f32,
    pub stride: usize,
}

impl Source for F32 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(self, row: usize, col: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(self.ptr.add(row * self.stride + col)) }
    }
}

/// Half precision.
#[derive(Clone, Copy)]
pub struct F16 {
    pub ptr: *const u16,
    pub stride: usize,
}

impl Source for F16 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(self, row: usize, col: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_f16(self.ptr.add(row * self.stride + col)) }
    }
}

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
    /// The same product with another matrix.
    #[inline(always)]
    pub fn with<T>(self, b: T) -> Gemm<T> {
        let Gemm { a, a_stride, b: _, c, c_stride, n_rows, n_cols, inner, rescale } = self;
        Gemm { a, a_stride, b, c, c_stride, n_rows, n_cols, inner, rescale }
    }

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
