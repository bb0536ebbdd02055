//! The machine: instruction sets, threads, memory.

#[cfg(target_arch = "x86_64")]
mod amx;
mod cores;
pub mod direct;
pub mod isa;
pub mod memory;
mod pages;
pub mod probe;
mod scratch;
pub(crate) mod simd;
pub mod sync;
mod team;

pub use cores::Cores;
pub use isa::{Isa, IsaError};
pub use pages::Pages;
pub use scratch::Scratch;
pub use team::Team;
