//! The KV cache: keys and values of many sequences in blocks of [`KV_BLOCK`] positions (after vLLM's paged attention, Kwon et
//! al. 2023).
//!
//! A block is also attention's tile, at a fixed absolute position, so that a result doesn't depend on how the prompt
//! was cut up. One block holds its positions of every layer; a [`SeqKv`] is a table of blocks and a length. Blocks
//! are shared between sequences with a common beginning and are never written while shared.

#![allow(unsafe_code)]

mod held;
mod layout;
mod write;

pub use held::{HeldBlock, Keeper};

use layout::Layout;
pub(super) use layout::{GROUP, LayerLayout, Tile};

use crate::cpu::{Pages, simd};
use std::io::{Read, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// Positions in a block.
pub const KV_BLOCK: usize = 64;

/// How the numbers in the cache are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// Single precision.
    F32,
    /// Half precision; larger numbers are stored as the largest one, 65504.
    F16,
    /// Signed bytes, 32 of a head's values with one half-precision scale.
    Q8_0,
}

impl KvType {
    /// Bytes of an element without its scale.
    const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Q8_0 => 1,
        }
    }
}

/// What a layer keeps for each position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayer {
    /// Heads of keys and values.
    pub n_head_kv: usize,
    /// Values in a head's key.
    pub head_dim_k: usize,
    /// Values in a head's value.
    pub head_dim_v: usize,
}

/// Why the cache can't do what it's asked for.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// All blocks are in use.
    #[error(
        "the KV cache is full: {wanted} more blocks of {KV_BLOCK} positions wanted, {free} of {total} free; \
         end a session, shorten the context or give the cache more memory"
    )]
    Full {
        /// Blocks asked for.
        wanted: usize,
        /// Blocks left.
        free: usize,
        /// Blocks in the pool.
        total: usize,
    },
    /// The sizes don't fit in memory's addresses.
    #[error("a KV cache of {n_blocks} blocks is larger than the address space: ask for a shorter context")]
    TooLarge {
        /// Blocks asked for.
        n_blocks: usize,
    },
    /// The system refused the memory.
    #[error("no memory for a KV cache of {bytes} bytes ({source}): ask for a shorter context")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A saved sequence can't be read back.
    #[error("can't read the saved KV cache: {0}")]
    Restore(#[from] std::io::Error),
}

/// The memory of all sequences' keys and values. Its pages cost nothing until they are first used.
pub struct KvPool {
    layout: Layout,
    pages: Pages,
    n_blocks: usize,
    state: Mutex<State>,
    keepers: Mutex<Vec<Weak<dyn Keeper>>>,
}

/// Which blocks are whose.
#[derive(Default)]
struct State {
    /// Who holds each block that was ever used; blocks from `holders.len()` on are untouched.
    holders: Vec<Holders>,
    /// Used before, held by nobody; the last one is taken first, its memory being warm.
    free: Vec<u32>,
    /// Held by nobody, as untouched ones: their memory was given back.
    discarded: Vec<u32>,
    /// Blocks that are only kept.
    n_idle: usize,
}

/// How many hold a block.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Holders {
    n_seqs: u32,
    /// Those who keep it for sequences to come.
    n_keep: u32,
}

impl Holders {
    fn is_idle(self) -> bool {
        self.n_seqs == 0 && self.n_keep > 0
    }
}

impl KvPool {
    /// Bytes of a block for these layers; `None` if they overflow.
    pub fn bytes_per_block(layers: &[KvLayer], type_k: KvType, type_v: KvType) -> Option<usize> {
        Layout::new(layers, type_k, type_v).map(|l| l.block_bytes)
    }

    /// A pool of `n_blocks` for these layers.
    ///
    /// # Errors
    /// If the address space or the system's memory doesn't allow it.
    pub fn new(layers: &[KvLayer], type_k: KvType, type_v: KvType, n_blocks: usize) -> Result<Arc<Self>, KvError> {
        let too_large = || KvError::TooLarge { n_blocks };
        let layout = Layout::new(layers, type_k, type_v).ok_or_else(too_large)?;
        let bytes = layout.block_bytes.checked_mul(n_blocks).ok_or_else(too_large)?;
        if bytes > isize::MAX as usize || u32::try_from(n_blocks).is_err() {
            return Err(too_large());
        }
        let pages = Pages::new(bytes).map_err(|source| KvError::Memory { bytes, source })?;
        let (state, keepers) = Default::default();
        Ok(Arc::new(KvPool { layout, pages, n_blocks, state, keepers }))
    }

    /// Blocks in the pool.
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// Blocks that nobody holds.
    pub fn n_free(&self) -> usize {
        self.lock().n_free(self.n_blocks)
    }

    /// Blocks that were used since their memory was given back: what the pool really takes.
    pub fn n_touched(&self) -> usize {
        let state = self.lock();
        state.holders.len() - state.discarded.len()
    }

    /// Gives back the memory of the blocks that no sequence holds, but for `keep` of them.
    pub fn discard_free(&self, keep: usize) {
        let (mut state, page) = (self.lock(), rustix::param::page_size());
        let n = state.free.len().saturating_sub(keep);
        let blocks: Vec<u32> = state.free.drain(..n).collect();
        for at in blocks.iter().map(|&b| b as usize * self.layout.block_bytes) {
            // A page at an end may be a neighbour's too.
            let (start, end) = (at.next_multiple_of(page), (at + self.layout.block_bytes) / page * page);
            if start < end {
                // SAFETY: the pages are all of a block that nobody holds, or can take while the state is locked; whoever takes it
                // writes a position before it's read.
                unsafe { self.pages.discard(start..end) };
            }
        }
        state.discarded.extend(blocks);
    }

    /// Bytes of a saved sequence of `len` positions.
    pub fn saved_bytes(&self, len: usize) -> usize {
        len * self.layout.position_bytes()
    }

    /// The sizes of a layer.
    pub(super) fn layer(&self, layer: usize) -> &LayerLayout {
        &self.layout.layers[layer]
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// One head's piece of a block.
    pub(super) fn tile(&self, block: u32, layer: usize, kv_head: usize) -> Tile<'_> {
        let (block, l) = (block as usize, &self.layout.layers[layer]);
        assert!(block < self.n_blocks && kv_head < l.shape.n_head_kv, "block {block}, head {kv_head} out of range");
        let at = block * self.layout.block_bytes + l.start + kv_head * l.head_bytes;
        // SAFETY: the offsets lie inside the block, which lies inside the mapping.
        let part = |offset: usize| unsafe { self.pages.as_ptr().add(at + offset) };
        Tile {
            layout: &self.layout,
            layer: l,
            k: part(0),
            k_scale: part(l.k_scale).cast(),
            v: part(l.v),
            v_scale: part(l.v_scale).cast(),
        }
    }

    /// All tiles of a block in the order in which they are saved.
    fn tiles(&self, block: u32) -> impl Iterator<Item = Tile<'_>> {
        let heads = |layer: usize| (0..self.layout.layers[layer].shape.n_head_kv).map(move |h| (layer, h));
        (0..self.layout.layers.len()).flat_map(heads).map(move |(layer, h)| self.tile(block, layer, h))
    }
}

impl State {
    fn n_free(&self, n_blocks: usize) -> usize {
        n_blocks - self.holders.len() + self.free.len() + self.discarded.len()
    }

    /// Takes `n` blocks or none.
    fn take(&mut self, n: usize, n_blocks: usize) -> Result<Vec<u32>, KvError> {
        let free = self.n_free(n_blocks);
        if n > free {
            return Err(KvError::Full { wanted: n, free, total: n_blocks });
        }
        let blocks: Vec<u32> = (0..n)
            .map(|_| {
                self.free.pop().or_else(|| self.discarded.pop()).unwrap_or_else(|| {
                    self.holders.push(Holders::default());
                    self.holders.len() as u32 - 1
                })
            })
            .collect();
        blocks.iter().for_each(|&b| self.share(b));
        Ok(blocks)
    }

    /// Changes who holds a block; one that nobody holds any more is free.
    fn hold(&mut self, block: u32, change: impl FnOnce(&mut Holders)) {
        let holders = &mut self.holders[block as usize];
        let was_idle = holders.is_idle();
        change(holders);
        self.n_idle = self.n_idle + usize::from(holders.is_idle()) - usize::from(was_idle);
        if *holders == Holders::default() {
            self.free.push(block);
        }
    }

    /// One more sequence holds the block.
    fn share(&mut self, block: u32) {
        self.hold(block, |h| h.n_seqs += 1);
    }

    /// A sequence lets go of the block.
    fn release(&mut self, block: u32) {
        self.hold(block, |h| h.n_seqs -= 1);
    }

    /// Whether more than one holds the block.
    fn is_shared(&self, block: u32) -> bool {
        let h = self.holders[block as usize];
        h.n_seqs + h.n_keep > 1
    }
}

/// Rows of a matrix that don't follow each other directly: a head's part of a block of tokens.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// From the first value of the first row on.
    pub data: &'a [f32],
    /// Values from a row's first to the next row's first.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// The columns from `first` on of a matrix whose rows are `stride` long.
    pub fn new(matrix: &'a [f32], stride: usize, first: usize) -> Self {
        Rows { data: &matrix[first..], stride }
    }

    /// The first `n` values of row `i`.
    pub fn row(&self, i: usize, n: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..n]
    }
}

/// The keys and values of one sequence.
///
/// A forward pass over `n` new tokens is: [`reserve`](Self::reserve), then in each layer [`write`](Self::write) and
/// attention, in the end [`advance`](Self::advance).
pub struct SeqKv {
    pool: Arc<KvPool>,
    blocks: Vec<u32>,
    len: usize,
    /// Positions from `len` to here may be written: their blocks are this sequence's alone.
    reserved: usize,
}

impl SeqKv {
    /// An empty sequence.
    pub fn new(pool: &Arc<KvPool>) -> Self {
        SeqKv { pool: pool.clone(), blocks: Vec::new(), len: 0, reserved: 0 }
    }

    /// The pool that its blocks come from.
    pub fn pool(&self) -> &Arc<KvPool> {
        &self.pool
    }

    /// Positions that it holds.
    #[allow(clippy::len_without_is_empty)] // nobody asks
    pub fn len(&self) -> usize {
        self.len
    }

    /// Makes room for `n` more positions, in blocks that no other sequence holds.
    ///
    /// # Errors
    /// If the pool is full; nothing is changed then.
    pub fn reserve(&mut self, n: usize) -> Result<(), KvError> {
        let end = self.len.checked_add(n).ok_or(KvError::TooLarge { n_blocks: self.pool.n_blocks })?;
        let more = end.div_ceil(KV_BLOCK).saturating_sub(self.blocks.len());
        // The block that the next position falls into may be shared since a truncation.
        let partial = (n > 0 && !self.len.is_multiple_of(KV_BLOCK)).then_some(self.len / KV_BLOCK);
        let (pool, blocks) = (&self.pool, &mut self.blocks);
        pool.taking(|state| {
            let shared = partial.filter(|&i| state.is_shared(blocks[i]));
            let mut taken = state.take(more + usize::from(shared.is_some()), pool.n_blocks)?;
            if let Some((i, copy)) = shared.and_then(|i| Some((i, taken.pop()?))) {
                pool.copy_block(blocks[i], copy);
                state.release(std::mem::replace(&mut blocks[i], copy));
            }
            blocks.append(&mut taken);
            Ok(())
        })?;
        self.reserved = self.reserved.max(end);
        Ok(())
    }

    /// Writes the keys and values of `n` new positions from `pos` on, of one layer and head: `k` is `(n, head_dim_k)`, `v` is
    /// `(n, head_dim_v)`.
    ///
    /// # Panics
    /// If the positions aren't reserved.
    ///
    /// # Safety
    /// While it runs no other thread writes these positions of this layer and head, and none computes attention of this
    /// sequence in this layer and head.
    pub unsafe fn write(&self, layer: usize, kv_head: usize, pos: usize, n: usize, k: Rows, v: Rows) {
        assert!(pos >= self.len && n <= self.reserved && pos <= self.reserved - n, "position {pos} isn't reserved");
        let mut done = 0;
        while done < n {
            let lane = (pos + done) % KV_BLOCK;
            let now = (KV_BLOCK - lane).min(n - done);
            let tile = self.pool.tile(self.blocks[(pos + done) / KV_BLOCK], layer, kv_head);
            let (k, v) = (Rows::new(k.data, k.stride, done * k.stride), Rows::new(v.data, v.stride, done * v.stride));
            // SAFETY: the tile is this sequence's; the rest is the caller's promise.
            simd::run(unsafe { write::Write::new(tile, lane, now, k, v) });
            done += now;
        }
    }

    /// Counts `n` positions, written in every layer, as held.
    ///
    /// # Panics
    /// If they weren't reserved.
    pub fn advance(&mut self, n: usize) {
        assert!(n <= self.reserved - self.len, "advancing past what is reserved");
        self.len += n;
    }

    /// Forgets the positions from `len` on, and what was reserved. Does nothing if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.reserved = self.len;
        let keep = self.len.div_ceil(KV_BLOCK);
        let mut state = self.pool.lock();
        self.blocks.drain(keep..).for_each(|b| state.release(b));
    }

    /// Another sequence with the same positions. Full blocks are shared, the last one is copied if it isn't full.
    ///
    /// # Errors
    /// If the pool has no block for the copy.
    pub fn fork(&self) -> Result<Self, KvError> {
        let (full, rest) = (self.len / KV_BLOCK, self.len % KV_BLOCK);
        let mut blocks = self.blocks[..full].to_vec();
        self.pool.taking(|state| {
            for copy in state.take(usize::from(rest > 0), self.pool.n_blocks)? {
                self.pool.copy_block(self.blocks[full], copy);
                blocks.push(copy);
            }
            self.blocks[..full].iter().for_each(|&b| state.share(b));
            Ok(())
        })?;
        Ok(SeqKv { pool: self.pool.clone(), blocks, len: self.len, reserved: self.len })
    }

    /// Writes what it holds: [`KvPool::saved_bytes`] bytes, which [`SeqKv::restore`] reads into a pool of the same
    /// layers and types.
    ///
    /// # Errors
    /// The writer's.
    pub fn save(&self, out: &mut dyn std::io::Write) -> std::io::Result<()> {
        let mut out = std::io::BufWriter::with_capacity(1 << 18, out);
        for (i, &block) in self.blocks[..self.len.div_ceil(KV_BLOCK)].iter().enumerate() {
            let n = (self.len - i * KV_BLOCK).min(KV_BLOCK);
            for run in self.pool.tiles(block).flat_map(|t| t.runs(n).collect::<Vec<_>>()) {
                // SAFETY: the run lies in the tile; positions below `len` aren't written by anybody.
                out.write_all(unsafe { std::slice::from_raw_parts(run.ptr, run.len) })?;
            }
        }
        out.flush()
    }

    /// Reads a sequence of `len` positions that [`SeqKv::save`] wrote. The bytes aren't trusted: whatever they are, the
    /// worst is a wrong answer.
    ///
    /// # Errors
    /// If the pool is full or the reader fails or ends early.
    pub fn restore(pool: &Arc<KvPool>, len: usize, input: &mut dyn Read) -> Result<Self, KvError> {
        let mut seq = SeqKv::new(pool);
        seq.reserve(len)?;
        let mut input = std::io::BufReader::with_capacity(1 << 18, input);
        for (i, &block) in seq.blocks.iter().enumerate() {
            let n = (len - i * KV_BLOCK).min(KV_BLOCK);
            for run in pool.tiles(block).flat_map(|t| t.runs(n).collect::<Vec<_>>()) {
                // SAFETY: the run lies in the tile, whose block belongs to `seq` alone.
                input.read_exact(unsafe { std::slice::from_raw_parts_mut(run.ptr, run.len) })?;
            }
        }
        seq.advance(len);
        Ok(seq)
    }

    /// The tile of the block that holds `pos`.
    pub(super) fn tile_at(&self, pos: usize, layer: usize, kv_head: usize) -> Tile<'_> {
        self.pool.tile(self.blocks[pos / KV_BLOCK], layer, kv_head)
    }
}

impl Drop for SeqKv {
    fn drop(&mut self) {
        self.truncate(0);
    }
}

impl KvPool {
    /// Copies a block that nobody writes to one that nobody else holds.
    fn copy_block(&self, from: u32, to: u32) {
        let at = |b: u32| self.pages.as_ptr().wrapping_add(b as usize * self.layout.block_bytes);
        assert!(from != to && (from as usize) < self.n_blocks && (to as usize) < self.n_blocks);
        // SAFETY: two different blocks inside the mapping; a shared block isn't written, and a block that is forked or
        // truncated is reached through its sequence's borrow, which its writer has to hold too.
        unsafe { at(from).copy_to_nonoverlapping(at(to), self.layout.block_bytes) };
    }
}

#[cfg(test)]
mod tests;
