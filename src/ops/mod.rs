//! Operations over slices, on the CPU.
//!
//! Functions are single-threaded and work on what they are given (a row, a token, a head), and the caller splits the work among
//! threads; where the division matters, in [`matmul`] and [`attention`], they take the team and do it themselves. Each element of a result is computed by one fixed sequence of operations, which depends
//! neither on the instruction set nor on the other elements: see `cpu::simd`.

pub mod attention;
pub mod elementwise;
pub mod kv;
pub mod matmul;
pub mod norm;
pub mod rope;

pub use attention::{AttnParams, KvBatch};
pub use elementwise::{add, add_scaled, dot, scale, sigmoid, softmax, swiglu, swiglu_oai};
pub use kv::{KV_BLOCK, KvError, KvLayer, KvPool, KvType, SeqKv};
pub use norm::{rms_norm, rms_norm_heads, rms_norm_in_place};
pub use rope::{Rope, RopeConfig, RopeStyle, RopeTable, Yarn};
