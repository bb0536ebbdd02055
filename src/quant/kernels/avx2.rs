//! The vector operations on AVX2 with FMA and F16C, with or without VNNI: eight lanes.

use super::op;
use super::vector::Vector;
use core::arch::x86_64::*;
use core::hint::black_box;

/// Proof of AVX2, FMA and F16C, and with `VNNI` of AVX-VNNI, which is VNNI for vectors of 256 bits without AVX-512.
#[derive(Clone, Copy)]
pub(super) struct Avx2<const VNNI: bool> {
    /// 1, which the compiler doesn't know: a loop of so many times a few rounds stays a loop.
    one: usize,
}

impl<const VNNI: bool> Avx2<VNNI> {
    /// # Safety
    /// The processor has [`Isa::Avx2`](crate::cpu::Isa), or with `VNNI` [`Isa::AvxVnni`](crate::cpu::Isa), and so has the caller's
    /// `target_feature`.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self { one: black_box(1) }
    }

    /// Products of four bytes of weights and of activations, added up in pairs of 16 bits.
    ///
    /// Signed weights lend their sign to the activations: `|w| * (q * sign w)`; -128 is then an unsigned 128, and two
    /// products of it and 127 just fit.
    #[inline(always)]
    fn products(self, w: __m256i, q: __m256i, bits: u32) -> __m256i {
        if bits == 8 {
            op!(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w)))
        } else {
            op!(_mm256_maddubs_epi16(w, q))
        }
    }

    /// `sum` and sums of two products, times a [`factor`](Vector::factor).
    #[inline(always)]
    fn widen(self, sum: __m256i, pairs: __m256i, factor: __m256i) -> __m256i {
        op!(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, factor)))
    }

    /// `sum` and the products of four bytes of weights, unsigned, and of activations in each lane.
    #[inline(always)]
    fn vnni(self, sum: __m256i, w: __m256i, q: __m256i) -> __m256i {
        op!(_mm256_dpbusd_avx_epi32(sum, w, q))
    }

    /// [`dots`](Vector::dots) with VNNI, in a loop for the reason that [`scaled_dots`](Vector::scaled_dots) gives.
    ///
    /// # Safety
    /// As for `dots`.
    #[inline(always)]
    unsafe fn vnni_dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[__m256i; R]; N],
        w: [&[__m256i; K]; R],
        q: [*const i8; N],
    ) -> [[__m256i; R]; N] {
        let mut sums = start;
        // Two columns a round.
        const { assert!(K.is_multiple_of(2)) };
        for first in (0..K * self.one).step_by(2) {
            for j in first..first + 2 {
                for t in 0..N {
                    let q = op!(_mm256_set1_epi32(q[t].add(4 * j).cast::<i32>().read_unaligned()));
                    for r in 0..R {
                        // SAFETY: `one` is 1, so that `j` is below `K`.
                        sums[t][r] = self.vnni(sums[t][r], unsafe { *w[r].get_unchecked(j) }, q);
                    }
                }
            }
        }
        sums
    }

    /// One group of rows and one token.
    ///
    /// # Safety
    /// As for [`dot`](Vector::dot).
    #[inline(always)]
    unsafe fn row<const N: usize>(
        self,
        start: __m256i,
        w: &[__m256i; N],
        q: *const i8,
        bits: u32,
        factor: __m256i,
    ) -> __m256i {
        let narrow = narrow(bits);
        let mut sum = start;
        let mut pairs = factor;
        let mut j = 0;
        while j < N {
            let q = op!(_mm256_set1_epi32(q.add(4 * j).cast::<i32>().read_unaligned()));
            let products = self.products(w[j], q, bits);
            pairs = if j % narrow == 0 { products } else { op!(_mm256_add_epi16(pairs, products)) };
            j += 1;
            if j % narrow == 0 || j == N {
                sum = self.widen(sum, pairs, factor);
            }
        }
        sum
    }

    /// The products of [`at_once`] columns from `j` on, added to `pairs`, or put there if they are the `first`; what's full is widened.
    ///
    /// # Safety
    /// As for [`dots`](Vector::dots), and there are such columns.
    #[inline(always)]
    unsafe fn columns<const K: usize, const N: usize, const R: usize>(
        self,
        j: usize,
        first: bool,
        w: [&[__m256i; K]; R],
        q: [*const i8; N],
        bits: u32,
        factor: [__m256i; R],
        (pairs, sums): (&mut [[__m256i; R]; N], &mut [[__m256i; R]; N]),
    ) {
        let (narrow, at_once) = (narrow(bits), at_once(bits));
        for i in 0..at_once {
            for t in 0..N {
                let q = op!(_mm256_set1_epi32(q[t].add(4 * (j + i)).cast::<i32>().read_unaligned()));
                for r in 0..R {
                    // SAFETY: the caller's promise.
                    let products = self.products(unsafe { *w[r].get_unchecked(j + i) }, q, bits);
                    let fresh = i % narrow == 0 && (first || narrow <= at_once);
                    pairs[t][r] = if fresh { products } else { op!(_mm256_add_epi16(pairs[t][r], products)) };
                    if (i + 1) % narrow == 0 {
                        sums[t][r] = self.widen(sums[t][r], pairs[t][r], factor[r]);
                    }
                }
            }
        }
    }
}

/// How many sums of two products fit into 16 bits: with b bits they are at most `2 * 127 * (2^b - 1)` in size, and with 8, which are signed,
/// `2 * 127 * 128`. Then they have to be widened, which costs as much as two products.
const fn narrow(bits: u32) -> usize {
    match bits {
        0..=4 => 8,
        5 => 4,
        6 => 2,
        _ => 1,
    }
}

const _: () = {
    let mut bits = 0;
    while bits <= 8 {
        let largest = if bits == 8 { 128 } else { (1 << bits) - 1 };
        assert!(narrow(bits) * 2 * 127 * largest <= i16::MAX as usize);
        bits += 1;
    }
};

/// Columns that a round of [`Avx2::columns`] multiplies.
const fn at_once(bits: u32) -> usize {
    if narrow(bits) == 4 { 4 } else { 2 }
}

impl<const VNNI: bool> Vector for Avx2<VNNI> {
    const LANES: usize = 8;
    const MANY_REGISTERS: bool = false;
    const SIGNED_ZERO: i32 = if VNNI { 128 } else { 0 };
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
    unsafe fn store(self, p: *mut u8, x: Self::I) {
        op!(_mm256_storeu_si256(p.cast(), x))
    }
    /// Rows `i` and `i + 4` share a register, so that four by four numbers are exchanged in both halves at once.
    #[inline(always)]
    unsafe fn load_columns(self, p: *const u8, stride: usize) -> [Self::I; 4] {
        op!({
            let row = |i: usize| _mm_loadu_si128(p.add(i * stride).cast());
            let rows = |i: usize| _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(i)), row(i + 4));
            let (a, b, c, d) = (rows(0), rows(1), rows(2), rows(3));
            let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
            [
                _mm256_unpacklo_epi64(ab, cd),
                _mm256_unpackhi_epi64(ab, cd),
                _mm256_unpacklo_epi64(ab_high, cd_high),
                _mm256_unpackhi_epi64(ab_high, cd_high),
            ]
        })
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
    fn mul_add_i32(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        op!(_mm256_add_epi32(_mm256_mullo_epi32(a, b), c))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], codes: Self::I) -> Self::I {
        op!(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), codes))
    }

    #[inline(always)]
    fn signed(self, w: Self::I) -> Self::I {
        if VNNI { op!(_mm256_xor_si256(w, _mm256_set1_epi8(-128))) } else { w }
    }

    /// A shift is done to the number before it is spread, on its slow way through a scalar register, whatever is written here.
    /// A product of 16 bits isn't; sums of 32 bytes have no more.
    #[inline(always)]
    unsafe fn splat_sum(self, p: *const i32, shift: u32) -> Self::I {
        op!(_mm256_madd_epi16(_mm256_set1_epi32(p.read()), _mm256_set1_epi32(1 << shift)))
    }

    #[inline(always)]
    unsafe fn dot<const N: usize>(self, start: Self::I, w: &[Self::I; N], q: *const i8, bits: u32) -> Self::I {
        if VNNI {
            return (0..N).fold(start, |sum, j| {
                self.vnni(sum, w[j], op!(_mm256_set1_epi32(q.add(4 * j).cast::<i32>().read_unaligned())))
            });
        }
        // SAFETY: the caller's promise.
        unsafe { self.row(start, w, q, bits, self.factor(self.splat(1))) }
    }

    #[inline(always)]
    unsafe fn dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[Self::I; R]; N],
        w: [&[Self::I; K]; R],
        q: [*const i8; N],
        bits: u32,
    ) -> [[Self::I; R]; N] {
        // SAFETY: the caller's promise.
        unsafe {
            if VNNI {
                self.vnni_dots(start, w, q)
            } else {
                self.scaled_dots(start, w, q, bits, [self.factor(self.splat(1)); R])
            }
        }
    }

    /// Without VNNI: twice, as two numbers of 16 bits. Sums of two products are multiplied by it while they are widened, which costs
    /// nothing.
    #[inline(always)]
    fn factor(self, a: Self::I) -> Self::I {
        if VNNI {
            return a;
        }
        op!(_mm256_or_si256(_mm256_slli_epi32::<16>(a), _mm256_and_si256(a, _mm256_set1_epi32(0xffff))))
    }

    /// With several groups: four bytes of all tokens and groups, then the next four, so that what is loaded is used for several
    /// products while it is in a register. In a loop that isn't unrolled: the compiler would load everything first and keep
    /// it on the stack (Q4_0: 132 for 210 GOP/s).
    #[inline(always)]
    unsafe fn scaled_dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[Self::I; R]; N],
        w: [&[Self::I; K]; R],
        q: [*const i8; N],
        bits: u32,
        factor: [Self::I; R],
    ) -> [[Self::I; R]; N] {
        let mut sums = start;
        if VNNI {
            // SAFETY: the caller's promise.
            let dots = unsafe { self.vnni_dots([[self.splat(0); R]; N], w, q) };
            for t in 0..N {
                for r in 0..R {
                    sums[t][r] = self.mul_add_i32(dots[t][r], factor[r], sums[t][r]);
                }
            }
            return sums;
        }
        if R == 1 {
            for t in 0..N {
                // SAFETY: the caller's promise.
                sums[t][0] = unsafe { self.row(start[t][0], w[0], q[t], bits, factor[0]) };
            }
            return sums;
        }
        let at_once = at_once(bits);
        assert!(K.is_multiple_of(at_once));
        let mut pairs = [[op!(_mm256_setzero_si256()); R]; N];
        // SAFETY: the caller's promise; `one` is 1, so that columns are below `K`.
        unsafe {
            self.columns(0, true, w, q, bits, factor, (&mut pairs, &mut sums));
            for step in 1..K / at_once * self.one {
                self.columns(step * at_once, false, w, q, bits, factor, (&mut pairs, &mut sums));
            }
        }
        if narrow(bits) > at_once {
            for t in 0..N {
                for r in 0..R {
                    sums[t][r] = self.widen(sums[t][r], pairs[t][r], factor[r]);
                }
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn dot_pairs(self, start: Self::I, w: Self::I, p: *const i16) -> Self::I {
        let pairs = op!(_mm256_set1_epi32(p.cast::<i32>().read_unaligned()));
        if VNNI {
            op!(_mm256_dpwssd_avx_epi32(start, w, pairs))
        } else {
            op!(_mm256_add_epi32(start, _mm256_madd_epi16(w, pairs)))
        }
    }

    #[inline(always)]
    fn multiply_add(self, sum: Self::I, w: Self::I) -> Self::I {
        if VNNI { self.vnni(sum, sum, w) } else { op!(_mm256_add_epi16(sum, _mm256_maddubs_epi16(sum, w))) }
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        op!(_mm256_cvtepi32_ps(a))
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
}
