//! One timeline: text in, tokens, sampling, text out.

mod rng;
pub mod sampler;
pub mod stop;
pub mod template;
pub mod tokenizer;
