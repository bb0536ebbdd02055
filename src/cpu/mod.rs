//! The machine: instruction sets and threads.
