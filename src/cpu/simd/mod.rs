//! Sixteen f32 lanes on every instruction set, for element-wise operations, attention and the quantising of activations.
//!
//! An operation is written once, generic over [`Lanes`]: one AVX-512 register, two of AVX2, four of NEON, or an array.
//! The width is always sixteen, so a reduction that keeps partial sums in lanes has the same order everywhere, and since each
//! lane operation is correctly rounded (fused where it says so), every instruction set gives the same bits.
//! The inner functions carry no target feature themselves: they are `#[inline(always)]` and are compiled for the
//! instruction set of the [`run`] that they are reached from.
//!
//! That the processor has the instructions is known by the type: those that implement [`Lanes`] can't be named outside of here, so
//! code gets one only as the `V` of its [`Kernel::run`], and that is reached through [`run_on`] alone, which has asked for the features.
//! It holds for functions that take no lanes, as `splat`, too: whoever can name `V::splat` is being run with `V`, or was.

#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::Isa;

/// Lanes in a [`Lanes`].
pub const LANES: usize = 16;

/// 1.5 * 2^23: adding it rounds a number below 2^22 in size to the nearest integer, ties to even, which is then in the low bits;
/// subtracting it again leaves the integer as f32. Faster than asking libm where SSE4.1 isn't assumed.
pub const ROUND: f32 = 12_582_912.0;
/// Of a number plus [`ROUND`], the bits that are the integer, and what they are too large by.
const INTEGER: i32 = 0x7f_ffff;
const ZERO: i32 = 0x40_0000;

/// The nearest integer, ties to even, of a number below 2^22 in size; anything else gives some integer in that range.
#[inline(always)]
pub fn nearest(x: f32) -> i32 {
    ((x + ROUND).to_bits().cast_signed() & INTEGER) - ZERO
}

/// Sixteen f32 values that an operation is applied to side by side.
pub trait Lanes: Copy {
    /// Whether at least 28 of them fit in registers.
    const MANY_REGISTERS: bool;
    /// Runs `k` with this instruction set, in a function of its own: for what is large or used in several places.
    fn call<K: Kernel>(k: K) -> K::Out;
    /// Asks for the cache line at `p`, any address, to be fetched into the second level (the first is too small for a tile
    /// beside the one in use: that cost a third of the speed); does nothing where Rust has no such instruction.
    fn prefetch(p: *const u8);
    /// `x` in every lane.
    fn splat(x: f32) -> Self;
    /// The values at `p`.
    ///
    /// # Safety
    /// `p` is valid for reading 16 f32, aligned as f32.
    unsafe fn load(p: *const f32) -> Self;
    /// Writes the lanes to `p`.
    ///
    /// # Safety
    /// `p` is valid for writing 16 f32, aligned as f32.
    unsafe fn store(self, p: *mut f32);
    /// The half-precision values at `p`.
    ///
    /// # Safety
    /// `p` is valid for reading 16 u16.
    unsafe fn load_f16(p: *const u16) -> Self;
    /// Writes the lanes to `p` in half precision, rounded to nearest even.
    ///
    /// # Safety
    /// `p` is valid for writing 16 u16.
    unsafe fn store_f16(self, p: *mut u16);
    /// The signed bytes at `p`.
    ///
    /// # Safety
    /// `p` is valid for reading 16 bytes.
    unsafe fn load_i8(p: *const i8) -> Self;
    /// `self + o`
    fn add(self, o: Self) -> Self;
    /// `self - o`
    fn sub(self, o: Self) -> Self;
    /// `self * o`
    fn mul(self, o: Self) -> Self;
    /// `self / o`
    fn div(self, o: Self) -> Self;
    /// `self * b + c`, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    /// `self` where `self > o`, else `o`: what is not a number in `o` stays.
    fn max(self, o: Self) -> Self;
    /// `self` where `self < o`, else `o`: what is not a number in `o` stays.
    fn min(self, o: Self) -> Self;
    /// 0 where `x < bound`, else `self`.
    fn zero_if_less(self, x: Self, bound: f32) -> Self;
    /// The f32 whose bits are `(bits(self) << 23) + bits(1.0)`: 2^n for a `self` of [`ROUND`] + n.
    fn pow2(self) -> Self;
    /// The upper eight lanes added to the lower eight, then four, two, one: the order of every horizontal sum.
    fn sum(self) -> f32;
    /// The greatest lane; lanes that aren't numbers may be passed over.
    fn max_lane(self) -> f32;
    /// Of `self` without its sign and `o`, which has none, the larger in each lane. What isn't a number is larger than all: bits are
    /// compared, which order as the sizes do.
    fn larger_size(self, o: Self) -> Self;
    /// The largest lane, in the same sense, of numbers without signs.
    fn largest_size(self) -> f32;
    /// The integers nearest (ties to even) to `self * id`, and their sum. Products above 127 in size, but for a rounding, become some
    /// integers.
    fn quantize(self, id: f32, q: &mut [i8; LANES]) -> i32;
}

/// An operation to be compiled for each instruction set.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// The operation; must be `#[inline(always)]`.
    fn run<V: Lanes>(self) -> Self::Out;
}

/// Runs `k` with the instruction set of this process.
pub fn run<K: Kernel>(k: K) -> K::Out {
    #[cfg(test)]
    if let Some(isa) = tests::FORCED.get() {
        return run_on(isa, k);
    }
    // A wrong `ONCALL_ISA` has been refused when the engine started; here nothing can be said about it.
    run_on(Isa::get().unwrap_or(Isa::Scalar), k)
}

/// Runs `k` with `isa`.
///
/// # Panics
/// If the processor hasn't got it.
pub fn run_on<K: Kernel>(isa: Isa, k: K) -> K::Out {
    assert!(isa.is_available(), "the processor hasn't got {isa}");
    match isa {
        // SAFETY: the processor has the features: `is_available` asks for all of them.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni | Isa::Avx512Amx => unsafe { x86::run_avx512(k) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => unsafe { x86::run_avx2(k) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => unsafe { neon::run_neon(k) },
        _ => k.run::<scalar::Scalar>(),
    }
}

/// Loads up to 16 values; the lanes after them are `fill`.
#[inline(always)]
pub fn load_part<V: Lanes>(x: &[f32], fill: f32) -> V {
    let mut buf = [fill; LANES];
    buf[..x.len()].copy_from_slice(x);
    // SAFETY: `buf` has 16 values.
    unsafe { V::load(buf.as_ptr()) }
}

/// The chunk of 16 values as lanes.
#[inline(always)]
pub fn load<V: Lanes>(x: &[f32; LANES]) -> V {
    // SAFETY: the array has 16 values.
    unsafe { V::load(x.as_ptr()) }
}

/// Writes the lanes over the array.
#[inline(always)]
pub fn store<V: Lanes>(v: V, x: &mut [f32; LANES]) {
    // SAFETY: the array has 16 values.
    unsafe { v.store(x.as_mut_ptr()) }
}

/// Replaces each value by `f` of it and of the values at the same place in `y`.
#[inline(always)]
pub fn zip_map<V: Lanes>(x: &mut [f32], y: &[f32], f: impl Fn(V, V) -> V) {
    assert_eq!(x.len(), y.len());
    let (xs, x_tail) = x.as_chunks_mut::<LANES>();
    let (ys, y_tail) = y.as_chunks::<LANES>();
    for (x, y) in xs.iter_mut().zip(ys) {
        store(f(load(x), load(y)), x);
    }
    if !x_tail.is_empty() {
        let mut out = [0.0; LANES];
        store(f(load_part(x_tail, 0.0), load_part(y_tail, 0.0)), &mut out);
        x_tail.copy_from_slice(&out[..x_tail.len()]);
    }
}

/// Replaces each value by `f` of it.
#[inline(always)]
pub fn map<V: Lanes>(x: &mut [f32], f: impl Fn(V) -> V) {
    let (xs, tail) = x.as_chunks_mut::<LANES>();
    for x in xs {
        store(f(load(x)), x);
    }
    if !tail.is_empty() {
        let mut out = [0.0; LANES];
        store(f(load_part(tail, 0.0)), &mut out);
        tail.copy_from_slice(&out[..tail.len()]);
    }
}

/// e^x within 1.5e-7 of its size; 0 below -87, saturated above 88. What is not a number stays so.
///
/// x = n ln 2 + r, e^x = 2^n e^r. The polynomial is a minimax fit of e^r for |r| <= ln 2 / 2 (3e-9 before rounding).
#[inline(always)]
pub fn exp<V: Lanes>(x: V) -> V {
    let s = V::splat;
    let t = s(-87.0).max(s(88.0).min(x));
    let z = t.fma(s(std::f32::consts::LOG2_E), s(ROUND));
    let n = z.sub(s(ROUND));
    // ln 2 in two parts, the first with so few bits that its product with n is exact.
    let r = n.fma(s(-0.693_145_75), t);
    let r = n.fma(s(-1.428_606_8e-6), r);
    let p = s(0.001_381_454).fma(r, s(0.008_368_745));
    let p = p.fma(r, s(0.041_668_39));
    let p = p.fma(r, s(0.166_665_21));
    let p = p.fma(r, s(0.499_999_94));
    let p = p.fma(r.mul(r), r);
    let k = z.pow2();
    p.fma(k, k).zero_if_less(x, -87.0)
}

#[cfg(test)]
pub(crate) mod tests;
