//! What several integration tests share.

#[cfg(feature = "llama-cpp")]
pub mod llama;
pub mod stats;
pub mod strings;
pub mod vocab;
