//! Sixteen lanes in four NEON registers.

use super::{Kernel, LANES, Lanes};
use std::arch::aarch64::*;

/// Compiles `k` for NEON.
///
/// # Safety
/// The processor has it.
#[target_feature(enable = "neon")]
pub unsafe fn run_neon<K: Kernel>(k: K) -> K::Out {
    k.run::<Neon>()
}

/// Four registers.
#[derive(Clone, Copy)]
pub struct Neon([float32x4_t; 4]);

// SAFETY of the instructions is that every arm64 processor that Rust's targets admit has NEON; of the pointers, the caller's
// promise.

impl Neon {
    #[inline(always)]
    fn map(self, f: impl Fn(float32x4_t) -> float32x4_t) -> Self {
        let [a, b, c, d] = self.0;
        Neon([f(a), f(b), f(c), f(d)])
    }

    #[inline(always)]
    fn zip(self, o: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        let ([a, b, c, d], [p, q, r, s]) = (self.0, o.0);
        Neon([f(a, p), f(b, q), f(c, r), f(d, s)])
    }
}

impl Lanes for Neon {
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(k: K) -> K::Out {
        // SAFETY: see above.
        unsafe { run_neon(k) }
    }
    #[inline(always)]
    fn prefetch(_: *const u8) {}
    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Neon([unsafe { vdupq_n_f32(x) }; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see above.
        unsafe { Neon([vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))]) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        for (i, x) in self.0.into_iter().enumerate() {
            // SAFETY: see above.
            unsafe { vst1q_f32(p.add(4 * i), x) };
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        let mut out = Self::splat(0.0);
        for (i, x) in out.0.iter_mut().enumerate() {
            // SAFETY: see above.
            *x = unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p.add(4 * i)))) };
        }
        out
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        for (i, x) in self.0.into_iter().enumerate() {
            // SAFETY: see above.
            unsafe { vst1_u16(p.add(4 * i), vreinterpret_u16_f16(vcvt_f16_f32(x))) };
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: see above.
        unsafe {
            let x = vld1q_s8(p);
            let (lo, hi) = (vmovl_s8(vget_low_s8(x)), vmovl_s8(vget_high_s8(x)));
            Neon([
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(lo))),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(hi))),
            ])
        }
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        // SAFETY: see above.
        self.zip(o, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        // SAFETY: see above.
        self.zip(o, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        // SAFETY: see above.
        self.zip(o, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        // SAFETY: see above.
        self.zip(o, |a, b| unsafe { vdivq_f32(a, b) })
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        let mut out = c;
        for i in 0..4 {
            // SAFETY: see above.
            out.0[i] = unsafe { vfmaq_f32(c.0[i], self.0[i], b.0[i]) };
        }
        out
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        // SAFETY: see above. Not vmaxq: that prefers what isn't a number on either side.
        self.zip(o, |a, b| unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) })
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        // SAFETY: see above.
        self.zip(o, |a, b| unsafe { vbslq_f32(vcltq_f32(a, b), a, b) })
    }
    #[inline(always)]
    fn zero_if_less(self, x: Self, bound: f32) -> Self {
        // SAFETY: see above.
        self.zip(x, |a, x| unsafe { vbslq_f32(vcltq_f32(x, vdupq_n_f32(bound)), vdupq_n_f32(0.0), a) })
    }
    #[inline(always)]
    fn pow2(self) -> Self {
        // SAFETY: see above.
        self.map(|x| unsafe {
            let n = vshlq_n_s32::<23>(vreinterpretq_s32_f32(x));
            vreinterpretq_f32_s32(vaddq_s32(n, vdupq_n_s32(0x3f80_0000)))
        })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b, c, d] = self.0;
        // SAFETY: see above.
        unsafe {
            let x = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
            let x = vadd_f32(vget_low_f32(x), vget_high_f32(x));
            vget_lane_f32::<0>(x) + vget_lane_f32::<1>(x)
        }
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        let [a, b, c, d] = self.0;
        // SAFETY: see above.
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a, c), vmaxnmq_f32(b, d))) }
    }
    #[inline(always)]
    fn larger_size(self, o: Self) -> Self {
        // SAFETY: see above.
        self.zip(o, |a, b| unsafe {
            let size = vreinterpretq_u32_f32(vabsq_f32(a));
            vreinterpretq_f32_u32(vmaxq_u32(size, vreinterpretq_u32_f32(b)))
        })
    }
    #[inline(always)]
    fn largest_size(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let [a, b, c, d] = self.0.map(|x| vreinterpretq_u32_f32(x));
            f32::from_bits(vmaxvq_u32(vmaxq_u32(vmaxq_u32(a, b), vmaxq_u32(c, d))))
        }
    }
    /// An instruction rounds; its integers of 32 bits needn't be held within the bytes, by the caller's promise.
    #[inline(always)]
    fn quantize(self, id: f32, q: &mut [i8; LANES]) -> i32 {
        // SAFETY: see above; the array has 16 places.
        unsafe {
            let [a, b, c, d] = self.0.map(|x| vreinterpretq_s16_s32(vcvtnq_s32_f32(vmulq_n_f32(x, id))));
            let (low, high) = (vuzp1q_s16(a, b), vuzp1q_s16(c, d));
            let bytes = vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
            vst1q_s8(q.as_mut_ptr(), bytes);
            i32::from(vaddlvq_s8(bytes))
        }
    }
}
