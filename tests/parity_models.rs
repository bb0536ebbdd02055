//! oncall's logits against llama.cpp's on the same tiny files: F32 shows what is computed, quantised formats how it is rounded.
#![cfg(feature = "llama-cpp")]

mod common;

use common::llama::{Kv, Mode, Model, Options};
use common::nudge::nudge;
use common::ours::logits_all as ours;
use common::stats;
use oncall::arch::ARCHES;
use oncall::gguf::mixture;
use oncall::ops::KvType;
use oncall::synth::{self, PRESETS, Preset};
use std::path::{Path, PathBuf};

/// With nothing quantised the engines differ in the order of their sums alone (measured: 9e-14 to 3e-12); a RoPE base
/// wrong by 1% gives 2e-8 to 2e-3, the least where positions count least (granitemoe).
const SEMANTICS: f64 = 1e-10;
/// Nudged copies of each model. Some have one token near a router's tie, and one copy in ten or more crosses it: of five none
/// may (q3_k_s: 6.3e-5 at most with 5 copies, 7.0e-4 with 40).
const N_NUDGES: u64 = 40;

fn tiny() -> impl Iterator<Item = &'static Preset> {
    PRESETS.iter().filter(|p| p.is_tiny())
}

/// Tokens of no meaning, longer than every tiny model's sliding window.
fn tokens(n_vocab: u32) -> Vec<u32> {
    (0..150u32).map(|i| 3 + i.wrapping_mul(2_654_435_761) % (n_vocab - 3)).collect()
}

fn theirs(path: &Path, tokens: &[u32], mode: Mode, kv: Kv) -> Vec<f32> {
    Model::load(path, mode).context(Options { kv, ..Options::default() }).logits_all(tokens)
}

fn write(dir: &Path, preset: &Preset, mix: &str) -> PathBuf {
    let path = dir.join(format!("{}-{mix}.gguf", preset.name));
    let options = synth::Options { mixture: mixture::by_name(mix).unwrap(), ..synth::Options::parity(preset) };
    std::fs::write(&path, synth::to_bytes(preset, &options).unwrap()).unwrap();
    path
}

#[test]
fn every_architecture_computes_what_llama_cpp_does() {
    for arch in ARCHES {
        assert!(tiny().any(|p| p.arch == arch.name), "{} has no tiny preset", arch.name);
    }
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for preset in tiny() {
        let path = write(dir.path(), preset, "f32");
        let tokens = tokens(preset.n_vocab);
        let reference = theirs(&path, &tokens, Mode::Plain, Kv::F32);
        let nmse = stats::nmse(&ours(&path, &tokens, KvType::F32), &reference);
        // The same with a small mistake in the file that oncall reads: it must show.
        let mistaken = dir.path().join("mistaken.gguf");
        std::fs::write(&mistaken, with_rope_base_off(std::fs::read(&path).unwrap(), preset.arch)).unwrap();
        let off = stats::nmse(&ours(&mistaken, &tokens, KvType::F32), &reference);
        println!("note: {:28} NMSE {nmse:.1e}, with a RoPE base 1% off {off:.1e}", preset.name);
        if nmse > SEMANTICS || off <= SEMANTICS {
            wrong.push(preset.name);
        }
        std::fs::remove_file(path).unwrap();
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// Multiplies `ARCH.rope.freq_base` by 1.01 in a file's bytes.
fn with_rope_base_off(mut file: Vec<u8>, arch: &str) -> Vec<u8> {
    let key = format!("{arch}.rope.freq_base");
    let at = file.windows(key.len()).position(|w| w == key.as_bytes()).expect("the key is there") + key.len() + 4;
    let base = f32::from_le_bytes([file[at], file[at + 1], file[at + 2], file[at + 3]]);
    file[at..at + 4].copy_from_slice(&(base * 1.01).to_le_bytes());
    file
}

/// At most 3 times what llama.cpp differs from itself by: its two modes from one another, as the issue says, or, where these agree
/// to the bit and the ratio has no meaning, its plain mode from itself when the norms' weights are moved by one unit in the
/// last place.
#[test]
fn every_format_is_rounded_as_llama_cpp_rounds_it() {
    let dir = tempfile::tempdir().unwrap();
    let preset = Preset::by_name("tiny-llama-moe").unwrap();
    let tokens = tokens(preset.n_vocab);
    let nudged = dir.path().join("nudged.gguf");
    let mut wrong = Vec::new();
    for mix in mixture::MIXTURES.iter().filter(|m| m.name != "f32") {
        let path = write(dir.path(), preset, mix.name);
        let plain = theirs(&path, &tokens, Mode::Plain, Kv::F32);
        let modes = stats::nmse(&theirs(&path, &tokens, Mode::Repacked, Kv::F32), &plain);
        let scatter: Vec<f64> = (0..N_NUDGES)
            .map(|seed| {
                nudge(&path, &nudged, seed);
                stats::nmse(&theirs(&nudged, &tokens, Mode::Plain, Kv::F32), &plain)
            })
            .collect();
        let (least, most) = scatter.iter().fold((f64::MAX, 0f64), |(a, b), x| (a.min(*x), b.max(*x)));
        let nmse = stats::nmse(&ours(&path, &tokens, KvType::F32), &plain);
        println!(
            "note: {:8} NMSE {nmse:.1e}; llama.cpp's modes differ by {modes:.1e}, its answer to nudges by {least:.1e} to {most:.1e}",
            mix.name
        );
        if nmse > 3.0 * modes.max(most) {
            wrong.push(mix.name);
        }
        std::fs::remove_file(path).unwrap();
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
