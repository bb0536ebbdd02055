//! The tokenisers against llama.cpp's: the same file, the same text, the same ids.
#![cfg(feature = "llama-cpp")]

mod common;

use common::llama::Model;
use common::strings::HARD;
use common::vocab::{ByteLevel, REAL, Random, Vocab, all_pairs, random_text};
use oncall::session::tokenizer::{Tokenizer, known_pre_tokenizers};

const TINYMOE: &str = "models/tinymoe-stories-Q8_0.gguf";

/// Both sides of a vocabulary.
struct Pair {
    ours: Tokenizer,
    theirs: Model,
}

impl Pair {
    /// Through a file, as in use.
    fn of(vocab: &Vocab) -> Pair {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let path = folder.path().join("vocab.gguf");
        vocab.write(&path);
        Pair::open(path.to_str().expect("UTF-8 path"))
    }

    fn open(path: &str) -> Pair {
        let file = oncall::gguf::Gguf::open(path.as_ref()).expect("a sound file");
        let ours = Tokenizer::from_metadata(file.metadata()).expect("a sound vocabulary");
        Pair { ours, theirs: Model::load_vocab(path) }
    }

    fn check(&self, name: &str, text: &str) {
        for (add_special, parse_special) in [(false, false), (true, false), (true, true)] {
            let ours = self.ours.encode(text, add_special, parse_special);
            let theirs = self.theirs.tokenize(text.as_bytes(), add_special, parse_special);
            assert_eq!(
                self.pieces(&ours),
                self.pieces(&theirs),
                "{name}, add_special {add_special}, parse_special {parse_special}: {text:?}"
            );
            assert_eq!(ours, theirs, "{name}: {text:?}");
        }
    }

    fn pieces(&self, ids: &[u32]) -> Vec<String> {
        ids.iter().map(|&id| String::from_utf8_lossy(&self.ours.token_bytes(id)).into_owned()).collect()
    }

    /// Every token's bytes, and whether it ends a generation.
    fn check_tokens(&self, name: &str) {
        assert_eq!(self.ours.n_vocab(), self.theirs.n_vocab());
        for id in 0..self.ours.n_vocab() as u32 {
            let ours = self.ours.token_bytes(id);
            assert_eq!(ours, self.theirs.token_to_piece(id, true), "{name}: token {id}");
            let shown = if self.ours.is_hidden(id) { Default::default() } else { ours };
            assert_eq!(shown, self.theirs.token_to_piece(id, false), "{name}: token {id} without special ones");
            assert_eq!(self.ours.is_eog(id), self.theirs.is_eog(id), "{name}: token {id} ends a generation");
        }
    }
}

fn check_real(name: &str) {
    let vocab = Vocab::real(name);
    let pair = Pair::of(&vocab);
    pair.check_tokens(name);
    for text in HARD {
        pair.check(name, text);
    }
    // All of them in one text, so that each meets its neighbours; and real prose.
    pair.check(name, &HARD.join(""));
    pair.check(name, &HARD.join(" "));
    let stories = std::fs::read_to_string("models/heldout_sample.txt").expect("the sample is in the repository");
    pair.check(name, &stories);
    let mut random = Random(11);
    for _ in 0..1500 {
        let n = 1 + random.below(60);
        pair.check(name, &random_text(&mut random, n));
    }
    speed(name, &vocab, &pair, &stories);
}

/// Seconds that this thread has spent computing: the machine may be busy with other tests.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux counts a thread's time");
    let nanoseconds: f64 = stat.split(' ').next().and_then(|n| n.parse().ok()).expect("a number");
    nanoseconds / 1e9
}

/// How long building and encoding take, beside llama.cpp; printed, not judged.
fn speed(name: &str, vocab: &Vocab, pair: &Pair, text: &str) {
    let text = text.repeat((1 << 20) / text.len() + 1);
    let time = |f: &dyn Fn() -> usize| {
        let start = cpu_seconds();
        let n = f();
        (cpu_seconds() - start, n)
    };
    let data = vocab.data();
    let (build, _) = time(&|| Tokenizer::new(&data).expect("a sound vocabulary").n_vocab());
    let (ours, n) = time(&|| pair.ours.encode(&text, false, false).len());
    let (theirs, m) = time(&|| pair.theirs.tokenize(text.as_bytes(), false, false).len());
    assert_eq!(n, m);
    let mb = text.len() as f64 / 1e6;
    println!(
        "{name}: built in {:.0} ms; English text at {:.1} MB/s, llama.cpp {:.1} MB/s",
        build * 1e3,
        mb / ours,
        mb / theirs
    );
}

#[test]
fn qwen3() {
    check_real("qwen3");
}

#[test]
fn llama3() {
    check_real("llama3");
}

#[test]
fn deepseek_v3() {
    check_real("deepseek_v3");
}

#[test]
fn gptoss() {
    check_real("gptoss");
}

#[test]
fn llama2() {
    check_real("llama2");
}

#[test]
fn gemma3() {
    check_real("gemma3");
}

/// The list in the tests above is the list of vocabularies.
#[test]
fn every_real_vocabulary_has_its_test() {
    assert_eq!(REAL.len(), 6);
}

#[test]
fn embedded_model() {
    let pair = Pair::open(TINYMOE);
    pair.check_tokens("tinymoe");
    for text in HARD {
        pair.check("tinymoe", text);
    }
    pair.check("tinymoe", &HARD.join(" "));
}

/// Every pre-tokeniser cuts where llama.cpp's does.
#[test]
fn every_pre_tokenizer() {
    for name in known_pre_tokenizers() {
        let pair = Pair::of(&all_pairs(name));
        for text in HARD {
            pair.check(name, text);
        }
        let mut random = Random(3);
        for _ in 0..600 {
            let n = 1 + random.below(40);
            pair.check(name, &random_text(&mut random, n));
        }
    }
}

/// llama.cpp knows no name that oncall cuts differently because it is unknown here by mistake: the ones left out are listed.
#[test]
fn unknown_pre_tokenizers_are_refused() {
    for name in ["gemma4", "superbpe", "whitespace", "nonesuch"] {
        let vocab = ByteLevel::new(name).vocab;
        let message = Tokenizer::new(&vocab.data()).expect_err("it isn't known").to_string();
        assert!(message.contains(name), "{message}");
    }
}

/// The class of every character, seen through the cuts around it. The tables of the two differ by one version of Unicode:
/// llama.cpp's are of 15.1.
#[test]
fn every_character_is_of_the_same_class() {
    let newer = regex_automata::meta::Regex::new(r"^[\p{Age:16.0}--\p{Age:15.1}]$").expect("a pattern");
    for pre in ["llama-bpe", "deepseek-v3"] {
        // Letters, digits and marks merge with whatever byte comes next to them, so that a cut shows.
        let mut bytes = ByteLevel::new(pre);
        for neighbour in [b'a', b'!', b'1'] {
            for b in 0x80..=0xF4u8 {
                if b < 0xC0 { bytes.merge(&[b], &[neighbour]) } else { bytes.merge(&[neighbour], &[b]) }
            }
        }
        let pair = Pair::of(&bytes.vocab);
        let same =
            |text: &str| pair.ours.encode(text, false, false) == pair.theirs.tokenize(text.as_bytes(), false, false);
        let around = |c: char| format!("a{c}a\n!{c}!\n1{c}1\n");
        // Most of the code space isn't assigned; a sample of it will do.
        let all = ('\u{80}'..'\u{20000}').chain(('\u{20000}'..=char::MAX).step_by(251));
        let all: Vec<char> = all.collect();
        let mut differ = Vec::new();
        // llama.cpp compiles its patterns for each text, so many characters share one.
        for chunk in all.chunks(64) {
            if !same(&chunk.iter().map(|&c| around(c)).collect::<String>()) {
                differ.extend(chunk.iter().copied().filter(|&c| !same(&around(c))));
            }
        }
        println!("{pre}: {} characters differ, all of Unicode 16", differ.len());
        let wrong: Vec<char> = differ.iter().copied().filter(|c| !newer.is_match(c.to_string().as_str())).collect();
        assert!(wrong.is_empty(), "{pre}: {wrong:x?}");
        assert!(!differ.is_empty(), "{pre}: if the tables agree now, say so here");
    }
}
