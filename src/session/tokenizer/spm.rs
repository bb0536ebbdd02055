//! SentencePiece-style merging: the pair whose text is the token of the highest score goes first.
//!
//! Kudo and Richardson 2018, “SentencePiece”. The file's `tokenizer.ggml.model` is `llama`. Spaces are written as U+2581;
//! characters without a token become the tokens of their bytes.

use super::data::VocabData;
use super::error::TokenizerError;
use super::hash::NONE;
use super::merge::{Merger, Pairs};
use super::store::TokenStore;

/// How a space is written in the vocabulary: U+2581.
pub(super) const SPACE: &str = "\u{2581}";

/// What a SentencePiece-style vocabulary has beside its tokens.
pub(super) struct Spm {
    /// For each token a number that is lower for a higher score, and equal for equal ones.
    ranks: Vec<u32>,
    /// The token of each byte.
    bytes: [u32; 256],
    /// No token has a space after another character, so that words can be merged one by one.
    words_apart: bool,
    pub(super) add_space_prefix: bool,
}

impl Spm {
    pub(super) fn new(data: &VocabData, store: &TokenStore, unknown: Option<u32>) -> Result<Spm, TokenizerError> {
        let n = data.tokens.len();
        let ranks = match &data.scores {
            None => vec![rank(0.0); n],
            Some(scores) => {
                if let Some(i) = scores[..n].iter().position(|s| s.is_nan()) {
                    return Err(TokenizerError::Score(i as u32));
                }
                scores[..n].iter().map(|&s| rank(s)).collect()
            }
        };
        let mut bytes = [NONE; 256];
        for (b, slot) in bytes.iter_mut().enumerate() {
            let id = store.find(format!("<0x{b:02X}>").as_bytes()).or_else(|| store.find(&[b as u8]));
            *slot = id.or(unknown).ok_or(TokenizerError::NoByteToken(b as u8))?;
        }
        let words_apart = (0..n as u32).all(|id| !has_inner_space(store.bytes(id)));
        let add_space_prefix = data.add_space_prefix.unwrap_or(true);
        Ok(Spm { ranks, bytes, words_apart, add_space_prefix })
    }

    /// Appends the tokens of `text`; with `prefix`, as if a space stood before it.
    pub(super) fn encode(&self, store: &TokenStore, text: &str, prefix: bool, merger: &mut Merger, out: &mut Vec<u32>) {
        let mut escaped = String::with_capacity(text.len() + text.len() / 2 + SPACE.len());
        if prefix {
            escaped.push_str(SPACE);
        }
        for (i, part) in text.split(' ').enumerate() {
            if i > 0 {
                escaped.push_str(SPACE);
            }
            escaped.push_str(part);
        }
        let mut rest = escaped.as_str();
        while !rest.is_empty() {
            let end = if self.words_apart { word_end(rest) } else { rest.len() };
            self.encode_word(store, &rest[..end], merger, out);
            rest = &rest[end..];
        }
    }

    fn encode_word(&self, store: &TokenStore, word: &str, merger: &mut Merger, out: &mut Vec<u32>) {
        merger.clear();
        let mut char_bytes = [0; 4];
        for (i, c) in word.char_indices() {
            let id = store.find(c.encode_utf8(&mut char_bytes).as_bytes());
            merger.push(i as u32, id.unwrap_or(NONE));
        }
        let word = word.as_bytes();
        merger.run(word.len(), &Words { spm: self, store, word });
        merger.for_each(word.len(), |id, range| match id {
            NONE => out.extend(word[range].iter().map(|&b| self.bytes[b as usize])),
            id => out.push(id),
        });
    }
}

struct Words<'a> {
    spm: &'a Spm,
    store: &'a TokenStore,
    word: &'a [u8],
}

impl Pairs for Words<'_> {
    #[inline]
    fn pair(&self, _: u32, _: u32, range: std::ops::Range<usize>) -> Option<(u32, u32)> {
        let id = self.store.find(&self.word[range])?;
        Some((self.spm.ranks[id as usize], id))
    }
}

/// A number that orders scores from high to low.
fn rank(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits(); // −0 becomes 0: the two are equal
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    !ascending
}

/// Whether a space follows something else in the token.
fn has_inner_space(token: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(token) else { return true };
    text.trim_start_matches(SPACE).contains(SPACE)
}

/// Where the next word begins: at a space that follows something else.
fn word_end(text: &str) -> usize {
    let spaces = text.len() - text.trim_start_matches(SPACE).len();
    text[spaces..].find(SPACE).map_or(text.len(), |i| spaces + i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_order_scores_from_high_to_low() {
        let scores = [f32::INFINITY, 3.5, 1e-30, 0.0, -1e-30, -2.0, -1e9, f32::NEG_INFINITY];
        let ranks: Vec<u32> = scores.iter().map(|&s| rank(s)).collect();
        assert!(ranks.is_sorted_by(|a, b| a < b), "{ranks:?}");
        assert_eq!(rank(-0.0), rank(0.0));
        assert!(ranks.iter().all(|&r| r != NONE));
    }

    #[test]
    fn words_begin_at_a_space_after_something_else() {
        assert_eq!(word_end("\u{2581}\u{2581}ab\u{2581}c"), 8);
        assert_eq!(word_end("ab"), 2);
        assert_eq!(word_end("\u{2581}"), 3);
        assert!(has_inner_space("a\u{2581}".as_bytes()));
        assert!(!has_inner_space("\u{2581}\u{2581}a".as_bytes()));
    }
}
