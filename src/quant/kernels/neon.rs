//! The vector operations on NEON: four lanes, with or without the dot product instructions.

use super::vector::Vector;
use core::arch::aarch64::*;
use core::arch::asm;

/// Proof of NEON, and with `DOT` of dotprod.
#[derive(Clone, Copy)]
pub(super) struct Neon<const DOT: bool>(());

impl<const DOT: bool> Neon<DOT> {
    /// # Safety
    /// The processor has [`Isa::Neon`](crate::cpu::Isa), or with `DOT` [`Isa::NeonDot`](crate::cpu::Isa), and so has the
    /// caller's `target_feature`.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// Intrinsics in a method of [`Neon`].
macro_rules! op {
    ($e:expr) => {{
        // SAFETY: `self` proves that the processor has the instruction set; an address is the caller's promise.
        unsafe { $e }
    }};
}

/// `sdot` of four lanes of weights and four activations, which are lane `$i` of `$q`: not an intrinsic on stable Rust yet.
macro_rules! sdot {
    ($sum:ident, $w:expr, $q:ident, $i:literal) => {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe {
            asm!(
                concat!("sdot {sum:v}.4s, {w:v}.16b, {q:v}.4b[", $i, "]"),
                sum = inout(vreg) $sum, w = in(vreg) $w, q = in(vreg) $q,
                options(pure, nomem, nostack, preserves_flags)
            )
        }
    };
}

impl<const DOT: bool> Vector for Neon<DOT> {
    const LANES: usize = 4;
    const MANY_REGISTERS: bool = true;
    const SIGNED_ZERO: i32 = 0;
    type I = uint32x4_t;
    type F = float32x4_t;

    #[inline(always)]
    unsafe fn load(self, p: *const u8) -> Self::I {
        op!(vreinterpretq_u32_u8(vld1q_u8(p)))
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::I {
        let four = op!(p.cast::<u32>().read_unaligned());
        op!(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(u64::from(four))))))
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u8) -> Self::I {
        op!(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p))))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::F {
        op!(vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8, x: Self::I) {
        op!(vst1q_u8(p, vreinterpretq_u8_u32(x)))
    }
    #[inline(always)]
    unsafe fn load_columns(self, p: *const u8, stride: usize) -> [Self::I; 4] {
        // SAFETY: the caller's promise.
        let row = |i: usize| unsafe { self.load(p.add(i * stride)) };
        let (a, b, c, d) = (row(0), row(1), row(2), row(3));
        op!({
            let wide = |x| vreinterpretq_u64_u32(x);
            let (ab, ab_odd) = (wide(vtrn1q_u32(a, b)), wide(vtrn2q_u32(a, b)));
            let (cd, cd_odd) = (wide(vtrn1q_u32(c, d)), wide(vtrn2q_u32(c, d)));
            let columns =
                [vtrn1q_u64(ab, cd), vtrn1q_u64(ab_odd, cd_odd), vtrn2q_u64(ab, cd), vtrn2q_u64(ab_odd, cd_odd)];
            columns.map(|x| vreinterpretq_u32_u64(x))
        })
    }
    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, x: Self::F) {
        op!(vst1q_f32(p, x))
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a hint, which any address may be given to.
        unsafe { asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nomem, nostack, preserves_flags)) }
    }

    #[inline(always)]
    fn splat(self, x: u32) -> Self::I {
        op!(vdupq_n_u32(x))
    }
    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        op!(vandq_u32(a, b))
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        op!(vorrq_u32(a, b))
    }
    #[inline(always)]
    fn shl(self, a: Self::I, n: u32) -> Self::I {
        op!(vshlq_u32(a, vdupq_n_s32(n.cast_signed())))
    }
    #[inline(always)]
    fn shr(self, a: Self::I, n: u32) -> Self::I {
        op!(vshlq_u32(a, vdupq_n_s32(-n.cast_signed())))
    }
    #[inline(always)]
    fn sar(self, a: Self::I, n: u32) -> Self::I {
        op!(vreinterpretq_u32_s32(vshlq_s32(vreinterpretq_s32_u32(a), vdupq_n_s32(-n.cast_signed()))))
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        op!(vaddq_u32(a, b))
    }
    #[inline(always)]
    fn mul_add_i32(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        op!(vmlaq_u32(c, a, b))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], codes: Self::I) -> Self::I {
        op!(vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(table.as_ptr().cast()), vreinterpretq_u8_u32(codes))))
    }

    #[inline(always)]
    fn signed(self, w: Self::I) -> Self::I {
        w
    }

    /// Without the dot product instructions: products of bytes are added up in 16 bits as often as surely fits, then in pairs in 32.
    #[inline(always)]
    unsafe fn dot<const N: usize>(self, start: Self::I, w: &[Self::I; N], q: *const i8, bits: u32) -> Self::I {
        if DOT {
            let mut sum = start;
            let (fours, rest) = w.as_chunks::<4>();
            for (i, w) in fours.iter().enumerate() {
                let q = op!(vld1q_s8(q.add(16 * i)));
                sdot!(sum, w[0], q, 0);
                sdot!(sum, w[1], q, 1);
                sdot!(sum, w[2], q, 2);
                sdot!(sum, w[3], q, 3);
            }
            for (i, w) in rest.iter().enumerate() {
                let q = op!(vdupq_n_u32(q.add(16 * fours.len() + 4 * i).cast::<u32>().read_unaligned()));
                sdot!(sum, *w, q, 0);
            }
            return sum;
        }
        // 2^15 / (127 * (2^bits - 1)), and with 8 bits 2^15 / (127 * 128).
        let narrow = match bits {
            0..=5 => 8,
            6 => 4,
            _ => 2,
        };
        let (mut low, mut high) = op!((vdupq_n_s16(0), vdupq_n_s16(0)));
        let (mut wide_low, mut wide_high) = op!((vdupq_n_s32(0), vdupq_n_s32(0)));
        let mut j = 0;
        while j < N {
            let q = op!(vreinterpret_s8_u32(vdup_n_u32(q.add(4 * j).cast::<u32>().read_unaligned())));
            let w = op!(vreinterpretq_s8_u32(w[j]));
            if j % narrow == 0 {
                (low, high) = op!((vmull_s8(vget_low_s8(w), q), vmull_s8(vget_high_s8(w), q)));
            } else {
                (low, high) = op!((vmlal_s8(low, vget_low_s8(w), q), vmlal_s8(high, vget_high_s8(w), q)));
            }
            j += 1;
            if j % narrow == 0 || j == N {
                (wide_low, wide_high) = op!((vpadalq_s16(wide_low, low), vpadalq_s16(wide_high, high)));
            }
        }
        op!(vaddq_u32(start, vreinterpretq_u32_s32(vpaddq_s32(wide_low, wide_high))))
    }

    #[inline(always)]
    unsafe fn dot_pairs(self, start: Self::I, w: Self::I, p: *const i16) -> Self::I {
        let (w, q) =
            op!((vreinterpretq_s16_u32(w), vreinterpretq_s16_u32(vdupq_n_u32(p.cast::<u32>().read_unaligned()))));
        let products = op!(vpaddq_s32(vmull_s16(vget_low_s16(w), vget_low_s16(q)), vmull_high_s16(w, q)));
        op!(vaddq_u32(start, vreinterpretq_u32_s32(products)))
    }

    #[inline(always)]
    fn multiply_add(self, sum: Self::I, w: Self::I) -> Self::I {
        if DOT {
            let (mut sum, factor) = (sum, sum);
            let w = op!(vreinterpretq_s8_u32(w));
            sdot!(sum, factor, w, 0);
            return sum;
        }
        // Half the bytes a go: both halves of `sum` are multiplied, into one.
        let (s, w) = op!((vreinterpretq_s8_u32(sum), vreinterpretq_s8_u32(w)));
        let low = op!(vmlal_s8(vreinterpretq_s16_u32(sum), vget_low_s8(s), vget_low_s8(w)));
        op!(vreinterpretq_u32_s16(vmlal_s8(low, vget_high_s8(s), vget_high_s8(w))))
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        op!(vcvtq_f32_s32(vreinterpretq_s32_u32(a)))
    }
    #[inline(always)]
    fn e8m0_half(self, e: Self::I) -> Self::F {
        let one = self.splat(1);
        let normal = op!(vshlq_n_u32::<23>(vsubq_u32(e, one)));
        let subnormal = op!(vshlq_u32(self.splat(1 << 21), vreinterpretq_s32_u32(e)));
        self.as_f32(op!(vbslq_u32(vcgtq_u32(e, one), normal, subnormal)))
    }
    #[inline(always)]
    fn as_f32(self, a: Self::I) -> Self::F {
        op!(vreinterpretq_f32_u32(a))
    }
    #[inline(always)]
    fn splat_f32(self, x: f32) -> Self::F {
        op!(vdupq_n_f32(x))
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        op!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        op!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        op!(vfmaq_f32(c, a, b))
    }
}
