//! What several integration tests share.

pub mod cgroup;
#[cfg(target_os = "linux")]
pub mod disk;
#[cfg(feature = "llama-cpp")]
pub mod llama;
#[cfg(feature = "llama-cpp")]
pub mod nudge;
#[cfg(feature = "llama-cpp")]
pub mod ours;
pub mod stats;
pub mod strings;
pub mod vocab;
