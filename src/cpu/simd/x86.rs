//! Sixteen lanes in AVX-512 and AVX2 registers.

use super::{INTEGER, Kernel, LANES, Lanes, ROUND, ZERO};
use std::arch::x86_64::*;

/// The bits of 1.0.
const ONE: i32 = 0x3f80_0000;

/// Compiles `k` for AVX-512.
///
/// # Safety
/// The processor has these features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub unsafe fn run_avx512<K: Kernel>(k: K) -> K::Out {
    k.run::<Avx512>()
}

/// Compiles `k` for AVX2.
///
/// # Safety
/// The processor has these features.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run_avx2<K: Kernel>(k: K) -> K::Out {
    k.run::<Avx2>()
}

/// One register; reached only through [`run_avx512`].
#[derive(Clone, Copy)]
pub struct Avx512(__m512);

/// Two registers; reached only through [`run_avx2`].
#[derive(Clone, Copy)]
pub struct Avx2(__m256, __m256);

// In both: SAFETY of the instructions is that the type is reached only through the function that has the features, see the parent's
// beginning; of the pointers, the caller's promise.

impl Lanes for Avx512 {
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn call<K: Kernel>(k: K) -> K::Out {
        // SAFETY: see above.
        unsafe { run_avx512(k) }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: see above; a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_add_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_sub_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_mul_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_div_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_max_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_min_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn zero_if_less(self, x: Self, bound: f32) -> Self {
        // SAFETY: see above.
        Avx512(unsafe {
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x.0, _mm512_set1_ps(bound));
            _mm512_maskz_mov_ps(!less, self.0)
        })
    }
    #[inline(always)]
    fn pow2(self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe {
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
            _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(ONE)))
        })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let (lo, hi) = halves(self.0);
            sum8(_mm256_add_ps(lo, hi))
        }
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let (lo, hi) = halves(self.0);
            max8(_mm256_max_ps(lo, hi))
        }
    }
    #[inline(always)]
    fn larger_size(self, o: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe {
            let size = _mm512_castps_si512(_mm512_abs_ps(self.0));
            _mm512_castsi512_ps(_mm512_max_epi32(size, _mm512_castps_si512(o.0)))
        })
    }
    #[inline(always)]
    fn largest_size(self) -> f32 {
        // SAFETY: see above.
        f32::from_bits(unsafe { _mm512_reduce_max_epi32(_mm512_castps_si512(self.0)) }.cast_unsigned())
    }
    #[inline(always)]
    fn quantize(self, id: f32, q: &mut [i8; LANES]) -> i32 {
        // SAFETY: see above; the array has 16 places.
        unsafe {
            let x = _mm512_add_ps(_mm512_mul_ps(self.0, _mm512_set1_ps(id)), _mm512_set1_ps(ROUND));
            let x = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INTEGER));
            let x = _mm512_sub_epi32(x, _mm512_set1_epi32(ZERO));
            let x = _mm512_min_epi32(_mm512_max_epi32(x, _mm512_set1_epi32(-127)), _mm512_set1_epi32(127));
            _mm_storeu_si128(q.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x));
            _mm512_reduce_add_epi32(x)
        }
    }
}

impl Lanes for Avx2 {
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(k: K) -> K::Out {
        // SAFETY: see above.
        unsafe { run_avx2(k) }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: see above; a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        let x = unsafe { _mm256_set1_ps(x) };
        Avx2(x, x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        // SAFETY: see above.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1));
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: see above.
        unsafe {
            Avx2(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))),
            )
        }
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_add_ps(self.0, o.0), _mm256_add_ps(self.1, o.1)) }
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_sub_ps(self.0, o.0), _mm256_sub_ps(self.1, o.1)) }
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_mul_ps(self.0, o.0), _mm256_mul_ps(self.1, o.1)) }
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_div_ps(self.0, o.0), _mm256_div_ps(self.1, o.1)) }
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_max_ps(self.0, o.0), _mm256_max_ps(self.1, o.1)) }
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_min_ps(self.0, o.0), _mm256_min_ps(self.1, o.1)) }
    }
    #[inline(always)]
    fn zero_if_less(self, x: Self, bound: f32) -> Self {
        // SAFETY: see above.
        unsafe {
            let bound = _mm256_set1_ps(bound);
            Avx2(
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, bound), self.0),
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.1, bound), self.1),
            )
        }
    }
    #[inline(always)]
    fn pow2(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let one = _mm256_set1_epi32(ONE);
            let n = (_mm256_castps_si256(self.0), _mm256_castps_si256(self.1));
            Avx2(
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32::<23>(n.0), one)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32::<23>(n.1), one)),
            )
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe { sum8(_mm256_add_ps(self.0, self.1)) }
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        // SAFETY: see above.
        unsafe { max8(_mm256_max_ps(self.0, self.1)) }
    }
    #[inline(always)]
    fn larger_size(self, o: Self) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(larger_size8(self.0, o.0), larger_size8(self.1, o.1)) }
    }
    #[inline(always)]
    fn largest_size(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let max = _mm256_max_epi32(_mm256_castps_si256(self.0), _mm256_castps_si256(self.1));
            let max = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
            let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
            let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
            f32::from_bits(_mm_cvtsi128_si32(max).cast_unsigned())
        }
    }
    #[inline(always)]
    fn quantize(self, id: f32, q: &mut [i8; LANES]) -> i32 {
        // SAFETY: see above; the array has 16 places.
        unsafe {
            let (low, high) = (nearest8(self.0, id), nearest8(self.1, id));
            // Packing goes by halves of a vector: 0 to 3 of both, then 4 to 7.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(q.as_mut_ptr().cast(), bytes);
            let x = _mm256_add_epi32(low, high);
            let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
            _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
        }
    }
}

/// The lower and the upper eight lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(x: __m512) -> (__m256, __m256) {
    let hi = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x));
    (_mm512_castps512_ps256(x), _mm256_castpd_ps(hi))
}

/// The sum of eight lanes as [`Lanes::sum`] orders it.
#[inline]
#[target_feature(enable = "avx2")]
fn sum8(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// The greatest of eight lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn max8(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

/// [`Lanes::larger_size`] of eight lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn larger_size8(a: __m256, b: __m256) -> __m256 {
    let size = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(i32::MAX));
    _mm256_castsi256_ps(_mm256_max_epi32(size, _mm256_castps_si256(b)))
}

/// Eight lanes times `id`, rounded and held within -127..=127.
#[inline]
#[target_feature(enable = "avx2")]
fn nearest8(x: __m256, id: f32) -> __m256i {
    let x = _mm256_add_ps(_mm256_mul_ps(x, _mm256_set1_ps(id)), _mm256_set1_ps(ROUND));
    let x = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(INTEGER));
    let x = _mm256_sub_epi32(x, _mm256_set1_epi32(ZERO));
    _mm256_min_epi32(_mm256_max_epi32(x, _mm256_set1_epi32(-127)), _mm256_set1_epi32(127))
}
