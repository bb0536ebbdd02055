//! The GGUF file format: what a model file says about itself, where its tensors lie, and how to write one.
//!
//! A file is untrusted input. [`Header::parse`] is a pure function from bytes to a checked description:
//! every count is compared with the bytes that are there before anything is allocated for it, and every
//! tensor lies inside its file, aligned, apart from the others, with a format that [`crate::quant`] knows.
//! `docs/hostile-files.md` lists what is promised.
//!
//! Everything is read by positioned reads and nothing through a mapping, so a file that shrinks or a disk that fails is an error
//! and not a signal.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod cursor;
mod direct;
mod encode;
mod error;
mod file;
mod fnv;
mod header;
mod metadata;
pub mod mixture;
mod part;
mod read;
pub mod requantize;
mod split;
mod tensor;
mod value;
mod writer;

pub use direct::DirectFile;
pub use encode::Encode;
pub use error::{GgufError, HeaderError, KeyError, WriteError, printable};
pub use file::{Gguf, ModelFile};
pub use fnv::Fnv;
pub use header::{Header, MAX_HEADER_BYTES, MAX_KEYS, MAX_TENSORS};
pub use metadata::Metadata;
pub use part::{PartFile, remove_unfinished};
pub use tensor::Tensor;
pub use value::{Array, Strings, Value, ValueType};
pub use writer::{DataWriter, GgufWriter};

/// Where tensors begin unless `general.alignment` says otherwise, in bytes.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// The key that changes it.
pub const ALIGNMENT_KEY: &str = "general.alignment";

#[cfg(test)]
mod tests;
