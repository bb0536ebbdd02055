//! What the benches share: models by name, medians.

use oncall::gguf::{Gguf, mixture};
use oncall::synth::{self, Preset, upcycle};
use std::path::{Path, PathBuf};

/// The file of a model that is named, made or found in `models/cache`.
pub fn model(name: &str, format: &str) -> PathBuf {
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/cache");
    let smollm2 = cache.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let need = |path: &Path| assert!(path.exists(), "{} isn't there: run models/fetch-smollm2.sh", path.display());
    match name {
        "smollm2" => {
            need(&smollm2);
            smollm2
        }
        "smolmoe" => {
            let path = cache.join("smolmoe-q4_0.gguf");
            if !path.exists() {
                need(&smollm2);
                let dense = Gguf::open(&smollm2).expect("the fetched model is whole");
                upcycle::upcycle(&dense, &upcycle::Options::default(), &path, false, &mut |_, _| ())
                    .expect("upcycling");
            }
            path
        }
        _ => match Preset::by_name(name) {
            None => PathBuf::from(name),
            Some(preset) => {
                let path = cache.join(format!("{name}-{format}.gguf"));
                if !path.exists() {
                    std::fs::create_dir_all(&cache).expect("models/cache");
                    let mixture = mixture::by_name(format).expect("a known mixture of formats");
                    let options = synth::Options { mixture, ..synth::Options::default() };
                    synth::write(preset, &options, &path).expect("writing the model");
                }
                path
            }
        },
    }
}

/// The middle one.
pub fn median(x: impl Iterator<Item = f64>) -> f64 {
    let mut x: Vec<f64> = x.collect();
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}
