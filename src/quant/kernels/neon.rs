//! The vector operations on NEON: four lanes, at three levels, which share all but their products of bytes.

use super::op;
use super::vector::Vector;
use core::arch::aarch64::*;
use core::arch::asm;

/// `sdot` of four lanes of weights and four activations, which are lane `$i` of `$q`: not an intrinsic on stable Rust yet.
macro_rules! sdot {
    ($sum:expr, $w:expr, $q:expr, $i:literal) => {
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

/// `smmla` of two rows' eight weights and two tokens' eight activations, likewise.
macro_rules! smmla {
    ($sum:expr, $w:expr, $q:expr) => {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe {
            asm!(
                "smmla {sum:v}.4s, {w:v}.16b, {q:v}.16b",
                sum = inout(vreg) $sum, w = in(vreg) $w, q = in(vreg) $q,
                options(pure, nomem, nostack, preserves_flags)
            )
        }
    };
}

/// The levels of [`Neon`]: what every arm64 has, dotprod, and i8mm besides.
pub(super) const BASE: u32 = 0;
pub(super) const DOT: u32 = 1;
pub(super) const I8MM: u32 = 2;

/// Proof of NEON at a level.
#[derive(Clone, Copy)]
pub(super) struct Neon<const LEVEL: u32>(());

impl<const LEVEL: u32> Neon<LEVEL> {
    /// # Safety
    /// The processor has [`Isa::Neon`](crate::cpu::Isa), [`Isa::NeonDot`](crate::cpu::Isa) or
    /// [`Isa::NeonI8mm`](crate::cpu::Isa), as the level says, and so has the caller's `target_feature`.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }

    /// Activations `4 * j` and on of `4 * n` at `q`, in every lane: out of sixteen that are loaded at once, where there are so many.
    ///
    /// # Safety
    /// They can be read.
    #[inline(always)]
    unsafe fn four(self, q: *const i8, j: usize, n: usize) -> uint32x4_t {
        if j / 4 * 4 + 4 > n {
            return op!(vdupq_n_u32(q.add(4 * j).cast::<u32>().read_unaligned()));
        }
        let q = op!(vreinterpretq_u32_s8(vld1q_s8(q.add(j / 4 * 16))));
        op!(match j % 4 {
            0 => vdupq_laneq_u32::<0>(q),
            1 => vdupq_laneq_u32::<1>(q),
            2 => vdupq_laneq_u32::<2>(q),
            _ => vdupq_laneq_u32::<3>(q),
        })
    }

    /// `dots` with `sdot`: sixteen activations of each token, lane by lane. Loops of a few instructions, which the compiler unrolls:
    /// whole dot products one after the other it kept in a loop, and the sums on the stack.
    ///
    /// # Safety
    /// As for [`dots`](Vector::dots), the level is at least [`DOT`], and `K` is a multiple of four.
    #[inline(always)]
    unsafe fn lane_dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[uint32x4_t; R]; N],
        w: [&[uint32x4_t; K]; R],
        q: [*const i8; N],
    ) -> [[uint32x4_t; R]; N] {
        let mut sums = start;
        for i in 0..K / 4 {
            let mut acts = [op!(vdupq_n_s8(0)); N];
            for t in 0..N {
                acts[t] = op!(vld1q_s8(q[t].add(16 * i)));
            }
            macro_rules! lane {
                ($l:literal) => {
                    for r in 0..R {
                        let w = w[r][4 * i + $l];
                        for t in 0..N {
                            sdot!(sums[t][r], w, acts[t], $l);
                        }
                    }
                };
            }
            lane!(0);
            lane!(1);
            lane!(2);
            lane!(3);
        }
        sums
    }

    /// Sixteen activations of each of two tokens, as [`pair_dots`](Self::pair_dots) takes them: eight of both, then the others.
    #[inline(always)]
    fn join(self, a: int8x16_t, b: int8x16_t) -> [uint64x2_t; 2] {
        op!({
            let (a, b) = (vreinterpretq_u64_s8(a), vreinterpretq_u64_s8(b));
            [vtrn1q_u64(a, b), vtrn2q_u64(a, b)]
        })
    }

    /// The dot products of a [`panel`](Vector::panel) with `smmla`, whose operands are two rows and two tokens, eight bytes each.
    /// `joined(p, i)` are columns `16 * i` and on of pair `p`, [joined](Self::join); a token that is left over is its own partner.
    ///
    /// # Safety
    /// The level is [`I8MM`], and `K` is a multiple of four.
    #[inline(always)]
    unsafe fn pair_dots<const K: usize, const N: usize, const R: usize>(
        self,
        w: [&[uint32x4_t; K]; R],
        joined: impl Fn(usize, usize) -> [uint64x2_t; 2],
    ) -> [[uint32x4_t; R]; N] {
        let n_pairs = N.div_ceil(2);
        let zero = self.splat(0);
        // Rows 0 and 1, rows 2 and 3, each with both tokens of a pair.
        let (mut first, mut last) = ([[zero; R]; N], [[zero; R]; N]);
        for i in 0..K / 4 {
            let mut acts = [[op!(vdupq_n_u64(0)); 2]; N];
            for p in 0..n_pairs {
                acts[p] = joined(p, i);
            }
            for eight in 0..2 {
                for r in 0..R {
                    let (top, bottom) = (w[r][4 * i + 2 * eight], w[r][4 * i + 2 * eight + 1]);
                    for p in 0..n_pairs {
                        smmla!(first[p][r], top, acts[p][eight]);
                        smmla!(last[p][r], bottom, acts[p][eight]);
                    }
                }
            }
        }
        let mut sums = [[zero; R]; N];
        for t in 0..N {
            for r in 0..R {
                let (first, last) = (first[t / 2][r], last[t / 2][r]);
                sums[t][r] = op!(if t % 2 == 0 { vuzp1q_u32(first, last) } else { vuzp2q_u32(first, last) });
            }
        }
        sums
    }

    /// Blocks of some tokens, an even number, side by side, as [`gathered_dots`](Self::gathered_dots) takes them: with `smmla` pairs
    /// [joined](Self::join).
    #[inline(always)]
    pub(super) fn gather<const N: usize>(self, q: [&[i8; 32]; N]) -> [[i8; 32]; N] {
        if LEVEL < I8MM {
            return q.map(|q| *q);
        }
        let mut joined = [[0; 32]; N];
        for (q, to) in q.as_chunks::<2>().0.iter().zip(joined.as_chunks_mut::<2>().0) {
            for i in 0..2 {
                // SAFETY: `q` has two vectors a token, of which `i` is one; `to` has four.
                unsafe {
                    let [a, b] = q.map(|q| vld1q_s8(q.as_ptr().add(16 * i)));
                    let [first, last] = self.join(a, b);
                    let to = to.as_mut_ptr().cast::<i8>().add(32 * i);
                    vst1q_s8(to, vreinterpretq_s8_u64(first));
                    vst1q_s8(to.add(16), vreinterpretq_s8_u64(last));
                }
            }
        }
        joined
    }

    /// The dot products of a block's [`panel`](Vector::panel) with tokens that were [gathered](Self::gather). The level is at least
    /// [`DOT`].
    #[inline(always)]
    pub(super) fn gathered_dots<const N: usize, const R: usize>(
        self,
        w: [&[uint32x4_t; 8]; R],
        q: &[[i8; 32]; N],
    ) -> [[uint32x4_t; R]; N] {
        const { assert!(LEVEL >= DOT && N.is_multiple_of(2)) };
        let bytes = q.as_ptr().cast::<i8>();
        // SAFETY: tokens have 32 bytes, pairs of them 64.
        unsafe {
            if LEVEL == DOT {
                return self.lane_dots([[self.splat(0); R]; N], w, std::array::from_fn(|t| bytes.add(32 * t)));
            }
            self.pair_dots(w, |p, i| {
                let at = bytes.add(64 * p + 32 * i);
                [vreinterpretq_u64_s8(vld1q_s8(at)), vreinterpretq_u64_s8(vld1q_s8(at.add(16)))]
            })
        }
    }
}

/// How many products of a row's even columns fit into 16 bits, and as many of its odd ones apart or, if the second is true, added to them:
/// with b bits a product is at most `127 * (2^b - 1)` in size, and with 8, which are signed, `127 * 128`.
const fn narrow(bits: u32) -> (usize, bool) {
    match bits {
        0..=5 => (128 >> bits, true),
        6 => (4, false),
        _ => (2, false),
    }
}

const _: () = {
    let mut bits = 0;
    while bits <= 8 {
        let (narrow, together) = narrow(bits);
        let largest = if bits == 8 { 128 } else { (1 << bits) - 1 };
        assert!((if together { 2 * narrow } else { narrow }) * 127 * largest <= i16::MAX as usize);
        bits += 1;
    }
};

impl<const LEVEL: u32> Vector for Neon<LEVEL> {
    const LANES: usize = 4;
    const MANY_REGISTERS: bool = true;
    /// Never timed; by count asking only costs. (With a `prefetch` that does nothing, the loop over its lines stayed: 29 % of Q4_0's `gemv`.)
    const ASKS_FROM: Option<usize> = None;
    const SIGNED_ZERO: i32 = 0;
    const PRODUCTS: usize = if LEVEL >= I8MM { 8 } else { 4 };
    const BY_LANE: bool = true;
    /// More sums, or products of 16 bits besides, don't fit into the registers: twice the instructions.
    const FUSED: usize = if LEVEL >= DOT { 1 } else { 0 };
    const PANEL_SIGNED: bool = true;
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
    unsafe fn splat_sums(self, p: *const i16, first: usize, shift: u32) -> [Self::I; 8] {
        op!({
            let (a, b) = (vld1q_s16(p), vld1q_s16(p.add(8)));
            let sums = if first == 0 { vuzp1q_s16(a, b) } else { vuzp2q_s16(a, b) };
            let shift = vdupq_n_s32(shift.cast_signed());
            let low = vreinterpretq_u32_s32(vshlq_s32(vmovl_s16(vget_low_s16(sums)), shift));
            let high = vreinterpretq_u32_s32(vshlq_s32(vmovl_high_s16(sums), shift));
            [
                vdupq_laneq_u32::<0>(low),
                vdupq_laneq_u32::<1>(low),
                vdupq_laneq_u32::<2>(low),
                vdupq_laneq_u32::<3>(low),
                vdupq_laneq_u32::<0>(high),
                vdupq_laneq_u32::<1>(high),
                vdupq_laneq_u32::<2>(high),
                vdupq_laneq_u32::<3>(high),
            ]
        })
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
    fn high_nibbles(self, a: Self::I) -> Self::I {
        op!(vreinterpretq_u32_u8(vshrq_n_u8::<4>(vreinterpretq_u8_u32(a))))
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
        if LEVEL >= DOT {
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
        let (narrow, together) = narrow(bits);
        let (mut low, mut high) = op!((vdupq_n_s16(0), vdupq_n_s16(0)));
        let (mut wide_low, mut wide_high) = op!((vreinterpretq_s32_u32(start), vdupq_n_s32(0)));
        let mut j = 0;
        while j < N {
            let (w, q) = op!((vreinterpretq_s8_u32(w[j]), vreinterpretq_s8_u32(self.four(q, j, N))));
            if j % narrow == 0 {
                (low, high) = op!((vmull_s8(vget_low_s8(w), vget_low_s8(q)), vmull_high_s8(w, q)));
            } else {
                (low, high) = op!((vmlal_s8(low, vget_low_s8(w), vget_low_s8(q)), vmlal_high_s8(high, w, q)));
            }
            j += 1;
            let full = j % narrow == 0 || j == N;
            if full && together {
                wide_low = op!(vpadalq_s16(wide_low, vpaddq_s16(low, high)));
            } else if full && j <= narrow {
                (wide_low, wide_high) = op!((vpaddlq_s16(low), vpaddlq_s16(high)));
            } else if full {
                (wide_low, wide_high) = op!((vpadalq_s16(wide_low, low), vpadalq_s16(wide_high, high)));
            }
        }
        if together {
            return op!(vreinterpretq_u32_s32(wide_low));
        }
        op!(vaddq_u32(start, vreinterpretq_u32_s32(vpaddq_s32(wide_low, wide_high))))
    }

    #[inline(always)]
    unsafe fn dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[Self::I; R]; N],
        w: [&[Self::I; K]; R],
        q: [*const i8; N],
        bits: u32,
    ) -> [[Self::I; R]; N] {
        if LEVEL >= DOT && K.is_multiple_of(4) {
            // SAFETY: the caller's promise.
            return unsafe { self.lane_dots(start, w, q) };
        }
        let mut sums = start;
        for t in 0..N {
            for r in 0..R {
                // SAFETY: the caller's promise.
                sums[t][r] = unsafe { self.dot(start[t][r], w[r], q[t], bits) };
            }
        }
        sums
    }

    /// Less `zero`, so that no sum has to begin with anything; and with `smmla` neighbouring columns four bytes a row by turns.
    #[inline(always)]
    fn panel<const K: usize>(self, codes: [Self::I; K], zero: i32) -> [Self::I; K] {
        let zero = op!(vdupq_n_u8(zero as u8));
        let codes = codes.map(|w| op!(vreinterpretq_u32_u8(vsubq_u8(vreinterpretq_u8_u32(w), zero))));
        if LEVEL < I8MM {
            return codes;
        }
        std::array::from_fn(|j| {
            let (even, odd) = (codes[j / 2 * 2], codes[j / 2 * 2 + 1]);
            op!(if j.is_multiple_of(2) { vzip1q_u32(even, odd) } else { vzip2q_u32(even, odd) })
        })
    }

    #[inline(always)]
    unsafe fn panel_dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[Self::I; R]; N],
        w: [&[Self::I; K]; R],
        q: [*const i8; N],
        bits: u32,
    ) -> [[Self::I; R]; N] {
        if LEVEL < I8MM {
            // SAFETY: the caller's promise.
            return unsafe { self.dots(start, w, q, bits) };
        }
        // SAFETY: the caller's promise; of an odd number of tokens the last is its own partner.
        let mut sums = unsafe {
            self.pair_dots(w, |p, i| {
                let [a, b] = [2 * p, (2 * p + 1).min(N - 1)].map(|t| vld1q_s8(q[t].add(16 * i)));
                self.join(a, b)
            })
        };
        for t in 0..N {
            for r in 0..R {
                sums[t][r] = self.add_i32(start[t][r], sums[t][r]);
            }
        }
        sums
    }

    /// The lanes of `a`, then those of `b`.
    #[inline(always)]
    fn pair(self, a: Self::I, b: Self::I) -> Self::I {
        op!(vreinterpretq_u32_u16(vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b))))
    }

    #[inline(always)]
    unsafe fn dot_pairs(self, start: Self::I, w: Self::I, p: *const i16) -> Self::I {
        op!({
            let (sum, w) = (vreinterpretq_s32_u32(start), vreinterpretq_s16_u32(w));
            let pair = vreinterpret_s16_u32(vset_lane_u32::<0>(p.cast::<u32>().read_unaligned(), vdup_n_u32(0)));
            let sum = vmlal_lane_s16::<0>(sum, vget_low_s16(w), pair);
            vreinterpretq_u32_s32(vmlal_high_lane_s16::<1>(sum, w, pair))
        })
    }

    #[inline(always)]
    fn multiply_add(self, sum: Self::I, w: Self::I) -> Self::I {
        if LEVEL >= I8MM {
            let (mut sum, factor) = (sum, sum);
            smmla!(sum, factor, w);
            return sum;
        }
        if LEVEL >= DOT {
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
