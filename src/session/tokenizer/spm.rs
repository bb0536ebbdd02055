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
    /// The characters that have a space after them in some token, sorted. After any other a space begins a new word, and
    /// words can be merged one by one.
    before_space: Vec<char>,
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
        let mut before_space: Vec<char> = data.tokens.iter().flat_map(|t| chars_before_space(t)).collect();
        before_space.sort_unstable();
        before_space.dedup();
        let add_space_prefix = data.add_space_prefix.unwrap_or(true);
        Ok(Spm { ranks, bytes, before_space, add_space_prefix })
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
            let end = self.word_end(rest);
            self.encode_word(store, &rest[..end], merger, out);
            rest = &rest[end..];
        }
    }

    /// Where the next word begins.
    fn word_end(&self, text: &str) -> usize {
        let begins = |at: &usize| {
            let before = text[..*at].chars().next_back();
            before.is_some_and(|c| self.before_space.binary_search(&c).is_err())
        };
        text.match_indices(SPACE).map(|(at, _)| at).find(begins).unwrap_or(text.len())
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

/// The characters of a text that have a space after them.
fn chars_before_space(text: &str) -> impl Iterator<Item = char> {
    text.match_indices(SPACE).filter_map(|(at, _)| text[..at].chars().next_back())
}

#[cfg(test)]
mod tests {
    use super::super::store::Attr;
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
    fn words_begin_at_a_space_unless_a_token_spans_it() {
        let tokens = vec!["<unk>", "\u{2581}\u{2581}a", "b>\u{2581}<", "\u{2581}c"];
        let attrs = vec![Attr(Attr::NORMAL); 4];
        let data = VocabData { model: "llama", tokens, ..VocabData::default() };
        let store = super::super::build_store(&data, &attrs, false).unwrap();
        let spm = Spm::new(&data, &store, Some(0)).unwrap();
        assert_eq!(spm.before_space, ['>', '\u{2581}']);
        assert_eq!(spm.word_end("\u{2581}\u{2581}ab\u{2581}c"), 8);
        assert_eq!(spm.word_end("b>\u{2581}<\u{2581}c"), 6);
        assert_eq!(spm.word_end("ab"), 2);
        assert_eq!(spm.word_end("\u{2581}"), 3);
    }
}
