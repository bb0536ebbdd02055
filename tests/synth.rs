//! What the generators write is what they say they write.

use std::path::Path;

use oncall::gguf::Gguf;
use oncall::gguf::mixture::{self, MIXTURES};
use oncall::synth::{self, Options, PRESETS, Preset};

fn options(mixture: &str) -> Options {
    Options { mixture: mixture::by_name(mixture).unwrap(), ..Options::default() }
}

fn open(bytes: Vec<u8>) -> Gguf {
    Gguf::from_static("synthetic", Vec::leak(bytes)).unwrap()
}

/// All weights of a tensor.
fn weights(gguf: &Gguf, name: &str) -> Vec<f32> {
    let tensor = gguf.tensor(name).unwrap_or_else(|| panic!("no tensor {name}"));
    let mut bytes = vec![0; tensor.n_bytes as usize];
    gguf.read_at(tensor, 0, &mut bytes).unwrap();
    let mut out = vec![0.0; tensor.n_elements() as usize];
    (tensor.format.dequantize_row)(&bytes, &mut out);
    out
}

fn std_dev(x: &[f32]) -> f64 {
    (x.iter().map(|&v| f64::from(v * v)).sum::<f64>() / x.len() as f64).sqrt()
}

/// Quantising is slow, so the wide presets meet a few mixtures only, and the narrow ones all.
#[test]
fn every_tiny_preset_is_readable_in_every_mixture() {
    for preset in PRESETS.iter().filter(|p| p.is_tiny()) {
        let narrow = !preset.n_embd.is_multiple_of(256);
        let some = ["f32", "q8_0", "q4_k_m", "mxfp4"];
        for mixture in MIXTURES.iter().filter(|m| narrow || some.contains(&m.name)) {
            let n_layer = preset.moe.as_ref().map_or(1, |moe| moe.n_dense + 1);
            let options = Options { n_layer: Some(n_layer), n_vocab: Some(300), ..options(mixture.name) };
            let gguf = open(synth::to_bytes(preset, &options).unwrap());
            let what = format!("{} in {}", preset.name, mixture.name);
            for tensor in gguf.tensors() {
                let std = std_dev(&weights(&gguf, &tensor.name));
                assert!(std.is_finite() && std < 10.0, "{what}: {}: {std}", tensor.name);
                let expert = tensor.name.ends_with("_exps.weight");
                assert!(!expert || std > 1e-3, "{what}: {}: {std}", tensor.name);
            }
            let last = format!("blk.{}.ffn_gate_exps.weight", n_layer - 1);
            assert_eq!(gguf.tensor(&last).is_some(), preset.moe.is_some(), "{what}");
            if let (Some(experts), false) = (gguf.tensor(&last), narrow) {
                assert_eq!(experts.format.name, mixture.base, "{what}");
            }
        }
    }
}

#[test]
fn weights_keep_their_spread_in_every_format() {
    let preset = Preset::by_name("tiny-llama-moe").unwrap();
    for mixture in MIXTURES {
        let options = Options { n_layer: Some(1), residual_gain: 1.0, ..options(mixture.name) };
        let gguf = open(synth::to_bytes(preset, &options).unwrap());
        for (name, wanted) in [("token_embd.weight", 1.0), ("blk.0.ffn_up_exps.weight", 1.0 / 16.0)] {
            let std = std_dev(&weights(&gguf, name));
            assert!((std / wanted - 1.0).abs() < 0.12, "{name} in {}: {std}, not {wanted}", mixture.name);
        }
    }
}

/// Other machines, thread counts and versions must make the same file: stored figures of tests depend on it.
#[test]
fn the_same_seed_makes_the_same_bytes() {
    let preset = Preset::by_name("tiny-qwen3moe").unwrap();
    let options = options("q8_0");
    let make = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| synth::to_bytes(preset, &options).unwrap())
    };
    let one = make(1);
    assert!(one == make(3), "the number of threads shows");
    let other = synth::to_bytes(preset, &Options { seed: 2, ..options.clone() }).unwrap();
    assert!(one != other && one.len() == other.len());
    assert_eq!(fnv1a(&one), GOLDEN, "the generator's bytes have changed: {:#x}", fnv1a(&one));
}

/// FNV-1a of tiny-qwen3moe in Q8_0 with seed 1.
const GOLDEN: u64 = 0x95f3_f475_4617_2e04;

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn layers_and_vocabulary_can_be_changed() {
    let preset = Preset::by_name("tiny-gpt-oss").unwrap();
    let changed = Options { n_layer: Some(2), n_vocab: Some(500), ..options("f32") };
    let gguf = open(synth::to_bytes(preset, &changed).unwrap());
    assert_eq!(gguf.metadata().u32("gpt-oss.block_count").unwrap(), Some(2));
    assert_eq!(gguf.tensor("output.weight").unwrap().shape(), [256, 500]);
    assert_eq!(gguf.metadata().required_strings("tokenizer.ggml.tokens").unwrap().len(), 500);
    assert!(gguf.tensor("blk.2.attn_q.weight").is_none());
    // a layer that is there in both has the same weights
    let whole = open(synth::to_bytes(preset, &options("f32")).unwrap());
    assert_eq!(weights(&gguf, "blk.1.attn_q.weight"), weights(&whole, "blk.1.attn_q.weight"));
}

#[test]
fn impossible_options_are_refused() {
    let preset = Preset::by_name("tiny-deepseek2").unwrap();
    for bad in [
        Options { n_layer: Some(1), ..options("f32") },
        Options { n_layer: Some(0), ..options("f32") },
        Options { n_vocab: Some(100), ..options("f32") },
        Options { router_skew: -1.0, ..options("f32") },
        Options { residual_gain: f32::NAN, ..options("f32") },
    ] {
        assert!(synth::to_bytes(preset, &bad).is_err(), "{bad:?}");
    }
}

#[test]
fn files_have_the_bytes_that_memory_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let preset = Preset::by_name("tiny-olmoe").unwrap();
    let options = options("f16");
    synth::write(preset, &options, &path).unwrap();
    assert!(std::fs::read(&path).unwrap() == synth::to_bytes(preset, &options).unwrap());
    assert!(synth::write(preset, &options, &path).is_err(), "an existing file is not replaced unasked");
    let mut last = (0, 0);
    synth::write_with(preset, &options, &path, true, &mut |done, total| last = (done, total)).unwrap();
    assert!(last.0 == last.1 && last.0 > 0, "{last:?}");
    assert_eq!(entries(dir.path()), ["tiny.gguf"]);
}

fn entries(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}
