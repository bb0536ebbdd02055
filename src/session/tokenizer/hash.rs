//! Compact hash tables of numbers: the keys stay where they are, in an arena or a list, and a slot holds a 32-bit index.

use std::hash::{BuildHasher, RandomState};

/// No entry.
pub(super) const NONE: u32 = u32::MAX;

/// An open-addressing table of indices. The caller brings the hash and says whether an index is the one looked for.
pub(super) struct IndexTable {
    slots: Vec<u32>,
    seed: u64,
}

impl IndexTable {
    /// A table for up to `n` entries, at most half full. The seed differs in every process, so that a file cannot be
    /// made whose keys all collide; nothing but the speed depends on it.
    pub(super) fn with_capacity(n: usize) -> Self {
        let slots = (n.max(4) * 2).next_power_of_two();
        IndexTable { slots: vec![NONE; slots], seed: RandomState::new().hash_one(0u64) }
    }

    /// The hash of a run of bytes in this table.
    #[inline]
    pub(super) fn hash_bytes(&self, bytes: &[u8]) -> u64 {
        let mut h = self.seed ^ (bytes.len() as u64).wrapping_mul(K1);
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            let word = u64::from_le_bytes(chunk.try_into().unwrap_or_default());
            h = fold(h ^ word, K0);
        }
        let mut tail = 0u64;
        for &b in chunks.remainder() {
            tail = tail << 8 | u64::from(b);
        }
        fold(h ^ tail, K1)
    }

    /// The hash of a pair of numbers in this table.
    #[inline]
    pub(super) fn hash_pair(&self, a: u32, b: u32) -> u64 {
        fold(self.seed ^ (u64::from(a) << 32 | u64::from(b)), K1)
    }

    /// The index with this hash that `is` accepts.
    #[inline]
    pub(super) fn get(&self, hash: u64, is: impl Fn(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        // At most half of the slots are taken, so an empty one ends the search.
        loop {
            match self.slots[at] {
                NONE => return None,
                index if is(index) => return Some(index),
                _ => at = (at + 1) & mask,
            }
        }
    }

    /// Adds `index`, unless one that `is` accepts is there already: that one is the answer then.
    pub(super) fn insert(&mut self, hash: u64, index: u32, is: impl Fn(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            match self.slots[at] {
                NONE => {
                    self.slots[at] = index;
                    return None;
                }
                there if is(there) => return Some(there),
                _ => at = (at + 1) & mask,
            }
        }
    }
}

// Odd numbers with well-mixed bits: the fractions of the square roots of 2 and 3.
const K0: u64 = 0x6a09_e667_f3bc_c909;
const K1: u64 = 0xbb67_ae85_84ca_a73b;

/// Both halves of the 128-bit product, folded into one.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let p = u128::from(a) * u128::from(b);
    (p >> 64) as u64 ^ p as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_inserted_and_nothing_else() {
        let words: Vec<String> = (0..5000).map(|i| format!("w{i:x}{}", "z".repeat(i % 23))).collect();
        let mut table = IndexTable::with_capacity(words.len());
        for (i, w) in words.iter().enumerate() {
            let h = table.hash_bytes(w.as_bytes());
            assert_eq!(table.insert(h, i as u32, |j| words[j as usize] == *w), None);
        }
        for (i, w) in words.iter().enumerate() {
            let h = table.hash_bytes(w.as_bytes());
            assert_eq!(table.get(h, |j| words[j as usize] == *w), Some(i as u32));
            assert_eq!(table.insert(h, 0, |j| words[j as usize] == *w), Some(i as u32));
        }
        for absent in ["", "w", "zz", "w0zzzz"] {
            let h = table.hash_bytes(absent.as_bytes());
            assert_eq!(table.get(h, |j| words[j as usize] == absent), None);
        }
    }
}
