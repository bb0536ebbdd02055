//! Attention of a few tokens and one head of keys and values over a range of tiles: the online softmax (Milakov and
//! Gimelshein 2018; FlashAttention, Dao et al. 2022).
//!
//! What a row's result is made of, in this order, however rows are grouped: for each range of [`RANGE`] positions, for
//! each tile of it that the row sees, scores, new maximum, rescaling, sum. The ranges' parts are merged in order. Within a
//! tile a row goes through the same operations whichever rows are beside it; positions that it doesn't see have weight
//! zero, which changes no sum (but perhaps the sign of a zero, which the end removes).

use super::gemm::{F16, F32, Gemm};
use super::scratch::{Buf, Part};
use super::{AttnParams, RANGE};
use crate::ops::elementwise::Softcap;
use crate::ops::kv::{GROUP, KV_BLOCK, KvType, Rows, SeqKv, Tile};
use crate::ops::simd::{Kernel, LANES, Lanes, exp, load, store};
use std::ops::Range;

/// Up to how many rows a half-precision tile is converted anew for each few of them, instead of once into memory.
const DIRECT_ROWS: usize = 12;

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
}

/// What an item needs besides its parts.
#[derive(Default)]
pub struct Scratch {
    q: Buf,
    scores: Buf,
    rescale: Buf,
    k: Buf,
    v: Buf,
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
        if later.max[r] == f32::NEG_INFINITY {
            continue;
        }
        let dv_pad = total.dv_pad;
        let (out, more) = (&mut total.out[r * dv_pad..][..dv_pad], &later.out[r * dv_pad..][..dv_pad]);
        if total.max[r] == f32::NEG_INFINITY {
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
    pub place: Place<'a>,
    pub total: Part<'b>,
    pub out: *mut f32,
    pub stride: usize,
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
            // SAFETY: whoever made this has checked that the rows lie in the output, and writes them from nowhere else.
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
        attend_tile::<V>(p, tile * KV_BLOCK, s, part);
    }
}

/// Adds the tile whose first position is `start` to the parts of the rows that see any of it.
#[inline(always)]
fn attend_tile<V: Lanes>(p: &Place, start: usize, s: &mut Scratch, part: &mut Part) {
    let sees = |t: usize| {
        let v = p.visible(t);
        v.start.max(start)..v.end.min(start + KV_BLOCK)
    };
    let from = start.saturating_sub(p.pos);
    let to = p.params.n_swa.map_or(p.n_tokens, |n| (start + KV_BLOCK + n - 1).saturating_sub(p.pos).min(p.n_tokens));
    if from >= to {
        return;
    }
    let rows = from * p.group..to * p.group;
    // The positions that any of these rows sees; those past the end may never have been written.
    let (lo, hi) = (sees(from).start - start, sees(to - 1).end - start);
    let tile = p.seq.tile_at(start, p.layer, p.kv_head);
    scores::<V>(p, &tile, rows.clone(), hi, s);
    let (max, sum) = (&mut part.max[rows.clone()], &mut part.sum[rows.clone()]);
    let (scores, rescale) = (s.scores.get(rows.len() * KV_BLOCK), s.rescale.get(rows.len()));
    for (i, scores) in scores.as_chunks_mut::<KV_BLOCK>().0.iter_mut().enumerate() {
        let seen = sees(from + i / p.group);
        weigh::<V>(p, scores, seen.start - start..seen.end - start, &mut max[i], &mut rescale[i], &mut sum[i]);
    }
    accumulate::<V>(&tile, rows, lo..hi, s, part);
}

/// Products of the rows' queries with the tile's first `hi` keys, into `s.scores`, shape `(rows.len(), 64)`.
#[inline(always)]
fn scores<V: Lanes>(p: &Place, tile: &Tile, rows: Range<usize>, hi: usize, s: &mut Scratch) {
    let (dk, n_cols) = (tile.layer.shape.head_dim_k, hi.next_multiple_of(LANES));
    let a = &s.q.get(p.n_rows() * dk)[rows.start * dk..rows.end * dk];
    let c = s.scores.get(rows.len() * KV_BLOCK);
    let gemm = Gemm {
        a: a.as_ptr(),
        a_stride: dk,
        b: F32 { ptr: tile.k.cast(), stride: KV_BLOCK },
        c: c.as_mut_ptr(),
        c_stride: KV_BLOCK,
        n_rows: rows.len(),
        n_cols,
        inner: (0, dk),
        rescale: None,
    };
    // SAFETY: the tile's keys are `(head_dim_k, 64)`, converted or not; `a` and `c` have `rows.len()` rows.
    unsafe {
        match tile.layout.type_k {
            KvType::F32 => gemm.compute::<V>(),
            KvType::F16 if rows.len() <= DIRECT_ROWS => {
                gemm.with(F16 { ptr: tile.k.cast(), stride: KV_BLOCK }).compute::<V>();
            }
            KvType::F16 => {
                let b = convert_f16::<V>(tile.k.cast(), dk * KV_BLOCK, &mut s.k);
                gemm.with(F32 { ptr: b, stride: KV_BLOCK }).compute::<V>();
            }
            KvType::Q8_0 => {
                let b = convert_q8_keys::<V>(tile, n_cols, &mut s.k);
                gemm.with(F32 { ptr: b, stride: KV_BLOCK }).compute::<V>();
            }
        }
    }
}

/// Turns a row's scores into weights relative to its new maximum, 0 where it doesn't see; `rescale` is what its earlier
/// results are multiplied by.
#[inline(always)]
fn weigh<V: Lanes>(
    p: &Place,
    scores: &mut [f32; KV_BLOCK],
    seen: Range<usize>,
    max: &mut f32,
    rescale: &mut f32,
    sum: &mut f32,
) {
    if let Some(cap) = p.params.softcap {
        for x in scores.as_chunks_mut::<LANES>().0 {
            store(Softcap(cap).apply_to(load::<V>(x)), x);
        }
    }
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    let quads = scores.as_chunks_mut::<LANES>().0;
    let highest = load::<V>(&quads[0]).max(load(&quads[1])).max(load::<V>(&quads[2]).max(load(&quads[3]))).max_lane();
    let new = if highest > *max { highest } else { *max };
    *rescale = exp1::<V>(*max - new);
    *max = new;
    let mut total = V::splat(0.0);
    for x in quads {
        let w = exp(load::<V>(x).sub(V::splat(new)));
        store(w, x);
        total = total.add(w);
    }
    *sum = *sum * *rescale + total.sum();
}

/// Rescales the rows' sums and adds the tile's values of the positions `seen` with the weights in `s.scores`.
#[inline(always)]
fn accumulate<V: Lanes>(tile: &Tile, rows: Range<usize>, seen: Range<usize>, s: &mut Scratch, part: &mut Part) {
    let dv_pad = tile.layer.dv_pad;
    let a = s.scores.get(rows.len() * KV_BLOCK);
    let c = &mut part.out[rows.start * dv_pad..rows.end * dv_pad];
    let gemm = Gemm {
        a: a.as_ptr(),
        a_stride: KV_BLOCK,
        b: F32 { ptr: tile.v.cast(), stride: dv_pad },
        c: c.as_mut_ptr(),
        c_stride: dv_pad,
        n_rows: rows.len(),
        n_cols: dv_pad,
        inner: (seen.start, seen.end),
        rescale: Some(s.rescale.get(rows.len()).as_ptr()),
    };
    // SAFETY: the tile's values are `(64, dv_pad)`, converted or not; `a` and `c` have `rows.len()` rows.
    unsafe {
        match tile.layout.type_v {
            KvType::F32 => gemm.compute::<V>(),
            KvType::F16 if rows.len() <= DIRECT_ROWS => {
                gemm.with(F16 { ptr: tile.v.cast(), stride: dv_pad }).compute::<V>();
            }
            KvType::F16 => {
                let b = convert_f16::<V>(tile.v.cast(), seen.end * dv_pad, &mut s.v);
                gemm.with(F32 { ptr: b, stride: dv_pad }).compute::<V>();
            }
            KvType::Q8_0 => {
                let b = convert_q8_values::<V>(tile, seen, &mut s.v);
                gemm.with(F32 { ptr: b, stride: dv_pad }).compute::<V>();
            }
        }
    }
}

/// The first `n` values (a multiple of [`LANES`]) in single precision.
///
/// # Safety
/// `src` is valid for reading them.
#[inline(always)]
unsafe fn convert_f16<V: Lanes>(src: *const u16, n: usize, buf: &mut Buf) -> *const f32 {
    let out = buf.get(n);
    for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        store(unsafe { V::load_f16(src.add(i * LANES)) }, out);
    }
    out.as_ptr()
}

/// The keys of the first `n_cols` positions. A byte times a half-precision scale is exact in f32.
///
/// # Safety
/// The tile's keys are Q8_0.
#[inline(always)]
unsafe fn convert_q8_keys<V: Lanes>(tile: &Tile, n_cols: usize, buf: &mut Buf) -> *const f32 {
    let out = buf.get(tile.layer.shape.head_dim_k * KV_BLOCK);
    for (d, row) in out.chunks_exact_mut(KV_BLOCK).enumerate() {
        for (j, out) in row[..n_cols].as_chunks_mut().0.iter_mut().enumerate() {
            // SAFETY: `d` is below head_dim_k, and its group's scales are a row of 64.
            let (x, scale) = unsafe {
                (
                    V::load_i8(tile.k.cast::<i8>().add(d * KV_BLOCK + j * LANES)),
                    V::load_f16(tile.k_scale.add(d / GROUP * KV_BLOCK + j * LANES)),
                )
            };
            store(x.mul(scale), out);
        }
    }
    out.as_ptr()
}

/// The values of the positions `seen`.
///
/// # Safety
/// The tile's values are Q8_0.
#[inline(always)]
unsafe fn convert_q8_values<V: Lanes>(tile: &Tile, seen: Range<usize>, buf: &mut Buf) -> *const f32 {
    let dv_pad = tile.layer.dv_pad;
    let n_groups = dv_pad.div_ceil(GROUP);
    let out = buf.get(KV_BLOCK * dv_pad);
    for t in seen {
        for (j, out) in out[t * dv_pad..][..dv_pad].as_chunks_mut().0.iter_mut().enumerate() {
            // SAFETY: `t` is below 64, and each position has `n_groups` scales.
            let (x, scale) = unsafe {
                (
                    V::load_i8(tile.v.cast::<i8>().add(t * dv_pad + j * LANES)),
                    half::f16::from_bits(*tile.v_scale.add(t * n_groups + j * LANES / GROUP)),
                )
            };
            store(x.mul(V::splat(scale.to_f32())), out);
        }
    }
    out.as_ptr()
}
