//! Merging neighbours, best pair first: what SentencePiece-style and byte-pair tokenisers have in common.
//!
//! A doubly linked list of symbols and a heap of candidate pairs make it O(n log n) for a word of n symbols, however
//! long the word is. Sennrich et al. 2016, “Neural Machine Translation of Rare Words with Subword Units”.

use super::hash::NONE;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A piece of the word that is being tokenised.
#[derive(Clone, Copy)]
pub(super) struct Symbol {
    /// The first byte of the word that belongs to it.
    pub(super) start: u32,
    /// Its token, or a number that only the vocabulary understands.
    pub(super) id: u32,
    prev: u32,
    next: u32,
    /// The rank of the pair that it forms with the next symbol; [`NONE`] if they don't form one, or if the symbol is gone.
    rank: u32,
    /// What that pair becomes.
    pair_id: u32,
}

/// Which neighbours merge.
pub(super) trait Pairs {
    /// The rank of a pair (lower merges first) and the symbol that it becomes. `left` and `right` are ids, `range` the bytes
    /// of the two together.
    fn pair(&self, left: u32, right: u32, range: std::ops::Range<usize>) -> Option<(u32, u32)>;
}

/// The list and the heap, kept between words to spare allocations.
#[derive(Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Reverse<u64>>,
}

impl Merger {
    /// Forgets the last word.
    pub(super) fn clear(&mut self) {
        self.symbols.clear();
        self.heap.clear();
    }

    /// Appends a symbol that starts at byte `start`.
    #[inline]
    pub(super) fn push(&mut self, start: u32, id: u32) {
        let i = self.symbols.len() as u32;
        self.symbols.push(Symbol {
            start,
            id,
            prev: i.wrapping_sub(1), // NONE for the first
            next: i + 1,
            rank: NONE,
            pair_id: NONE,
        });
    }

    /// Merges until no pair is left: lowest rank first, the leftmost among equals.
    pub(super) fn run(&mut self, end: usize, pairs: &impl Pairs) {
        let Some(last) = self.symbols.last_mut() else { return };
        last.next = NONE;
        for i in 0..self.symbols.len() as u32 - 1 {
            self.look(i, end, pairs);
        }
        while let Some(Reverse(key)) = self.heap.pop() {
            let left = key as u32;
            let symbol = self.symbols[left as usize];
            // Whatever was merged since then has another rank, or an entry of its own with the same key.
            if symbol.rank != (key >> 32) as u32 {
                continue;
            }
            let right = symbol.next as usize;
            let after = self.symbols[right].next;
            self.symbols[right].rank = NONE;
            let merged = &mut self.symbols[left as usize];
            merged.id = symbol.pair_id;
            merged.next = after;
            if after != NONE {
                self.symbols[after as usize].prev = left;
            }
            if symbol.prev != NONE {
                self.look(symbol.prev, end, pairs);
            }
            self.look(left, end, pairs);
        }
    }

    /// Looks up the pair that begins with symbol `left` and queues it.
    #[inline]
    fn look(&mut self, left: u32, end: usize, pairs: &impl Pairs) {
        let l = self.symbols[left as usize];
        let found = if l.next == NONE {
            None
        } else {
            let r = self.symbols[l.next as usize];
            let stop = if r.next == NONE { end } else { self.symbols[r.next as usize].start as usize };
            pairs.pair(l.id, r.id, l.start as usize..stop)
        };
        let (rank, pair_id) = found.unwrap_or((NONE, NONE));
        let l = &mut self.symbols[left as usize];
        (l.rank, l.pair_id) = (rank, pair_id);
        if rank != NONE {
            self.heap.push(Reverse(u64::from(rank) << 32 | u64::from(left)));
        }
    }

    /// Calls `each` with every symbol that is left, its id and its bytes, in order.
    pub(super) fn for_each(&self, end: usize, mut each: impl FnMut(u32, std::ops::Range<usize>)) {
        let mut at = if self.symbols.is_empty() { NONE } else { 0 };
        while at != NONE {
            let s = self.symbols[at as usize];
            let stop = if s.next == NONE { end } else { self.symbols[s.next as usize].start as usize };
            each(s.id, s.start as usize..stop);
            at = s.next;
        }
    }
}
