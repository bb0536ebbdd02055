//! The store and what it uses of its own room.

#[path = "../../src/moe/lookahead.rs"]
pub mod lookahead;
#[path = "../../src/moe/policy.rs"]
pub mod policy;
#[path = "../../src/moe/store/mod.rs"]
pub mod store;

/// What was given up.
pub mod lossy {
    /// As the engine counts it.
    pub struct Losses {
        /// Experts dropped.
        pub dropped: u64,
        /// Experts that others stood in for.
        pub replaced: u64,
        /// Experts that weren't asked for.
        pub left_out: u64,
    }
}

/// Where experts' bytes come from.
pub mod source {
    /// As in the engine.
    pub trait Source: Send + Sync {
        /// As in the engine.
        fn read(&self, tensor: usize, offset: u64, n_bytes: usize, buf: &mut [u8]) -> Result<usize, String>;
    }
}
