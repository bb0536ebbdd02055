//! Matrices of weights times token blocks.
//!
//! The weights are [`Packed`]: brought into the kernels' order when they are read, by [`pack`]. The activations
//! are [`Acts`]: quantised once for all the matrices that read them. [`matmul_groups`] is the product, a part of the rows at a time.

pub use crate::quant::kernels::{Acts, Chosen, OutRows, Packed, matmul_groups, multiply_rate, pack};
