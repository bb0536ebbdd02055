//! What the store uses of the machine.

#[path = "../../src/cpu/pages.rs"]
mod pages;
pub use pages::Pages;

/// Direct reads: there are none.
pub mod direct {
    /// As in the engine.
    pub const BLOCK: usize = 4096;
}

/// An instruction set: nothing is computed here.
#[derive(Clone, Copy)]
pub struct Isa;

/// The locks and threads that loom watches.
pub mod sync {
    pub use loom::sync::{Condvar, Mutex, MutexGuard};
    pub use loom::thread;
}
