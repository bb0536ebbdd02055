//! Sixteen lanes as an array: what every instruction set must agree with.

use super::{Kernel, LANES, Lanes, nearest};
use half::f16;

/// The lanes.
#[derive(Clone, Copy)]
pub struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn zip(self, o: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Scalar(std::array::from_fn(|i| f(self.0[i], o.0[i])))
    }
}

impl Lanes for Scalar {
    const MANY_REGISTERS: bool = false;
    #[inline(never)]
    fn call<K: Kernel>(k: K) -> K::Out {
        k.run::<Self>()
    }
    #[inline(always)]
    fn prefetch(_: *const u8) {}
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Scalar([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Scalar(unsafe { p.cast::<[f32; LANES]>().read() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; LANES]>().write(self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: the caller's promise.
        let bits = unsafe { p.cast::<[u16; LANES]>().read() };
        Scalar(bits.map(|b| f16::from_bits(b).to_f32()))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u16; LANES]>().write(self.0.map(|x| f16::from_f32(x).to_bits())) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: the caller's promise.
        Scalar(unsafe { p.cast::<[i8; LANES]>().read() }.map(f32::from))
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        self.zip(o, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        self.zip(o, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        self.zip(o, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        self.zip(o, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Scalar(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        self.zip(o, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        self.zip(o, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn zero_if_less(self, x: Self, bound: f32) -> Self {
        self.zip(x, |a, x| if x < bound { 0.0 } else { a })
    }
    #[inline(always)]
    fn pow2(self) -> Self {
        Scalar(self.0.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(0x3f80_0000))))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut x = self.0;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] += x[i + half];
            }
        }
        x[0]
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn larger_size(self, o: Self) -> Self {
        let bits = |x: f32| x.to_bits().cast_signed();
        self.zip(o, |a, b| f32::from_bits(bits(a.abs()).max(bits(b)).cast_unsigned()))
    }
    #[inline(always)]
    fn largest_size(self) -> f32 {
        let mut x = self.0.map(|x| x.to_bits().cast_signed());
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] = x[i].max(x[i + half]);
            }
        }
        f32::from_bits(x[0].cast_unsigned())
    }
    #[inline(always)]
    fn quantize(self, id: f32, q: &mut [i8; LANES]) -> i32 {
        let lanes = self.0.map(|x| nearest(x * id).clamp(-127, 127));
        *q = lanes.map(|x| x as i8);
        lanes.iter().sum()
    }
}
