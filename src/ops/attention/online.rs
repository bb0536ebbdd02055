//! Attention of a few tokens and one head of keys and values over a range of tiles: the online softmax (Milakov and
//! Gimelshein 2018; FlashAttention, Dao et al. 2022).
//!
//! What a row's result is made of, in this order, however rows are grouped: for each range of [`RANGE`] positions, for
//! each tile of it that the row sees, scores, new maximum, rescaling, sum. The ranges' parts are merged in order. Within a
//! tile a row goes through the same operations whichever rows are beside it; positions that it doesn't see have weight
//! zero, which changes no sum, stored values being finite (but perhaps the sign of a zero, which the end removes).

use super::gemm::{Gemm, Operands};
use super::scratch::{Buf, Part};
use super::source::{self, Convert, Source, Use};
use super::{AttnParams, RANGE};
use crate::cpu::simd::{self, Kernel, LANES, Lanes, exp, load, store};
use crate::ops::kv::{KV_BLOCK, Rows, SeqKv, Tile};
use std::ops::Range;

/// A work item's place: some tokens of a sequence, one head of keys and values.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub params: &'a AttnParams<'a>,
    pub seq: &'a SeqKv,
    pub layer: usize,
    pub kv_head: usize,
    /// Query heads that share the head of keys and values.
    pub group: usize,
    /// Position of the first token.
    pub pos: usize,
    pub n_tokens: usize,
    /// Row `t` holds the group's queries of token `t`, `(group, head_dim_k)`.
    pub q: Rows<'a>,
}

impl Place<'_> {
    /// Pairs of token and query head: token by token.
    pub fn n_rows(&self) -> usize {
        self.n_tokens * self.group
    }

    /// Values that a row's sum is padded to.
    pub fn dv_pad(&self) -> usize {
        self.seq.pool().layer(self.layer).dv_pad
    }

    /// The positions that token `t` sees.
    fn visible(&self, t: usize) -> Range<usize> {
        self.params.visible(self.pos + t)
    }

    /// Which positions of the tile that begins at `start` token `t`, who sees one at least, sees: counted from there.
    fn seen(&self, t: usize, start: usize) -> Range<usize> {
        let v = self.visible(t);
        v.start.max(start) - start..v.end.min(start + KV_BLOCK) - start
    }
}

/// What an item needs besides its parts.
#[derive(Default)]
pub struct Scratch {
    q: Buf,
    scores: Buf,
    rescale: Buf,
    converted: Buf,
    scales: Buf,
}

/// Computes `ranges`, each into a part of its own, and merges them into `total` (one range goes there directly).
pub struct Attend<'a, 'b> {
    pub place: Place<'a>,
    pub ranges: Range<usize>,
    pub scratch: &'b mut Scratch,
    pub total: Part<'b>,
    pub part: Part<'b>,
}

impl Kernel for Attend<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        scale_queries(&self.place, self.scratch);
        for (i, range) in self.ranges.clone().enumerate() {
            let part = if i == 0 { &mut self.total } else { &mut self.part };
            attend_range::<V>(&self.place, range, self.scratch, part);
            if i > 0 {
                merge::<V>(&mut self.total, &self.part);
            }
        }
    }
}

/// Merges the parts of successive ranges, equal in size, into the first.
pub struct Merge<'a> {
    pub parts: &'a mut [f32],
    pub n_parts: usize,
    pub n_rows: usize,
}

impl Kernel for Merge<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (first, rest) = self.parts.split_at_mut(self.parts.len() / self.n_parts);
        let size = first.len();
        let mut total = Part::new(first, self.n_rows);
        for part in rest.chunks_mut(size) {
            merge::<V>(&mut total, &Part::new(part, self.n_rows));
        }
    }
}

/// Adds what a later range gave.
#[inline(always)]
fn merge<V: Lanes>(total: &mut Part, later: &Part) {
    for r in 0..total.max.len() {
        // Nothing was seen. The maximum wouldn't tell: it is passed over by scores that aren't numbers.
        if later.sum[r] == 0.0 {
            continue;
        }
        let dv_pad = total.dv_pad;
        let (out, more) = (&mut total.out[r * dv_pad..][..dv_pad], &later.out[r * dv_pad..][..dv_pad]);
        if total.sum[r] == 0.0 {
            (total.max[r], total.sum[r]) = (later.max[r], later.sum[r]);
            out.copy_from_slice(more);
            continue;
        }
        let max = if later.max[r] > total.max[r] { later.max[r] } else { total.max[r] };
        let (a, b) = (exp1::<V>(total.max[r] - max), exp1::<V>(later.max[r] - max));
        (total.max[r], total.sum[r]) = (max, total.sum[r] * a + later.sum[r] * b);
        let (a, b) = (V::splat(a), V::splat(b));
        for (x, y) in out.as_chunks_mut().0.iter_mut().zip(more.as_chunks().0) {
            store(load::<V>(y).fma(b, load::<V>(x).mul(a)), x);
        }
    }
}

/// [`exp`] of one value.
#[inline(always)]
fn exp1<V: Lanes>(x: f32) -> f32 {
    let mut out = [0.0; LANES];
    store(exp(V::splat(x)), &mut out);
    out[0]
}

/// Divides the sums by the sums of weights and writes head `h` of token `t` to `out + t * stride + h * head_dim_v`.
pub struct Finish<'a, 'b> {
    place: Place<'a>,
    total: Part<'b>,
    out: *mut f32,
    stride: usize,
}

impl<'a, 'b> Finish<'a, 'b> {
    /// # Safety
    /// Until it has run, the places that it writes are valid for that, and nobody else uses them.
    pub unsafe fn new(place: Place<'a>, total: Part<'b>, out: *mut f32, stride: usize) -> Self {
        Finish { place, total, out, stride }
    }
}

impl Kernel for Finish<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (p, total) = (&self.place, self.total);
        let (dv, group) = (p.seq.pool().layer(p.layer).shape.head_dim_v, p.group);
        for r in 0..p.n_rows() {
            let (t, h) = (r / group, r % group);
            let (mut sum, mut factor) = (total.sum[r], 1.0);
            if let Some(sinks) = p.params.sinks {
                let sink = sinks[p.kv_head * group + h];
                let max = if sink > total.max[r] { sink } else { total.max[r] };
                factor = exp1::<V>(total.max[r] - max);
                sum = sum * factor + exp1::<V>(sink - max);
            }
            let factor = factor / sum;
            let x = &total.out[r * total.dv_pad..][..dv];
            // SAFETY: the promise made to `new`.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.add(t * self.stride + h * dv), dv) };
            for (out, x) in out.iter_mut().zip(x) {
                // Adding 0 makes -0 to 0: see the module's beginning.
                *out = x * factor + 0.0;
            }
        }
    }
}

/// The queries times the scale, row by row.
#[inline(always)]
fn scale_queries(p: &Place, s: &mut Scratch) {
    let width = p.group * p.seq.pool().layer(p.layer).shape.head_dim_k;
    for (t, out) in s.q.get(p.n_tokens * width).chunks_exact_mut(width).enumerate() {
        for (out, q) in out.iter_mut().zip(p.q.row(t, width)) {
            *out = q * p.params.scale;
        }
    }
}

/// Computes one range's part for all rows.
#[inline(always)]
fn attend_range<V: Lanes>(p: &Place, range: usize, s: &mut Scratch, part: &mut Part) {
    part.clear();
    let first = (range * RANGE).max(p.visible(0).start) / KV_BLOCK;
    let last = ((range + 1) * RANGE).min(p.visible(p.n_tokens - 1).end).div_ceil(KV_BLOCK);
    for tile in first..last {
        attend_tile::<V>(p, tile * KV_BLOCK, tile + 1 < last, s, part);
    }
}

/// Adds the tile whose first position is `start` to the parts of the rows that see any of it.
#[inline(always)]
fn attend_tile<V: Lanes>(p: &Place, start: usize, more: bool, s: &mut Scratch, part: &mut Part) {
    let from = start.saturating_sub(p.pos);
    let to = p.params.n_swa.map_or(p.n_tokens, |n| (start + KV_BLOCK + n - 1).saturating_sub(p.pos).min(p.n_tokens));
    if from >= to {
        return;
    }
    let rows = from * p.group..to * p.group;
    // The positions that any of these rows sees; those past the end may never have been written.
    let (lo, hi) = (p.seen(from, start).start, p.seen(to - 1, start).end);
    let tile = p.seq.tile_at(start, p.layer, p.kv_head);
    let next = if more { p.seq.tile_at(start + KV_BLOCK, p.layer, p.kv_head).k } else { tile.k };
    let ahead = (next as isize).wrapping_sub(tile.k as isize);
    scores::<V>(p, &tile, ahead, rows.clone(), hi, s);
    weigh::<V>(p, start, rows.clone(), s, part);
    accumulate::<V>(&tile, ahead, rows, lo..hi, s, part);
}

/// Turns the rows' scores into weights relative to their new maxima, 0 where a row doesn't see; `s.rescale` is what their
/// earlier results are multiplied by.
#[inline(always)]
fn weigh<V: Lanes>(p: &Place, start: usize, rows: Range<usize>, s: &mut Scratch, part: &mut Part) {
    let (max, sum) = (&mut part.max[rows.clone()], &mut part.sum[rows.clone()]);
    let (scores, rescale) = (s.scores.get(rows.len() * KV_BLOCK), s.rescale.get(rows.len()));
    let scores = scores.as_chunks_mut::<KV_BLOCK>().0;
    for (i, scores) in scores.iter_mut().enumerate() {
        let seen = p.seen((rows.start + i) / p.group, start);
        if seen.len() < KV_BLOCK {
            scores[..seen.start].fill(f32::NEG_INFINITY);
            scores[seen.end..].fill(f32::NEG_INFINITY);
        }
        let x = scores.as_chunks::<LANES>().0;
        let highest = load::<V>(&x[0]).max(load(&x[1])).max(load::<V>(&x[2]).max(load(&x[3]))).max_lane();
        let new = if highest > max[i] { highest } else { max[i] };
        (rescale[i], max[i]) = (max[i] - new, new);
    }
    simd::map::<V>(rescale, exp);
    for (i, scores) in scores.iter_mut().enumerate() {
        let mut total = V::splat(0.0);
        for x in scores.as_chunks_mut::<LANES>().0 {
            let w = exp(load::<V>(x).sub(V::splat(max[i])));
            store(w, x);
            total = total.add(w);
        }
        sum[i] = sum[i] * rescale[i] + total.sum();
    }
}

/// Products of the rows' queries with the tile's first `hi` keys, into `s.scores`, shape `(rows.len(), 64)`.
#[inline(always)]
fn scores<V: Lanes>(p: &Place, tile: &Tile, next: isize, rows: Range<usize>, hi: usize, s: &mut Scratch) {
    let (dk, n_cols) = (tile.layer.shape.head_dim_k, hi.next_multiple_of(LANES));
    let a = &s.q.get(p.n_rows() * dk)[rows.start * dk..rows.end * dk];
    let c = s.scores.get(rows.len() * KV_BLOCK);
    let o = Operands {
        a: a.as_ptr(),
        a_stride: dk,
        c: c.as_mut_ptr(),
        c_stride: KV_BLOCK,
        n_rows: rows.len(),
        n_cols,
        inner: (0, dk),
        rescale: None,
        ahead: next,
    };
    let product = Product { o, b_stride: KV_BLOCK, converted: s.converted.get(dk * KV_BLOCK) };
    // SAFETY: the tile's keys are `(head_dim_k, 64)`; `a` and `c` have `rows.len()` rows.
    unsafe { source::keys::<V>(tile, &mut s.scales, product) }
}

/// Rescales the rows' sums and adds the tile's values of the positions `seen` with the weights in `s.scores`.
#[inline(always)]
fn accumulate<V: Lanes>(
    tile: &Tile,
    next: isize,
    rows: Range<usize>,
    seen: Range<usize>,
    s: &mut Scratch,
    part: &mut Part,
) {
    let dv_pad = tile.layer.dv_pad;
    let a = s.scores.get(rows.len() * KV_BLOCK);
    let c = &mut part.out[rows.start * dv_pad..rows.end * dv_pad];
    let o = Operands {
        a: a.as_ptr(),
        a_stride: KV_BLOCK,
        c: c.as_mut_ptr(),
        c_stride: dv_pad,
        n_rows: rows.len(),
        n_cols: dv_pad,
        inner: (seen.start, seen.end),
        rescale: Some(s.rescale.get(rows.len()).as_ptr()),
        ahead: next,
    };
    let product = Product { o, b_stride: dv_pad, converted: s.converted.get(KV_BLOCK * dv_pad) };
    // SAFETY: the tile's values are `(64, dv_pad)`; `a` and `c` have `rows.len()` rows.
    unsafe { source::values::<V>(tile, &mut s.scales, product) }
}

/// A [`Gemm`] whose `b` isn't known yet, converted first if there are many rows.
struct Product<'a> {
    o: Operands,
    /// Room for all of `b` in single precision, and the length of its rows.
    converted: &'a mut [f32],
    b_stride: usize,
}

impl Use for Product<'_> {
    #[inline(always)]
    unsafe fn with<V: Lanes, S: Source>(self, source: S) {
        let o = self.o;
        // SAFETY: the shapes are those that `scores` and `accumulate` give; what is converted has the source's.
        unsafe {
            if o.n_rows <= S::DIRECT_ROWS {
                return V::call(Gemm::new(o, source));
            }
            let b = V::call(Convert::new(source, o, self.converted, self.b_stride));
            V::call(Gemm::new(Operands { ahead: 0, ..o }, b));
        }
    }
}
