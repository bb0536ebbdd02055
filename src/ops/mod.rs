//! Operations over slices, on the CPU.
//!
//! Every function here is single-threaded and works on what it is given (a row, a token, a head); the caller splits
//! the work among threads. Each element of a result is computed by one fixed sequence of operations, which depends
//! neither on the instruction set nor on the other elements: see `simd`.

pub mod attention;
pub mod elementwise;
pub mod kv;
pub mod matmul;
pub mod norm;
pub mod rope;
mod simd;

pub use attention::{AttnParams, KvBatch};
pub use elementwise::{add, add_bias, scale, sigmoid, softcap, softmax, swiglu, swiglu_oai};
pub use kv::{KV_BLOCK, KvError, KvLayer, KvPool, KvType, SeqKv};
pub use norm::{rms_norm, rms_norm_heads, rms_norm_in_place};
pub use rope::{Rope, RopeConfig, RopeStyle, RopeTable, Yarn};
