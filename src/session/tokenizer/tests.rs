//! Both kinds of tokeniser on vocabularies made here.

use super::*;
use proptest::prelude::*;

/// A byte-level vocabulary: all bytes, then what the merges make, then special tokens.
struct ByteLevel {
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
}

impl ByteLevel {
    fn new(merges: &[(&str, &str)], special: &[(&str, i32)]) -> ByteLevel {
        let mut tokens: Vec<String> = (0..=255u8).map(|b| bytes::encode(&[b])).collect();
        let merges: Vec<(String, String)> =
            merges.iter().map(|(a, b)| (bytes::encode(a.as_bytes()), bytes::encode(b.as_bytes()))).collect();
        tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
        let mut types = vec![1; tokens.len()];
        for (text, kind) in special {
            tokens.push(text.to_string());
            types.push(*kind);
        }
        ByteLevel { tokens, types, merges: merges.iter().map(|(a, b)| format!("{a} {b}")).collect() }
    }

    fn data(&self, pre: &'static str) -> VocabData<'_> {
        VocabData {
            model: "gpt2",
            pre: Some(pre),
            tokens: self.tokens.iter().map(String::as_str).collect(),
            types: Some(self.types.clone()),
            merges: Some(self.merges.iter().map(String::as_str).collect()),
            add_bos: Some(false),
            ..VocabData::default()
        }
    }

    fn tokenizer(&self, pre: &'static str) -> Tokenizer {
        Tokenizer::new(&self.data(pre)).unwrap()
    }
}

fn pieces(t: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|&id| String::from_utf8_lossy(&t.token_bytes(id)).into_owned()).collect()
}

#[test]
fn the_best_merge_goes_first_and_the_leftmost_among_equals() {
    let v = ByteLevel::new(&[("b", "c"), ("a", "b"), ("a", "a"), ("aa", "a")], &[]);
    let t = v.tokenizer("gpt-2");
    assert_eq!(pieces(&t, &t.encode("abc", false, false)), ["a", "bc"]);
    assert_eq!(pieces(&t, &t.encode("aaaaa", false, false)), ["aa", "aaa"]);
    assert_eq!(pieces(&t, &t.encode("ab c", false, false)), ["ab", " ", "c"]);
}

#[test]
fn ignore_merges_takes_a_word_that_is_a_token() {
    // "abc" is a token that no merge makes.
    let v = ByteLevel::new(&[("b", "c")], &[("abc", 1)]);
    let with = v.tokenizer("tekken");
    let without = v.tokenizer("gpt-2");
    assert_eq!(pieces(&with, &with.encode("abc", false, false)), ["abc"]);
    assert_eq!(pieces(&without, &without.encode("abc", false, false)), ["a", "bc"]);
}

#[test]
fn special_tokens_are_parsed_on_request_and_user_defined_ones_always() {
    let v = ByteLevel::new(&[], &[("<|im_end|>", 3), ("<tool>", 4), ("<tool>x", 4)]);
    let t = v.tokenizer("gpt-2");
    let end = t.special_by_name("<|im_end|>").unwrap();
    assert_eq!(t.encode("<|im_end|>", false, true), [end]);
    assert_eq!(t.encode("<|im_end|>", false, false).len(), 10);
    assert_eq!(pieces(&t, &t.encode("a<tool>xb<tool>", false, false)), ["a", "<tool>x", "b", "<tool>"]);
    assert!(t.is_eog(end) && t.special(Special::Eot) == Some(end));
    assert_eq!(t.token_kind(end), TokenKind::Control);
    assert_eq!(t.decode(&[end, u32::from(b'A')], false, false).len(), 1);
    assert_eq!(t.special_by_name("<|im"), None);
}

fn embedded() -> Tokenizer {
    static MODEL: &[u8] = include_bytes!("../../../models/tinymoe-stories-Q8_0.gguf");
    let file = crate::gguf::Gguf::from_static("embedded", MODEL).unwrap();
    Tokenizer::from_metadata(file.metadata()).unwrap()
}

#[test]
fn the_embedded_model_reads_and_writes_its_own_text() {
    let t = embedded();
    let text = "Once upon a time, there was a little girl named Lily.\n She said: “Où?” 字 \u{1F600}\t!";
    let ids = t.encode(text, true, false);
    assert_eq!(ids[0], t.bos().unwrap());
    assert_eq!(t.decode(&ids, true, false), text);
    assert!(t.is_eog(t.eos().unwrap()));
}
