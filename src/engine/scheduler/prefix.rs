//! Common beginnings: a tree of full KV blocks by the tokens that they stand for.
//!
//! A block's contents depend on its tokens and on all before them, so a block is found under its tokens and the block before.
//! The tokens themselves are the key: two texts are never taken for each other.

use super::lock;
use crate::ops::kv::{HeldBlock, KV_BLOCK, Keeper, KvPool, SeqKv};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// The tokens of a block.
type Tokens = [u32; KV_BLOCK];
/// A block in the tree; 0 is the beginning of every text.
pub(super) type NodeId = u64;

/// A block that can tell whether somebody besides the tree uses it.
pub(super) trait Shared {
    /// Whether it's in use.
    fn is_shared(&self) -> bool;
}

impl Shared for HeldBlock {
    fn is_shared(&self) -> bool {
        HeldBlock::is_shared(self)
    }
}

struct Node<B> {
    id: NodeId,
    block: B,
    n_children: usize,
    /// When it was last found or put in.
    used: u64,
}

/// The tree.
pub(super) struct Prefixes<B> {
    nodes: HashMap<(NodeId, Tokens), Node<B>>,
    /// The key of each node, for the way back to its parent.
    keys: HashMap<NodeId, (NodeId, Tokens)>,
    clock: u64,
    next_id: NodeId,
}

/// The tokens of block `i` of a text, if it is full.
fn block(tokens: &[u32], i: usize) -> Option<&Tokens> {
    tokens.get(i * KV_BLOCK..)?.first_chunk()
}

impl<B: Shared> Prefixes<B> {
    pub fn new() -> Self {
        Prefixes { nodes: HashMap::new(), keys: HashMap::new(), clock: 0, next_id: 1 }
    }

    /// The blocks with which this text begins, at most `n_most`.
    pub fn path(&self, tokens: &[u32], n_most: usize) -> Vec<NodeId> {
        let mut path = Vec::new();
        let mut at = 0;
        while let Some(key) = block(tokens, path.len()).filter(|_| path.len() < n_most)
            && let Some(node) = self.nodes.get(&(at, *key))
        {
            at = node.id;
            path.push(at);
        }
        path
    }

    /// The blocks of a path. They count as used now.
    pub fn take<'a>(&'a mut self, path: &'a [NodeId]) -> impl Iterator<Item = &'a B> {
        self.clock += 1;
        for id in path {
            if let Some(node) = self.keys.get(id).and_then(|key| self.nodes.get_mut(key)) {
                node.used = self.clock;
            }
        }
        path.iter().filter_map(|id| self.keys.get(id).and_then(|key| self.nodes.get(key))).map(|n| &n.block)
    }

    /// Puts the block after `path` in, or finds it there: its place in the tree, and the block that is there. Who uses it must use
    /// that one, so that what is idle can be evicted: nobody uses a block without those before it.
    pub fn insert(&mut self, path: &[NodeId], tokens: &[u32], hold: impl FnOnce() -> B) -> Option<(NodeId, &B)> {
        let parent = path.last().copied().unwrap_or(0);
        let key = (parent, *block(tokens, path.len())?);
        self.clock += 1;
        if !self.nodes.contains_key(&key) {
            let id = self.next_id;
            self.next_id += 1;
            if let Some(node) = self.keys.get(&parent).and_then(|key| self.nodes.get_mut(key)) {
                node.n_children += 1;
            }
            self.nodes.insert(key, Node { id, block: hold(), n_children: 0, used: self.clock });
            self.keys.insert(id, key);
        }
        let node = self.nodes.get_mut(&key)?;
        node.used = self.clock;
        Some((node.id, &node.block))
    }

    /// Blocks in the tree.
    pub fn n_blocks(&self) -> usize {
        self.nodes.len()
    }

    /// Lets go of everything.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.keys.clear();
    }

    /// Gives up to `n` idle blocks back, those first that weren't used for the longest time, a block never before what
    /// follows it. How many.
    pub fn evict(&mut self, n: usize) -> usize {
        for i in 0..n {
            let idle = self.nodes.iter().filter(|(_, n)| n.n_children == 0 && !n.block.is_shared());
            let Some(key) = idle.min_by_key(|(_, n)| n.used).map(|(key, _)| *key) else { return i };
            if let Some(node) = self.nodes.remove(&key) {
                self.keys.remove(&node.id);
            }
            if let Some(parent) = self.keys.get(&key.0).and_then(|key| self.nodes.get_mut(key)) {
                parent.n_children -= 1;
            }
        }
        n
    }
}

impl Prefixes<HeldBlock> {
    /// A sequence of the blocks with which this text begins, at most `n_most`, and their path.
    pub fn begin(&mut self, pool: &Arc<KvPool>, tokens: &[u32], n_most: usize) -> (Vec<NodeId>, SeqKv) {
        let path = self.path(tokens, n_most);
        let kv = SeqKv::beginning(pool, self.take(&path));
        (path, kv)
    }
}

/// What is kept is given back to whoever needs room, a session outside of the queue too. Its lock is taken before the pool's.
impl Keeper for Mutex<Prefixes<HeldBlock>> {
    fn give_back(&self, n: usize) -> usize {
        lock(self).evict(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::rc::Rc;

    /// A block that stands for a text; whoever holds a clone uses it.
    impl Shared for Rc<Vec<u32>> {
        fn is_shared(&self) -> bool {
            Rc::strong_count(self) > 1
        }
    }

    /// A text of blocks, each of one token repeated, and a tail.
    fn text(blocks: &[u32], tail: usize) -> Vec<u32> {
        blocks.iter().flat_map(|&b| [b; KV_BLOCK]).chain(vec![9; tail]).collect()
    }

    fn put(tree: &mut Prefixes<Rc<Vec<u32>>>, tokens: &[u32]) {
        let mut path = Vec::new();
        while let Some((id, _)) = tree.insert(&path, tokens, || Rc::new(tokens[..(path.len() + 1) * KV_BLOCK].to_vec()))
        {
            path.push(id);
        }
    }

    fn n_idle(tree: &Prefixes<Rc<Vec<u32>>>) -> usize {
        tree.nodes.values().filter(|n| !n.block.is_shared()).count()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn what_is_found_is_what_was_put_in(
            steps in prop::collection::vec((prop::collection::vec(0u32..3, 0..5), 0usize..KV_BLOCK, 0usize..3), 1..30)
        ) {
            let mut tree: Prefixes<Rc<Vec<u32>>> = Prefixes::new();
            for (blocks, tail, evict) in steps {
                let tokens = text(&blocks, tail);
                let path = tree.path(&tokens, usize::MAX);
                let found: Vec<_> = tree.take(&path).cloned().collect();
                prop_assert_eq!(found.len(), path.len());
                for (i, b) in found.iter().enumerate() {
                    prop_assert_eq!(&b[..], &tokens[..(i + 1) * KV_BLOCK]);
                }
                // This text is in use until the next one comes.
                let in_use = found;
                put(&mut tree, &tokens);
                prop_assert_eq!(tree.path(&tokens, usize::MAX).len(), blocks.len());
                let before = (tree.n_blocks(), n_idle(&tree));
                prop_assert_eq!(tree.evict(evict), evict.min(before.1));
                prop_assert_eq!(tree.n_blocks(), before.0 - evict.min(before.1), "all that is idle can go");
                for b in &in_use {
                    prop_assert!(tree.path(b, usize::MAX).len() * KV_BLOCK == b.len(), "what is in use stays");
                }
            }
        }
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let mut tree = Prefixes::new();
        let (a, b) = (text(&[1, 2], 0), text(&[1, 3], 0));
        put(&mut tree, &a);
        put(&mut tree, &b);
        let path = tree.path(&a, usize::MAX);
        assert_eq!(tree.take(&path).count(), 2);
        tree.evict(1);
        assert_eq!((tree.path(&a, 9).len(), tree.path(&b, 9).len()), (2, 1));
        assert_eq!(tree.path(&a, 1).len(), 1, "no more than was asked for");
        tree.evict(9);
        assert_eq!(tree.n_blocks(), 0);
    }
}
