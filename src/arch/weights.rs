//! Loading: an architecture declares the weights that it needs, then all dense ones are read at once, in parallel,
//! each packed for the kernels while it is still in the cache.

#![allow(unsafe_code)]

use super::ModelError;
use crate::cpu::{Isa, Pages};
use crate::gguf::{Gguf, Metadata, Tensor};
use crate::moe::{LayerParts, Part};
use crate::ops::matmul::{self, MAX_LANES, Packed};
use crate::quant::Format;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Rows are read and packed in pieces of about this many bytes: they stay in a core's second-level cache.
const PIECE_BYTES: usize = 512 << 10;

/// A dense matrix, or several of one shape, by its place in [`Dense`]. Maps `n_cols` inputs to `n_rows` outputs.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Its number format.
    pub format: &'static Format,
    /// Output width.
    pub n_rows: usize,
    /// Input width.
    pub n_cols: usize,
    tensor: usize,
    /// Where its bytes begin in the tensor, and in memory.
    offset: u64,
    at: usize,
    n_bytes: usize,
}

/// The dense weights in memory: read once, owned, packed for this machine's kernels.
pub struct Dense {
    pages: Pages,
    isa: Isa,
}

impl Dense {
    /// The matrix's packed rows.
    pub fn packed(&self, m: &Matrix) -> Packed<'_> {
        Packed::new(m.format, self.isa, m.n_rows, m.n_cols, &self.pages[m.at..m.at + m.n_bytes])
    }

    /// Bytes that the weights take.
    pub fn n_bytes(&self) -> usize {
        self.pages.len()
    }
}

/// Collects what an architecture declares.
pub struct Loader<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
    isa: Isa,
    matrices: Vec<Matrix>,
    n_bytes: usize,
    vector_bytes: usize,
    /// Nothing is read: sizes are all that is wanted.
    describe: bool,
}

impl<'a> Loader<'a> {
    /// A loader for a model of this architecture. One that describes reads nothing: its vectors hold ones.
    pub fn new(gguf: &'a Gguf, arch: &'a str, isa: Isa, describe: bool) -> Self {
        Loader { gguf, arch, isa, matrices: Vec::new(), n_bytes: 0, vector_bytes: 0, describe }
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &'a Metadata {
        self.gguf.metadata()
    }

    /// A tensor's index in the file, its shape checked.
    pub fn index(&self, name: &str, shape: &[usize]) -> Result<usize, ModelError> {
        self.find(name, shape).map(|f| f.0)
    }

    /// Whether the model has the tensor.
    pub fn has(&self, name: &str) -> bool {
        self.gguf.tensor(name).is_some()
    }

    /// Bytes that the declared weights will take.
    pub fn declared_bytes(&self) -> u64 {
        (self.n_bytes + self.vector_bytes) as u64
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<(usize, &'a Tensor), ModelError> {
        let Some(index) = self.gguf.tensor_index(name) else {
            return Err(ModelError::MissingTensor { tensor: name.into(), arch: self.arch.into() });
        };
        let t = &self.gguf.tensors()[index];
        let same = (0..4).all(|i| t.dim(i) == shape.get(i).map_or(1, |&d| d as u64));
        if !same {
            let show = |dims: &[u64]| dims.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
            let expected: Vec<u64> = shape.iter().map(|&d| d as u64).collect();
            return Err(ModelError::Shape { tensor: name.into(), found: show(t.shape()), expected: show(&expected) });
        }
        Ok((index, t))
    }

    fn declare(&mut self, tensor: usize, offset: u64, n_rows: usize, n_cols: usize) -> Matrix {
        let t = &self.gguf.tensors()[tensor];
        let n_bytes = n_rows * row_bytes(t.format, n_cols);
        let m = Matrix { format: t.format, n_rows, n_cols, tensor, offset, at: self.n_bytes, n_bytes };
        self.n_bytes = (self.n_bytes + n_bytes).next_multiple_of(64);
        self.matrices.push(m);
        m
    }

    /// A matrix that maps `n_cols` inputs to `n_rows` outputs.
    pub fn matrix(&mut self, name: &str, n_cols: usize, n_rows: usize) -> Result<Matrix, ModelError> {
        let (tensor, _) = self.find(name, &[n_cols, n_rows])?;
        Ok(self.declare(tensor, 0, n_rows, n_cols))
    }

    /// `n` matrices of one shape in one tensor: one for each head.
    pub fn matrices(&mut self, name: &str, n_cols: usize, n_rows: usize, n: usize) -> Result<Vec<Matrix>, ModelError> {
        let (tensor, t) = self.find(name, &[n_cols, n_rows, n])?;
        let stride = t.n_bytes / n as u64;
        Ok((0..n).map(|i| self.declare(tensor, i as u64 * stride, n_rows, n_cols)).collect())
    }

    /// A small tensor as f32, read at once.
    pub fn vector(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let (_, t) = self.find(name, shape)?;
        let mut out = vec![1.0; shape.iter().product()];
        if !self.describe {
            let mut raw = vec![0; t.n_bytes as usize];
            self.gguf.read_at(t, 0, &mut raw)?;
            (t.format.dequantize_row)(&raw, &mut out);
        }
        self.vector_bytes += out.len() * 4;
        Ok(out)
    }

    /// The same, if the model has it.
    pub fn optional_vector(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, ModelError> {
        if self.has(name) { self.vector(name, shape).map(Some) } else { Ok(None) }
    }

    /// The experts of a layer: `ffn_gate_exps`, `ffn_up_exps` (or both merged in `ffn_gate_up_exps`), `ffn_down_exps`.
    pub fn experts(&self, layer: usize, n_embd: usize, n_ff: usize, n_expert: usize) -> Result<LayerParts, ModelError> {
        let name = |part: &str| format!("blk.{layer}.ffn_{part}_exps.weight");
        let part = |name: &str, n_cols: usize, n_rows: usize, pieces: usize, piece: usize| {
            let (tensor, t) = self.find(name, &[n_cols, n_rows * pieces, n_expert])?;
            let n_bytes = n_rows * row_bytes(t.format, n_cols);
            let (stride, offset) = ((n_bytes * pieces) as u64, (n_bytes * piece) as u64);
            Ok::<_, ModelError>(Part { tensor, offset, stride, n_bytes, format: t.format, n_rows, n_cols })
        };
        let down = part(&name("down"), n_ff, n_embd, 1, 0)?;
        if self.has(&name("gate_up")) {
            let merged = name("gate_up");
            return Ok([part(&merged, n_embd, n_ff, 2, 0)?, part(&merged, n_embd, n_ff, 2, 1)?, down]);
        }
        Ok([part(&name("gate"), n_embd, n_ff, 1, 0)?, part(&name("up"), n_embd, n_ff, 1, 0)?, down])
    }

    /// Reads and packs every declared matrix, until `stop` is true; `progress` is told bytes as they are done.
    pub fn read(self, stop: Option<&AtomicBool>, progress: &(dyn Fn(u64) + Sync)) -> Result<Dense, ModelError> {
        let bytes = self.n_bytes as u64;
        let memory = |source| ModelError::Memory { bytes, what: "dense weights".into(), source };
        let pages = Pages::new(self.n_bytes).map_err(memory)?;
        let base = Shared(pages.as_ptr());
        let pieces: Vec<(&Matrix, Range<usize>)> = self.matrices.iter().flat_map(pieces).collect();
        pieces.par_iter().try_for_each_init(Vec::new, |scratch: &mut Vec<u8>, (m, rows)| {
            if stop.is_some_and(|stop| stop.load(Relaxed)) {
                return Err(ModelError::Stopped);
            }
            let row = row_bytes(m.format, m.n_cols);
            let (at, n_bytes) = (m.at + rows.start * row, rows.len() * row);
            assert!(at + n_bytes <= pages.len());
            // SAFETY: pieces are disjoint ranges of the mapping, which outlives this loop and nobody else uses yet.
            let data = unsafe { std::slice::from_raw_parts_mut(base.get().add(at), n_bytes) };
            let tensor = &self.gguf.tensors()[m.tensor];
            scratch.resize(n_bytes, 0);
            self.gguf.read_at(tensor, m.offset + (rows.start * row) as u64, scratch)?;
            matmul::pack(m.format, self.isa, rows.len(), m.n_cols, scratch, data);
            progress(n_bytes as u64);
            Ok(())
        })?;
        Ok(Dense { pages, isa: self.isa })
    }
}

/// A pointer that threads may share; each writes its own part.
struct Shared(*mut u8);
impl Shared {
    fn get(&self) -> *mut u8 {
        self.0
    }
}
// SAFETY: users write disjoint parts.
unsafe impl Sync for Shared {}

/// Bytes of a row; the file's parser has checked that rows are whole blocks.
fn row_bytes(format: &Format, n_cols: usize) -> usize {
    n_cols / format.block_len * format.block_bytes
}

/// Splits a matrix into ranges of whole row groups, of any instruction set.
fn pieces(m: &Matrix) -> impl Iterator<Item = (&Matrix, Range<usize>)> {
    let rows = (PIECE_BYTES / row_bytes(m.format, m.n_cols).max(1)).next_multiple_of(MAX_LANES).max(MAX_LANES);
    (0..m.n_rows.div_ceil(rows)).map(move |i| (m, i * rows..((i + 1) * rows).min(m.n_rows)))
}
