//! oncall's numbers against llama.cpp's on the same files.
#![cfg(feature = "llama-cpp")]

mod common;

use common::llama::{Mode, Model, Options};
use common::stats;

const TINYMOE: &str = "models/tinymoe-stories-Q8_0.gguf";

/// The held-out stories, blank lines between them.
fn heldout() -> Vec<String> {
    let text = std::fs::read_to_string("models/heldout_sample.txt").expect("the sample is in the repository");
    text.split("\n\n").map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect()
}

/// The reference is sound before anything is compared with it: it reaches the loss on the model's card, both its modes
/// do, and it tells the same whatever the chunk.
#[test]
fn reference_reaches_the_card_loss() {
    for mode in [Mode::Plain, Mode::Repacked] {
        let model = Model::load(TINYMOE, mode);
        let mut context = model.context(Options::default());
        let (mut sum, mut n) = (0.0, 0);
        for story in heldout().iter().take(20) {
            let tokens = model.tokenize(story.as_bytes(), true, false);
            context.clear();
            let logits = context.logits_all(&tokens);
            assert!(logits.iter().all(|x| x.is_finite()));
            assert_eq!(logits.len(), tokens.len() * model.n_vocab());
            sum += stats::nll(&logits, &tokens) * (tokens.len() - 1) as f64;
            n += tokens.len() - 1;
        }
        let loss = sum / n as f64;
        println!("{mode:?}: {loss:.4} nats/token over {n} tokens");
        assert!((0.34..0.42).contains(&loss), "the card says 0.379, this is {loss}");
    }
}

/// The helper's chunks join: positions continue and rows stay in order.
#[test]
fn reference_chunks_join() {
    let model = Model::load(TINYMOE, Mode::Plain);
    let tokens = model.tokenize(heldout()[0].as_bytes(), true, false);
    let whole = model.context(Options::default()).logits_all(&tokens);
    let mut chunked = model.context(Options { n_batch: 7, ..Options::default() });
    let pieces = chunked.logits_all(&tokens);
    let nmse = stats::nmse(&pieces, &whole);
    println!("chunks of 7 against one: NMSE {nmse:.2e}");
    assert!(nmse < 1e-3, "{nmse}");
    chunked.clear();
    let last = chunked.decode(&tokens);
    assert_eq!(last, pieces[pieces.len() - model.n_vocab()..], "decode is the last row of logits_all");
    let text = model.detokenize(&tokens, true, false);
    assert_eq!(String::from_utf8(text).unwrap().trim_start(), heldout()[0]);
}
