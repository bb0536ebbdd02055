//! The vector operations in plain Rust: four lanes.

use super::vector::Vector;
use half::f16;

/// Four lanes of plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

const N: usize = 4;

macro_rules! lanes {
    ($l:ident => $e:expr) => {{
        let mut out = [Default::default(); N];
        let mut $l = 0;
        while $l < N {
            out[$l] = $e;
            $l += 1;
        }
        out
    }};
}

impl Vector for Scalar {
    const LANES: usize = N;
    const ASKS_FROM: Option<usize> = None;
    const MANY_REGISTERS: bool = true;
    const SIGNED_ZERO: i32 = 0;
    type I = [u32; N];
    type F = [f32; N];

    #[inline(always)]
    unsafe fn load(self, p: *const u8) -> Self::I {
        // SAFETY: the caller's promise.
        let lanes: [[u8; 4]; N] = unsafe { p.cast::<[[u8; 4]; N]>().read_unaligned() };
        lanes!(l => u32::from_le_bytes(lanes[l]))
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::I {
        // SAFETY: the caller's promise.
        let lanes = unsafe { p.cast::<[u8; N]>().read_unaligned() };
        lanes!(l => u32::from(lanes[l]))
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u8) -> Self::I {
        // SAFETY: the caller's promise.
        let lanes: [[u8; 2]; N] = unsafe { p.cast::<[[u8; 2]; N]>().read_unaligned() };
        lanes!(l => u32::from(u16::from_le_bytes(lanes[l])))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let lanes = unsafe { self.load_u16(p) };
        lanes!(l => f16::from_bits(lanes[l] as u16).to_f32())
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8, x: Self::I) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[[u8; 4]; N]>().write_unaligned(x.map(u32::to_le_bytes)) }
    }
    #[inline(always)]
    unsafe fn load_columns(self, p: *const u8, stride: usize) -> [Self::I; 4] {
        // SAFETY: the caller's promise.
        let rows: [Self::I; N] = std::array::from_fn(|row| unsafe { self.load(p.add(row * stride)) });
        std::array::from_fn(|j| lanes!(l => rows[l][j]))
    }
    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, x: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; N]>().write_unaligned(x) }
    }

    #[inline(always)]
    fn splat(self, x: u32) -> Self::I {
        [x; N]
    }
    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        lanes!(l => a[l] & b[l])
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        lanes!(l => a[l] | b[l])
    }
    #[inline(always)]
    fn shl(self, a: Self::I, n: u32) -> Self::I {
        lanes!(l => a[l] << n)
    }
    #[inline(always)]
    fn shr(self, a: Self::I, n: u32) -> Self::I {
        lanes!(l => a[l] >> n)
    }
    #[inline(always)]
    fn sar(self, a: Self::I, n: u32) -> Self::I {
        lanes!(l => (a[l].cast_signed() >> n).cast_unsigned())
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        lanes!(l => a[l].wrapping_add(b[l]))
    }
    #[inline(always)]
    fn mul_add_i32(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        lanes!(l => a[l].wrapping_mul(b[l]).wrapping_add(c[l]))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], codes: Self::I) -> Self::I {
        lanes!(l => {
            let c = codes[l].to_le_bytes();
            let at = |c: u8| table[usize::from(c & 15)].cast_unsigned();
            u32::from_le_bytes([at(c[0]), at(c[1]), at(c[2]), at(c[3])])
        })
    }

    #[inline(always)]
    fn signed(self, w: Self::I) -> Self::I {
        w
    }
    #[inline(always)]
    unsafe fn dot<const K: usize>(self, start: Self::I, w: &[Self::I; K], q: *const i8, _: u32) -> Self::I {
        let mut sum = start;
        for (j, w) in w.iter().enumerate() {
            // SAFETY: the caller's promise.
            let q = unsafe { q.add(4 * j).cast::<[i8; 4]>().read() };
            for l in 0..N {
                for (w, q) in w[l].to_le_bytes().into_iter().zip(q) {
                    // Weights of fewer than 8 bits are the same signed and unsigned.
                    let product = i32::from(w.cast_signed()) * i32::from(q);
                    sum[l] = sum[l].wrapping_add(product.cast_unsigned());
                }
            }
        }
        sum
    }

    #[inline(always)]
    unsafe fn dot_pairs(self, start: Self::I, w: Self::I, p: *const i16) -> Self::I {
        // SAFETY: the caller's promise.
        let [a, b] = unsafe { p.cast::<[i16; 2]>().read() }.map(i32::from);
        lanes!(l => {
            let (low, high) = (w[l] as i16, (w[l] >> 16) as i16);
            start[l].wrapping_add((i32::from(low) * a + i32::from(high) * b).cast_unsigned())
        })
    }

    #[inline(always)]
    fn multiply_add(self, sum: Self::I, w: Self::I) -> Self::I {
        let product = |a: u32, b: u32| {
            let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
            (0..4).fold(0u32, |sum, i| sum.wrapping_add(u32::from(a[i]) * u32::from(b[i])))
        };
        lanes!(l => sum[l].wrapping_add(product(sum[l], w[l])))
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        lanes!(l => a[l].cast_signed() as f32)
    }
    #[inline(always)]
    fn as_f32(self, a: Self::I) -> Self::F {
        lanes!(l => f32::from_bits(a[l]))
    }
    #[inline(always)]
    fn splat_f32(self, x: f32) -> Self::F {
        [x; N]
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(l => a[l] + b[l])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(l => a[l] * b[l])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        lanes!(l => a[l].mul_add(b[l], c[l]))
    }
}
