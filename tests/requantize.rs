//! Models written in other mixtures, and dense models made into mixtures of experts.

use std::path::{Path, PathBuf};

use oncall::gguf::mixture::{self, MIXTURES};
use oncall::gguf::requantize::{Plan, RequantizeError};
use oncall::gguf::{Gguf, WriteError};
use oncall::synth::upcycle::{self, upcycle};
use oncall::synth::{self, Preset, SynthError};

fn tiny(dir: &Path, preset: &str, mixture: &str) -> PathBuf {
    let path = dir.join(format!("{preset}-{mixture}.gguf"));
    let mixture = mixture::by_name(mixture).unwrap();
    let options = synth::Options { mixture, n_vocab: Some(300), ..Default::default() };
    synth::write_with(Preset::by_name(preset).unwrap(), &options, &path, true, &mut |_, _| ()).unwrap();
    path
}

fn weights(gguf: &Gguf, name: &str) -> Vec<f32> {
    let tensor = gguf.tensor(name).unwrap_or_else(|| panic!("no tensor {name}"));
    let mut bytes = vec![0; tensor.n_bytes as usize];
    gguf.read_at(tensor, 0, &mut bytes).unwrap();
    let mut out = vec![0.0; tensor.n_elements() as usize];
    (tensor.format.dequantize_row)(&bytes, &mut out);
    out
}

/// Root mean square of the difference, against that of the reference.
fn error(ours: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(ours.len(), reference.len());
    let square = |x: f64| x * x;
    let difference: f64 = ours.iter().zip(reference).map(|(a, b)| square(f64::from(a - b))).sum();
    (difference / reference.iter().map(|&b| square(f64::from(b))).sum::<f64>()).sqrt()
}

#[test]
fn every_mixture_keeps_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let source = Gguf::open(&tiny(dir.path(), "tiny-llama-moe-288", "f32")).unwrap();
    let out = dir.path().join("out.gguf");
    for mixture in MIXTURES {
        let plan = Plan::new(&source, mixture).unwrap();
        let mut last = (0, 0);
        plan.write(&out, true, &mut |done, total| {
            last = (done, total);
            true
        })
        .unwrap();
        let result = Gguf::open(&out).unwrap();
        assert_eq!(last, (plan.n_bytes(), plan.n_bytes()), "{}", mixture.name);
        assert_eq!(result.tensors().iter().map(|t| t.n_bytes).sum::<u64>(), plan.n_bytes());
        assert_eq!(result.metadata().u32("general.file_type").unwrap(), Some(mixture.file_type));
        assert_eq!(result.metadata().len(), source.metadata().len());
        for ((before, format), after) in plan.tensors().zip(result.tensors()) {
            assert_eq!((&before.name, before.shape(), format.id), (&after.name, after.shape(), after.format.id));
            let error = error(&weights(&result, &after.name), &weights(&source, &before.name));
            let bound = match format.name {
                "f32" => 0.0,
                "f16" | "bf16" | "q8_0" => 0.01,
                "q5_0" | "q5_1" | "q5_k" | "q6_k" => 0.06,
                "q2_k" => 0.35,
                _ => 0.13,
            };
            assert!(error <= bound, "{} in {}: {error}", after.name, format.name);
        }
    }
}

#[test]
fn a_mixture_made_is_a_mixture_planned() {
    // the same rules whether weights are drawn in a mixture or brought to it
    let dir = tempfile::tempdir().unwrap();
    for preset in ["tiny-llama-moe-288", "tiny-deepseek2-lite", "tiny-llama-tied"] {
        // What is open can't be made again.
        let apart = tempfile::tempdir().unwrap();
        let f32 = Gguf::open(&tiny(apart.path(), preset, "f32")).unwrap();
        for mixture in MIXTURES {
            let made = Gguf::open(&tiny(dir.path(), preset, mixture.name)).unwrap();
            for (tensor, format) in Plan::new(&f32, mixture).unwrap().tensors() {
                let made = made.tensor(&tensor.name).unwrap();
                assert_eq!(made.format.name, format.name, "{preset} {}: {}", mixture.name, tensor.name);
            }
        }
    }
}

#[test]
fn what_is_wrong_is_said_before_anything_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = tiny(dir.path(), "tiny-llama", "q4_0");
    let before = std::fs::read(&path).unwrap();
    let source = Gguf::open(&path).unwrap();
    let plan = Plan::new(&source, mixture::by_name("q8_0").unwrap()).unwrap();
    assert_eq!(plan.rounded_twice().map(|t| &*t.name), Some("token_embd.weight"));
    let same = dir.path().join(".").join(path.file_name().unwrap());
    for overwrite in [true, false] {
        let refused = plan.write(&same, overwrite, &mut |_, _| true);
        assert!(matches!(refused, Err(RequantizeError::Write(WriteError::Model { .. }))), "{refused:?}");
    }
    let other = tiny(dir.path(), "tiny-llama", "f16");
    let refused = plan.write(&other, false, &mut |_, _| true);
    assert!(matches!(refused, Err(RequantizeError::Write(_))), "{refused:?}");
    let same_again = Plan::new(&source, mixture::by_name("q4_0").unwrap()).unwrap();
    assert!(same_again.rounded_twice().is_none(), "a copy rounds nothing");
    let stopped = plan.write(&dir.path().join("new.gguf"), false, &mut |done, _| done == 0);
    assert!(matches!(stopped, Err(RequantizeError::Stopped)), "{stopped:?}");
    assert!(!dir.path().join("new.gguf").exists() && !dir.path().join("new.gguf.part").exists());
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn experts_are_the_dense_network_with_noise() {
    let dir = tempfile::tempdir().unwrap();
    let dense = Gguf::open(&tiny(dir.path(), "tiny-llama-tied", "f16")).unwrap();
    let out = dir.path().join("moe.gguf");
    let options = upcycle::Options { mixture: mixture::by_name("q8_0").unwrap(), noise: 0.1, ..Default::default() };
    upcycle(&dense, &options, &out, false, &mut |_, _| ()).unwrap();
    let moe = Gguf::open(&out).unwrap();
    assert_eq!(moe.metadata().u32("llama.expert_count").unwrap(), Some(8));
    assert_eq!(moe.metadata().u32("llama.expert_used_count").unwrap(), Some(2));
    assert_eq!(moe.tensor("blk.0.ffn_gate_inp.weight").unwrap().shape(), [256, 8]);
    assert!(moe.tensor("blk.0.ffn_gate.weight").is_none());
    assert_eq!(weights(&moe, "blk.1.attn_q.weight"), weights(&dense, "blk.1.attn_q.weight"));
    for matrix in ["gate", "up", "down"] {
        let reference = weights(&dense, &format!("blk.2.ffn_{matrix}.weight"));
        let experts = weights(&moe, &format!("blk.2.ffn_{matrix}_exps.weight"));
        let experts: Vec<&[f32]> = experts.chunks(reference.len()).collect();
        assert_eq!(experts.len(), 8);
        for (e, expert) in experts.iter().enumerate() {
            let noise = error(expert, &reference);
            assert!((0.095..0.105).contains(&noise), "{matrix} of expert {e}: noise {noise}");
            assert!(!experts[..e].contains(expert));
        }
        // the noise of different experts is independent: their mean has less
        let mean: Vec<f32> =
            (0..reference.len()).map(|i| experts.iter().map(|expert| expert[i]).sum::<f32>() / 8.0).collect();
        let noise = error(&mean, &reference);
        assert!((noise - 0.1 / 8f64.sqrt()).abs() < 0.004, "{matrix}: noise of the mean {noise}");
    }
    let again = dir.path().join("again.gguf");
    upcycle(&dense, &options, &again, false, &mut |_, _| ()).unwrap();
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&again).unwrap());
}

#[test]
fn only_dense_llama_models_are_upcycled() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let refuse = |preset: &str, options: upcycle::Options| {
        let source = Gguf::open(&tiny(dir.path(), preset, "f32")).unwrap();
        upcycle(&source, &options, &out, false, &mut |_, _| ()).unwrap_err()
    };
    for preset in ["tiny-olmoe", "tiny-llama-moe"] {
        let error = refuse(preset, Default::default());
        assert!(matches!(error, SynthError::NotDense(_)), "{preset}: {error}");
    }
    for n_expert_used in [0, 9] {
        let error = refuse("tiny-llama", upcycle::Options { n_expert_used, ..Default::default() });
        assert!(matches!(error, SynthError::Options(_)), "{error}");
    }
    assert!(!out.exists());
}
