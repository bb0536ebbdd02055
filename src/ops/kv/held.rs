//! Full blocks held by themselves: what sequences that begin alike share without any of them having to live on.

use super::{KV_BLOCK, KvError, KvPool, SeqKv, State};
use std::sync::{Arc, MutexGuard, Weak};

/// A full block of some sequence's positions. It keeps the block as long as it lives; nobody writes to it.
pub struct HeldBlock {
    pool: Arc<KvPool>,
    block: u32,
}

impl HeldBlock {
    /// Whether a sequence holds the block too.
    pub fn is_shared(&self) -> bool {
        self.pool.lock().holders[self.block as usize].n_seqs > 0
    }
}

impl Drop for HeldBlock {
    fn drop(&mut self) {
        self.pool.lock().hold(self.block, |h| h.n_keep -= 1);
    }
}

/// Who holds blocks for sequences to come ([`SeqKv::hold`]), as long as nobody needs their room.
pub trait Keeper: Send + Sync {
    /// Lets go of up to `n` blocks that no sequence holds; how many. None of the pool's locks is held meanwhile, so those who hold
    /// a lock that this takes must not take blocks.
    fn give_back(&self, n: usize) -> usize;
}

impl KvPool {
    /// Names somebody to be asked for blocks when there are too few.
    pub fn add_keeper(&self, keeper: Weak<dyn Keeper>) {
        let mut keepers = self.keepers();
        keepers.retain(|k| k.strong_count() > 0);
        keepers.push(keeper);
    }

    fn keepers(&self) -> MutexGuard<'_, Vec<Weak<dyn Keeper>>> {
        self.keepers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Blocks that can be had: free ones, and those that are only kept.
    pub fn n_available(&self) -> usize {
        let state = self.lock();
        state.n_free(self.n_blocks) + state.n_idle
    }

    /// Does what takes blocks. Where they are too few, keepers give some back first.
    pub(super) fn taking<T>(&self, mut take: impl FnMut(&mut State) -> Result<T, KvError>) -> Result<T, KvError> {
        loop {
            // A statement of its own: the lock isn't held any more when keepers are asked.
            let result = take(&mut self.lock());
            match result {
                Err(KvError::Full { wanted, free, total }) => {
                    if !self.reclaim(wanted.saturating_sub(free)) {
                        return Err(KvError::Full { wanted, free: self.n_available(), total });
                    }
                }
                result => return result,
            }
        }
    }

    /// Asks keepers for `n` blocks, unless they don't have so many: then nothing is given up in vain. Whether there are more than before.
    fn reclaim(&self, n: usize) -> bool {
        if self.lock().n_idle < n {
            return false;
        }
        let keepers: Vec<Arc<dyn Keeper>> = self.keepers().iter().filter_map(Weak::upgrade).collect();
        let left = keepers.iter().fold(n, |left, k| left.saturating_sub(k.give_back(left)));
        left < n
    }
}

impl SeqKv {
    /// Holds block `i` of this sequence.
    ///
    /// # Panics
    /// If the block isn't full yet.
    pub fn hold(&self, i: usize) -> HeldBlock {
        assert!((i + 1) * KV_BLOCK <= self.len, "block {i} of {} positions isn't full", self.len);
        self.pool.lock().hold(self.blocks[i], |h| h.n_keep += 1);
        HeldBlock { pool: self.pool.clone(), block: self.blocks[i] }
    }

    /// Takes a held block for its own block `i`, which holds the same: a beginning that two have computed is in memory once.
    ///
    /// # Panics
    /// If its block isn't full yet, or the other one is another pool's.
    pub fn share(&mut self, i: usize, held: &HeldBlock) {
        assert!((i + 1) * KV_BLOCK <= self.len, "block {i} of {} positions isn't full", self.len);
        assert!(Arc::ptr_eq(&held.pool, &self.pool), "a block of another pool");
        let mut state = self.pool.lock();
        state.share(held.block);
        state.release(std::mem::replace(&mut self.blocks[i], held.block));
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
            state.share(held.block);
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

    /// Blocks that no other sequence holds: what can be had when it ends.
    pub fn n_own_blocks(&self) -> usize {
        let state = self.pool.lock();
        self.blocks.iter().filter(|&&b| state.holders[b as usize].n_seqs == 1).count()
    }
}
