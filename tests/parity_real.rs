//! Real text through real models: would anybody notice which engine predicts it?
//!
//! The issue asks for a mean KL divergence of at most 0.001 and for the same best token in 99 % of the positions. With F32 weights that holds
//! by far, and is tested. With quantised weights no engine reaches it that isn't llama.cpp bit for bit, since llama.cpp doesn't
//! reach it against itself: its activations are rounded to 8 bits in every layer, and the least change anywhere before (another type
//! of the cache, flash attention or not, a norm's weight moved by one unit in the last place) ends in other roundings. So there
//! the bounds are taken from what llama.cpp does to itself, measured in the same run:
//!
//! - as near to llama.cpp as llama.cpp is after such a nudge ([`nudge`](common::nudge)), and
//! - as near as llama.cpp to the truth, which is the same weights as F32, where nothing is rounded.
#![cfg(feature = "llama-cpp")]

mod common;

use common::llama::{Kv, Mode, Model, Options};
use common::nudge::nudge;
use common::ours::logits_all;
use common::stats::{Agreement, agreement, nll};
use oncall::gguf::requantize::Plan;
use oncall::gguf::{Gguf, mixture};
use oncall::ops::KvType;
use oncall::synth::upcycle;
use std::path::{Path, PathBuf};

/// With nothing rounded; measured 1e-11 and 100 %. What was asked for is 1e-3 and 99 %.
const EXACT: Agreement = Agreement { kl: 1e-8, top1: 0.998 };
/// What was asked for: where llama.cpp differs from itself by less, they count.
const AIM: Agreement = Agreement { kl: 1e-3, top1: 0.99 };
/// Two measurements of one scatter over 512 positions lie within this factor of each other (0.9 to 1.2 was seen).
const SCATTER: f64 = 1.4;

/// Prose that the models find easy, and a page of this project, as it once was, that they find hard.
const TEXTS: &[&str] = &["models/heldout_sample.txt", "tests/golden/technical.txt"];
const N_TOKENS: usize = 512;

fn smollm2() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "models/fetch-smollm2.sh fetches {}", path.display());
    path
}

fn theirs(path: &Path, tokens: &[u32], kv: Kv) -> Vec<f32> {
    Model::load(path, Mode::Plain).context(Options { kv, ..Options::default() }).logits_all(tokens)
}

/// All that is compared on one text.
struct Logits {
    n_vocab: usize,
    /// llama.cpp's, of the model, of the nudged model, and of the model in F32.
    theirs: Vec<f32>,
    nudged: Vec<f32>,
    truth: Vec<f32>,
    /// oncall's, of the model and of the model in F32.
    ours: Vec<f32>,
    our_truth: Vec<f32>,
}

fn compare(name: &str, l: &Logits) -> Vec<String> {
    let of = |a: &[f32], b: &[f32]| agreement(a, b, l.n_vocab);
    let (exact, apart, scatter) = (of(&l.our_truth, &l.truth), of(&l.ours, &l.theirs), of(&l.nudged, &l.theirs));
    let (our_error, their_error) = (of(&l.ours, &l.truth), of(&l.theirs, &l.truth));
    let show = |a: &Agreement| format!("KL {:.1e}, same best token {:.1} %", a.kl, 100.0 * a.top1);
    println!("note: {name}, F32: oncall and llama.cpp {}", show(&exact));
    println!("note: {name}: oncall and llama.cpp {}; llama.cpp nudged {}", show(&apart), show(&scatter));
    println!("note: {name}: from the truth oncall {}; llama.cpp {}", show(&our_error), show(&their_error));
    // A share of 512 positions scatters by sqrt(0.04 * 0.96 / 512), 0.9 %; two of them by 1.2 %; this is three times that.
    let least = AIM.top1.min(scatter.top1 - 0.037);
    let rules = [
        (exact.kl <= EXACT.kl && exact.top1 >= EXACT.top1, "F32 differs"),
        (
            apart.kl <= AIM.kl.max(SCATTER * scatter.kl) && apart.top1 >= least,
            "farther from llama.cpp than it is from itself",
        ),
        (our_error.kl <= SCATTER * their_error.kl, "farther from the truth than llama.cpp"),
    ];
    rules.iter().filter(|(holds, _)| !holds).map(|(_, what)| format!("{name}: {what}")).collect()
}

/// Compares on the first tokens of each text.
fn check(model: &Path, texts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (f32s, nudged) = (dir.path().join("f32.gguf"), dir.path().join("nudged.gguf"));
    let source = Gguf::open(model).unwrap();
    Plan::new(&source, mixture::by_name("f32").unwrap()).unwrap().write(&f32s, false, &mut |_, _| true).unwrap();
    nudge(model, &nudged, 1);
    let vocab = Model::load_vocab(model);
    let mut wrong = Vec::new();
    for path in texts {
        let text = std::fs::read(path).unwrap();
        let tokens: Vec<u32> = vocab.tokenize(&text, true, false).into_iter().take(N_TOKENS).collect();
        assert_eq!(tokens.len(), N_TOKENS);
        let logits = Logits {
            n_vocab: vocab.n_vocab(),
            theirs: theirs(model, &tokens, Kv::F16),
            nudged: theirs(&nudged, &tokens, Kv::F16),
            truth: theirs(&f32s, &tokens, Kv::F32),
            ours: logits_all(model, &tokens, KvType::F16),
            our_truth: logits_all(&f32s, &tokens, KvType::F32),
        };
        let name = format!("{} on {path}", model.file_stem().unwrap().display());
        println!("note: {name}: perplexity {:.2}", nll(&logits.truth, &tokens).exp());
        wrong.extend(compare(&name, &logits));
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn a_dense_model() {
    check(&smollm2(), TEXTS);
}

#[test]
fn a_mixture_of_experts() {
    let dir = tempfile::tempdir().unwrap();
    let moe = dir.path().join("SmolMoE.Q4_0.gguf");
    let source = Gguf::open(&smollm2()).unwrap();
    upcycle::upcycle(&source, &upcycle::Options::default(), &moe, false, &mut |_, _| ()).unwrap();
    check(&moe, TEXTS);
}
