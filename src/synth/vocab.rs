//! A small SentencePiece-style vocabulary, so that a synthetic model can tokenise text without any other file.

/// A token's kind, as `tokenizer.ggml.token_type` numbers them.
mod kind {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// Tokens, with scores and kinds of the same length.
pub struct Vocab {
    /// The pieces; U+2581 stands for a space.
    pub tokens: Vec<String>,
    /// Merging prefers the piece of the higher score.
    pub scores: Vec<f32>,
    /// [`kind`] of each.
    pub kinds: Vec<i32>,
}

/// Pieces beside single characters: words whose every prefix is a piece too, so that merging reaches them.
const WORDS: &str = "the and to of a in was he she it that said they his her you with for on had as at but \
    is not be one there all so were little day very then when what out up him them big happy friend \
    once upon time went saw wanted play home mother could would like good from this have are can";

impl Vocab {
    /// A vocabulary of exactly `n` tokens: unknown, BOS (1), EOS (2), the bytes, printable ASCII, pieces of
    /// common English words, and unused tokens up to `n`.
    pub fn of_size(n: usize) -> Self {
        let mut vocab =
            Vocab { tokens: Vec::with_capacity(n), scores: Vec::with_capacity(n), kinds: Vec::with_capacity(n) };
        vocab.push("<unk>".into(), kind::UNKNOWN);
        vocab.push("<s>".into(), kind::CONTROL);
        vocab.push("</s>".into(), kind::CONTROL);
        for byte in 0..=255u8 {
            vocab.push(format!("<0x{byte:02X}>"), kind::BYTE);
        }
        let mut pieces = vec!["\u{2581}".to_string()];
        pieces.extend((b'!'..=b'~').map(|c| char::from(c).to_string()));
        for word in WORDS.split_whitespace() {
            let word = format!("\u{2581}{word}");
            for (end, _) in word.char_indices().skip(2).chain([(word.len(), ' ')]) {
                pieces.push(word[..end].to_string());
            }
        }
        let mut seen = std::collections::HashSet::new();
        pieces.retain(|piece| seen.insert(piece.clone()));
        for piece in pieces {
            vocab.push(piece, kind::NORMAL);
        }
        for unused in vocab.tokens.len()..n {
            vocab.push(format!("[PAD{unused}]"), kind::UNUSED);
        }
        vocab.tokens.truncate(n);
        vocab.scores.truncate(n);
        vocab.kinds.truncate(n);
        vocab
    }

    /// The smallest size that can still write every byte.
    pub const MIN: usize = 3 + 256;

    fn push(&mut self, token: String, kind: i32) {
        // earlier pieces are the more common ones; special tokens and bytes are never merged
        let score = match kind {
            kind::NORMAL => -(self.tokens.len() as f32),
            _ => 0.0,
        };
        self.tokens.push(token);
        self.scores.push(score);
        self.kinds.push(kind);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_exactly_the_size_and_no_token_twice() {
        for n in [Vocab::MIN, 1024, 5000] {
            let vocab = Vocab::of_size(n);
            assert_eq!((vocab.tokens.len(), vocab.scores.len(), vocab.kinds.len()), (n, n, n));
            let distinct: std::collections::HashSet<_> = vocab.tokens.iter().collect();
            assert_eq!(distinct.len(), n);
        }
    }

    #[test]
    fn words_can_be_reached_by_merging() {
        let vocab = Vocab::of_size(1024);
        let known: std::collections::HashSet<_> = vocab.tokens.iter().map(String::as_str).collect();
        for piece in vocab.tokens.iter().filter(|t| t.starts_with('\u{2581}')) {
            let (last, _) = piece.char_indices().next_back().unwrap();
            assert!(last == 0 || known.contains(&piece[..last]), "{piece}");
        }
        assert!(known.contains("\u{2581}little"));
        assert!(vocab.tokens.last().unwrap().starts_with("[PAD"), "room for words in 1024");
    }
}
