//! A mixture of experts from a dense model: real text without training.
//!
//! Each expert is the dense feed-forward network with small noise of its own, so whichever experts the random
//! router picks, their mean is close to the dense network and the text stays as good. An engine sees real
//! activations, distinct experts and a router that decides. The idea of starting experts from a dense network is
//! Komatsuzaki et al., "Sparse Upcycling", 2022; they go on to train, which is left out here.

use std::path::Path;

use rayon::prelude::*;

use super::rng::Rng;
use super::{Progress, SynthError, fill};
use crate::gguf::mixture::{Facts, Mixture};
use crate::gguf::{Gguf, GgufWriter, Tensor};
use crate::quant::{self, Format};

/// How a dense model becomes a mixture of experts.
#[derive(Clone, Debug)]
pub struct Options {
    /// Experts of each layer.
    pub n_expert: u32,
    /// Experts that a token uses.
    pub n_expert_used: u32,
    /// Root mean square of an expert's noise, against that of the weights.
    pub noise: f32,
    /// Formats of the experts; other tensors keep theirs.
    pub mixture: &'static Mixture,
    /// Spread of the router's weights.
    pub router_std: f32,
    /// Another seed makes other experts and another router.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        let mixture = super::Options::default().mixture;
        Self { n_expert: 8, n_expert_used: 2, noise: 0.02, mixture, router_std: 0.1, seed: 1 }
    }
}

/// Weights that are held as f32 at a time, unless a row alone is longer.
const CHUNK: u64 = 4 << 20;

/// A tensor of the result and what it's made from.
struct Part<'a> {
    name: String,
    shape: Vec<u64>,
    format: &'static Format,
    origin: Origin<'a>,
}

enum Origin<'a> {
    /// The dense model's bytes.
    Copy(&'a Tensor),
    /// The dense matrix with noise, once for each expert.
    Experts(&'a Tensor),
    Router,
}

/// Writes the mixture of experts made from a dense model of the `llama` architecture.
pub fn upcycle(
    dense: &Gguf,
    options: &Options,
    path: &Path,
    overwrite: bool,
    progress: &mut Progress<'_>,
) -> Result<(), SynthError> {
    let parts = parts(dense, options)?;
    let mut writer = GgufWriter::new();
    let keys = dense.metadata();
    writer.set_all(keys);
    let name = keys.get("general.name").and_then(|v| v.as_str()).unwrap_or("dense");
    let (n, used) = (options.n_expert, options.n_expert_used);
    writer.set("general.name", format!("{name} upcycled {n}x top-{used}"));
    writer.set("general.file_type", options.mixture.file_type);
    writer.set("llama.expert_count", n);
    writer.set("llama.expert_used_count", used);
    for part in &parts {
        writer.tensor(&part.name, &part.shape, part.format);
    }
    let mut file = writer.create(path, overwrite)?;
    let total = parts.iter().map(Part::n_bytes).sum();
    let mut done = 0;
    for part in &parts {
        part.produce(dense, options, &mut |bytes| {
            file.write(bytes)?;
            done += bytes.len() as u64;
            progress(done, total);
            Ok(())
        })?;
    }
    Ok(file.finish()?)
}

/// The result's tensors, or why there can't be a result.
fn parts<'a>(dense: &'a Gguf, options: &Options) -> Result<Vec<Part<'a>>, SynthError> {
    let not = |why: String| Err(SynthError::NotDense(why));
    let keys = dense.metadata();
    let arch = keys.required_str("general.architecture").map_err(|e| SynthError::NotDense(e.to_string()))?;
    if arch != "llama" {
        return not(format!("the architecture is {arch:?}, not \"llama\""));
    }
    if keys.contains("llama.expert_count") {
        return not("it is a mixture of experts already".into());
    }
    if options.n_expert_used == 0 || options.n_expert_used > options.n_expert {
        return Err(SynthError::Options("a token uses at least one expert and at most all".into()));
    }
    let number = |key: &str| keys.required_u32(key).map_err(|e| SynthError::NotDense(e.to_string()));
    let n_embd = number("llama.embedding_length")?;
    // attention keeps its formats, so its rules' facts don't matter
    let facts = Facts { n_layer: number("llama.block_count")?, n_expert: options.n_expert, n_gqa: 1, tied: false };
    let f32 = quant::by_name("f32").expect("F32 is registered");
    let mut parts = Vec::new();
    for tensor in dense.tensors() {
        let matrix = ["ffn_gate", "ffn_up", "ffn_down"]
            .into_iter()
            .find_map(|m| Some((m, tensor.name.strip_suffix(&format!(".{m}.weight"))?)));
        let Some((matrix, layer)) = matrix else {
            let (name, shape) = (tensor.name.to_string(), tensor.shape().to_vec());
            parts.push(Part { name, shape, format: tensor.format, origin: Origin::Copy(tensor) });
            continue;
        };
        let name = format!("{layer}.{matrix}_exps.weight");
        let shape = vec![tensor.dim(0), tensor.dim(1), options.n_expert.into()];
        let format = options.mixture.format(&facts, &name, &shape).unwrap_or(f32);
        if matrix == "ffn_gate" {
            let (name, shape) = (format!("{layer}.ffn_gate_inp.weight"), vec![n_embd.into(), options.n_expert.into()]);
            parts.push(Part { name, shape, format: f32, origin: Origin::Router });
        }
        parts.push(Part { name, shape, format, origin: Origin::Experts(tensor) });
    }
    if !parts.iter().any(|part| matches!(part.origin, Origin::Experts(_))) {
        return not("no tensor is called blk.N.ffn_gate.weight".into());
    }
    Ok(parts)
}

type Sink<'s> = dyn FnMut(&[u8]) -> Result<(), SynthError> + 's;

impl Part<'_> {
    fn n_bytes(&self) -> u64 {
        let blocks = self.shape.iter().product::<u64>() / self.format.block_len as u64;
        blocks * self.format.block_bytes as u64
    }

    fn produce(&self, dense: &Gguf, options: &Options, sink: &mut Sink<'_>) -> Result<(), SynthError> {
        let rng = Rng::new(options.seed, &self.name);
        match self.origin {
            Origin::Copy(tensor) => chunks(dense, tensor, &mut |bytes, _| sink(bytes)),
            Origin::Router => {
                let mut rng = rng;
                let n: u64 = self.shape.iter().product();
                let weights: Vec<f32> = (0..n).map(|_| rng.normal() * options.router_std).collect();
                sink(&fill::quantised(self.format, &weights))
            }
            Origin::Experts(tensor) => {
                let noise = options.noise * rms(dense, tensor)?;
                (0..u64::from(options.n_expert)).try_for_each(|e| self.expert(dense, tensor, noise, &rng.part(e), sink))
            }
        }
    }

    /// One expert's matrix. Each row's noise is a stream of its own: threads and chunks make no difference.
    fn expert(
        &self,
        dense: &Gguf,
        tensor: &Tensor,
        noise: f32,
        rng: &Rng,
        sink: &mut Sink<'_>,
    ) -> Result<(), SynthError> {
        let (n_cols, from_bytes) = (tensor.n_cols() as usize, tensor.row_bytes() as usize);
        let to_bytes = n_cols / self.format.block_len * self.format.block_bytes;
        let mut out = Vec::new();
        chunks(dense, tensor, &mut |bytes, first_row| {
            out.resize(bytes.len() / from_bytes * to_bytes, 0);
            let rows = bytes.par_chunks(from_bytes).zip(out.par_chunks_mut(to_bytes));
            rows.enumerate().for_each(|(i, (from, to))| {
                let mut rng = rng.part(first_row + i as u64);
                let mut row = vec![0f32; n_cols];
                (tensor.format.dequantize_row)(from, &mut row);
                row.iter_mut().for_each(|w| *w += noise * rng.normal());
                (self.format.quantize_row)(&row, to);
            });
            sink(&out)
        })
    }
}

/// Root mean square of a tensor's weights.
fn rms(dense: &Gguf, tensor: &Tensor) -> Result<f32, SynthError> {
    let mut sum = 0f64;
    let mut row = vec![0f32; tensor.n_cols() as usize];
    chunks(dense, tensor, &mut |bytes, _| {
        for from in bytes.chunks(tensor.row_bytes() as usize) {
            (tensor.format.dequantize_row)(from, &mut row);
            sum += row.iter().map(|w| f64::from(w * w)).sum::<f64>();
        }
        Ok(())
    })?;
    Ok((sum / tensor.n_elements() as f64).sqrt() as f32)
}

/// Reads a tensor in chunks of whole rows, each with the number of its first row.
fn chunks(
    dense: &Gguf,
    tensor: &Tensor,
    take: &mut dyn FnMut(&[u8], u64) -> Result<(), SynthError>,
) -> Result<(), SynthError> {
    let rows_at_once = (CHUNK / tensor.n_cols().max(1)).max(1);
    let mut bytes = Vec::new();
    for first in (0..tensor.n_rows()).step_by(rows_at_once as usize) {
        let rows = rows_at_once.min(tensor.n_rows() - first);
        bytes.resize((rows * tensor.row_bytes()) as usize, 0);
        dense.read_at(tensor, first * tensor.row_bytes(), &mut bytes)?;
        take(&bytes, first)?;
    }
    Ok(())
}
