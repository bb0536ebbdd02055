//! The machine: instruction sets, threads, memory.

mod pages;
mod team;

pub use pages::Pages;
pub use team::Team;
