//! The vector operations on AVX2 with FMA and F16C: eight lanes.

use super::vector::Vector;
use core::arch::x86_64::*;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has [`Isa::Avx2`](crate::cpu::Isa), and so has the caller's `target_feature`.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// Intrinsics in a method of [`Avx2`].
macro_rules! op {
    ($e:expr) => {{
        // SAFETY: `self` proves that the processor has the instruction set; an address is the caller's promise.
        unsafe { $e }
    }};
}

impl Vector for Avx2 {
    const LANES: usize = 8;
    const MANY_REGISTERS: bool = false;
    const SIGNED_ZERO: i32 = 0;
    type I = __m256i;
    type F = __m256;

    #[inline(always)]
    unsafe fn load(self, p: *const u8) -> Self::I {
        op!(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::I {
        op!(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u8) -> Self::I {
        op!(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::F {
        op!(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, x: Self::F) {
        op!(_mm256_storeu_ps(p, x))
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }

    #[inline(always)]
    fn splat(self, x: u32) -> Self::I {
        op!(_mm256_set1_epi32(x.cast_signed()))
    }
    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn shl(self, a: Self::I, n: u32) -> Self::I {
        op!(_mm256_sll_epi32(a, _mm_cvtsi32_si128(n.cast_signed())))
    }
    #[inline(always)]
    fn shr(self, a: Self::I, n: u32) -> Self::I {
        op!(_mm256_srl_epi32(a, _mm_cvtsi32_si128(n.cast_signed())))
    }
    #[inline(always)]
    fn sar(self, a: Self::I, n: u32) -> Self::I {
        op!(_mm256_sra_epi32(a, _mm_cvtsi32_si128(n.cast_signed())))
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], codes: Self::I) -> Self::I {
        op!(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), codes))
    }

    #[inline(always)]
    fn signed(self, w: Self::I) -> Self::I {
        w
    }

    /// `maddubs` adds two products of an unsigned and a signed byte in 16 bits. Those of b-bit weights are at most
    /// `2 * 127 * (2^b - 1)` in size, so a few of them fit before they have to be widened, which costs as much as two.
    /// Signed weights lend their sign to the activations: `|w| * (q * sign w)`; -128 is then an unsigned 128, and two
    /// products of it and 127 just fit.
    #[inline(always)]
    unsafe fn dot<const N: usize>(self, start: Self::I, w: &[Self::I; N], q: *const i8, bits: u32) -> Self::I {
        let narrow = match bits {
            0..=4 => 8,
            5 => 4,
            6 => 2,
            _ => 1,
        };
        let ones = op!(_mm256_set1_epi16(1));
        let mut sum = start;
        let mut pairs = ones;
        let mut j = 0;
        while j < N {
            let q = op!(_mm256_set1_epi32(q.add(4 * j).cast::<i32>().read_unaligned()));
            let products = if bits == 8 {
                op!(_mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(q, w[j])))
            } else {
                op!(_mm256_maddubs_epi16(w[j], q))
            };
            pairs = if j % narrow == 0 { products } else { op!(_mm256_add_epi16(pairs, products)) };
            j += 1;
            if j % narrow == 0 || j == N {
                sum = op!(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones)));
            }
        }
        sum
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        op!(_mm256_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn e8m0_half(self, e: Self::I) -> Self::F {
        let one = self.splat(1);
        let normal = op!(_mm256_slli_epi32::<23>(_mm256_sub_epi32(e, one)));
        let subnormal = op!(_mm256_sllv_epi32(_mm256_set1_epi32(1 << 21), e));
        self.as_f32(op!(_mm256_blendv_epi8(subnormal, normal, _mm256_cmpgt_epi32(e, one))))
    }
    #[inline(always)]
    fn as_f32(self, a: Self::I) -> Self::F {
        op!(_mm256_castsi256_ps(a))
    }
    #[inline(always)]
    fn splat_f32(self, x: f32) -> Self::F {
        op!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        op!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        op!(_mm256_fnmadd_ps(a, b, c))
    }
}
