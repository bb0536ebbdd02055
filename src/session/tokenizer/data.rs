//! A vocabulary as the file has it, before anything is made of it.

/// A token that the metadata name by its function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    /// Begins a text.
    Bos,
    /// Ends a text.
    Eos,
    /// Ends a turn of a chat.
    Eot,
    /// Ends a message of a turn.
    Eom,
    /// Stands for what has no token.
    Unk,
    /// Separates texts.
    Sep,
    /// Fills up a batch.
    Pad,
    /// A hole to be filled.
    Mask,
    /// Fill-in-the-middle: what precedes the hole follows.
    FimPre,
    /// Fill-in-the-middle: what follows the hole follows.
    FimSuf,
    /// Fill-in-the-middle: the hole's content follows.
    FimMid,
    /// Fill-in-the-middle: padding.
    FimPad,
    /// Fill-in-the-middle: a repository's name follows.
    FimRep,
    /// Fill-in-the-middle: a file follows.
    FimSep,
}

/// How many of them there are.
pub(super) const N_SPECIAL: usize = 14;

/// The metadata keys of the special tokens (the GGUF specification's spelling, `seperator` included). The last three are
/// older names: where both are given the older one decides, as in llama.cpp.
pub const SPECIAL_KEYS: [(&str, Special); N_SPECIAL + 3] = [
    ("tokenizer.ggml.bos_token_id", Special::Bos),
    ("tokenizer.ggml.eos_token_id", Special::Eos),
    ("tokenizer.ggml.eot_token_id", Special::Eot),
    ("tokenizer.ggml.eom_token_id", Special::Eom),
    ("tokenizer.ggml.unknown_token_id", Special::Unk),
    ("tokenizer.ggml.seperator_token_id", Special::Sep),
    ("tokenizer.ggml.padding_token_id", Special::Pad),
    ("tokenizer.ggml.mask_token_id", Special::Mask),
    ("tokenizer.ggml.fim_pre_token_id", Special::FimPre),
    ("tokenizer.ggml.fim_suf_token_id", Special::FimSuf),
    ("tokenizer.ggml.fim_mid_token_id", Special::FimMid),
    ("tokenizer.ggml.fim_pad_token_id", Special::FimPad),
    ("tokenizer.ggml.fim_rep_token_id", Special::FimRep),
    ("tokenizer.ggml.fim_sep_token_id", Special::FimSep),
    ("tokenizer.ggml.prefix_token_id", Special::FimPre),
    ("tokenizer.ggml.suffix_token_id", Special::FimSuf),
    ("tokenizer.ggml.middle_token_id", Special::FimMid),
];

/// A vocabulary in the terms of a GGUF file's `tokenizer.ggml.*` keys, borrowed from it.
#[derive(Clone, Debug, Default)]
pub struct VocabData<'a> {
    /// `model`: `llama` or `gpt2`.
    pub model: &'a str,
    /// `pre`: the pre-tokeniser of a byte-level vocabulary.
    pub pre: Option<&'a str>,
    /// `tokens`: the text of each.
    pub tokens: Vec<&'a str>,
    /// `scores`: one for each token, or none at all.
    pub scores: Option<Vec<f32>>,
    /// `token_type`: one for each token, or none at all (then all are normal).
    pub types: Option<Vec<i32>>,
    /// `merges`: two parts and a space between, best first.
    pub merges: Option<Vec<&'a str>>,
    /// Ids of special tokens: the key that names it, its function, the id.
    pub ids: Vec<(&'static str, Special, u32)>,
    /// `add_bos_token`, if the file says.
    pub add_bos: Option<bool>,
    /// `add_eos_token`, if the file says.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`, if the file says.
    pub add_space_prefix: Option<bool>,
    /// `general.name`: Phi-3's special tokens swallow the white space after them, and only the name tells.
    pub model_name: Option<&'a str>,
}
