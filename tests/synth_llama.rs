//! llama.cpp loads what the generators write, and reads finite logits from it.
#![cfg(feature = "llama-cpp")]

mod common;

use common::llama::{Mode, Model, Options};
use oncall::synth::{self, PRESETS};

/// Prompts are longer than every tiny window.
const N_TOKENS: u32 = 96;

fn tokens() -> Vec<u32> {
    (0..N_TOKENS).map(|i| 259 + i * 37 % 700).collect()
}

#[test]
fn llama_cpp_loads_every_tiny_preset() {
    let dir = tempfile::tempdir().unwrap();
    for preset in PRESETS.iter().filter(|p| p.is_tiny()) {
        let path = dir.path().join(preset.name);
        synth::write(preset, &synth::Options::parity(preset), &path).unwrap();
        let model = Model::load(&path, Mode::Plain);
        assert_eq!(model.n_vocab(), preset.n_vocab as usize, "{}", preset.name);
        let logits = model.context(Options::default()).logits_all(&tokens());
        assert!(logits.iter().all(|x| x.is_finite()), "{}: logits that aren't finite", preset.name);
        let std = (logits.iter().map(|x| x * x).sum::<f32>() / logits.len() as f32).sqrt();
        assert!((0.05..20.0).contains(&std), "{}: logits of size {std}", preset.name);
        println!("{}: logits of size {std:.2}", preset.name);
        std::fs::remove_file(path).unwrap();
    }
}
