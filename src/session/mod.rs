//! One timeline: text in, tokens, sampling, text out.

pub mod grammar;
mod rng;
pub mod sampler;
pub mod stop;
pub mod template;
pub mod tokenizer;
