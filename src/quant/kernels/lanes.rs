//! What quantising does across a block's numbers: the largest in size, and sums of integers.
//!
//! Of plain loops the compiler makes dozens of shuffles there, two numbers at a time, or gathers over several blocks. By the vector,
//! Zen 4 quantises 2.4 G activations a second to Q8_0 and 3.5 to Q8_K on AVX-512, where loops did 1.4 and 1.8; 2.1 and 4.5 on AVX2.

/// Operations across the numbers of a block, for an instruction set. A value proves that the processor has it.
pub(super) trait Lanes: Copy {
    /// The size of the number that is largest in size; what isn't a number is larger than all. `N` is a multiple of 16.
    ///
    /// The bits of sizes are compared, which order as the sizes do.
    fn largest_size<const N: usize>(self, x: &[f32; N]) -> f32;

    /// `x * id` rounded to nearest (ties to even) and held within -127..=127; the sums of the first and of the second 16.
    fn scale_and_sum(self, x: &[f32; 32], id: f32, q: &mut [i8; 32]) -> [i32; 2];
}

/// See [`nearest`](crate::quant::act::nearest).
const SHIFT: f32 = 12_582_912.0;
/// The bits of the sum that are the integer, and what they are too large by.
const BITS: i32 = 0x7f_ffff;
const ZERO: i32 = 0x40_0000;

/// Plain Rust, sixteen numbers at a time, which the compiler vectorises.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl Lanes for Plain {
    #[inline(always)]
    fn largest_size<const N: usize>(self, x: &[f32; N]) -> f32 {
        let mut lanes = [0i32; 16];
        for x in x.as_chunks::<16>().0 {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane = x.abs().to_bits().cast_signed().max(*lane);
            }
        }
        let mut n = 8;
        while n > 0 {
            for i in 0..n {
                lanes[i] = lanes[i].max(lanes[i + n]);
            }
            n /= 2;
        }
        f32::from_bits(lanes[0].cast_unsigned())
    }

    #[inline(always)]
    fn scale_and_sum(self, x: &[f32; 32], id: f32, q: &mut [i8; 32]) -> [i32; 2] {
        let mut sums = [0; 2];
        for (half, (x, q)) in x.as_chunks::<16>().0.iter().zip(q.as_chunks_mut::<16>().0).enumerate() {
            let mut lanes = [0i32; 16];
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane = (((x * id + SHIFT).to_bits().cast_signed() & BITS) - ZERO).clamp(-127, 127);
            }
            for (q, lane) in q.iter_mut().zip(lanes) {
                *q = lane as i8;
            }
            sums[half] = lanes.iter().sum();
        }
        sums
    }
}

/// NEON, which every arm64 has. By count 64 instructions fewer for a block of Q8_0 than what the compiler makes of [`Plain`].
#[cfg(target_arch = "aarch64")]
#[derive(Clone, Copy)]
pub(super) struct Neon;

#[cfg(target_arch = "aarch64")]
impl Lanes for Neon {
    #[inline(always)]
    fn largest_size<const N: usize>(self, x: &[f32; N]) -> f32 {
        use core::arch::aarch64::*;
        // SAFETY: sixteen numbers are four vectors.
        unsafe {
            let mut max = [vdupq_n_u32(0); 4];
            for x in x.as_chunks::<16>().0 {
                for i in 0..4 {
                    let size = vabsq_f32(vld1q_f32(x.as_ptr().add(4 * i)));
                    max[i] = vmaxq_u32(vreinterpretq_u32_f32(size), max[i]);
                }
            }
            f32::from_bits(vmaxvq_u32(vmaxq_u32(vmaxq_u32(max[0], max[1]), vmaxq_u32(max[2], max[3]))))
        }
    }

    /// What rounds to an integer of 32 bits needn't be held: numbers times `id` are at most 127 and a rounding, and none becomes 0.
    #[inline(always)]
    fn scale_and_sum(self, x: &[f32; 32], id: f32, q: &mut [i8; 32]) -> [i32; 2] {
        use core::arch::aarch64::*;
        let mut sums = [0; 2];
        for (half, (x, q)) in x.as_chunks::<16>().0.iter().zip(q.as_chunks_mut::<16>().0).enumerate() {
            // SAFETY: sixteen numbers are four vectors, and as bytes one.
            unsafe {
                let nearest =
                    |i: usize| vreinterpretq_s16_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x.as_ptr().add(4 * i)), id)));
                let (low, high) = (vuzp1q_s16(nearest(0), nearest(1)), vuzp1q_s16(nearest(2), nearest(3)));
                let bytes = vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
                vst1q_s8(q.as_mut_ptr(), bytes);
                sums[half] = i32::from(vaddlvq_s8(bytes));
            }
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::*;

    use super::{BITS, Lanes, SHIFT, ZERO};

    /// Proof of AVX2.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2(());

    impl Avx2 {
        /// # Safety
        /// The processor has it, and so has the caller's `target_feature`.
        #[inline(always)]
        pub(in super::super) unsafe fn new() -> Self {
            Self(())
        }

        /// Eight numbers times `id`, rounded.
        ///
        /// # Safety
        /// They can be read.
        #[inline(always)]
        unsafe fn nearest(self, x: *const f32, id: f32) -> __m256i {
            // SAFETY: the caller's promise; `self` proves that the processor has the instructions.
            unsafe {
                let x = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(id)), _mm256_set1_ps(SHIFT));
                let x = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(BITS));
                let x = _mm256_sub_epi32(x, _mm256_set1_epi32(ZERO));
                _mm256_min_epi32(_mm256_max_epi32(x, _mm256_set1_epi32(-127)), _mm256_set1_epi32(127))
            }
        }

        /// The sum of eight numbers.
        #[inline(always)]
        fn sum(self, x: __m256i) -> i32 {
            // SAFETY: `self` proves that the processor has the instructions.
            unsafe {
                let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
                let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
                _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
            }
        }
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        fn largest_size<const N: usize>(self, x: &[f32; N]) -> f32 {
            // SAFETY: `self` proves that the processor has the instructions; sixteen numbers are two vectors.
            unsafe {
                let bits = _mm256_set1_epi32(i32::MAX);
                let mut max = [_mm256_setzero_si256(); 2];
                for x in x.as_chunks::<16>().0 {
                    for i in 0..2 {
                        let x = _mm256_loadu_si256(x.as_ptr().add(8 * i).cast());
                        max[i] = _mm256_max_epi32(_mm256_and_si256(x, bits), max[i]);
                    }
                }
                let max = _mm256_max_epi32(max[0], max[1]);
                let max = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
                let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
                let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
                f32::from_bits(_mm_cvtsi128_si32(max).cast_unsigned())
            }
        }

        #[inline(always)]
        fn scale_and_sum(self, x: &[f32; 32], id: f32, q: &mut [i8; 32]) -> [i32; 2] {
            // SAFETY: as above; of 32 numbers the vectors from 0, 8, 16 and 24 on are read, and from 0 and 16 on written.
            unsafe {
                let mut sums = [0; 2];
                for i in 0..2 {
                    let x = x.as_ptr().add(16 * i);
                    let (low, high) = (self.nearest(x, id), self.nearest(x.add(8), id));
                    // Packing goes by halves of a vector: 0 to 3 of both, then 4 to 7.
                    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
                    let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
                    _mm_storeu_si128(q.as_mut_ptr().add(16 * i).cast(), bytes);
                    sums[i] = self.sum(_mm256_add_epi32(low, high));
                }
                sums
            }
        }
    }

    /// Proof of AVX-512 F.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(());

    impl Avx512 {
        /// # Safety
        /// The processor has it, and so has the caller's `target_feature`.
        #[inline(always)]
        pub(in super::super) unsafe fn new() -> Self {
            Self(())
        }
    }

    impl Lanes for Avx512 {
        #[inline(always)]
        fn largest_size<const N: usize>(self, x: &[f32; N]) -> f32 {
            // SAFETY: `self` proves that the processor has the instructions; sixteen numbers are a vector.
            unsafe {
                let mut max = _mm512_setzero_si512();
                for x in x.as_chunks::<16>().0 {
                    let x = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x.as_ptr())));
                    max = _mm512_max_epi32(x, max);
                }
                f32::from_bits(_mm512_reduce_max_epi32(max).cast_unsigned())
            }
        }

        #[inline(always)]
        fn scale_and_sum(self, x: &[f32; 32], id: f32, q: &mut [i8; 32]) -> [i32; 2] {
            // SAFETY: as above; of 32 numbers those from 0 and 16 on are read and written.
            unsafe {
                let mut sums = [0; 2];
                for i in 0..2 {
                    let x = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(16 * i)), _mm512_set1_ps(id));
                    let x = _mm512_castps_si512(_mm512_add_ps(x, _mm512_set1_ps(SHIFT)));
                    let x = _mm512_sub_epi32(_mm512_and_si512(x, _mm512_set1_epi32(BITS)), _mm512_set1_epi32(ZERO));
                    let x = _mm512_min_epi32(_mm512_max_epi32(x, _mm512_set1_epi32(-127)), _mm512_set1_epi32(127));
                    _mm_storeu_si128(q.as_mut_ptr().add(16 * i).cast(), _mm512_cvtepi32_epi8(x));
                    sums[i] = _mm512_reduce_add_epi32(x);
                }
                sums
            }
        }
    }
}
