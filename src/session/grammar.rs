//! Grammars: which tokens may come next, so that a text is of a certain form. The parser is llguidance's.
//!
//! A grammar is written in llguidance's variant of Lark, or is a JSON schema. It is untrusted input: what compiling it and each mask may cost
//! is bounded by llguidance's limits, and what it doesn't support is an error, never ignored.

use super::tokenizer::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::sync::Arc;

/// The longest grammar or schema, in bytes.
const MAX_SOURCE: usize = 1 << 20;

/// What a text has to be like.
#[derive(Clone, Debug)]
pub struct Grammar(TopLevelGrammar);

/// Why a grammar can't be used.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum GrammarError {
    /// It's longer than any real one.
    #[error("{what} has {len} bytes, at most {MAX_SOURCE} are taken")]
    TooLong {
        /// Grammar or schema.
        what: &'static str,
        /// Its length.
        len: usize,
    },
    /// A schema that isn't JSON, or not a schema.
    #[error("the JSON schema can't be read: {0}")]
    Schema(String),
    /// It can't be compiled for this vocabulary.
    #[error("the grammar can't be used: {0}")]
    Compile(String),
    /// It became too large while it was used, or there is an error in it that only showed then.
    #[error("the grammar failed after {n_tokens} tokens: {why}")]
    Failed {
        /// Tokens written before.
        n_tokens: usize,
        /// What went wrong.
        why: String,
    },
    /// The vocabulary has no token that ends a text.
    #[error("this model has no token that ends a text, so a grammar couldn't end one either")]
    NoEnd,
}

impl Grammar {
    /// A grammar in llguidance's variant of Lark.
    ///
    /// # Errors
    /// If it's too long or empty. Whether it is right is found out when it's first used.
    pub fn lark(source: &str) -> Result<Self, GrammarError> {
        check_len("the grammar", source)?;
        if source.trim().is_empty() {
            return Err(GrammarError::Compile("it is empty".into()));
        }
        Ok(Grammar(TopLevelGrammar::from_lark(source.to_string())))
    }

    /// Texts that are JSON and valid under this schema.
    ///
    /// # Errors
    /// If the schema is too long or isn't JSON.
    pub fn json_schema(source: &str) -> Result<Self, GrammarError> {
        check_len("the JSON schema", source)?;
        Self::schema(serde_json::from_str(source).map_err(|e| GrammarError::Schema(e.to_string()))?)
    }

    /// As [`Grammar::json_schema`], for a schema that was read already.
    ///
    /// # Errors
    /// If it isn't an object or a boolean.
    pub fn schema(mut schema: Value) -> Result<Self, GrammarError> {
        match &mut schema {
            // Between tokens of JSON a space, or a new line and its indentation: a weak model would write white space for ever.
            Value::Object(fields) if !fields.contains_key("x-guidance") => {
                fields.insert("x-guidance".into(), json!({ "whitespace_pattern": r"\x20|\x0A\x20{0,20}" }));
            }
            Value::Object(_) | Value::Bool(_) => {}
            _ => return Err(GrammarError::Schema("it must be an object".into())),
        }
        Ok(Grammar(TopLevelGrammar::from_json_schema(schema)))
    }

    /// Texts that are a JSON object.
    pub fn json_object() -> Self {
        let pattern = json!({ "whitespace_pattern": r"\x20|\x0A\x20{0,20}" });
        Grammar(TopLevelGrammar::from_json_schema(json!({ "type": "object", "x-guidance": pattern })))
    }
}

fn check_len(what: &'static str, source: &str) -> Result<(), GrammarError> {
    if source.len() > MAX_SOURCE { Err(GrammarError::TooLong { what, len: source.len() }) } else { Ok(()) }
}

/// A vocabulary as llguidance sees it: a tree of bytes, and how the model's own tokeniser divides text.
struct Vocabulary {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<u32> {
        let tokens = self.trie.tokenize_with_greedy_fallback(text, |text| self.tokenizer.encode_within(text));
        // What the vocabulary can't spell comes back as the unknown token.
        if self.trie.decode_raw(&tokens) == text { tokens } else { self.trie.greedy_tokenize(text) }
    }

    /// So text that a grammar leaves no choice about gets the tokens that the model has learnt it as.
    fn tokenize_is_canonical(&self) -> bool {
        true
    }
}

/// What grammars are compiled with.
pub struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    /// For a vocabulary and a model whose logits are `n_vocab` wide.
    ///
    /// # Errors
    /// If the vocabulary has no token that ends a text.
    pub fn new(tokenizer: Arc<Tokenizer>, n_vocab: usize) -> Result<Self, GrammarError> {
        let end = tokenizer.eos().filter(|&t| tokenizer.is_eog(t)).or(tokenizer.eog_ids().first().copied());
        let end = end.filter(|&t| (t as usize) < n_vocab).ok_or(GrammarError::NoEnd)?;
        let word = |id: u32| {
            let bytes = tokenizer.token_bytes(id);
            // Control tokens aren't text, whatever they look like.
            if tokenizer.is_hidden(id) { [&[TokTrie::SPECIAL_TOKEN_MARKER], &*bytes].concat() } else { bytes.into() }
        };
        let words: Vec<Vec<u8>> = (0..n_vocab as u32).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(n_vocab as u32, end), &words);
        let env: TokEnv = Arc::new(Vocabulary { trie, tokenizer });
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices).map_err(compile)?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Grammars { factory })
    }

    /// The state of a text that is to follow this grammar.
    ///
    /// # Errors
    /// If the grammar is wrong or too large, or uses what isn't supported.
    pub fn start(&self, grammar: &Grammar) -> Result<GrammarState, GrammarError> {
        let matcher = Matcher::new(self.factory.create_parser(grammar.0.clone()));
        match matcher.get_error() {
            Some(why) => Err(GrammarError::Compile(why)),
            None => Ok(GrammarState { matcher, mask: None, n_tokens: 0 }),
        }
    }
}

fn compile(e: impl std::fmt::Display) -> GrammarError {
    GrammarError::Compile(e.to_string())
}

/// Where in its grammar a text is.
#[derive(Clone)]
pub struct GrammarState {
    matcher: Matcher,
    mask: Option<SimpleVob>,
    n_tokens: usize,
}

impl GrammarState {
    /// The tokens that may come next: token `t` is bit `t % 32` of word `t / 32`.
    ///
    /// # Errors
    /// If the grammar became too large.
    pub fn mask(&mut self) -> Result<&[u32], GrammarError> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| self.failed(e))?;
        Ok(self.mask.insert(mask).as_slice())
    }

    /// Goes on by a token that was allowed.
    ///
    /// # Errors
    /// If it wasn't.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        self.matcher.consume_token(token).map_err(|e| self.failed(e))?;
        self.n_tokens += 1;
        Ok(())
    }

    /// The tokens that come next whatever the model thinks, because the grammar allows one text only; none if it leaves a choice.
    pub fn forced(&mut self) -> Vec<u32> {
        self.matcher.compute_ff_tokens()
    }

    /// Whether the text is complete and can't go on.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }

    fn failed(&self, e: impl std::fmt::Display) -> GrammarError {
        GrammarError::Failed { n_tokens: self.n_tokens, why: e.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::tokenizer::VocabData;
    use proptest::prelude::*;

    /// Bytes as tokens, some words, and an end.
    fn tokenizer() -> Tokenizer {
        let words = ["<unk>", "</s>", "true", "false", "\":", "{\"", "yes", "12"];
        let bytes: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
        let tokens: Vec<&str> = words.iter().copied().chain(bytes.iter().map(|b| &**b)).collect();
        let types = (0..tokens.len()).map(|i| match i {
            0 => 2,
            1 => 3,
            i if i < words.len() => 1,
            _ => 6,
        });
        let data = VocabData {
            model: "llama",
            scores: Some(vec![0.0; tokens.len()]),
            types: Some(types.collect()),
            ids: vec![("tokenizer.ggml.eos_token_id", crate::session::tokenizer::Special::Eos, 1)],
            add_bos: Some(false),
            tokens,
            ..VocabData::default()
        };
        Tokenizer::new(&data).unwrap()
    }

    /// Follows the grammar by choices among the allowed tokens until it ends.
    fn wander(grammar: &Grammar, choices: &[u16]) -> (String, bool) {
        let t = Arc::new(tokenizer());
        let grammars = Grammars::new(t.clone(), t.n_vocab() + 3).unwrap();
        let mut state = grammars.start(grammar).unwrap();
        let mut bytes = Vec::new();
        for &c in choices {
            let forced = state.forced();
            let mask = state.mask().unwrap().to_vec();
            let allowed: Vec<u32> =
                (0..t.n_vocab() as u32 + 3).filter(|t| mask[*t as usize / 32] >> (t % 32) & 1 == 1).collect();
            let token = allowed[c as usize % allowed.len()];
            assert!(
                forced.is_empty() || forced[0] == token && allowed.len() == 1,
                "{forced:?}, but allowed are {allowed:?}"
            );
            assert_ne!(token, 0, "the unknown token isn't text");
            if token == 1 {
                return (String::from_utf8(bytes).unwrap(), true);
            }
            bytes.extend_from_slice(&t.token_bytes(token));
            state.accept(token).unwrap();
            if state.is_complete() {
                return (String::from_utf8(bytes).unwrap(), true);
            }
        }
        (String::from_utf8_lossy(&bytes).into_owned(), false)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        #[test]
        fn whatever_is_chosen_follows_the_schema(choices in prop::collection::vec(any::<u16>(), 200)) {
            let schema = r##"{"type":"object","properties":{"a":{"type":"boolean"},"n":{"$ref":"#/$defs/small"}},
                "required":["a","n"],"additionalProperties":false,"$defs":{"small":{"type":"integer","minimum":3,"maximum":12}}}"##;
            let (text, ended) = wander(&Grammar::json_schema(schema).unwrap(), &choices);
            prop_assert!(ended, "{text}");
            let v: Value = serde_json::from_str(&text).unwrap();
            prop_assert!(v["a"].is_boolean() && (3..=12).contains(&v["n"].as_i64().unwrap()), "{text}");
            prop_assert_eq!(v.as_object().unwrap().len(), 2);
        }
    }

    #[test]
    fn lark_grammars() {
        let (text, ended) = wander(&Grammar::lark("start: \"yes\" | \"no\"").unwrap(), &[0; 8]);
        assert!(ended && (text == "yes" || text == "no"), "{text}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let t = tokenizer();
        let n_vocab = t.n_vocab();
        let grammars = Grammars::new(Arc::new(t), n_vocab).unwrap();
        let start = |g: Grammar| grammars.start(&g).err().unwrap().to_string();
        assert!(Grammar::json_schema("{").unwrap_err().to_string().contains("EOF"));
        assert!(Grammar::json_schema("[]").unwrap_err().to_string().contains("object"));
        assert!(Grammar::lark(" \n").unwrap_err().to_string().contains("empty"));
        assert!(matches!(Grammar::lark(&"x".repeat(MAX_SOURCE + 1)), Err(GrammarError::TooLong { .. })));
        let e = start(Grammar::lark("start: nobody").unwrap());
        assert!(e.contains("nobody"), "{e}");
        let e = start(Grammar::json_schema(r#"{"type":"object","if":{}}"#).unwrap());
        assert!(e.contains("if"), "what isn't supported isn't ignored: {e}");
        let mut state = grammars.start(&Grammar::lark("start: \"yes\"").unwrap()).unwrap();
        state.accept(7).unwrap_err();
    }
}
