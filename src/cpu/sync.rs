//! Locks and threads of those whose concurrency is checked: `loom/` compiles the same files against a model checker's.

pub use std::sync::{Condvar, Mutex, MutexGuard};
pub use std::thread;
