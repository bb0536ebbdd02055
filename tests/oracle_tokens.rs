//! Byte-pair encoding against the crate `tokenizers`, on a vocabulary that is made here: needs neither network nor llama.cpp.
//!
//! Only the pre-tokenisers that llama.cpp cuts as the models' makers do are compared: it simplifies some of the others.

mod common;

use common::strings::HARD;
use common::vocab::{Random, all_pairs, random_text};
use serde_json::{Value, json};
use tokenizers::Tokenizer as Oracle;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// The published tokeniser of a pre-tokeniser's name, with the vocabulary made here.
fn oracle(pre: &str, splits: &[&str]) -> Oracle {
    let vocab = all_pairs(pre);
    let ids: serde_json::Map<String, Value> =
        vocab.tokens.iter().enumerate().map(|(i, t)| (t.clone(), json!(i))).collect();
    let split = |p: &&str| json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false});
    let mut cuts: Vec<Value> = splits.iter().map(split).collect();
    cuts.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre == "llama-bpe", "vocab": ids, "merges": vocab.merges},
    });
    Oracle::from_bytes(serde_json::to_vec(&tokenizer).expect("JSON")).expect("a tokeniser")
}

#[test]
fn byte_pair_encoding_is_the_published_one() {
    let mut all = [LLAMA3, QWEN2, GPT2].map(|p| vec![p]).to_vec();
    all.push(vec![r"\p{N}", GPT2]);
    all.push(DEEPSEEK_V3.to_vec());
    for (pre, splits) in ["llama-bpe", "qwen2", "gpt-2", "smollm", "deepseek-v3"].into_iter().zip(&all) {
        let (ours, theirs) = (all_pairs(pre).tokenizer(), oracle(pre, splits));
        let mut random = Random(5);
        let random = (0..400).map(|_| {
            let n = 1 + random.below(50);
            random_text(&mut random, n)
        });
        for text in HARD.iter().map(|t| t.to_string()).chain(random) {
            // `(?i:'s)` matches ſ too, which llama.cpp's pattern doesn't.
            let text = text.replace('ſ', "f");
            let expected = theirs.encode(text.as_str(), false).expect("the oracle encodes");
            assert_eq!(ours.encode(&text, false, false), expected.get_ids(), "{pre}: {text:?}");
        }
    }
}
