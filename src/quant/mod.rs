//! Number formats of weights in a file: one file each, one line in [`FORMATS`].
//!
//! A tensor's rows are sequences of blocks. A format says how a block is laid out, how it becomes
//! f32, how f32 becomes it, and what its dot product with a quantised row of activations is.
//! The scalar dot product defines the result; every kernel of every instruction set gives the same bits.

pub mod act;
mod bf16;
mod block1;
mod block32;
mod f16;
mod f32;
mod fit;
mod iq4_nl;
mod iq4_xs;
mod k4;
pub(crate) mod kernels;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod superblock;

pub use act::ActRow;

use crate::cpu::Isa;

/// What a row of activations is quantised to before it meets a format's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActKind {
    /// Not quantised.
    F32,
    /// Blocks of 32 signed bytes with one scale, as ggml's Q8_0.
    Q8_0,
    /// Blocks of 256 signed bytes with one f32 scale, as ggml's Q8_K.
    Q8K,
}

impl ActKind {
    /// Activations in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Q8_0 => 32,
            Self::Q8K => 256,
        }
    }
}

/// A number format: the constants of its block and its scalar functions.
pub struct Format {
    /// The type's number in a GGUF file.
    pub id: u32,
    /// ggml's name for it, in lower case: `q4_0`.
    pub name: &'static str,
    /// Weights in a block.
    pub block_len: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// What activations are quantised to for its dot products.
    pub act: ActKind,
    /// Whole blocks to f32: `src.len() / block_bytes * block_len == dst.len()`, else it panics.
    pub dequantize_row: fn(src: &[u8], dst: &mut [f32]),
    /// f32 to whole blocks, as ggml's reference quantiser does. Panics if the lengths don't match.
    pub quantize_row: fn(src: &[f32], dst: &mut [u8]),
    /// The dot product with as many activations of kind `act`, in scalar code. It defines the result: the order of its
    /// operations is the order of every kernel. Panics if the lengths don't match.
    pub vec_dot: fn(row: &[u8], x: ActRow<'_>) -> f32,
    /// Its kernels on an instruction set, if they are compiled for this machine.
    pub(crate) kernels: fn(Isa) -> Option<&'static kernels::Kernels>,
}

impl Format {
    /// Bytes of a row of `n` weights; `None` if `n` isn't a whole number of blocks or the size overflows.
    pub fn row_bytes(&self, n: u64) -> Option<u64> {
        let len = self.block_len as u64;
        (n.is_multiple_of(len)).then(|| (n / len).checked_mul(self.block_bytes as u64)).flatten()
    }
}

impl std::fmt::Debug for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Every format that oncall reads.
pub static FORMATS: &[&Format] = &[
    &f32::FORMAT,
    &f16::FORMAT,
    &bf16::FORMAT,
    &q4_0::FORMAT,
    &q4_1::FORMAT,
    &q5_0::FORMAT,
    &q5_1::FORMAT,
    &q8_0::FORMAT,
    &q2_k::FORMAT,
    &q3_k::FORMAT,
    &q4_k::FORMAT,
    &q5_k::FORMAT,
    &q6_k::FORMAT,
    &iq4_nl::FORMAT,
    &iq4_xs::FORMAT,
    &mxfp4::FORMAT,
];

/// The format with this number in a GGUF file.
pub fn by_id(id: u32) -> Option<&'static Format> {
    FORMATS.iter().copied().find(|f| f.id == id)
}

/// The format of this name, in any case.
pub fn by_name(name: &str) -> Option<&'static Format> {
    FORMATS.iter().copied().find(|f| f.name.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests;
