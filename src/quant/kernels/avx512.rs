//! The vector operations on AVX-512 with VNNI: sixteen lanes.

use super::op;
use super::vector::Vector;
use core::arch::x86_64::*;

/// Proof of AVX-512 F, BW, VL and VNNI.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has [`Isa::Avx512Vnni`](crate::cpu::isa::Isa), and so has the caller's `target_feature`.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Avx512 {
    /// Bytes less `x`, wrapping.
    #[inline(always)]
    pub(super) fn sub_u8(self, a: __m512i, x: u8) -> __m512i {
        op!(_mm512_sub_epi8(a, _mm512_set1_epi8(x.cast_signed())))
    }

    /// Products of 16 bits, without what is above.
    #[inline(always)]
    pub(super) fn mul_i16(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_mullo_epi16(a, b))
    }

    /// `sum` and the products of two numbers of 16 bits. The instruction saturates, which sums here don't reach; the compiler takes the one that
    /// doesn't apart, into two.
    #[inline(always)]
    pub(super) fn add_pair(self, sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_dpwssds_epi32(sum, a, b))
    }

    /// Unsigned bytes less `zero` times the signed number of eight bits that is in each 16 bits, cut in two: the lower and the upper byte of each.
    #[inline(always)]
    pub(super) fn scaled_bytes(self, w: __m512i, zero: i16, scale: __m512i) -> [__m512i; 2] {
        op!({
            let less = _mm512_mullo_epi16(scale, _mm512_set1_epi16(zero));
            let even = _mm512_mullo_epi16(_mm512_and_si512(w, _mm512_set1_epi16(0xff)), scale);
            let odd = _mm512_mullo_epi16(_mm512_srli_epi16::<8>(w), scale);
            let (even, odd) = (_mm512_sub_epi16(even, less), _mm512_sub_epi16(odd, less));
            let upper = |a, b| _mm512_mask_blend_epi8(0xaaaa_aaaa_aaaa_aaaa, a, b);
            [upper(even, _mm512_slli_epi16::<8>(odd)), upper(_mm512_srli_epi16::<8>(even), odd)]
        })
    }
}

impl Vector for Avx512 {
    const LANES: usize = 16;
    const MANY_REGISTERS: bool = true;
    const SIGNED_ZERO: i32 = 128;
    /// With fewer, work between two loads is short enough for the processor to look past it, and asking only takes its places for
    /// lines on their way (Zen 4, from memory, one token, GB/s with and without asking: Q6_K 22 and 27 with one thread, 31.5 and
    /// 34.8 with two; Q4_0 26.3 and 27.5, 32 and 33).
    const ASKS_FROM: Option<usize> = Some(3);
    type I = __m512i;
    type F = __m512;

    #[inline(always)]
    unsafe fn load(self, p: *const u8) -> Self::I {
        op!(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::I {
        op!(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u8) -> Self::I {
        op!(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::F {
        op!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8, x: Self::I) {
        op!(_mm512_storeu_si512(p.cast(), x))
    }
    /// Rows `i`, `i + 4`, `i + 8` and `i + 12` share a register, so that four by four numbers are exchanged in all quarters at once.
    #[inline(always)]
    unsafe fn load_columns(self, p: *const u8, stride: usize) -> [Self::I; 4] {
        op!({
            let row = |i: usize| _mm_loadu_si128(p.add(i * stride).cast());
            let rows = |i: usize| {
                let r = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(row(i)), row(i + 4));
                _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(r, row(i + 8)), row(i + 12))
            };
            let (a, b, c, d) = (rows(0), rows(1), rows(2), rows(3));
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ]
        })
    }
    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, x: Self::F) {
        op!(_mm512_storeu_ps(p, x))
    }

    /// Into the second-level cache, which has more places for lines on their way (Zen 4, two threads, from memory: Q4_0 four tokens
    /// 15 to 22 GB/s, eight 9.6 to 11.6; Q6_K 18 to 25, 10.8 to 14.8; from 32 tokens on no difference).
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }

    #[inline(always)]
    fn splat(self, x: u32) -> Self::I {
        op!(_mm512_set1_epi32(x.cast_signed()))
    }
    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn shl(self, a: Self::I, n: u32) -> Self::I {
        op!(_mm512_sll_epi32(a, _mm_cvtsi32_si128(n.cast_signed())))
    }
    #[inline(always)]
    fn shr(self, a: Self::I, n: u32) -> Self::I {
        op!(_mm512_srl_epi32(a, _mm_cvtsi32_si128(n.cast_signed())))
    }
    #[inline(always)]
    fn sar(self, a: Self::I, n: u32) -> Self::I {
        op!(_mm512_sra_epi32(a, _mm_cvtsi32_si128(n.cast_signed())))
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn mul_add_i32(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        op!(_mm512_add_epi32(_mm512_mullo_epi32(a, b), c))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], codes: Self::I) -> Self::I {
        op!(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), codes))
    }

    #[inline(always)]
    fn signed(self, w: Self::I) -> Self::I {
        op!(_mm512_xor_si512(w, _mm512_set1_epi8(-128)))
    }
    #[inline(always)]
    unsafe fn dot<const N: usize>(self, start: Self::I, w: &[Self::I; N], q: *const i8, _: u32) -> Self::I {
        let mut sum = start;
        let mut j = 0;
        while j < N {
            let q = op!(_mm512_set1_epi32(q.add(4 * j).cast::<i32>().read_unaligned()));
            sum = op!(_mm512_dpbusd_epi32(sum, w[j], q));
            j += 1;
        }
        sum
    }

    /// Column by column, each for all tokens, since one token's products wait for each other (Zen 4: the loop alone reaches 89 % of the rate on
    /// registers, token by token 81; with 60 tokens Q4_K went from 320 to 328 GOP/s, Q6_K from 266 to 282).
    #[inline(always)]
    unsafe fn panel_dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[Self::I; R]; N],
        w: [&[Self::I; K]; R],
        q: [*const i8; N],
        _: u32,
    ) -> [[Self::I; R]; N] {
        let mut sums = start;
        let mut j = 0;
        while j < K {
            for t in 0..N {
                let q = op!(_mm512_set1_epi32(q[t].add(4 * j).cast::<i32>().read_unaligned()));
                for r in 0..R {
                    sums[t][r] = op!(_mm512_dpbusd_epi32(sums[t][r], w[r][j], q));
                }
            }
            j += 1;
        }
        sums
    }

    #[inline(always)]
    unsafe fn dot_pairs(self, start: Self::I, w: Self::I, p: *const i16) -> Self::I {
        op!(_mm512_dpwssd_epi32(start, w, _mm512_set1_epi32(p.cast::<i32>().read_unaligned())))
    }

    #[inline(always)]
    fn multiply_add(self, sum: Self::I, w: Self::I) -> Self::I {
        op!(_mm512_dpbusd_epi32(sum, sum, w))
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        op!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn as_f32(self, a: Self::I) -> Self::F {
        op!(_mm512_castsi512_ps(a))
    }
    #[inline(always)]
    fn splat_f32(self, x: f32) -> Self::F {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        op!(_mm512_fmadd_ps(a, b, c))
    }
}
