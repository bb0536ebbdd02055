//! The memory budget: what a model needs besides its experts, and what is left for their slots.

use super::{EngineError, EngineOptions};
use crate::arch::Decoder;
use crate::cpu;
use crate::moe::StoreLayout;
use crate::moe::planner::Needs;
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

/// What a model needs with these options. `dense` is the bytes of its dense weights.
pub(super) fn needs(o: &EngineOptions, model: &Decoder, dense: u64, n_ctx: usize) -> Needs {
    let block = KvPool::bytes_per_block(&model.kv_layers(), o.type_k, o.type_v).unwrap_or(usize::MAX) as u64;
    let layout = model.store_layout();
    let (least_slots, all_slots) = layout.as_ref().map_or((0, 0), |l: &StoreLayout| {
        let used = model.config.moe.as_ref().map_or(1, |m| m.router.n_expert_used);
        (l.bytes_for_least(used), l.bytes_for_all())
    });
    Needs {
        base: BASE_BYTES,
        dense,
        kv: block.saturating_mul(o.n_kv_blocks(n_ctx) as u64),
        logits: 8 * (model.config.n_vocab * o.n_sessions.max(1)) as u64,
        per_token: model.bytes_per_token(),
        least_slots,
        all_slots,
        chunk: o.chunk,
    }
}

impl Memory {
    /// Bytes; `None` where nobody knows what the machine can spare.
    pub fn resolve(self) -> Option<u64> {
        match self {
            Memory::Bytes(n) => Some(n),
            // What it holds already, when the budget is changed, it can hold on to.
            Memory::Auto => cpu::memory::available().map(|n| n - n / HEADROOM + cpu::memory::resident().unwrap_or(0)),
        }
    }
}

impl Budget {
    /// Divides the memory. Where it's short, blocks of tokens are made shorter before slots are taken away.
    pub(super) fn new(o: &EngineOptions, model: &Decoder, dense: u64, n_ctx: usize) -> Result<Self, EngineError> {
        let needs = needs(o, model, dense, n_ctx);
        let bytes = o.memory.resolve();
        let budget = bytes.unwrap_or(u64::MAX);
        let shares = needs.divide(budget).ok_or(EngineError::Budget { budget, smallest: needs.smallest() })?;
        Ok(Budget {
            bytes,
            dense,
            kv: needs.kv,
            activations: shares.activations,
            base: needs.base,
            slots: shares.slots,
            chunk: shares.chunk,
            least: needs.smallest(),
        })
    }
}
