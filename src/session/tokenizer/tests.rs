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

/// Merges of some English, so that the properties meet tokens of several bytes.
fn english() -> ByteLevel {
    ByteLevel::new(
        &[
            ("t", "h"),
            ("th", "e"),
            (" ", "t"),
            (" t", "he"),
            ("i", "n"),
            ("in", "g"),
            (" ", " "),
            ("  ", "  "),
            ("\n", "\n"),
            ("é", "e"),
            ("\u{c3}", "\u{a9}"),
            ("e", "r"),
            (" ", "a"),
            ("1", "2"),
        ],
        &[("<|endoftext|>", 3), ("<|im_end|>", 3), ("[x]", 4)],
    )
}

/// One of each kind.
const PRES: [&str; 12] = [
    "default",
    "llama-bpe",
    "qwen2",
    "gpt-2",
    "smollm",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "gpt-4o",
    "tekken",
    "afmoe",
    "exaone-moe",
];

/// Any text, with more of what tokenisers treat specially.
fn texts() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => any::<String>(),
        2 => "[ \t\r\n]{0,6}",
        2 => "[a-zA-Z']{0,12}",
        1 => "[0-9]{0,9}",
        1 => "(the |ing|é|字|👍🏽|<\\|im_end\\|>|\\[x\\]|<0x0A>|\u{3000}){0,4}",
    ];
    proptest::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn byte_level_text_survives(text in texts(), parse_special: bool, add_special: bool) {
        thread_local!(static ALL: Vec<Tokenizer> = PRES.iter().map(|pre| english().tokenizer(pre)).collect());
        ALL.with(|all| {
            for t in all {
                let ids = t.encode(&text, add_special, parse_special);
                prop_assert_eq!(&t.decode(&ids, true, true), &text);
            }
            Ok(())
        })?;
    }

    #[test]
    fn scored_text_survives(text in texts(), add_special: bool) {
        thread_local!(static T: Tokenizer = embedded());
        T.with(|t| {
            let text = text.replace(spm::SPACE, "_"); // which means a space to such a vocabulary
            let ids = t.encode(&text, add_special, false);
            prop_assert_eq!(&t.decode(&ids, true, false), &text);
            Ok(())
        })?;
    }

    #[test]
    fn streaming_gives_the_same_and_never_half_a_character(ids in proptest::collection::vec(0u32..300, 0..40), show: bool) {
        let t = english().tokenizer("llama-bpe");
        let mut bytes = Vec::new();
        let mut stream = StreamDecoder::new(show);
        let mut streamed = String::new();
        for &id in &ids {
            if show || !t.is_hidden(id) {
                bytes.extend_from_slice(&t.token_bytes(id));
            }
            streamed.push_str(stream.push(&t, id));
            // All but an unfinished character is out at once.
            let whole = String::from_utf8_lossy(&bytes);
            let held = whole.strip_prefix(&streamed).map(|rest| rest.to_owned());
            prop_assert!(matches!(held.as_deref(), Some("" | "\u{fffd}")), "{:?} of {:?}", streamed, whole);
        }
        streamed.push_str(stream.finish());
        prop_assert_eq!(&streamed, &String::from_utf8_lossy(&bytes));
        prop_assert_eq!(&t.decode(&ids, false, show), &streamed);
    }

    #[test]
    fn damaged_vocabularies_never_panic(
        tokens in proptest::collection::vec("[ab<>0x|Ġ▁ é]{0,8}|<0x[0-9A-F]{2}>", 0..40),
        types in proptest::option::of(proptest::collection::vec(-1i32..9, 0..45)),
        scores in proptest::option::of(proptest::collection::vec(any::<f32>(), 0..45)),
        merges in proptest::option::of(proptest::collection::vec("[abĠé ]{0,6}", 0..30)),
        ids in proptest::collection::vec((0usize..SPECIAL_KEYS.len(), 0u32..50), 0..4),
        model in "llama|gpt2|bert",
        add_bos: Option<bool>,
        text in texts(),
    ) {
        let data = VocabData {
            model: &model,
            pre: Some("qwen2"),
            tokens: tokens.iter().map(String::as_str).collect(),
            types,
            scores,
            merges: merges.as_ref().map(|m| m.iter().map(String::as_str).collect()),
            ids: ids.iter().map(|&(k, id)| (SPECIAL_KEYS[k].0, SPECIAL_KEYS[k].1, id)).collect(),
            add_bos,
            ..VocabData::default()
        };
        match Tokenizer::new(&data) {
            Ok(t) => {
                let ids = t.encode(&text, true, true);
                prop_assert!(ids.iter().all(|&id| (id as usize) < t.n_vocab()));
                t.decode(&ids, true, true);
            }
            Err(e) => prop_assert!(!e.to_string().is_empty()),
        }
    }
}

#[test]
fn each_damage_has_its_error() {
    let v = english();
    let n = v.tokens.len();
    let error = |change: &dyn Fn(&mut VocabData)| {
        let mut data = v.data("qwen2");
        change(&mut data);
        Tokenizer::new(&data).expect_err("it is damaged").to_string()
    };
    let cases: &[(&dyn Fn(&mut VocabData), &[&str])] = &[
        (&|d| d.model = "bert", &["tokenizer.ggml.model", "\"bert\"", "gpt2"]),
        (&|d| d.pre = Some("nonesuch"), &["tokenizer.ggml.pre", "\"nonesuch\"", "llama-bpe"]),
        (&|d| d.tokens.clear(), &["tokenizer.ggml.tokens"]),
        (&|d| d.types = Some(vec![1; 7]), &["tokenizer.ggml.token_type", "7 entries"]),
        (&|d| d.scores = Some(vec![1.0; 9]), &["tokenizer.ggml.scores", "9 entries"]),
        (&|d| d.merges = None, &["tokenizer.ggml.merges is absent"]),
        (&|d| d.merges.as_mut().unwrap()[3] = "ab", &["tokenizer.ggml.merges", "entry 3", "\"ab\""]),
        (&|d| d.merges.as_mut().unwrap()[4] = "a ", &["entry 4"]),
        (&|d| d.merges.as_mut().unwrap()[5] = " a", &["entry 5"]),
        (&|d| d.merges.as_mut().unwrap()[6] = "", &["entry 6"]),
        (&|d| d.tokens[9] = "a", &["tokens 9 and 97 are both \"a\""]),
        (&|d| d.tokens[259] = "<|im_end|>", &["tokens 259 and", "<|im_end|>"]),
        (&|d| d.types.as_mut().unwrap()[8] = 6, &["token 8", "type byte", "<0xHH>"]),
        (
            &|d| d.ids = vec![("tokenizer.ggml.eos_token_id", Special::Eos, 100_000)],
            &["tokenizer.ggml.eos_token_id is 100000"],
        ),
        (&|d| d.add_bos = Some(true), &["tokenizer.ggml.bos_token_id is absent"]),
        (&|d| d.add_eos = Some(true), &["tokenizer.ggml.eos_token_id is absent"]),
        (&|d| (d.model, d.scores) = ("llama", Some(vec![f32::NAN; 1000])), &["score of token 0"]),
    ];
    for (change, wanted) in cases {
        let message = error(change);
        assert!(wanted.iter().all(|w| message.contains(w)), "{message} lacks one of {wanted:?}");
    }
    // Longer arrays than needed are fine, as in llama.cpp.
    let mut data = v.data("qwen2");
    data.types = Some(vec![1; n + 5]);
    Tokenizer::new(&data).unwrap();
}

#[test]
fn without_byte_tokens_the_unknown_token_stands_in_or_it_is_an_error() {
    let data = |tokens: &[&'static str]| VocabData {
        model: "llama",
        tokens: tokens.to_vec(),
        types: Some(vec![2, 3, 3, 1, 1]),
        add_bos: Some(false),
        ..VocabData::default()
    };
    let t = Tokenizer::new(&data(&["<unk>", "<s>", "</s>", "▁a", "▁"])).unwrap();
    assert_eq!(t.encode("aéa", false, false), [3, 0, 0, 0]);
    let mut none = data(&["▁a"]);
    none.types = None;
    none.ids = vec![("tokenizer.ggml.unknown_token_id", Special::Unk, 0)];
    assert!(Tokenizer::new(&none).is_ok());
}

#[test]
fn bos_eos_and_the_space_before_a_text() {
    let tokens = ["<unk>", "<s>", "</s>", "▁a", "▁", "a", "▁b", "<u>"];
    let data = VocabData {
        model: "llama",
        tokens: tokens.to_vec(),
        scores: Some(vec![0.0, 0.0, 0.0, -1.0, -5.0, -4.0, -2.0, 0.0]),
        types: Some(vec![2, 3, 3, 1, 1, 1, 1, 4]),
        add_eos: Some(true),
        ..VocabData::default()
    };
    let t = Tokenizer::new(&data).unwrap();
    assert_eq!(t.encode("", true, false), [1, 2]);
    assert!(t.encode("", false, false).is_empty());
    assert_eq!(t.encode("a b", true, false), [1, 3, 6, 2]);
    // After a special token the space is put again.
    assert_eq!(t.encode("a<u>a</s>", false, true), [3, 7, 3, 2]);
    assert_eq!(t.decode(&[1, 3, 6, 2], true, false), "a b");
    assert_eq!(t.decode(&[1, 3, 6, 2], false, true), "<s> a b</s>");
    let plain = Tokenizer::new(&VocabData { add_space_prefix: Some(false), ..data }).unwrap();
    assert_eq!(plain.encode("a b", false, false), [5, 6]);
    assert_eq!(plain.decode(&[5, 6], false, false), "a b");
}

#[test]
fn phi3_special_tokens_swallow_the_space_after_them() {
    let v = ByteLevel::new(&[], &[("<|user|>", 3), ("<s>", 3)]);
    let mut data = v.data("gpt-2");
    data.model_name = Some("Phi-3.5 MoE");
    let t = Tokenizer::new(&data).unwrap();
    assert_eq!(pieces(&t, &t.encode("<|user|> \n a<s> b", false, true)), ["<|user|>", "a", "<s>", " ", "b"]);
}

#[test]
fn the_end_of_a_message_is_not_the_end_for_gptoss() {
    let eog = |names: &[&str]| {
        let special: Vec<(&str, i32)> = names.iter().map(|n| (*n, 3)).collect();
        let v = ByteLevel::new(&[], &special);
        let t = v.tokenizer("gpt-4o");
        let ends = |n: &&&str| t.is_eog(t.special_by_name(n).unwrap());
        names.iter().filter(ends).map(|n| n.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(eog(&["<|end|>", "<|start|>"]), ["<|end|>"]);
    assert_eq!(eog(&["<|end|>", "<|return|>", "<|call|>", "<|start|>"]), ["<|return|>", "<|call|>"]);
    assert_eq!(eog(&["<|file_sep|>", "<|fim_prefix|>", "<|im_start|>"]), ["<|file_sep|>"]);
}

/// Long runs of one kind of character: with anything quadratic inside this would take an hour.
#[test]
fn long_runs_take_no_longer_than_others() {
    let start = std::time::Instant::now();
    let merges = [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa"), (" ", " "), ("1", "1")];
    let bpe = ByteLevel::new(&merges, &[("  ", 4), ("   ", 4)]);
    let mut all: Vec<Tokenizer> = PRES.iter().map(|pre| bpe.tokenizer(pre)).collect();
    all.push(embedded());
    for unit in ["a", "ab", " ", "\n", "1", "字", "é", "!", "\u{301}", " \n", "'", "A"] {
        let text = unit.repeat((1 << 16) / unit.len());
        for t in &all {
            assert_eq!(t.decode(&t.encode(&text, false, false), false, false), text);
        }
    }
    assert!(start.elapsed().as_secs() < 120, "{:?}", start.elapsed());
}
