//! A vocabulary's data from a file's metadata.

use super::data::{SPECIAL_KEYS, VocabData};
use super::{Tokenizer, TokenizerError};
use crate::gguf::{KeyError, Metadata};

impl Tokenizer {
    /// The tokeniser that a file's metadata describe.
    ///
    /// # Errors
    /// As [`Tokenizer::new`], and for keys that are absent or of another type.
    pub fn from_metadata(metadata: &Metadata) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::new(&VocabData::from_metadata(metadata)?)
    }
}

impl<'a> VocabData<'a> {
    /// The `tokenizer.ggml.*` keys of a file, as they are.
    ///
    /// # Errors
    /// If a key that no vocabulary can do without is absent, or one has another type than it must have.
    pub fn from_metadata(metadata: &'a Metadata) -> Result<VocabData<'a>, TokenizerError> {
        let mut ids = Vec::new();
        for (key, special) in SPECIAL_KEYS {
            if let Some(id) = metadata.u32(key)? {
                ids.push((key, special, id));
            }
        }
        Ok(VocabData {
            model: metadata.required_str("tokenizer.ggml.model")?,
            pre: metadata.str("tokenizer.ggml.pre")?,
            tokens: metadata.required_strings("tokenizer.ggml.tokens")?.collect(),
            scores: scores(metadata)?,
            types: metadata.i32s("tokenizer.ggml.token_type")?,
            merges: metadata.strings("tokenizer.ggml.merges")?.map(Iterator::collect),
            ids,
            add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?,
            model_name: metadata.str("general.name")?,
        })
    }
}

/// Scores are floats in most files and integers in some.
fn scores(metadata: &Metadata) -> Result<Option<Vec<f32>>, KeyError> {
    const KEY: &str = "tokenizer.ggml.scores";
    match metadata.i32s(KEY) {
        Ok(scores) => Ok(scores.map(|all| all.into_iter().map(|s| s as f32).collect())),
        Err(_) => metadata.f32s(KEY),
    }
}
