//! oncall runs quantised mixture-of-experts language models, which may be larger than the machine's memory.
//!
//! Begin with [`engine::Engine`]: [`load`](engine::Engine::load) a file, [`feed`](engine::Session::feed) a session, write with a
//! [`Generation`](engine::Generation); for many texts together [`submit`](engine::Engine::submit) requests. `examples/embed.rs` does all of it.
//!
//! ```
//! use oncall::engine::{Engine, EngineOptions, Generation, GenerationParams};
//!
//! let engine = Engine::embedded(&EngineOptions::default())?;
//! let mut session = engine.session();
//! session.feed(&engine.tokenizer().encode("Once upon a time", true, false), &mut |_n_done| true)?;
//! let params = GenerationParams { n_predict: Some(8), ..GenerationParams::default() };
//! let mut writing = Generation::new(&mut session, params)?;
//! let mut text = String::new();
//! while let Some(piece) = writing.next()? {
//!     text += &piece.text;
//! }
//! assert!(!text.is_empty());
//! # Ok::<(), oncall::engine::EngineError>(())
//! ```
//!
//! A program that embeds the library needs no command line: `default-features = false`.
//!
//! The house, from the top down; a room uses only the rooms below it:
//!
//! | room | what it is |
//! |---|---|
//! | [`cli`] | thin front ends: parse, call the engine, print |
//! | [`batch`] | offline batches: files of requests in, files of results out |
//! | [`engine`] | [`engine::Engine`] (a loaded model), [`engine::Session`] (one timeline), generation, the queue |
//! | [`session`] | tokenisers, chat templates, grammars, sampling, stop strings |
//! | [`arch`] | a family of models in a file: configuration, weights, forward pass |
//! | [`moe`] | router, expert store, policies, the planner |
//! | [`ops`] | matmul, norms, RoPE, attention, the KV cache, on the CPU |
//! | [`gguf`] | the file: parse, positioned reads, write |
//! | [`quant`] | number formats: block, quantise, dequantise, dot products, kernels |
//! | [`cpu`] | instruction sets, threads, what the machine has |

pub mod arch;
pub mod batch;
#[cfg(feature = "cli")]
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
