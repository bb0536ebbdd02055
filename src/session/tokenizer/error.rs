//! Why a vocabulary is refused.

/// What is wrong with the vocabulary in a file's metadata.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The model is none of those that oncall reads.
    #[error(
        "tokenizer.ggml.model is \"{0}\"; oncall reads \"llama\" (SentencePiece-style) and \"gpt2\" (byte-level BPE)"
    )]
    UnknownModel(String),
    /// The pre-tokeniser is none of those that oncall knows. Guessing one would give wrong tokens without a sign of it.
    #[error("tokenizer.ggml.pre is \"{name}\", a pre-tokeniser that oncall doesn't know; it knows {known}")]
    UnknownPre {
        /// The name in the file.
        name: String,
        /// All the names that oncall knows.
        known: String,
    },
    /// A key that the model needs is absent.
    #[error("{key} is absent from the file's metadata: {why}")]
    Missing {
        /// The key.
        key: &'static str,
        /// What needs it.
        why: &'static str,
    },
    /// A key is absent, or has another type than it must have.
    #[error(transparent)]
    Key(#[from] crate::gguf::KeyError),
    /// An array is shorter than the vocabulary.
    #[error("{key} has {got} entries for {want} tokens: the file is damaged, fetch or convert it again")]
    Length {
        /// The key.
        key: &'static str,
        /// Its length.
        got: usize,
        /// The number of tokens.
        want: usize,
    },
    /// More tokens, bytes or merges than 32-bit numbers can count.
    #[error("the vocabulary is too large: {what} is {got}, the most is {max}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size.
        got: usize,
        /// The limit.
        max: usize,
    },
    /// Two tokens have the same text, so that a text would have two readings.
    #[error("tokenizer.ggml.tokens: tokens {first} and {second} are both \"{text}\"")]
    DuplicateToken {
        /// The first of the two.
        first: u32,
        /// The second.
        second: u32,
        /// Their text.
        text: String,
    },
    /// A score that isn't a number can't be ordered.
    #[error("tokenizer.ggml.scores: the score of token {0} isn't a number")]
    Score(u32),
    /// A token of type byte must be written `<0xHH>`.
    #[error("tokenizer.ggml.tokens: token {id} is of type byte, but \"{text}\" isn't of the form <0xHH>")]
    ByteToken {
        /// The token.
        id: u32,
        /// Its text.
        text: String,
    },
    /// A byte that no token stands for, in a vocabulary that has no token for the unknown either.
    #[error(
        "tokenizer.ggml.tokens: no token stands for byte 0x{0:02X}, and there is no unknown token to take its place"
    )]
    NoByteToken(u8),
    /// A merge must be two parts with a space between them.
    #[error("tokenizer.ggml.merges: entry {index} is \"{text}\", not two parts with a space between them")]
    Merge {
        /// Its place in the list.
        index: usize,
        /// Its text.
        text: String,
    },
    /// A special token's id points outside the vocabulary.
    #[error("{key} is {id}, but the vocabulary has {n_vocab} tokens")]
    SpecialOutside {
        /// The key.
        key: &'static str,
        /// The id.
        id: u32,
        /// Tokens in the vocabulary.
        n_vocab: usize,
    },
    /// A pattern or a matcher couldn't be built.
    #[error("cannot build the {what}: {why}")]
    Build {
        /// What was built.
        what: &'static str,
        /// The builder's reason.
        why: String,
    },
}

/// The start of a text from a file, fit for a message.
pub(super) fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(40).flat_map(char::escape_debug).collect();
    if text.chars().nth(40).is_some() {
        short.push('…');
    }
    short
}
