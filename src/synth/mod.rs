//! Models of random weights and real shapes, for tests, benches and the examples; not part of the public interface.
//!
//! [`write`] makes a GGUF file that any engine loads, from a [`Preset`] and [`Options`]: larger than memory if
//! asked, and the same bytes for the same seed on every machine. What it says means nothing. [`upcycle`](mod@upcycle)
//! makes a mixture of experts that does speak, from a dense model.

mod fill;
mod metadata;
pub mod preset;
pub(crate) mod rng;
mod router;
mod tensors;
pub mod upcycle;
mod vocab;

use std::path::Path;

use crate::gguf::mixture::{self, Mixture};
use crate::gguf::{GgufError, GgufWriter, WriteError};

pub use preset::{PRESETS, Preset};
use tensors::Spec;

/// How a preset is filled.
#[derive(Clone, Debug)]
pub struct Options {
    /// Formats of the tensors.
    pub mixture: &'static Mixture,
    /// Another seed makes another model.
    pub seed: u64,
    /// Size of what a layer adds, against the residual stream. At 0.1 the stream stays the token's embedding, more
    /// or less, and no depth overflows; at 1.0 every part of every layer shows in the logits, as parity tests need
    /// (granitemoe scales its residuals down: 40 there).
    pub residual_gain: f32,
    /// How unequal experts are: 0 for all alike, 1 for what real models do.
    pub router_skew: f32,
    /// Another number of layers than the preset's.
    pub n_layer: Option<u32>,
    /// Another number of tokens than the preset's.
    pub n_vocab: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        let mixture = mixture::by_name("q4_0").expect("a mixture of the table");
        Self { mixture, seed: 1, residual_gain: 0.1, router_skew: 0.0, n_layer: None, n_vocab: None }
    }
}

impl Options {
    /// For comparisons of numbers with another engine: F32, and layers as large as the stream.
    pub fn parity(preset: &Preset) -> Self {
        let mixture = mixture::by_name("f32").expect("a mixture of the table");
        let residual_gain = if preset.arch == "granitemoe" { 40.0 } else { 1.0 };
        Self { mixture, residual_gain, ..Self::default() }
    }
}

/// Why a model wasn't made.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// The options contradict the preset or themselves.
    #[error("{0}")]
    Options(String),
    /// Reading the dense model failed.
    #[error(transparent)]
    Read(#[from] GgufError),
    /// The dense model isn't one that can be upcycled.
    #[error("can't be upcycled: {0}")]
    NotDense(String),
    /// Writing failed.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Told after each piece: bytes of tensor data written, and in all.
pub type Progress<'p> = dyn FnMut(u64, u64) + 'p;

/// Writes a model; an error if the file is there already.
pub fn write(preset: &Preset, options: &Options, path: &Path) -> Result<(), SynthError> {
    write_with(preset, options, path, false, &mut |_, _| ())
}

/// As [`write`], replacing an existing file if `overwrite` says so, with progress.
pub fn write_with(
    preset: &Preset,
    options: &Options,
    path: &Path,
    overwrite: bool,
    progress: &mut Progress<'_>,
) -> Result<(), SynthError> {
    let preset = adapted(preset, options)?;
    let specs = tensors::specs(&preset, options);
    let mut file = declare(&preset, options, &specs).create(path, overwrite)?;
    fill_all(&preset, options, &specs, &mut |bytes| Ok(file.write(bytes)?), progress)?;
    Ok(file.finish()?)
}

/// The bytes of a model, for tests with tiny ones.
pub fn to_bytes(preset: &Preset, options: &Options) -> Result<Vec<u8>, SynthError> {
    let preset = adapted(preset, options)?;
    let specs = tensors::specs(&preset, options);
    let mut out = declare(&preset, options, &specs).in_memory()?;
    fill_all(&preset, options, &specs, &mut |bytes| Ok(out.write(bytes)?), &mut |_, _| ())?;
    Ok(out.finish()?)
}

/// The preset with what the options change of its shape.
fn adapted(preset: &Preset, options: &Options) -> Result<Preset, SynthError> {
    let mut preset = preset.clone();
    preset.n_layer = options.n_layer.unwrap_or(preset.n_layer);
    preset.n_vocab = options.n_vocab.unwrap_or(preset.n_vocab);
    let wrong = |what: String| Err(SynthError::Options(what));
    let n_dense = preset.moe.as_ref().map_or(0, |moe| moe.n_dense);
    if preset.n_layer <= n_dense {
        return wrong(format!("{} needs more than {n_dense} layers", preset.name));
    }
    if (preset.n_vocab as usize) < vocab::Vocab::MIN {
        return wrong(format!("a vocabulary needs at least {} tokens, for the bytes", vocab::Vocab::MIN));
    }
    if !(options.router_skew.is_finite() && options.router_skew >= 0.0) {
        return wrong("the router's skew is a number from 0 on".into());
    }
    if !(options.residual_gain.is_finite() && options.residual_gain > 0.0) {
        return wrong("the residual gain is a number above 0".into());
    }
    Ok(preset)
}

fn declare(preset: &Preset, options: &Options, specs: &[Spec]) -> GgufWriter {
    let mut writer = GgufWriter::new();
    metadata::set(&mut writer, preset, options);
    for spec in specs {
        writer.tensor(&spec.name, &spec.shape, spec.format);
    }
    writer
}

fn fill_all(
    preset: &Preset,
    options: &Options,
    specs: &[Spec],
    sink: &mut fill::Sink<'_>,
    progress: &mut Progress<'_>,
) -> Result<(), SynthError> {
    let total = specs.iter().map(Spec::n_bytes).sum();
    let mut done = 0;
    let mut filler = fill::Filler::new(preset, options.seed, options.router_skew);
    for spec in specs {
        filler.fill(spec, &mut |bytes| {
            sink(bytes)?;
            done += bytes.len() as u64;
            progress(done, total);
            Ok(())
        })?;
    }
    Ok(())
}
