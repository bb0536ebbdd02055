//! Tokenisers: text to tokens and back, as the file's own `tokenizer.ggml.*` metadata say.
//!
//! Two kinds: SentencePiece-style merging by score (`spm`, `tokenizer.ggml.model` = `llama`) and byte-level byte-pair encoding
//! (`bpe`, `gpt2`) behind a pre-tokeniser (`pre`, `tokenizer.ggml.pre`). The ids are those of llama.cpp for the same file; a
//! vocabulary that isn't understood is an error, never a guess.

mod bpe;
mod bytes;
mod data;
mod error;
mod hash;
mod load;
mod merge;
mod patterns;
mod pre;
mod special;
mod spm;
mod store;
mod stream;
#[cfg(test)]
mod tests;

pub use data::{SPECIAL_KEYS, Special, VocabData};
pub use error::TokenizerError;
pub use pre::known_pre_tokenizers;
pub use store::TokenKind;
pub use stream::StreamDecoder;

use merge::Merger;
use special::{Part, Roles, Specials};
use std::borrow::Cow;
use store::{Attr, TokenStore};

/// The longest run of text that is merged as one, so that 32-bit positions suffice. Longer ones are cut here, at a character.
const MAX_RUN: usize = 1 << 30;

/// A vocabulary and how to use it.
pub struct Tokenizer {
    store: TokenStore,
    algorithm: Algorithm,
    roles: Roles,
    specials: Specials,
    add_bos: bool,
    add_eos: bool,
}

enum Algorithm {
    Spm(Box<spm::Spm>),
    Bpe(Box<bpe::Bpe>),
}

impl Tokenizer {
    /// A tokeniser from a vocabulary's data.
    ///
    /// # Errors
    /// A model or pre-tokeniser that isn't known, arrays that are too short, duplicate tokens, malformed merges or byte tokens,
    /// special ids outside the vocabulary: see [`TokenizerError`].
    pub fn new(data: &VocabData) -> Result<Tokenizer, TokenizerError> {
        let is_bpe = match data.model {
            "llama" => false,
            "gpt2" => true,
            other => return Err(TokenizerError::UnknownModel(error::excerpt(other))),
        };
        check_lengths(data)?;
        let mut attrs: Vec<Attr> = match &data.types {
            Some(types) => types[..data.tokens.len()].iter().map(|&t| Attr::from_type(t)).collect(),
            None => vec![Attr(Attr::NORMAL); data.tokens.len()],
        };
        let roles = Roles::find(data, &mut attrs)?;
        set_rstrip(data, &mut attrs);
        let store = build_store(data, &attrs, is_bpe)?;
        let specials = Specials::new(&data.tokens, &attrs)?;
        let (algorithm, bos_by_default) = if is_bpe {
            let pre = pre::PreTokenizer::new(pre_name(data))?;
            let add_bos = pre.add_bos;
            (Algorithm::Bpe(Box::new(bpe::Bpe::new(data, &store, pre)?)), add_bos)
        } else {
            (Algorithm::Spm(Box::new(spm::Spm::new(data, &store, roles.get(Special::Unk))?)), true)
        };
        let add_bos = data.add_bos.unwrap_or(bos_by_default);
        let add_eos = data.add_eos.unwrap_or(false);
        for (wanted, special, key) in [
            (add_bos, Special::Bos, "tokenizer.ggml.bos_token_id"),
            (add_eos, Special::Eos, "tokenizer.ggml.eos_token_id"),
        ] {
            if wanted && roles.get(special).is_none() {
                return Err(TokenizerError::Missing { key, why: "every text must begin or end with this token" });
            }
        }
        Ok(Tokenizer { store, algorithm, roles, specials, add_bos, add_eos })
    }

    /// The tokens of a text.
    ///
    /// With `add_special`, BOS and EOS are added if the vocabulary wants them ([`adds_bos`](Self::adds_bos)). With `parse_special`, control
    /// tokens written out in the text become those tokens: for prompts from a template, not for text from strangers. Tokens
    /// of kind [`TokenKind::UserDefined`] are always recognised.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        if add_special && self.add_bos {
            out.extend(self.bos());
        }
        self.encode_parts(text, true, parse_special, &mut out);
        if add_special && self.add_eos {
            out.extend(self.eos());
        }
        out
    }

    /// The tokens of a text that stands within another: no space is put before it.
    pub fn encode_within(&self, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        self.encode_parts(text, false, false, &mut out);
        out
    }

    /// The beginning of a text counts as what comes after a special token.
    fn encode_parts(&self, text: &str, mut after_special: bool, parse_special: bool, out: &mut Vec<u32>) {
        let mut merger = Merger::default();
        self.specials.split(text, parse_special, |part| match part {
            Part::Token(id) => {
                out.push(id);
                after_special = true;
            }
            Part::Text(mut rest) => {
                while !rest.is_empty() {
                    let (run, next) = rest.split_at(rest.floor_char_boundary(MAX_RUN));
                    self.encode_run(run, after_special, &mut merger, out);
                    after_special = false;
                    rest = next;
                }
            }
        });
    }

    fn encode_run(&self, text: &str, after_special: bool, merger: &mut Merger, out: &mut Vec<u32>) {
        match &self.algorithm {
            Algorithm::Bpe(bpe) => bpe.encode(&self.store, text, merger, out),
            Algorithm::Spm(spm) => {
                let prefix = spm.add_space_prefix && after_special;
                spm.encode(&self.store, text, prefix, merger, out);
            }
        }
    }

    /// The bytes that a token stands for, control tokens as they are written. Perhaps not a whole character; nothing for unused
    /// tokens and ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Cow<'_, [u8]> {
        const SHOWN: u8 = Attr::UNKNOWN | Attr::CONTROL | Attr::USER_DEFINED;
        let attr = self.store.attr(id);
        let bytes = self.store.bytes(id);
        if attr.any(SHOWN) {
            return Cow::Borrowed(bytes);
        }
        if attr.any(Attr::NORMAL) {
            return match self.algorithm {
                Algorithm::Bpe(_) => Cow::Borrowed(bytes),
                Algorithm::Spm(_) => unescape(bytes),
            };
        }
        if attr.any(Attr::BYTE)
            && let Some(byte) = store::parse_byte(bytes)
        {
            return Cow::Owned(vec![byte]);
        }
        Cow::Borrowed(&[])
    }

    /// The text of some tokens; what isn't UTF-8 becomes U+FFFD.
    ///
    /// With `remove_special`, the BOS and EOS that [`encode`](Self::encode) adds are left out. With `show_special`, control tokens are written out.
    /// The space that a SentencePiece-style tokeniser puts before a text is removed. (llama.cpp keeps it where it removes BOS, and
    /// deletes spaces before punctuation for some vocabularies. Here decoding gives back what was encoded.)
    pub fn decode(&self, ids: &[u32], remove_special: bool, show_special: bool) -> String {
        let mut ids = ids;
        if remove_special && self.add_bos && ids.first().copied() == self.bos() {
            ids = ids.split_first().map_or(ids, |(_, rest)| rest);
        }
        if remove_special && self.add_eos && ids.last().copied() == self.eos() {
            ids = ids.split_last().map_or(ids, |(_, rest)| rest);
        }
        let mut stream = StreamDecoder::from_start(self, show_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(stream.push(self, id));
        }
        text.push_str(stream.finish());
        text
    }

    /// Bytes of the longest token: a text of `n` tokens is at most `n` times as long.
    pub fn longest(&self) -> usize {
        (0..self.store.len() as u32).map(|id| self.store.bytes(id).len()).max().unwrap_or(0)
    }

    /// Tokens in the vocabulary. (A model's output may be wider.)
    pub fn n_vocab(&self) -> usize {
        self.store.len()
    }

    /// What a token is.
    pub fn token_kind(&self, id: u32) -> TokenKind {
        self.store.attr(id).kind()
    }

    /// Whether text for readers leaves the token out: control tokens and the unknown one.
    pub fn is_hidden(&self, id: u32) -> bool {
        self.store.attr(id).any(Attr::CONTROL | Attr::UNKNOWN)
    }

    /// Whether the token ends a generation: EOS, the end of a turn or a message, and others known by name.
    pub fn is_eog(&self, id: u32) -> bool {
        self.roles.eog().binary_search(&id).is_ok()
    }

    /// All tokens that end a generation, ascending.
    pub fn eog_ids(&self) -> &[u32] {
        self.roles.eog()
    }

    /// The token with this function, if there is one.
    pub fn special(&self, special: Special) -> Option<u32> {
        self.roles.get(special)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.special(Special::Bos)
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.special(Special::Eos)
    }

    /// The control, user-defined or unknown token that is written like this, e.g. `<|im_end|>`.
    pub fn special_by_name(&self, name: &str) -> Option<u32> {
        self.specials.by_name(name)
    }

    /// Whether [`encode`](Self::encode) with `add_special` begins with BOS.
    pub fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether [`encode`](Self::encode) with `add_special` ends with EOS.
    pub fn adds_eos(&self) -> bool {
        self.add_eos
    }

    /// Whether a space is put before a text and after each special token.
    pub fn adds_space_prefix(&self) -> bool {
        matches!(&self.algorithm, Algorithm::Spm(spm) if spm.add_space_prefix)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.algorithm {
            Algorithm::Spm(_) => "SPM",
            Algorithm::Bpe(_) => "BPE",
        };
        write!(f, "Tokenizer({kind}, {} tokens)", self.n_vocab())
    }
}

/// Arrays that go with the tokens must reach to the last one; llama.cpp lets them be longer.
fn check_lengths(data: &VocabData) -> Result<(), TokenizerError> {
    let want = data.tokens.len();
    if want == 0 {
        let key = "tokenizer.ggml.tokens";
        return Err(TokenizerError::Missing { key, why: "a vocabulary needs at least one token" });
    }
    let lengths = [
        ("tokenizer.ggml.scores", data.scores.as_ref().map(Vec::len)),
        ("tokenizer.ggml.token_type", data.types.as_ref().map(Vec::len)),
    ];
    for (key, got) in lengths {
        if let Some(got) = got.filter(|&got| got < want) {
            return Err(TokenizerError::Length { key, got, want });
        }
    }
    Ok(())
}

/// Phi-3's special tokens swallow the white space to their right; only the model's name tells (as in llama.cpp).
fn set_rstrip(data: &VocabData, attrs: &mut [Attr]) {
    let name = data.model_name.unwrap_or_default().to_ascii_lowercase();
    if !name.contains("phi-3") && !name.contains("phi3") {
        return;
    }
    for (attr, token) in attrs.iter_mut().zip(&data.tokens) {
        let special = attr.any(Attr::CONTROL | Attr::USER_DEFINED | Attr::UNKNOWN);
        if special && !["<unk>", "<s>", "<|endoftext|>"].contains(token) {
            attr.0 |= Attr::RSTRIP;
        }
    }
}

/// The pre-tokeniser's name, `default` if the file has none.
fn pre_name<'a>(data: &VocabData<'a>) -> &'a str {
    data.pre.filter(|name| !name.is_empty()).unwrap_or_else(|| {
        tracing::warn!(
            "tokenizer.ggml.pre is absent: an old file, whose text may be cut in other places than the model learned"
        );
        "default"
    })
}

/// The tokens in the form in which they are looked up: a byte-level vocabulary's as the bytes that they stand for (special
/// ones as they are written), a SentencePiece-style one's as they are.
fn build_store(data: &VocabData, attrs: &[Attr], is_bpe: bool) -> Result<TokenStore, TokenizerError> {
    let bytes = data.tokens.iter().map(|t| t.len()).sum();
    let mut store = TokenStore::with_capacity(data.tokens.len(), bytes)?;
    let mut unfindable = std::collections::HashMap::new();
    let mut decoded = Vec::new();
    for (id, (text, &attr)) in data.tokens.iter().zip(attrs).enumerate() {
        let id = id as u32;
        let name;
        let text = if text.is_empty() {
            name = format!("[EMPTY_{id}]"); // as llama.cpp names it
            name.as_str()
        } else {
            text
        };
        if attr.any(Attr::BYTE) && store::parse_byte(text.as_bytes()).is_none() {
            return Err(TokenizerError::ByteToken { id, text: error::excerpt(text) });
        }
        if !is_bpe {
            store.push(text.as_bytes(), attr, true)?;
            continue;
        }
        decoded.clear();
        let can_decode = bytes::decode_into(text, &mut decoded);
        let written = attr.any(Attr::CONTROL | Attr::USER_DEFINED | Attr::UNKNOWN);
        // A word is looked up by its bytes, so a token whose written form differs from what it decodes to is
        // found as a special token only.
        let find = can_decode && (!written || decoded == text.as_bytes());
        if !find && let Some(first) = unfindable.insert(text.to_string(), id) {
            return Err(store::duplicate(first, id, text));
        }
        store.push(if find { &decoded } else { text.as_bytes() }, attr, find)?;
    }
    Ok(store)
}

/// A piece of a SentencePiece-style vocabulary with its spaces.
fn unescape(bytes: &[u8]) -> Cow<'_, [u8]> {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.contains(spm::SPACE) => Cow::Owned(text.replace(spm::SPACE, " ").into_bytes()),
        _ => Cow::Borrowed(bytes),
    }
}
