//! Attention over the KV cache, and the writing of it, for a block of tokens of one or more sequences.

#![allow(unsafe_code)]

mod gemm;
mod online;
mod scratch;
mod source;

use super::kv::{KV_BLOCK, KvError, Rows, SeqKv};
use crate::cpu::{Team, simd};
use online::{Attend, Finish, Merge, Place, Scratch};
use scratch::{Buf, Part};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

/// Positions whose sum is kept apart from the others', at fixed places, whether or not it is computed by another thread: a long context
/// can be split among threads without changing the result.
pub const RANGE: usize = 16 * KV_BLOCK;

/// Rows (tokens times query heads) of a work item in a prefill, about: enough to make up for converting a tile, few enough for the
/// sums to stay in a core's own cache.
const ITEM_ROWS: usize = 128;

/// How a layer attends. Always causal: a token sees itself and what comes before it in its sequence.
#[derive(Clone, Debug)]
pub struct AttnParams<'a> {
    /// Query heads.
    pub n_head: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// The sliding window: a token at `p` sees the positions above `p - n_swa`. None: all.
    pub n_swa: Option<usize>,
    /// A score for each query head that takes its share of the weights and gives nothing (gpt-oss).
    pub sinks: Option<&'a [f32]>,
}

/// New tokens of one sequence in a block of tokens.
struct Run<'a> {
    seq: &'a mut SeqKv,
    /// Position of the first.
    pos: usize,
    n: usize,
    /// Its place in the block.
    row: usize,
}

/// A block of new tokens for the KV cache: one or more of each of some sequences, one sequence after the other.
///
/// It borrows the sequences for a whole forward pass: no other can write to them, and since [`write`](Self::write) takes it
/// exclusively, nobody reads what is being written.
pub struct KvBatch<'a> {
    runs: Vec<Run<'a>>,
    n_tokens: usize,
    /// Parts of a long context.
    parts: Buf,
}

/// Some tokens of a run and one head: what has one result.
struct Unit {
    run: usize,
    tokens: Range<usize>,
    kv_head: usize,
    /// Ranges that it sees.
    ranges: Range<usize>,
    /// Where its parts begin, one for each range, if each is an item of its own.
    parts: Option<usize>,
}

/// Memory of a thread for its items.
#[derive(Default)]
struct ThreadScratch {
    scratch: Scratch,
    part: Buf,
    total: Buf,
}

thread_local! {
    static SCRATCH: RefCell<ThreadScratch> = RefCell::default();
}

impl<'a> KvBatch<'a> {
    /// Makes room for `n` new tokens of each sequence, in the order of the block.
    ///
    /// # Errors
    /// If the pool is full: then some sequences may have reserved room, and none is changed otherwise.
    ///
    /// # Panics
    /// If the sequences aren't all of one pool: a block has one shape.
    pub fn new(seqs: impl IntoIterator<Item = (&'a mut SeqKv, usize)>) -> Result<Self, KvError> {
        let (mut runs, mut n_tokens) = (Vec::<Run<'_>>::new(), 0);
        for (seq, n) in seqs {
            let one_pool = runs.first().is_none_or(|r| Arc::ptr_eq(r.seq.pool(), seq.pool()));
            assert!(one_pool, "sequences of different pools in one block");
            seq.reserve(n)?;
            let pos = seq.len();
            runs.push(Run { seq, pos, n, row: n_tokens });
            n_tokens += n;
        }
        Ok(KvBatch { runs, n_tokens, parts: Buf::default() })
    }

    /// The position of each token in its sequence.
    pub fn positions(&self) -> Vec<u32> {
        self.runs.iter().flat_map(|r| (r.pos..r.pos + r.n).map(|p| p as u32)).collect()
    }

    /// Writes the tokens' keys `(n_tokens, n_head_kv * head_dim_k)` and values `(n_tokens, n_head_kv * head_dim_v)` of a
    /// layer.
    pub fn write(&mut self, team: &Team, layer: usize, k: &[f32], v: &[f32]) {
        let Some(first) = self.runs.first() else { return };
        let shape = first.seq.pool().layer(layer).shape;
        let (k_stride, v_stride) = (shape.n_head_kv * shape.head_dim_k, shape.n_head_kv * shape.head_dim_v);
        assert!(k.len() == self.n_tokens * k_stride && v.len() == self.n_tokens * v_stride, "shapes of k and v");
        let write = |i: usize| {
            let (run, h) = (&self.runs[i / shape.n_head_kv], i % shape.n_head_kv);
            if run.n == 0 {
                return;
            }
            let k = Rows::new(k, k_stride, run.row * k_stride + h * shape.head_dim_k);
            let v = Rows::new(v, v_stride, run.row * v_stride + h * shape.head_dim_v);
            // SAFETY: the run's sequence is borrowed exclusively by this batch, which is borrowed exclusively here; each
            // item is another sequence or head.
            unsafe { run.seq.write(layer, h, run.pos, run.n, k, v) };
        };
        let n_items = self.runs.len() * shape.n_head_kv;
        // One token's rows are written faster than a thread is woken.
        if self.n_tokens < 4 { (0..n_items).for_each(write) } else { team.run(n_items, &write) }
    }

    /// Attention of the tokens' queries `(n_tokens, n_head * head_dim_k)` into `out`, `(n_tokens, n_head * head_dim_v)`, after
    /// [`write`](Self::write) of the same layer. A row of the result depends on its own query and on the sequence up to its
    /// token, bit by bit: not on the team, nor on the other tokens in the block.
    pub fn attend(&mut self, team: &Team, layer: usize, params: &AttnParams, q: &[f32], out: &mut [f32]) {
        let Some(first) = self.runs.first() else { return };
        let l = *first.seq.pool().layer(layer);
        let (q_stride, out_stride) = (params.n_head * l.shape.head_dim_k, params.n_head * l.shape.head_dim_v);
        assert!(params.n_head.is_multiple_of(l.shape.n_head_kv), "n_head isn't a multiple of n_head_kv");
        assert!(params.sinks.is_none_or(|s| s.len() == params.n_head), "a sink for each head");
        assert!(params.n_swa != Some(0), "a window of nothing");
        assert!(q.len() == self.n_tokens * q_stride && out.len() == self.n_tokens * out_stride, "shapes of q and out");
        let group = params.n_head / l.shape.n_head_kv;
        let (units, n_floats) = self.units(team.n_threads(), layer, params, group);
        let items: Vec<(&Unit, usize)> = units.iter().flat_map(|u| (0..u.n_parts()).map(move |i| (u, i))).collect();
        let mut parts = std::mem::take(&mut self.parts);
        let job = Job {
            runs: &self.runs,
            params,
            layer,
            group,
            q,
            q_stride,
            parts: parts.get(n_floats).as_mut_ptr(),
            out: out.as_mut_ptr(),
            out_stride,
        };
        // SAFETY: the sizes were checked, and each unit and part is computed once.
        team.run(items.len(), &|i| unsafe { job.item(items[i].0, items[i].1) });
        let split: Vec<&Unit> = units.iter().filter(|u| u.parts.is_some()).collect();
        // SAFETY: as above; all parts are computed.
        team.run(split.len(), &|i| unsafe { job.merge(split[i]) });
        self.parts = parts;
    }

    /// Counts the tokens as held by their sequences: the end of the forward pass.
    pub fn advance(self) {
        self.runs.into_iter().for_each(|r| r.seq.advance(r.n));
    }
}

impl KvBatch<'_> {
    /// The units of an attention, the costly ones first, and how many floats their parts need.
    fn units(&self, n_threads: usize, layer: usize, params: &AttnParams, group: usize) -> (Vec<Unit>, usize) {
        let mut units = Vec::new();
        let Some(first) = self.runs.first() else { return (units, 0) };
        let l = first.seq.pool().layer(layer);
        // A power of two, and cut at absolute positions: then fewer units reach into the next tile.
        let wide = l.shape.head_dim_k + l.dv_pad > 512;
        let per_item = (if wide { ITEM_ROWS / 2 } else { ITEM_ROWS }) / group;
        let n = (per_item.max(1) + 1).next_power_of_two() / 2;
        let n = n.min(KV_BLOCK);
        for (i, run) in self.runs.iter().enumerate() {
            let mut start = 0;
            while start < run.n {
                let end = ((run.pos + start) / n * n + n - run.pos).min(run.n);
                let ranges = params.ranges(run.pos + start, end - start);
                units.extend((0..l.shape.n_head_kv).map(|kv_head| Unit {
                    run: i,
                    tokens: start..end,
                    kv_head,
                    ranges: ranges.clone(),
                    parts: None,
                }));
                start = end;
            }
        }
        units.reverse();
        let mut n_floats = 0;
        if n_threads > 1 && units.len() < 4 * n_threads {
            for u in units.iter_mut().filter(|u| u.ranges.len() > 1) {
                u.parts = Some(n_floats);
                n_floats += u.ranges.len() * Part::size(u.tokens.len() * group, l.dv_pad);
            }
        }
        (units, n_floats)
    }
}

impl Unit {
    fn n_parts(&self) -> usize {
        if self.parts.is_some() { self.ranges.len() } else { 1 }
    }
}

impl AttnParams<'_> {
    /// The positions that a token at `pos` sees.
    fn visible(&self, pos: usize) -> Range<usize> {
        self.n_swa.map_or(0, |n| (pos + 1).saturating_sub(n))..pos + 1
    }

    /// The ranges, in units of [`RANGE`], that any of `n` tokens from `pos` on sees.
    fn ranges(&self, pos: usize, n: usize) -> Range<usize> {
        self.visible(pos).start / RANGE..(pos + n - 1) / RANGE + 1
    }
}

/// What the items of an attention have in common.
struct Job<'a> {
    runs: &'a [Run<'a>],
    params: &'a AttnParams<'a>,
    layer: usize,
    group: usize,
    q: &'a [f32],
    q_stride: usize,
    parts: *mut f32,
    out: *mut f32,
    out_stride: usize,
}

// SAFETY: the pointers are written through in `item` and `merge` alone, whose callers see to disjointness.
unsafe impl Sync for Job<'_> {}

impl<'a> Job<'a> {
    fn place(&self, unit: &Unit) -> Place<'_> {
        let run = &self.runs[unit.run];
        let shape = run.seq.pool().layer(self.layer).shape;
        let row = run.row + unit.tokens.start;
        let first = row * self.q_stride + unit.kv_head * self.group * shape.head_dim_k;
        Place {
            params: self.params,
            seq: run.seq,
            layer: self.layer,
            kv_head: unit.kv_head,
            group: self.group,
            pos: run.pos + unit.tokens.start,
            n_tokens: unit.tokens.len(),
            q: Rows::new(self.q, self.q_stride, first),
        }
    }

    /// Computes part `part` of the unit, or all of it if it isn't split.
    ///
    /// # Safety
    /// `parts` and `out` are as large as the units need; nobody else uses this part, or this unit's output, meanwhile.
    unsafe fn item(&self, unit: &Unit, part: usize) {
        let place = self.place(unit);
        let (n_rows, size) = (place.n_rows(), Part::size(place.n_rows(), place.dv_pad()));
        SCRATCH.with_borrow_mut(|s| {
            let spare = Part::new(s.part.get(size), n_rows);
            let Some(parts) = unit.parts else {
                let total = Part::new(s.total.get(size), n_rows);
                simd::run(Attend { place, ranges: unit.ranges.clone(), scratch: &mut s.scratch, total, part: spare });
                let total = Part::new(s.total.get(size), n_rows);
                // SAFETY: the caller's promise.
                return unsafe { self.finish(unit, place, total) };
            };
            // SAFETY: the part lies in `parts` and is this item's alone.
            let buf = unsafe { std::slice::from_raw_parts_mut(self.parts.add(parts + part * size), size) };
            let range = unit.ranges.start + part;
            let total = Part::new(buf, n_rows);
            simd::run(Attend { place, ranges: range..range + 1, scratch: &mut s.scratch, total, part: spare });
        });
    }

    /// Merges a split unit's parts and writes its output.
    ///
    /// # Safety
    /// As for `item`, and the unit's parts are all computed.
    unsafe fn merge(&self, unit: &Unit) {
        let place = self.place(unit);
        let (n_rows, size) = (place.n_rows(), Part::size(place.n_rows(), place.dv_pad()));
        let (Some(at), n_parts) = (unit.parts, unit.ranges.len()) else { return };
        // SAFETY: the parts lie in `parts` and are this unit's alone.
        let parts = unsafe { std::slice::from_raw_parts_mut(self.parts.add(at), n_parts * size) };
        simd::run(Merge { parts, n_parts, n_rows });
        // SAFETY: the caller's promise.
        unsafe { self.finish(unit, place, Part::new(&mut parts[..size], n_rows)) };
    }

    /// # Safety
    /// As for `item`.
    unsafe fn finish(&self, unit: &Unit, place: Place, total: Part) {
        let row = self.runs[unit.run].row + unit.tokens.start;
        let dv = place.seq.pool().layer(self.layer).shape.head_dim_v;
        // SAFETY: the first value of the unit's output, which is as large as its place says and the caller's alone.
        let finish = unsafe {
            let out = self.out.add(row * self.out_stride + unit.kv_head * self.group * dv);
            Finish::new(place, total, out, self.out_stride)
        };
        simd::run(finish);
    }
}

#[cfg(test)]
mod tests;
