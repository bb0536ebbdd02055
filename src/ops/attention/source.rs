//! The cache's matrices as lanes, whatever they are stored as. What comes out is exact: a half-precision number, or a byte times
//! a half-precision scale, has few enough bits for f32. So it makes no difference to a result whether a matrix is
//! converted while it's multiplied or before.

use super::gemm::Operands;
use super::scratch::Buf;
use crate::cpu::simd::{Kernel, LANES, Lanes, store};
use crate::ops::kv::{GROUP, KV_BLOCK, KvType, Tile};

/// A matrix in memory.
pub trait Source: Copy {
    /// Up to how many rows it pays to convert it anew for each few of them, rather than once into memory.
    const DIRECT_ROWS: usize;

    /// The lanes from `col`, a multiple of [`LANES`], on of row `row`.
    ///
    /// # Safety
    /// They lie in the matrix.
    unsafe fn load<V: Lanes>(self, row: usize, col: usize) -> V;

    /// The address that [`load`](Self::load) reads.
    fn at(self, row: usize, col: usize) -> *const u8;
}

/// Single precision; rows are `stride` apart.
#[derive(Clone, Copy)]
pub struct F32 {
    pub ptr: *const f32,
    pub stride: usize,
}

impl Source for F32 {
    const DIRECT_ROWS: usize = usize::MAX;

    #[inline(always)]
    unsafe fn load<V: Lanes>(self, row: usize, col: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(self.ptr.add(row * self.stride + col)) }
    }
    #[inline(always)]
    fn at(self, row: usize, col: usize) -> *const u8 {
        self.ptr.wrapping_add(row * self.stride + col).cast()
    }
}

/// Half precision.
#[derive(Clone, Copy)]
pub struct F16 {
    pub ptr: *const u16,
    pub stride: usize,
}

impl Source for F16 {
    const DIRECT_ROWS: usize = 12;

    #[inline(always)]
    unsafe fn load<V: Lanes>(self, row: usize, col: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_f16(self.ptr.add(row * self.stride + col)) }
    }
    #[inline(always)]
    fn at(self, row: usize, col: usize) -> *const u8 {
        self.ptr.wrapping_add(row * self.stride + col).cast()
    }
}

/// Keys in bytes: [`GROUP`] rows share a row of scales.
#[derive(Clone, Copy)]
pub struct Q8Keys {
    pub ptr: *const i8,
    pub scales: *const f32, // (ceil(rows / 32), 64)
}

impl Source for Q8Keys {
    const DIRECT_ROWS: usize = 12;

    #[inline(always)]
    unsafe fn load<V: Lanes>(self, row: usize, col: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = V::load(self.scales.add(row / GROUP * KV_BLOCK + col));
            V::load_i8(self.ptr.add(row * KV_BLOCK + col)).mul(scale)
        }
    }
    #[inline(always)]
    fn at(self, row: usize, col: usize) -> *const u8 {
        self.ptr.wrapping_add(row * KV_BLOCK + col).cast()
    }
}

/// Values in bytes: [`GROUP`] columns share a scale in each row.
#[derive(Clone, Copy)]
pub struct Q8Values {
    pub ptr: *const i8,
    pub stride: usize,
    pub scales: *const f32, // (64, n_groups)
    pub n_groups: usize,
}

impl Source for Q8Values {
    const DIRECT_ROWS: usize = 12;

    #[inline(always)]
    unsafe fn load<V: Lanes>(self, row: usize, col: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = *self.scales.add(row * self.n_groups + col / GROUP);
            V::load_i8(self.ptr.add(row * self.stride + col)).mul(V::splat(scale))
        }
    }
    #[inline(always)]
    fn at(self, row: usize, col: usize) -> *const u8 {
        self.ptr.wrapping_add(row * self.stride + col).cast()
    }
}

/// What is done with a matrix once its type is known.
pub trait Use {
    /// # Safety
    /// As the user says.
    unsafe fn with<V: Lanes, S: Source>(self, source: S);
}

/// The keys of a tile, `(head_dim_k, 64)`.
///
/// # Safety
/// As for `u`.
#[inline(always)]
pub unsafe fn keys<V: Lanes>(tile: &Tile, scales: &mut Buf, u: impl Use) {
    // SAFETY: the tile's keys have this type and shape; the rest is the caller's promise.
    unsafe {
        match tile.layout.type_k {
            KvType::F32 => u.with::<V, _>(F32 { ptr: tile.k.cast(), stride: KV_BLOCK }),
            KvType::F16 => u.with::<V, _>(F16 { ptr: tile.k.cast(), stride: KV_BLOCK }),
            KvType::Q8_0 => {
                let n = tile.layer.shape.head_dim_k.div_ceil(GROUP) * KV_BLOCK;
                let scales = convert_scales::<V>(tile.k_scale, n, scales);
                u.with::<V, _>(Q8Keys { ptr: tile.k.cast(), scales });
            }
        }
    }
}

/// The values of a tile, `(64, dv_pad)`.
///
/// # Safety
/// As for `u`.
#[inline(always)]
pub unsafe fn values<V: Lanes>(tile: &Tile, scales: &mut Buf, u: impl Use) {
    let stride = tile.layer.dv_pad;
    // SAFETY: as above.
    unsafe {
        match tile.layout.type_v {
            KvType::F32 => u.with::<V, _>(F32 { ptr: tile.v.cast(), stride }),
            KvType::F16 => u.with::<V, _>(F16 { ptr: tile.v.cast(), stride }),
            KvType::Q8_0 => {
                let n_groups = stride.div_ceil(GROUP);
                let scales = convert_scales::<V>(tile.v_scale, n_groups * KV_BLOCK, scales);
                u.with::<V, _>(Q8Values { ptr: tile.v.cast(), stride, scales, n_groups });
            }
        }
    }
}

/// `n` scales, a multiple of [`LANES`], in single precision.
///
/// # Safety
/// `src` is valid for reading them.
#[inline(always)]
unsafe fn convert_scales<V: Lanes>(src: *const u16, n: usize, buf: &mut Buf) -> *const f32 {
    let out = buf.get(n);
    for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        store(unsafe { V::load_f16(src.add(i * LANES)) }, out);
    }
    out.as_ptr()
}

/// Converts a part of a matrix to single precision, at the same rows and columns of `out`.
pub struct Convert<'a, S> {
    source: S,
    o: Operands,
    out: &'a mut [f32],
    stride: usize,
}

impl<'a, S: Source> Convert<'a, S> {
    /// Converts what a product of these operands reads of `source`; the rows of `out` are `stride` apart.
    ///
    /// # Safety
    /// Until it has run, `o.n_cols` columns of the rows `o.inner` of `source` can be read.
    #[inline(always)]
    pub unsafe fn new(source: S, o: Operands, out: &'a mut [f32], stride: usize) -> Self {
        Convert { source, o, out, stride }
    }
}

impl<S: Source> Kernel for Convert<'_, S> {
    type Out = F32;
    #[inline(always)]
    fn run<V: Lanes>(self) -> F32 {
        for row in self.o.inner.0..self.o.inner.1 {
            let out = &mut self.out[row * self.stride..][..self.o.n_cols];
            for (j, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                // SAFETY: the promise made to `new`.
                store(unsafe { self.source.load::<V>(row, j * LANES) }, out);
                if self.o.ahead != 0 {
                    V::prefetch(self.source.at(row, j * LANES).wrapping_offset(self.o.ahead));
                }
            }
        }
        F32 { ptr: self.out.as_ptr(), stride: self.stride }
    }
}
