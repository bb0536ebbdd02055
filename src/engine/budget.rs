//! The memory budget: what a model needs besides its experts, and what is left for their slots.

use super::{EngineError, EngineOptions};
use crate::arch::Decoder;
use crate::cpu;
use crate::moe::StoreLayout;
use crate::ops::kv::KvPool;

/// The program, its threads' stacks and allocator, the file's header and the tokeniser of a large vocabulary.
const BASE_BYTES: u64 = 64 << 20;
/// Of what the machine can spare, this much is left to others: a tenth.
const HEADROOM: u64 = 10;

/// How much memory the engine may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// What the machine can spare, less a tenth.
    #[default]
    Auto,
    /// This many bytes, for everything that the process holds.
    Bytes(u64),
}

/// What the engine takes, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Budget {
    /// Bytes that the engine may take; `None` where nobody knows.
    pub bytes: Option<u64>,
    /// Dense weights.
    pub dense: u64,
    /// The KV cache, full.
    pub kv: u64,
    /// Buffers for a block of tokens.
    pub activations: u64,
    /// The program, its tokeniser, and small things.
    pub base: u64,
    /// Slots for experts.
    pub slots: u64,
    /// Tokens of a prompt that go through the layers together.
    pub chunk: usize,
    /// The smallest budget that works.
    pub least: u64,
}

impl Budget {
    /// Divides the memory. Where it's short, blocks of tokens are made shorter before slots are taken away.
    pub(super) fn new(o: &EngineOptions, model: &Decoder, dense: u64, n_ctx: usize) -> Result<Self, EngineError> {
        let block = KvPool::bytes_per_block(&model.kv_layers(), o.type_k, o.type_v).unwrap_or(usize::MAX) as u64;
        let kv = block.saturating_mul(o.n_kv_blocks(n_ctx) as u64);
        let logits = 8 * (model.config.n_vocab * o.n_sessions.max(1)) as u64;
        let activations = |chunk: usize| chunk as u64 * model.bytes_per_token() + logits;
        let layout = model.store_layout();
        let (least, all) = layout.as_ref().map_or((0, 0), |l: &StoreLayout| {
            let used = model.config.moe.as_ref().map_or(1, |m| m.router.n_expert_used);
            (l.bytes_for_least(used), l.bytes_for_all())
        });
        let bytes = match o.memory {
            Memory::Bytes(n) => Some(n),
            // What it holds already, when the budget is changed, it can hold on to.
            Memory::Auto => cpu::memory::available().map(|n| n - n / HEADROOM + cpu::memory::resident().unwrap_or(0)),
        };
        let base = BASE_BYTES;
        let fixed = |chunk| base.saturating_add(dense).saturating_add(kv).saturating_add(activations(chunk));
        let smallest = fixed(1).saturating_add(least);
        let whole = |chunk: usize| {
            let activations = activations(chunk);
            Budget { bytes, dense, kv, activations, base, slots: all, chunk, least: smallest }
        };
        let Some(budget) = bytes else { return Ok(whole(o.chunk)) };
        let mut chunk = o.chunk.max(1);
        while chunk > 1 && fixed(chunk).saturating_add(least) > budget {
            chunk /= 2;
        }
        if smallest > budget {
            return Err(EngineError::Budget { budget, smallest });
        }
        let slots = (budget - fixed(chunk)).min(all);
        Ok(Budget { slots, ..whole(chunk) })
    }
}
