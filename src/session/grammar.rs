//! Grammars: which tokens may come next, so that a text is of a certain form. The parser is llguidance's.
//!
//! A grammar is written in llguidance's variant of Lark, or is a JSON schema. It is untrusted input: what compiling it and each mask may cost
//! is bounded by llguidance's limits, and what it doesn't support is an error, never ignored.

mod references;

use super::tokenizer::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::{Arc, Mutex};

/// The longest grammar or schema, in bytes.
const MAX_SOURCE: usize = 1 << 20;
/// How deep rules may lead into each other, in all: llguidance follows them by recursion.
const MAX_RULE_LEVELS: usize = 10_000;
/// The same for a schema's references. Where a schema is intersected with what it refers to, it is copied: what that takes grows with the
/// square of the depth, to some 60 MB here.
const MAX_SCHEMA_LEVELS: usize = 2000;
/// Stack for each level: the most that was seen is 4.5 KiB, without optimisation some three times as much.
const STACK_A_LEVEL: usize = 16 << 10;
/// Stack for the rest: regular expressions, intersections of schemas.
const STACK: usize = 4 << 20;

/// What a text has to be like. Clones are one grammar, which is compiled once for all of them if they are used one after the other.
#[derive(Clone, Debug)]
pub struct Grammar(Arc<Source>);

#[derive(Debug)]
struct Source {
    grammar: TopLevelGrammar,
    /// A bound on how deep compiling it recurses.
    n_levels: usize,
}

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
    /// It would lead the compiler too deep.
    #[error(
        "{what}'s rules or references lead into each other up to {n_levels} levels deep, at most {most} are followed: divide it, or have \
         fewer definitions"
    )]
    TooDeep {
        /// Grammar or schema.
        what: &'static str,
        /// How deep.
        n_levels: usize,
        /// How deep it may be.
        most: usize,
    },
    /// It isn't in the language that grammars are written in.
    #[error(
        "this is GBNF; grammars are written in llguidance's variant of Lark: a rule is `start: \"yes\" | \"no\"`, the first one is start"
    )]
    Gbnf,
    /// The system has no thread to compile it on.
    #[error("the system refused a thread to compile the grammar on: {0}")]
    System(String),
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
        let what = "the grammar";
        check_len(what, source.len())?;
        if source.trim().is_empty() {
            return Err(GrammarError::Compile("it is empty".into()));
        }
        if source.lines().any(is_gbnf) {
            return Err(GrammarError::Gbnf);
        }
        let source = references::resolve_embedded(source);
        let n_levels = lark_levels(&source)?;
        let grammar = TopLevelGrammar::from_lark(source);
        Ok(Grammar(Arc::new(Source { grammar, n_levels })))
    }

    /// Texts that are JSON and valid under this schema.
    ///
    /// # Errors
    /// If the schema is too long or isn't JSON.
    pub fn json_schema(source: &str) -> Result<Self, GrammarError> {
        check_len(SCHEMA, source.len())?;
        Self::schema(serde_json::from_str(source).map_err(|e| GrammarError::Schema(e.to_string()))?)
    }

    /// As [`Grammar::json_schema`], for a schema that was read already.
    ///
    /// # Errors
    /// If it isn't an object or a boolean, is too long or too deep, or refers to what isn't in it.
    pub fn schema(mut schema: Value) -> Result<Self, GrammarError> {
        check_len(SCHEMA, schema.to_string().len())?;
        references::resolve(&mut schema)?;
        let n_levels = schema_levels(&schema)?;
        match &mut schema {
            // Between tokens of JSON a space, or a new line and its indentation: a weak model would write white space for ever.
            Value::Object(fields) if !fields.contains_key("x-guidance") => {
                fields.insert("x-guidance".into(), json!({ "whitespace_pattern": r"\x20|\x0A\x20{0,20}" }));
            }
            Value::Object(_) | Value::Bool(_) => {}
            _ => return Err(GrammarError::Schema("it must be an object".into())),
        }
        let grammar = TopLevelGrammar::from_json_schema(schema);
        Ok(Grammar(Arc::new(Source { grammar, n_levels })))
    }

    /// Texts that are a JSON object.
    pub fn json_object() -> Self {
        let pattern = json!({ "whitespace_pattern": r"\x20|\x0A\x20{0,20}" });
        let grammar = TopLevelGrammar::from_json_schema(json!({ "type": "object", "x-guidance": pattern }));
        Grammar(Arc::new(Source { grammar, n_levels: 1 }))
    }
}

const SCHEMA: &str = "the JSON schema";
/// What stands before a schema in a grammar.
const EMBEDDED: &str = "%json";

fn check_len(what: &'static str, len: usize) -> Result<(), GrammarError> {
    if len > MAX_SOURCE { Err(GrammarError::TooLong { what, len }) } else { Ok(()) }
}

/// Whether a line is a rule of GBNF, which no line of Lark can be.
fn is_gbnf(line: &str) -> bool {
    line.split_once("::=").is_some_and(|(name, _)| {
        let name = name.trim();
        !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "-_".contains(c))
    })
}

/// At least as deep as compiling a grammar recurses: a rule is entered by its colon, once, and a group, a template or a condition by
/// its bracket. What stands in texts counts as well, so that Lark needn't be read for it.
fn lark_levels(source: &str) -> Result<usize, GrammarError> {
    let own = source.bytes().filter(|b| b":([{".contains(b)).count();
    check_levels("the grammar", own, MAX_RULE_LEVELS)?;
    let schema = |(at, word): (usize, &str)| {
        serde_json::Deserializer::from_str(&source[at + word.len()..]).into_iter::<Value>().next()?.ok()
    };
    // They are compiled one after the other.
    let schemas = source.match_indices(EMBEDDED).filter_map(schema);
    schemas.map(|s| schema_levels(&s)).try_fold(own, |most, n| Ok(most.max(n?)))
}

fn check_levels(what: &'static str, n_levels: usize, most: usize) -> Result<usize, GrammarError> {
    if n_levels > most { Err(GrammarError::TooDeep { what, n_levels, most }) } else { Ok(n_levels) }
}

/// At least as deep as compiling a schema recurses: it follows each reference once, so that all that are referred to may stand upon
/// each other.
fn schema_levels(schema: &Value) -> Result<usize, GrammarError> {
    check_numbers(schema)?;
    let mut references = HashSet::new();
    let mut n = levels(schema, &mut references);
    for reference in references {
        // That bounds the time that counting takes, too.
        check_levels(SCHEMA, n, MAX_SCHEMA_LEVELS)?;
        // As llguidance finds it: parts aren't unescaped, and the whole is also `#/`.
        let parts = reference.strip_prefix("#/").filter(|path| !path.is_empty()).into_iter().flat_map(|p| p.split('/'));
        n += 1 + references::find(schema, parts).map_or(0, |to| levels(to, &mut HashSet::new()));
    }
    check_levels(SCHEMA, n, MAX_SCHEMA_LEVELS)
}

/// llguidance computes with bounds as 64-bit floats: beyond 2^53 what it allows would be other numbers than the schema does.
fn check_numbers(schema: &Value) -> Result<(), GrammarError> {
    const LARGEST: f64 = (1u64 << 53) as f64;
    const OF_NUMBERS: [&str; 5] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
    match schema {
        Value::Object(fields) => fields.iter().try_for_each(|(name, v)| match v {
            Value::Number(n) if OF_NUMBERS.contains(&&**name) && n.as_f64().is_none_or(|x| x.abs() > LARGEST) => {
                Err(GrammarError::Schema(format!("{name} {n} isn't supported: it's beyond 2^53")))
            }
            Value::Object(named) if references::NAMED.contains(&&**name) => named.values().try_for_each(check_numbers),
            // Data, not schemas.
            _ if references::DATA.contains(&&**name) => Ok(()),
            _ => check_numbers(v),
        }),
        Value::Array(list) => list.iter().try_for_each(check_numbers),
        _ => Ok(()),
    }
}

/// The levels of objects and lists in each other, and what they refer to.
fn levels<'v>(v: &'v Value, references: &mut HashSet<&'v str>) -> usize {
    match v {
        Value::Object(fields) => {
            references.extend(fields.get("$ref").and_then(Value::as_str));
            1 + fields.values().map(|v| levels(v, references)).max().unwrap_or(0)
        }
        Value::Array(list) => 1 + list.iter().map(|v| levels(v, references)).max().unwrap_or(0),
        _ => 0,
    }
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
    /// The grammar that was compiled last, before its first token: most are used many times in turn.
    last: Mutex<Option<(Grammar, GrammarState)>>,
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
        Ok(Grammars { factory, last: Mutex::default() })
    }

    /// The state of a text that is to follow this grammar.
    ///
    /// # Errors
    /// If the grammar is wrong or too large, or uses what isn't supported.
    pub fn start(&self, grammar: &Grammar) -> Result<GrammarState, GrammarError> {
        let mut last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, state)) = last.as_ref().filter(|(of, _)| Arc::ptr_eq(&of.0, &grammar.0)) {
            return Ok(state.fork());
        }
        let state = self.compile(grammar)?;
        *last = Some((grammar.clone(), state.fork()));
        Ok(state)
    }

    /// Compiles on a thread of its own, whose stack is as deep as this grammar may need it.
    fn compile(&self, grammar: &Grammar) -> Result<GrammarState, GrammarError> {
        let source = &*grammar.0;
        let work = || {
            let matcher = Matcher::new(self.factory.create_parser(source.grammar.clone()));
            match matcher.get_error() {
                Some(why) => Err(compile(why)),
                None => Ok(GrammarState { matcher, mask: None, n_tokens: 0 }),
            }
        };
        std::thread::scope(|s| {
            let thread = std::thread::Builder::new().name("oncall-grammar".into());
            let thread = thread.stack_size(STACK + source.n_levels * STACK_A_LEVEL);
            let thread = thread.spawn_scoped(s, work).map_err(|e| GrammarError::System(e.to_string()))?;
            thread.join().unwrap_or_else(|_| Err(compile("the compiler panicked; please report the grammar")))
        })
    }
}

fn compile(e: impl std::fmt::Display) -> GrammarError {
    GrammarError::Compile(readable(&e.to_string()))
}

/// llguidance's messages without what is for its authors, and not longer than anybody reads.
fn readable(message: &str) -> String {
    let message = message.split("\n<").next().unwrap_or_default().trim_end();
    match message {
        "NoExtensionBias" | "NoExtension" => {
            "no token can come next: no text that the vocabulary can spell follows it".into()
        }
        _ => message.chars().take(1000).collect(),
    }
}

/// Where in its grammar a text is.
pub struct GrammarState {
    matcher: Matcher,
    mask: Option<SimpleVob>,
    n_tokens: usize,
}

impl GrammarState {
    /// A copy that shares nothing, not even the lexer's states, whose number is bounded: what one text does changes nothing for
    /// another.
    fn fork(&self) -> Self {
        GrammarState { matcher: self.matcher.deep_clone(), mask: self.mask.clone(), n_tokens: self.n_tokens }
    }

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
        GrammarError::Failed { n_tokens: self.n_tokens, why: readable(&e.to_string()) }
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

    /// RFC 6901: `/` and `~` in names are `~1` and `~0`; in a reference, bytes may be percent-encoded besides.
    #[test]
    fn references_have_escapes() {
        let follows = |grammar: Grammar| wander(&grammar, &[0; 8]).0;
        for reference in
            ["a~1b", "a%7E1b", "c~0d", "c%7e0d", "100%25", "r%C3%BCck", "x~01y", "plain", "deep~1er/properties/e~1f"]
        {
            let schema = json!({
                "$ref": format!("#/$defs/{reference}"),
                "$defs": {
                    "a/b": { "const": "yes" }, "c~d": { "const": "yes" }, "100%": { "const": "yes" }, "rück": { "const": "yes" },
                    "x~1y": { "const": "yes" }, "plain": { "const": "yes" }, "deep/er": { "properties": { "e/f": { "$ref": "#/$defs/c~0d" } } },
                },
            });
            let lark = Grammar::lark(&format!("start: %json {schema}\n")).unwrap();
            for grammar in [Grammar::schema(schema).unwrap(), lark] {
                assert_eq!(follows(grammar), "\"yes\"", "{reference}");
            }
        }
        // One that leads to where it stands; its definition's copy has a name of its own.
        let list = json!({ "type": "array", "items": { "$ref": "#/$defs/a~1b" }, "minItems": 1, "maxItems": 1 });
        let defs = json!({ "a/b": { "anyOf": [{ "const": "yes" }, list] }, "copy 0": { "const": "no" } });
        let recursive = json!({ "$ref": "#/$defs/a%7E1b", "$defs": defs });
        assert!(follows(Grammar::schema(recursive).unwrap()).contains("yes"));
        // Data is no reference, and a property may have any name.
        let data = json!({ "properties": { "default": { "$ref": "#/$defs/a~1b" }, "x": { "const": { "$ref": "a~2" } } },
            "$defs": { "a/b": { "type": "null" } } });
        Grammar::schema(data).unwrap();
        for (reference, words) in [
            ("#/$defs/a~2", "~0"),
            ("#/$defs/a~", "~0"),
            ("#/$defs/a%7", "%25"),
            ("#/$defs/a%ff", "UTF-8"),
            ("#/$defs/a~1c", "nothing in the schema"),
            ("other.json#/a", "into the schema itself"),
            ("#anchor", "anchor"),
        ] {
            let e = Grammar::schema(json!({ "items": { "$ref": reference }, "$defs": {} })).unwrap_err().to_string();
            assert!(e.contains(reference) && e.contains(words), "{e}");
        }
        let large = json!({ "a/b": { "enum": ["x".repeat(MAX_SOURCE * 2 / 3)] } });
        let e = Grammar::schema(json!({ "$ref": "#/$defs/a~1b", "$defs": large })).unwrap_err();
        assert!(matches!(e, GrammarError::TooLong { .. }), "{e}");
        let beyond = json!({ "properties": { "default": { "maximum": 1e300 } } });
        assert!(Grammar::schema(beyond).is_err(), "a property of that name has a schema");
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
        let e = state.accept(7).unwrap_err().to_string();
        assert!(!e.contains('<'), "{e}");
        let mut state = grammars.start(&Grammar::lark("start: A\nA: /a/ & /b/").unwrap()).unwrap();
        let e = state.mask().unwrap_err().to_string();
        assert!(e.contains("no token can come next"), "{e}");
        assert_eq!(Grammar::lark("root ::= \"a\"").unwrap_err(), GrammarError::Gbnf);
        let long = json!({ "enum": ["x".repeat(MAX_SOURCE)] });
        assert!(matches!(Grammar::schema(long), Err(GrammarError::TooLong { .. })));
    }

    /// A schema whose definitions are a chain, and the Lark rules of one.
    fn chain(n: usize, link: impl Fn(Value) -> Value) -> Value {
        let mut defs: serde_json::Map<String, Value> =
            (0..n).map(|i| (format!("a{i}"), link(json!({ "$ref": format!("#/$defs/a{}", i + 1) })))).collect();
        defs.insert(format!("a{n}"), json!({ "type": "null" }));
        json!({ "$ref": "#/$defs/a0", "$defs": defs })
    }

    fn rules(n: usize, link: impl Fn(String) -> String) -> String {
        let rules: String = (0..n).map(|i| format!("a{i}: {}\n", link(format!("a{}", i + 1)))).collect();
        format!("start: a0\n{rules}a{n}: \"yes\"\n")
    }

    /// On a thread with a small stack, as this one is: what is taken can be compiled and used, the rest is an error.
    #[test]
    fn long_chains_need_no_stack_of_the_caller() {
        let t = Arc::new(tokenizer());
        let grammars = Grammars::new(t.clone(), t.n_vocab()).unwrap();
        let links: [&dyn Fn(Value) -> Value; 8] = [
            &|r| r,
            &|r| json!({ "type": "object", "properties": { "x": r } }),
            &|r| json!({ "items": r }),
            &|r| json!({ "prefixItems": [r] }),
            &|r| json!({ "anyOf": [r] }),
            &|r| json!({ "allOf": [r, { "type": ["object", "null"] }] }),
            &|r| json!({ "additionalProperties": r }),
            &|r| json!({ "properties": { "x": { "allOf": [r, { "type": ["object", "null"] }] } } }),
        ];
        let mut all: Vec<(bool, Result<Grammar, GrammarError>)> = Vec::new();
        for link in links {
            let depth = levels(&link(json!({})), &mut HashSet::new()) + 1;
            all.push((true, Grammar::schema(chain(MAX_SCHEMA_LEVELS / depth - 3, link))));
            all.push((false, Grammar::schema(chain(MAX_SCHEMA_LEVELS / depth + 300, link))));
        }
        // Each level of a schema by a name of its own.
        let nest = (0..50).fold(json!({ "type": "null" }), |v, _| json!({ "items": v }));
        let aliases: Vec<Value> =
            (0..50).map(|i| json!({ "$ref": format!("#/$defs/n{}", "/items".repeat(i)) })).collect();
        let defs = json!({ "$defs": { "n": nest }, "anyOf": aliases });
        all.push((true, Grammar::schema(defs.clone())));
        all.push((true, Grammar::lark(&format!("start: %json {defs}"))));
        all.push((false, Grammar::lark(&format!("start: %json {}", chain(MAX_SCHEMA_LEVELS, |r| r)))));
        all.push((true, Grammar::lark(&rules(MAX_RULE_LEVELS - 10, |r| r))));
        all.push((true, Grammar::lark(&rules(MAX_RULE_LEVELS / 9 - 10, |r| format!("(((((((({r}))))))))")))));
        all.push((true, Grammar::lark(&rules(MAX_RULE_LEVELS - 10, |r| r).replace('a', "A"))));
        all.push((false, Grammar::lark(&rules(MAX_RULE_LEVELS, |r| r))));
        let mut conditions = format!("start: a::0\na::_: \"yes\" %if {}true{}", "not(".repeat(9000), ")".repeat(9000));
        all.push((true, Grammar::lark(&conditions)));
        conditions = format!("start: a{}\n", "{a".repeat(9000));
        all.push((true, Grammar::lark(&conditions)));
        for (i, (fits, grammar)) in all.into_iter().enumerate() {
            match grammar {
                Ok(g) => {
                    assert!(fits, "{i}");
                    if let Ok(mut state) = grammars.start(&g) {
                        state.forced();
                        state.mask().map(drop).unwrap_or_default();
                        drop(state.fork());
                    }
                }
                Err(e) => assert!(!fits && matches!(e, GrammarError::TooDeep { .. }), "{i}: {e}"),
            }
        }
    }

    #[test]
    fn a_grammar_is_compiled_once_and_its_states_share_nothing() {
        let t = Arc::new(tokenizer());
        let grammars = Grammars::new(t.clone(), t.n_vocab()).unwrap();
        let grammar = Grammar::lark("start: \"yes\" | \"12\"").unwrap();
        let mut first = grammars.start(&grammar).unwrap();
        first.accept(6).unwrap();
        assert!(Arc::ptr_eq(&grammars.last.lock().unwrap().as_ref().unwrap().0.0, &grammar.0));
        let mut second = grammars.start(&grammar.clone()).unwrap();
        second.accept(7).unwrap();
        assert!(first.is_complete() && second.is_complete());
        let other = Grammar::lark("start: \"yes\"").unwrap();
        grammars.start(&other).unwrap().accept(7).unwrap_err();
    }
}
