//! Any vocabulary is a tokeniser or an error; a tokeniser takes any text.
//!
//! Input: a byte of choices, then `tokens \x01 merges \x01 text`, tokens and merges one a line, a token's first
//! character saying its type and score.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oncall::session::tokenizer::{SPECIAL_KEYS, StreamDecoder, Tokenizer, VocabData};

/// One of each family of pre-tokenisers, and one that doesn't exist.
const PRES: [&str; 16] = [
    "gpt-2",
    "llama-bpe",
    "qwen2",
    "smollm",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "gpt-4o",
    "dbrx",
    "olmo",
    "tekken",
    "granite-docling",
    "refact",
    "afmoe",
    "default",
    "nonesuch",
];

fuzz_target!(|input: &[u8]| {
    let Some((&choices, rest)) = input.split_first() else { return };
    let rest = String::from_utf8_lossy(rest);
    let mut parts = rest.splitn(3, '\x01');
    let mut lines = || parts.next().unwrap_or("").split('\n').filter(|line| !line.is_empty());
    let (tokens, merges, text) = (lines(), lines(), parts.next().unwrap_or(""));

    let byte_level = choices & 1 == 0;
    let complete = choices & 2 == 0;
    let mut words = if complete { all_bytes(byte_level) } else { Vec::new() };
    let mut types = vec![if byte_level { 1 } else { 6 }; words.len()];
    let mut scores = vec![0.0; words.len()];
    for line in tokens {
        let first = line.chars().next().unwrap_or('1');
        words.push(line[first.len_utf8()..].into());
        types.push((first as i32 & 7) + i32::from(first == '0'));
        scores.push(if first == 'N' { f32::NAN } else { -((first as i32) >> 3) as f32 });
    }
    let plain = byte_level && complete && types.iter().all(|&t| t == 1);
    let data = VocabData {
        model: if byte_level { "gpt2" } else { "llama" },
        pre: Some(PRES[usize::from(choices >> 4)]),
        tokens: words.iter().map(String::as_str).collect(),
        scores: Some(scores),
        types: Some(types),
        merges: Some(merges.collect()),
        // Sometimes outside the vocabulary.
        ids: SPECIAL_KEYS[..2].iter().map(|&(key, special)| (key, special, u32::from(choices))).collect(),
        add_bos: Some(choices & 4 != 0),
        ..VocabData::default()
    };
    match Tokenizer::new(&data) {
        Ok(tokenizer) => {
            check(&tokenizer, text);
            if plain {
                // Nothing is lost where every byte has a token and no token is a mark.
                assert_eq!(tokenizer.decode(&tokenizer.encode(text, false, false), false, true), text);
            }
        }
        Err(error) => assert!(error.to_string().len() < 4096),
    }
});

fn check(tokenizer: &Tokenizer, text: &str) {
    for special in [false, true] {
        let ids = tokenizer.encode(text, special, special);
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.n_vocab()));
        let mut stream = StreamDecoder::new(special);
        let mut streamed = String::new();
        for &id in &ids {
            streamed.push_str(stream.push(tokenizer, id));
            let _ = (tokenizer.token_kind(id), tokenizer.is_eog(id));
        }
        streamed.push_str(stream.finish());
        let whole = tokenizer.decode(&ids, false, special);
        // Decoding a whole text takes away the space that the tokeniser put before it.
        assert!(streamed == whole || streamed.strip_prefix(' ') == Some(&whole));
    }
    assert!(tokenizer.token_bytes(u32::MAX).is_empty());
    tokenizer.decode(&[0, u32::MAX, 1], true, true);
}

/// A token for each byte, as the two kinds of vocabulary write them.
fn all_bytes(byte_level: bool) -> Vec<String> {
    let mut others = 256..;
    (0..=255u8)
        .map(|b| match b {
            _ if !byte_level => format!("<0x{b:02X}>"),
            // GPT-2's alphabet: printable bytes are themselves, the others are counted from U+0100.
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE.. => char::from(b).to_string(),
            _ => others.next().and_then(char::from_u32).unwrap_or_default().to_string(),
        })
        .collect()
}
