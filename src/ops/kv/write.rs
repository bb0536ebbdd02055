//! Rows of keys and values into a block.

use super::layout::{GROUP, Tile};
use super::{KV_BLOCK, KvType, Rows};
use crate::ops::simd::{Kernel, LANES, Lanes, load_part};
use half::f16;

/// The largest half-precision number: larger values are stored as this one, since an infinity in a later row of values would
/// turn the zero weights of earlier tokens into what is not a number.
const F16_MAX: f32 = 65504.0;

/// Writes row `t` of `k` and `v` to the tile's position `lane + t`, for all `t` below `n`.
pub struct Write<'a> {
    pub tile: Tile<'a>,
    pub lane: usize,
    pub n: usize,
    pub k: Rows<'a>,
    pub v: Rows<'a>,
}

impl Kernel for Write<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (tile, shape) = (&self.tile, self.tile.layer.shape);
        assert!(self.lane + self.n <= KV_BLOCK);
        for t in 0..self.n {
            let lane = self.lane + t;
            let (k, v) = (self.k.row(t, shape.head_dim_k), self.v.row(t, shape.head_dim_v));
            // SAFETY: the tile's parts have the sizes of `layout`'s table for `shape`; `lane` is below 64.
            unsafe {
                match tile.layout.type_k {
                    KvType::F32 => scatter(k, tile.k.cast::<f32>().add(lane)),
                    KvType::F16 => scatter_f16::<V>(k, tile.k.cast::<u16>().add(lane)),
                    KvType::Q8_0 => scatter_q8(k, tile.k.cast::<i8>().add(lane), tile.k_scale.add(lane)),
                }
                let at = lane * tile.layer.dv_pad;
                match tile.layout.type_v {
                    KvType::F32 => v.as_ptr().copy_to_nonoverlapping(tile.v.cast::<f32>().add(at), v.len()),
                    KvType::F16 => store_f16::<V>(v, tile.v.cast::<u16>().add(at)),
                    KvType::Q8_0 => {
                        let scales = tile.v_scale.add(lane * tile.layer.dv_pad.div_ceil(GROUP));
                        store_q8(v, tile.v.cast::<i8>().add(at), scales);
                    }
                }
            }
        }
    }
}

/// # Safety
/// Every 64th place from `out` on is valid for writing, for as many as `x` has.
unsafe fn scatter<T: Copy>(x: &[T], out: *mut T) {
    for (d, &x) in x.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { out.add(d * KV_BLOCK).write(x) };
    }
}

#[inline(always)]
fn to_f16<V: Lanes>(x: &[f32]) -> [u16; LANES] {
    let x: V = load_part(x, 0.0);
    let x = V::splat(-F16_MAX).max(V::splat(F16_MAX).min(x));
    let mut bits = [0; LANES];
    // SAFETY: the array has 16 places.
    unsafe { x.store_f16(bits.as_mut_ptr()) };
    bits
}

/// # Safety
/// As [`scatter`].
#[inline(always)]
unsafe fn scatter_f16<V: Lanes>(x: &[f32], out: *mut u16) {
    for (i, x) in x.chunks(LANES).enumerate() {
        // SAFETY: the caller's promise.
        unsafe { scatter(&to_f16::<V>(x)[..x.len()], out.add(i * LANES * KV_BLOCK)) };
    }
}

/// # Safety
/// `out` is valid for writing `x.len()` rounded up to whole [`LANES`].
#[inline(always)]
unsafe fn store_f16<V: Lanes>(x: &[f32], out: *mut u16) {
    for (i, x) in x.chunks(LANES).enumerate() {
        // SAFETY: the caller's promise.
        unsafe { out.add(i * LANES).cast::<[u16; LANES]>().write(to_f16::<V>(x)) };
    }
}

/// A group's scale and bytes: the greatest value becomes 127.
fn quantize(x: &[f32]) -> (f16, [i8; GROUP]) {
    let amax = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let d = (amax / 127.0).min(F16_MAX);
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    let mut q = [0; GROUP];
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    (f16::from_f32(d), q)
}

/// # Safety
/// As [`scatter`], and `scales` likewise for each group.
unsafe fn scatter_q8(x: &[f32], out: *mut i8, scales: *mut u16) {
    for (g, x) in x.chunks(GROUP).enumerate() {
        let (d, q) = quantize(x);
        // SAFETY: the caller's promise.
        unsafe {
            scales.add(g * KV_BLOCK).write(d.to_bits());
            scatter(&q[..x.len()], out.add(g * GROUP * KV_BLOCK));
        }
    }
}

/// # Safety
/// `out` is valid for writing `x.len()` values, `scales` for one value a group.
unsafe fn store_q8(x: &[f32], out: *mut i8, scales: *mut u16) {
    for (g, x) in x.chunks(GROUP).enumerate() {
        let (d, q) = quantize(x);
        // SAFETY: the caller's promise.
        unsafe {
            scales.add(g).write(d.to_bits());
            q.as_ptr().copy_to_nonoverlapping(out.add(g * GROUP), x.len());
        }
    }
}
