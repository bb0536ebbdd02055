//! Writing a model again in another mixture of formats.

use std::path::Path;

use rayon::prelude::*;

use super::mixture::{Facts, Mixture};
use super::{Gguf, GgufError, GgufWriter, KeyError, Tensor, WriteError};
use crate::quant::Format;

/// Weights that are held as f32 at a time, unless a row alone is longer.
const CHUNK: u64 = 4 << 20;

/// Why a model wasn't written in another mixture.
#[derive(Debug, thiserror::Error)]
pub enum RequantizeError {
    /// The model's metadata doesn't say what the rules need.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The model couldn't be read.
    #[error(transparent)]
    Read(#[from] GgufError),
    /// The result couldn't be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The caller ended it.
    #[error("it was stopped before the whole model was written")]
    Stopped,
}

/// What each tensor of a model becomes in a mixture.
pub struct Plan<'a> {
    source: &'a Gguf,
    mixture: &'static Mixture,
    /// Of each tensor of the source.
    formats: Vec<&'static Format>,
}

impl<'a> Plan<'a> {
    /// Chooses the formats. Reads no tensor.
    pub fn new(source: &'a Gguf, mixture: &'static Mixture) -> Result<Self, RequantizeError> {
        let facts = facts(source)?;
        let format = |tensor: &Tensor| mixture.format(&facts, &tensor.name, tensor.shape()).unwrap_or(tensor.format);
        let formats = source.tensors().iter().map(format).collect();
        Ok(Self { source, mixture, formats })
    }

    /// The tensors with their new formats, in the file's order.
    pub fn tensors(&self) -> impl Iterator<Item = (&'a Tensor, &'static Format)> {
        self.source.tensors().iter().zip(self.formats.iter().copied())
    }

    /// Bytes of all tensors in their new formats.
    pub fn n_bytes(&self) -> u64 {
        self.tensors().map(|(tensor, format)| tensor.n_rows() * row_bytes(tensor, format)).sum()
    }

    /// The first tensor that is rounded already and would be rounded again: the result is worse than
    /// one made from the original.
    pub fn rounded_twice(&self) -> Option<&'a Tensor> {
        let twice = |(tensor, format): &(&Tensor, &Format)| {
            tensor.format.block_len > 1 && format.block_len > 1 && tensor.format.id != format.id
        };
        self.tensors().find(twice).map(|(tensor, _)| tensor)
    }

    /// Writes the model. `progress` is told the bytes of tensor data written, and in all, from the beginning on; with `false` it ends
    /// the work, which leaves nothing then.
    pub fn write(
        &self,
        path: &Path,
        overwrite: bool,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<(), RequantizeError> {
        let mut writer = GgufWriter::new();
        writer.set_all(self.source.metadata());
        writer.set("general.file_type", self.mixture.file_type);
        writer.set("general.quantization_version", 2u32);
        for (tensor, format) in self.tensors() {
            writer.tensor(&tensor.name, tensor.shape(), format);
        }
        let mut file = writer.create(path, overwrite)?;
        let (mut done, total) = (0, self.n_bytes());
        let mut go_on = |done| if progress(done, total) { Ok(()) } else { Err(RequantizeError::Stopped) };
        go_on(done)?;
        for (tensor, format) in self.tensors() {
            convert(self.source, tensor, format, &mut |bytes| {
                file.write(bytes)?;
                done += bytes.len() as u64;
                go_on(done)
            })?;
        }
        Ok(file.finish()?)
    }
}

fn row_bytes(tensor: &Tensor, format: &Format) -> u64 {
    tensor.n_cols() / format.block_len as u64 * format.block_bytes as u64
}

/// What the mixture's rules need, from the metadata.
fn facts(source: &Gguf) -> Result<Facts, KeyError> {
    let keys = source.metadata();
    let arch = keys.required_str("general.architecture")?;
    let n_layer = keys.required_u32(&format!("{arch}.block_count"))?;
    // heads differ between the layers of a few models; any layer that has some does for the rules
    let heads = |key: &str| {
        let per_layer = keys.u32_per_layer(&format!("{arch}.attention.{key}"), n_layer as usize)?;
        Ok::<_, KeyError>(per_layer.and_then(|all| all.into_iter().max()).unwrap_or(1))
    };
    Ok(Facts {
        n_layer,
        n_expert: keys.u32(&format!("{arch}.expert_count"))?.unwrap_or(0),
        n_gqa: heads("head_count")? / heads("head_count_kv")?.max(1),
        tied: source.tensor("output.weight").is_none(),
    })
}

/// Hands a tensor's bytes in a format to `sink`, in order: read in chunks of whole rows, rows in parallel.
fn convert(
    source: &Gguf,
    tensor: &Tensor,
    format: &'static Format,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), RequantizeError>,
) -> Result<(), RequantizeError> {
    let (from_bytes, to_bytes) = (tensor.row_bytes() as usize, row_bytes(tensor, format) as usize);
    let rows_at_once = (CHUNK / tensor.n_cols().max(1)).max(1);
    let mut input = Vec::new();
    let mut output = Vec::new();
    for first in (0..tensor.n_rows()).step_by(rows_at_once as usize) {
        let rows = rows_at_once.min(tensor.n_rows() - first) as usize;
        input.resize(rows * from_bytes, 0);
        source.read_at(tensor, first * tensor.row_bytes(), &mut input)?;
        if format.id == tensor.format.id {
            sink(&input)?;
            continue;
        }
        output.resize(rows * to_bytes, 0);
        let n_cols = tensor.n_cols() as usize;
        let pairs = input.par_chunks(from_bytes).zip(output.par_chunks_mut(to_bytes));
        pairs.for_each_init(
            || vec![0f32; n_cols],
            |row, (from, to)| {
                (tensor.format.dequantize_row)(from, row);
                (format.quantize_row)(row, to);
            },
        );
        sink(&output)?;
    }
    Ok(())
}
