//! Full blocks held by themselves: what sequences that begin alike share without any of them having to live on.

use super::{KV_BLOCK, KvPool, SeqKv};
use std::sync::Arc;

/// A full block of some sequence's positions. It keeps the block as long as it lives; nobody writes to it.
pub struct HeldBlock {
    pool: Arc<KvPool>,
    block: u32,
}

impl HeldBlock {
    /// Whether a sequence holds the block too.
    pub fn is_shared(&self) -> bool {
        self.pool.lock().refs[self.block as usize] > 1
    }
}

impl Drop for HeldBlock {
    fn drop(&mut self) {
        self.pool.lock().release(self.block);
    }
}

impl SeqKv {
    /// Holds block `i` of this sequence.
    ///
    /// # Panics
    /// If the block isn't full yet.
    pub fn hold(&self, i: usize) -> HeldBlock {
        assert!((i + 1) * KV_BLOCK <= self.len, "block {i} of {} positions isn't full", self.len);
        self.pool.lock().refs[self.blocks[i] as usize] += 1;
        HeldBlock { pool: self.pool.clone(), block: self.blocks[i] }
    }

    /// A sequence that begins with these blocks, in this order. They must be the first blocks of one and the same text:
    /// what they hold depends on everything before it.
    ///
    /// # Panics
    /// If a block is another pool's.
    pub fn beginning<'a>(pool: &Arc<KvPool>, blocks: impl Iterator<Item = &'a HeldBlock>) -> Self {
        let mut seq = SeqKv::new(pool);
        let mut state = pool.lock();
        for held in blocks {
            assert!(Arc::ptr_eq(&held.pool, pool), "a block of another pool");
            state.refs[held.block as usize] += 1;
            seq.blocks.push(held.block);
        }
        drop(state);
        seq.len = seq.blocks.len() * KV_BLOCK;
        seq.reserved = seq.len;
        seq
    }

    /// Blocks that it holds, shared ones too.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody else holds: what comes free when it ends.
    pub fn n_own_blocks(&self) -> usize {
        let state = self.pool.lock();
        self.blocks.iter().filter(|&&b| state.refs[b as usize] == 1).count()
    }
}
