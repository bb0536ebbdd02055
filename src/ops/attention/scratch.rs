//! Memory that attention works in.

use crate::cpu::simd::LANES;

/// 16 floats on one cache line.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

/// Floats at an aligned address, kept between uses.
#[derive(Default)]
pub struct Buf(Vec<Line>);

impl Buf {
    /// The first `n` floats, with any contents; those of the last use unless it has to grow.
    #[inline(always)]
    pub fn get(&mut self, n: usize) -> &mut [f32] {
        let lines = n.div_ceil(LANES);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; LANES]));
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..n]
    }
}

/// Part of a softmax-weighted sum for each of some rows: the maximum score, the sum of weights relative to it, the
/// weighted sum of values.
pub struct Part<'a> {
    pub dv_pad: usize,
    pub max: &'a mut [f32], // (n_rows)
    pub sum: &'a mut [f32], // (n_rows)
    pub out: &'a mut [f32], // (n_rows, dv_pad)
}

impl<'a> Part<'a> {
    /// Floats that a part needs, a multiple of [`LANES`].
    pub fn size(n_rows: usize, dv_pad: usize) -> usize {
        2 * n_rows.next_multiple_of(LANES) + n_rows * dv_pad
    }

    /// A part in a buffer of [`Part::size`].
    pub fn new(buf: &'a mut [f32], n_rows: usize) -> Self {
        let padded = n_rows.next_multiple_of(LANES);
        let (max, rest) = buf.split_at_mut(padded);
        let (sum, out) = rest.split_at_mut(padded);
        Part { dv_pad: out.len() / n_rows, max: &mut max[..n_rows], sum: &mut sum[..n_rows], out }
    }

    /// Of nothing.
    pub fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.out.fill(0.0);
    }
}
