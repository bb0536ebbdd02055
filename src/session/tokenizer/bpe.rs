//! Byte-pair encoding over bytes, with the merges in the order of their ranks.

use super::bytes;
use super::data::VocabData;
use super::error::{TokenizerError, excerpt};
use super::hash::{IndexTable, NONE};
use super::merge::{Merger, Pairs};
use super::pre::PreTokenizer;
use super::store::TokenStore;
use std::collections::HashMap;

/// A merge: two symbols and what they become. A symbol below the vocabulary's size is a token; the others occur in merges
/// only (a merge may make something that isn't a token, on the way to one).
#[derive(Clone, Copy)]
struct Merge {
    left: u32,
    right: u32,
    result: u32,
}

/// The merges of a vocabulary and its pre-tokeniser.
pub(super) struct Bpe {
    pre: PreTokenizer,
    /// By rank.
    merges: Vec<Merge>,
    by_pair: IndexTable,
    /// The symbol of each byte.
    byte_symbols: [u32; 256],
    n_vocab: u32,
}

impl Bpe {
    pub(super) fn new(data: &VocabData, store: &TokenStore, pre: PreTokenizer) -> Result<Bpe, TokenizerError> {
        let Some(texts) = &data.merges else {
            let key = "tokenizer.ggml.merges";
            return Err(TokenizerError::Missing { key, why: "byte-level BPE has nothing to go by without it" });
        };
        let max = (u32::MAX / 8) as usize; // four symbols a merge at most, and the tokens, stay below NONE
        if texts.len() > max {
            return Err(TokenizerError::TooLarge { what: "the number of merges", got: texts.len(), max });
        }
        let mut symbols = Symbols { store, others: HashMap::new() };
        let byte_symbols = std::array::from_fn(|b| symbols.id(&[b as u8]));
        let mut by_pair = IndexTable::with_capacity(texts.len());
        let mut merges: Vec<Merge> = Vec::with_capacity(texts.len());
        let mut whole = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            let merge = symbols.merge(index, text, &mut whole)?;
            if merge.left != NONE {
                let hash = by_pair.hash_pair(merge.left, merge.right);
                // A pair given twice keeps its first rank.
                by_pair.insert(hash, index as u32, |i| is_pair(&merges, i, merge.left, merge.right));
            }
            merges.push(merge);
        }
        Ok(Bpe { pre, merges, by_pair, byte_symbols, n_vocab: store.len() as u32 })
    }

    /// Appends the tokens of `text`.
    pub(super) fn encode(&self, store: &TokenStore, text: &str, merger: &mut Merger, out: &mut Vec<u32>) {
        self.pre.split(text, &mut |word| self.encode_word(store, word.as_bytes(), merger, out));
    }

    fn encode_word(&self, store: &TokenStore, word: &[u8], merger: &mut Merger, out: &mut Vec<u32>) {
        if self.pre.ignore_merges
            && let Some(id) = store.find(word)
        {
            out.push(id);
            return;
        }
        merger.clear();
        for (i, &b) in word.iter().enumerate() {
            merger.push(i as u32, self.byte_symbols[b as usize]);
        }
        merger.run(word.len(), self);
        merger.for_each(word.len(), |id, range| {
            if id < self.n_vocab {
                out.push(id);
            } else {
                self.encode_unknown(&word[range], out);
            }
        });
    }

    /// A piece that isn't a token. As in llama.cpp its printable ASCII characters become tokens of their own, and the rest,
    /// for which a sound vocabulary has tokens, is dropped.
    #[cold]
    fn encode_unknown(&self, piece: &[u8], out: &mut Vec<u32>) {
        let symbols = piece.iter().filter(|&&b| bytes::is_plain_ascii(b)).map(|&b| self.byte_symbols[b as usize]);
        out.extend(symbols.filter(|&id| id < self.n_vocab));
    }
}

impl Pairs for Bpe {
    #[inline]
    fn pair(&self, left: u32, right: u32, _: std::ops::Range<usize>) -> Option<(u32, u32)> {
        let hash = self.by_pair.hash_pair(left, right);
        let rank = self.by_pair.get(hash, |i| is_pair(&self.merges, i, left, right))?;
        Some((rank, self.merges[rank as usize].result))
    }
}

#[inline]
fn is_pair(merges: &[Merge], index: u32, left: u32, right: u32) -> bool {
    merges.get(index as usize).is_some_and(|m| m.left == left && m.right == right)
}

/// Numbers for all that occurs in merges.
struct Symbols<'s> {
    store: &'s TokenStore,
    /// What isn't a token.
    others: HashMap<Vec<u8>, u32>,
}

impl Symbols<'_> {
    fn id(&mut self, bytes: &[u8]) -> u32 {
        if let Some(id) = self.store.find(bytes) {
            return id;
        }
        if let Some(&id) = self.others.get(bytes) {
            return id;
        }
        let id = (self.store.len() + self.others.len()) as u32;
        self.others.insert(bytes.to_vec(), id);
        id
    }

    /// A merge from its text. One with a character outside GPT-2's alphabet can't occur, and keeps its rank only.
    fn merge(&mut self, index: usize, text: &str, whole: &mut Vec<u8>) -> Result<Merge, TokenizerError> {
        // The space that parts the two isn't the first character: that one is never empty.
        let parts = text.char_indices().nth(1).and_then(|(at, _)| {
            let space = at + text[at..].find(' ')?;
            Some((&text[..space], &text[space + 1..])).filter(|(_, right)| !right.is_empty())
        });
        let Some((left, right)) = parts else {
            return Err(TokenizerError::Merge { index, text: excerpt(text) });
        };
        whole.clear();
        if !bytes::decode_into(left, whole) {
            return Ok(Merge { left: NONE, right: NONE, result: NONE });
        }
        let middle = whole.len();
        if !bytes::decode_into(right, whole) {
            return Ok(Merge { left: NONE, right: NONE, result: NONE });
        }
        let (left, right) = whole.split_at(middle);
        Ok(Merge { left: self.id(left), right: self.id(right), result: self.id(whole) })
    }
}
