//! Matrices of weights times token blocks.
//!
//! The weights are [`Packed`]: brought into the kernels' order when they are read, by [`pack`]. The activations
//! are [`Acts`]: quantised once for all the matrices that read them. [`matmul`] multiplies on all threads.

pub use crate::quant::kernels::{
    Acts, Chosen, MAX_LANES, OutRows, Packed, Product, matmul, matmul_here, multiply_rate, pack, scratch_bytes,
};
