//! `oncall perplexity` against llama.cpp, scored as llama.cpp's own tool does it: the text in chunks of the context's length, the first token
//! of each replaced by BOS if the vocabulary adds one, and the second half of each chunk scored.
#![cfg(feature = "llama-cpp")]

mod common;

use common::llama::{Kv, Mode, Model, Options};
use common::stats;
use oncall::gguf::Gguf;
use oncall::session::tokenizer::Tokenizer;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// What the two may differ by: 0.5 %.
const RELATIVE: f64 = 0.005;
const TEXT: &str = "models/heldout_sample.txt";

fn ours(model: &Path, n_ctx: usize, chunks: usize) -> Value {
    let out = Command::new(env!("CARGO_BIN_EXE_oncall"))
        .args(["perplexity", "--json", "-f", TEXT, "-c", &n_ctx.to_string(), "--chunks", &chunks.to_string(), "-m"])
        .arg(model)
        .output()
        .expect("the program starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("one JSON object")
}

/// Perplexity and the number of tokens scored.
fn theirs(path: &Path, n_ctx: usize, chunks: usize) -> (f64, usize) {
    let model = Model::load(path, Mode::Plain);
    let text = std::fs::read(TEXT).unwrap();
    let tokens = model.tokenize(&text, true, false);
    let bos = Tokenizer::from_metadata(Gguf::open(path).unwrap().metadata()).unwrap();
    let bos = bos.bos().filter(|_| bos.adds_bos());
    let mut context = model.context(Options { kv: Kv::F16, n_ctx: n_ctx as u32, ..Options::default() });
    let (mut sum, mut n) = (0.0, 0);
    for chunk in tokens.chunks_exact(n_ctx).take(chunks) {
        let mut input = chunk.to_vec();
        if let Some(bos) = bos {
            input[0] = bos;
        }
        context.clear();
        let logits = context.logits_all(&input);
        let first = n_ctx / 2;
        // Rows first..n_ctx - 1 predict the tokens after them.
        let n_scored = n_ctx - first - 1;
        sum += n_scored as f64 * stats::nll(&logits[first * model.n_vocab()..], &chunk[first..]);
        n += n_scored;
    }
    ((sum / n as f64).exp(), n)
}

fn compare(path: &Path, n_ctx: usize, chunks: usize) {
    let ours = ours(path, n_ctx, chunks);
    let (reference, n) = theirs(path, n_ctx, chunks);
    let perplexity = ours["perplexity"].as_f64().unwrap();
    println!("note: {}: perplexity {perplexity:.4}, llama.cpp {reference:.4}, {n} tokens", path.display());
    assert_eq!(ours["chunks"], chunks, "the text has as many chunks");
    assert_eq!(ours["scored_tokens"], n);
    assert!((perplexity / reference - 1.0).abs() <= RELATIVE, "{perplexity} and {reference}");
}

/// A vocabulary that adds BOS.
#[test]
fn of_the_model_that_is_built_in() {
    compare(Path::new("models/tinymoe-stories-Q8_0.gguf"), 256, 8);
}

/// A vocabulary that doesn't, and chunks as long as llama.cpp's by default.
#[test]
fn of_smollm2() {
    let path = Path::new("models/cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "models/fetch-smollm2.sh fetches {}", path.display());
    compare(path, 512, 3);
}
