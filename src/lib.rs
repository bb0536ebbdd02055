//! oncall runs quantised mixture-of-experts language models that are larger than the machine's memory.
//!
//! The house, from the top down; a room uses only the rooms below it:
//!
//! | room | what it is |
//! |---|---|
//! | [`cli`] | thin front ends: parse, call the engine, print |
//! | [`batch`] | offline batches: files of requests in, files of results out |
//! | [`engine`] | [`engine::Engine`] (a loaded model) and [`engine::Session`] (one timeline) |
//! | [`session`] | tokenisers, chat templates, sampling, stop strings, generation, the KV cache |
//! | [`arch`] | a family of models in a file: configuration, weights, forward pass |
//! | [`moe`] | router, expert store, policies, the planner |
//! | [`ops`] | matmul, norms, RoPE, attention over slices, on the CPU |
//! | [`gguf`] | the file: parse, positioned reads, write |
//! | [`quant`] | number formats: block, quantise, dequantise, dot products, kernels |
//! | [`cpu`] | instruction sets, threads, what the machine has |

pub mod arch;
pub mod batch;
pub mod cli;
pub mod cpu;
pub mod engine;
pub mod gguf;
pub mod moe;
pub mod ops;
pub mod quant;
pub mod session;
#[doc(hidden)]
pub mod synth;
