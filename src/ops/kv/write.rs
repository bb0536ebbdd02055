//! Rows of keys and values into a block.
//!
//! What is infinite or not a number must show in what every later token gets, and in nothing before it. In keys it is stored as not
//! a number (a score of minus infinity would pass for a position that isn't seen): to each number it is added times zero, which is
//! nothing for those that are finite. Values are always stored finite, since tokens that don't see a position multiply its values by
//! zero: one that isn't makes the position's whole key not a number, whose score is left out where it isn't seen.

use super::layout::{GROUP, Tile};
use super::{KV_BLOCK, KvType, Rows};
use crate::cpu::simd::{Kernel, LANES, Lanes, ROUND, load, store};

/// The largest half-precision number: larger numbers are stored as this one, so that they stay numbers.
const F16_MAX: f32 = 65504.0;

/// Writes row `t` of `k` and `v` to the tile's position `lane + t`, for all `t` below `n`.
pub struct Write<'a> {
    tile: Tile<'a>,
    lane: usize,
    n: usize,
    k: Rows<'a>,
    v: Rows<'a>,
}

impl<'a> Write<'a> {
    /// # Safety
    /// Until it has run, nobody else uses these positions of the tile, whose parts are as its layout says.
    pub unsafe fn new(tile: Tile<'a>, lane: usize, n: usize, k: Rows<'a>, v: Rows<'a>) -> Self {
        Write { tile, lane, n, k, v }
    }
}

impl Kernel for Write<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        assert!(self.lane + self.n <= KV_BLOCK);
        let layout = self.tile.layout;
        // SAFETY: the tile's parts have these types.
        unsafe {
            let broken = match layout.type_v {
                KvType::F32 => self.values::<V, AsF32>(),
                KvType::F16 => self.values::<V, AsF16>(),
                KvType::Q8_0 => self.values::<V, AsQ8>(),
            };
            match layout.type_k {
                KvType::F32 => self.keys::<V, AsF32>(broken),
                KvType::F16 => self.keys::<V, AsF16>(broken),
                KvType::Q8_0 => self.keys::<V, AsQ8>(broken),
            }
        }
    }
}

impl Write<'_> {
    /// Writes the keys; those whose bit is set in `broken` as not a number.
    ///
    /// # Safety
    /// The tile's keys are stored as `E` does it.
    #[inline(always)]
    unsafe fn keys<V: Lanes, E: Encoder>(&self, broken: u64) {
        let dim = self.tile.layer.shape.head_dim_k;
        for start in (0..dim).step_by(GROUP) {
            for t in 0..self.n {
                let lane = self.lane + t;
                // SAFETY: keys are `(dim, 64)`, their scales `(ceil(dim / 32), 64)`, and the lane is below 64.
                unsafe {
                    let is_broken = broken >> t & 1 == 1;
                    let x = if is_broken { [f32::NAN; GROUP] } else { piece(self.k.row(t, dim), start) };
                    let x = E::encode::<V>(&x, self.tile.k_scale.wrapping_add(start / GROUP * KV_BLOCK + lane));
                    let out = self.tile.k.cast::<E::Element>().add(start * KV_BLOCK + lane);
                    for (d, x) in x.into_iter().enumerate().take(dim - start) {
                        out.add(d * KV_BLOCK).write(x);
                    }
                }
            }
        }
    }

    /// Writes the values; returns a bit for each row in which some weren't finite: zeros stand in their place.
    ///
    /// # Safety
    /// The tile's values are stored as `E` does it.
    #[inline(always)]
    unsafe fn values<V: Lanes, E: Encoder>(&self) -> u64 {
        let (dim, dv_pad) = (self.tile.layer.shape.head_dim_v, self.tile.layer.dv_pad);
        let mut broken = 0;
        for t in 0..self.n {
            let lane = self.lane + t;
            for start in (0..dim).step_by(GROUP) {
                // SAFETY: values are `(64, dv_pad)`, their scales `(64, ceil(dv_pad / 32))`, and the lane is below 64.
                unsafe {
                    let mut x = piece(self.v.row(t, dim), start);
                    if !x.iter().fold(true, |finite, x| finite & x.is_finite()) {
                        (x, broken) = ([0.0; GROUP], broken | 1 << t);
                    }
                    let scale = self.tile.v_scale.wrapping_add(lane * dv_pad.div_ceil(GROUP) + start / GROUP);
                    let x = E::encode::<V>(&x, scale);
                    let out = self.tile.v.cast::<E::Element>().add(lane * dv_pad + start);
                    if start + GROUP <= dv_pad {
                        out.cast::<[E::Element; GROUP]>().write(x);
                    } else {
                        x.as_ptr().copy_to_nonoverlapping(out, LANES);
                    }
                }
            }
        }
        broken
    }
}

/// The [`GROUP`] values from `start` on, zeros after the row's end.
#[inline(always)]
fn piece(row: &[f32], start: usize) -> [f32; GROUP] {
    let rest = &row[start..];
    rest.first_chunk().copied().unwrap_or_else(|| {
        let mut x = [0.0; GROUP];
        x[..rest.len()].copy_from_slice(rest);
        x
    })
}

/// How values are stored.
trait Encoder {
    type Element: Copy;
    /// # Safety
    /// `scale` is valid for writing, if the type has scales.
    unsafe fn encode<V: Lanes>(x: &[f32; GROUP], scale: *mut u16) -> [Self::Element; GROUP];
}

struct AsF32;
impl Encoder for AsF32 {
    type Element = f32;
    #[inline(always)]
    unsafe fn encode<V: Lanes>(x: &[f32; GROUP], _: *mut u16) -> [f32; GROUP] {
        let mut out = [0.0; GROUP];
        for (x, out) in x.as_chunks().0.iter().zip(out.as_chunks_mut::<LANES>().0) {
            let x: V = load(x);
            store(x.fma(V::splat(0.0), x), out);
        }
        out
    }
}

struct AsF16;
impl Encoder for AsF16 {
    type Element = u16;
    #[inline(always)]
    unsafe fn encode<V: Lanes>(x: &[f32; GROUP], _: *mut u16) -> [u16; GROUP] {
        let mut out = [0; GROUP];
        for (x, out) in x.as_chunks().0.iter().zip(out.as_chunks_mut::<LANES>().0) {
            let x: V = load(x);
            let held = V::splat(-F16_MAX).max(V::splat(F16_MAX).min(x));
            let x = x.fma(V::splat(0.0), held);
            // SAFETY: the array has 16 places.
            unsafe { x.store_f16(out.as_mut_ptr()) };
        }
        out
    }
}

/// One scale for all: the greatest value becomes 127.
struct AsQ8;
impl Encoder for AsQ8 {
    type Element = i8;
    #[inline(always)]
    unsafe fn encode<V: Lanes>(x: &[f32; GROUP], scale: *mut u16) -> [i8; GROUP] {
        let (mut max, mut zero) = (V::splat(0.0), V::splat(0.0));
        for x in x.as_chunks().0 {
            let x: V = load(x);
            max = x.max(V::splat(0.0).sub(x)).max(max);
            zero = x.fma(V::splat(0.0), zero);
        }
        let d = (max.max_lane() / 127.0).min(F16_MAX) + zero.sum();
        let mut half = [0; LANES];
        // SAFETY: the array has 16 places; `scale` is the caller's promise.
        unsafe {
            V::splat(d).store_f16(half.as_mut_ptr());
            scale.write(half[0]);
        }
        let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
        let mut q = [0; GROUP];
        for (q, x) in q.iter_mut().zip(x) {
            let rounded = (x * inverse).clamp(-127.0, 127.0) + ROUND;
            *q = rounded.to_bits() as i8;
        }
        q
    }
}
