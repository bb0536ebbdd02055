//! The tokens' bytes in one arena, their kinds, and the way from bytes to a token.

use super::error::{TokenizerError, excerpt};
use super::hash::IndexTable;

/// What a token is, as `tokenizer.ggml.token_type` says (and as llama.cpp corrects it by name).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// What stands for text that has no token.
    Unknown,
    /// A mark such as `<|im_end|>`: recognised in text only on request, and not shown.
    Control,
    /// Added by the model's makers: always recognised in text, and shown.
    UserDefined,
    /// Never to be used.
    Unused,
    /// One byte, written `<0xHH>`.
    Byte,
    /// The file doesn't say.
    Undefined,
}

/// A token's properties, several at once: a control token stays what it was before it was recognised as one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Attr(pub(super) u8);

impl Attr {
    pub(super) const UNKNOWN: u8 = 1;
    pub(super) const UNUSED: u8 = 2;
    pub(super) const NORMAL: u8 = 4;
    pub(super) const CONTROL: u8 = 8;
    pub(super) const USER_DEFINED: u8 = 16;
    pub(super) const BYTE: u8 = 32;
    /// White space to the right of the token belongs to it.
    pub(super) const RSTRIP: u8 = 64;

    /// From the number in `tokenizer.ggml.token_type`.
    pub(super) fn from_type(kind: i32) -> Attr {
        Attr(match kind {
            1 => Attr::NORMAL,
            2 => Attr::UNKNOWN,
            3 => Attr::CONTROL,
            4 => Attr::USER_DEFINED,
            5 => Attr::UNUSED,
            6 => Attr::BYTE,
            _ => 0,
        })
    }

    pub(super) fn any(self, bits: u8) -> bool {
        self.0 & bits != 0
    }

    /// The property that counts most.
    pub(super) fn kind(self) -> TokenKind {
        let order = [
            (Attr::CONTROL, TokenKind::Control),
            (Attr::UNKNOWN, TokenKind::Unknown),
            (Attr::USER_DEFINED, TokenKind::UserDefined),
            (Attr::BYTE, TokenKind::Byte),
            (Attr::UNUSED, TokenKind::Unused),
            (Attr::NORMAL, TokenKind::Normal),
        ];
        order.into_iter().find(|&(bit, _)| self.any(bit)).map_or(TokenKind::Undefined, |(_, kind)| kind)
    }
}

/// The tokens of a vocabulary: bytes, properties, lookup.
pub(super) struct TokenStore {
    arena: Vec<u8>,
    /// Where each token's bytes end in the arena.
    ends: Vec<u32>,
    attrs: Vec<Attr>,
    index: IndexTable,
    longest: usize,
}

impl TokenStore {
    /// An empty store for `n` tokens of `bytes` bytes in all.
    pub(super) fn with_capacity(n: usize, bytes: usize) -> Result<Self, TokenizerError> {
        // Half of the range is left for symbols that aren't tokens, see `Bpe`.
        let max = (u32::MAX / 2) as usize;
        for (what, got) in [("the number of tokens", n), ("the bytes of all tokens", bytes)] {
            if got > max {
                return Err(TokenizerError::TooLarge { what, got, max });
            }
        }
        Ok(TokenStore {
            arena: Vec::with_capacity(bytes),
            ends: Vec::with_capacity(n),
            attrs: Vec::with_capacity(n),
            index: IndexTable::with_capacity(n),
            longest: 0,
        })
    }

    /// Appends a token. With `find`, its bytes lead to it.
    pub(super) fn push(&mut self, bytes: &[u8], attr: Attr, find: bool) -> Result<(), TokenizerError> {
        let id = self.ends.len() as u32;
        self.arena.extend_from_slice(bytes);
        self.ends.push(self.arena.len() as u32);
        self.attrs.push(attr);
        if !find {
            return Ok(());
        }
        self.longest = self.longest.max(bytes.len());
        let (arena, ends) = (&self.arena, &self.ends);
        let same = |other: u32| slice(arena, ends, other) == bytes;
        let hash = self.index.hash_bytes(bytes);
        match self.index.insert(hash, id, same) {
            None => Ok(()),
            Some(first) => Err(duplicate(first, id, &String::from_utf8_lossy(bytes))),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The token's bytes as they are looked up; nothing for an id outside the vocabulary.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        if (id as usize) < self.ends.len() { slice(&self.arena, &self.ends, id) } else { &[] }
    }

    /// The token's properties; none for an id outside the vocabulary.
    pub(super) fn attr(&self, id: u32) -> Attr {
        self.attrs.get(id as usize).copied().unwrap_or(Attr(0))
    }

    /// The token with these bytes.
    #[inline]
    pub(super) fn find(&self, bytes: &[u8]) -> Option<u32> {
        if bytes.len() > self.longest {
            return None;
        }
        let hash = self.index.hash_bytes(bytes);
        self.index.get(hash, |id| slice(&self.arena, &self.ends, id) == bytes)
    }
}

pub(super) fn duplicate(first: u32, second: u32, text: &str) -> TokenizerError {
    TokenizerError::DuplicateToken { first, second, text: excerpt(text) }
}

#[inline]
fn slice<'a>(arena: &'a [u8], ends: &[u32], id: u32) -> &'a [u8] {
    let id = id as usize;
    let start = if id == 0 { 0 } else { ends[id - 1] as usize };
    &arena[start..ends[id] as usize]
}

/// The byte that a token of the form `<0xHH>` stands for.
pub(super) fn parse_byte(text: &[u8]) -> Option<u8> {
    match text {
        [b'<', b'0', b'x', hi, lo, b'>'] => {
            let digit = |c: u8| (c as char).to_digit(16);
            Some((digit(*hi)? << 4 | digit(*lo)?) as u8)
        }
        _ => None,
    }
}
