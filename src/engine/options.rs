//! What an engine is loaded with.

use super::{EngineError, Memory};
use crate::arch::Config;
use crate::cpu::Cores;
use crate::moe::policy::{self, MakePolicy};
use crate::moe::{IoMode, Lossy};
use crate::ops::kv::{KV_BLOCK, KvType};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// The context when none is asked for: the model's own, but not more than this.
const DEFAULT_CTX: usize = 4096;
/// Tokens of a prompt that go through the layers together when nothing else is asked for.
pub const DEFAULT_CHUNK: usize = 512;

/// Everything has a default: change what matters.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Positions that a session can hold; `None` for the model's own, up to 4096; 0 for the model's own.
    pub n_ctx: Option<usize>,
    /// Sessions, or sequences of the queue, at the same time.
    pub n_sessions: usize,
    /// Positions of the KV cache for all of them together, at least one full session's; `None` for all of them full.
    pub kv_positions: Option<usize>,
    /// Threads that compute; `None` for one on each core that this process may use.
    pub n_threads: Option<usize>,
    /// Tokens of a prompt that go through the layers together.
    pub chunk: usize,
    /// How keys are stored.
    pub type_k: KvType,
    /// How values are stored.
    pub type_v: KvType,
    /// Memory for everything.
    pub memory: Memory,
    /// Bytes for expert slots, whatever the memory says: for tests and measurements.
    pub expert_bytes: Option<u64>,
    /// How experts are read.
    pub io: IoMode,
    /// Which expert leaves when another needs its slot.
    pub policy: MakePolicy,
    /// Whether the next layer's experts are guessed and read ahead, while that pays.
    pub lookahead: bool,
    /// Lossy: experts that a token uses, fewer than the model was trained with.
    pub n_expert_used: Option<usize>,
    /// Lossy: what may be given up to read less.
    pub lossy: Lossy,
    /// Whether the experts' heat is kept between runs in the user's cache folder, and used to fill slots at start-up. Not by default;
    /// the command line does it.
    pub heat: bool,
    /// A file for the routers' choices, see [`crate::moe::trace`].
    pub record: Option<PathBuf>,
    /// Once this is true, loading ends with [`crate::arch::ModelError::Stopped`], and a pass, which otherwise waits for the disk
    /// however long it takes, with [`crate::arch::PassError::Stopped`]; its session is as it was before.
    pub stop: Option<Arc<AtomicBool>>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            n_ctx: None,
            n_sessions: 1,
            kv_positions: None,
            n_threads: None,
            chunk: DEFAULT_CHUNK,
            type_k: KvType::F16,
            type_v: KvType::F16,
            memory: Memory::Auto,
            expert_bytes: None,
            io: IoMode::Auto,
            policy: policy::POLICIES[0].1,
            lookahead: true,
            n_expert_used: None,
            lossy: Lossy::default(),
            heat: false,
            record: None,
            stop: None,
        }
    }
}

impl EngineOptions {
    /// Whether what may be given up can be, in a model of this kind.
    pub(super) fn check_lossy(&self, config: &Config) -> Result<(), EngineError> {
        let shares = [("--drop-cold", self.lossy.drop_cold), ("--prefer-resident", self.lossy.prefer_resident)];
        for (flag, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return Err(EngineError::Lossy { flag, value, why: "it takes a number from 0 to 1" });
            }
            if value > 0.0 && config.moe.is_none() {
                let why = "this model has no experts, every token uses all of it; leave it out";
                return Err(EngineError::Lossy { flag, value, why });
            }
        }
        Ok(())
    }

    /// Blocks of the KV cache for sessions of this length.
    pub(super) fn n_kv_blocks(&self, n_ctx: usize) -> usize {
        let one = n_ctx.div_ceil(KV_BLOCK);
        let all = one.saturating_mul(self.n_sessions.max(1));
        self.kv_positions.map_or(all, |n| n.div_ceil(KV_BLOCK).max(one))
    }

    /// Positions that a session of this model can hold.
    pub(super) fn n_ctx_of(&self, config: &Config) -> usize {
        match self.n_ctx {
            Some(0) => config.n_ctx_train,
            Some(n) => n,
            None => config.n_ctx_train.min(DEFAULT_CTX),
        }
    }

    /// Threads that compute on this machine.
    pub(super) fn n_threads_here(&self) -> usize {
        self.n_threads.unwrap_or_else(|| Cores::count().threads())
    }
}
