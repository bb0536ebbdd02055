//! A tensor's description.

use std::sync::Arc;

use crate::quant::Format;

/// A tensor: its shape, its format, and where its bytes are.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name: `blk.0.ffn_gate_exps.weight`.
    pub name: Arc<str>,
    /// Dimensions, the fastest first, 1 where there is none.
    pub(super) dims: [u64; 4],
    pub(super) n_dims: usize,
    /// Its number format.
    pub format: &'static Format,
    /// Index of its file in [`super::Gguf::files`].
    pub file: usize,
    /// Its first byte in that file.
    pub offset: u64,
    /// Its size in bytes.
    pub n_bytes: u64,
}

impl Tensor {
    /// The dimensions that the file declares, the fastest first: `[n_cols, n_rows, ...]`.
    pub fn shape(&self) -> &[u64] {
        &self.dims[..self.n_dims]
    }

    /// A dimension; 1 beyond those that are declared.
    pub fn dim(&self, i: usize) -> u64 {
        self.dims.get(i).copied().unwrap_or(1)
    }

    /// Elements of a row.
    pub fn n_cols(&self) -> u64 {
        self.dims[0]
    }

    /// Rows, of all the outer dimensions together.
    pub fn n_rows(&self) -> u64 {
        self.dims[1..].iter().product()
    }

    /// Elements.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> u64 {
        self.n_bytes / self.n_rows()
    }
}
