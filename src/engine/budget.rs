//! The memory budget: what a model needs besides its experts, and what is left for their slots.

use super::{EngineError, EngineOptions};
use crate::arch::Decoder;
use crate::cpu::{self, Isa, memory::Bound};
use crate::moe::StoreLayout;
use crate::moe::planner::Needs;
use crate::ops::kv::{KvPool, KvType};
use crate::ops::matmul::scratch_bytes;

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
    /// What bounds the memory that these are a share of; `None` where they were asked for.
    pub share_of: Option<Bound>,
    /// Dense weights.
    pub dense: u64,
    /// The KV cache, full.
    pub kv: u64,
    /// Buffers for a block of tokens.
    pub activations: u64,
    /// The program, its tokeniser, and small things.
    pub base: u64,
    /// Slots for experts when the KV cache is full and the longest block of tokens is in the buffers; until then they have more.
    pub slots: u64,
    /// Tokens of a prompt that go through the layers together when the KV cache is full; until then they may be more.
    pub chunk: usize,
    /// The smallest budget that works.
    pub least: u64,
}

/// What a model needs with these options. `dense` is the bytes of its dense weights.
///
/// # Errors
/// If the context's KV cache would have more bytes than there are numbers for.
pub(super) fn needs(o: &EngineOptions, model: &Decoder, dense: u64, n_ctx: usize) -> Result<Needs, EngineError> {
    let block = KvPool::bytes_per_block(&model.kv_layers(), o.type_k, o.type_v).unwrap_or(usize::MAX) as u64;
    let layout = model.store_layout();
    let (least_slots, all_slots) = layout.as_ref().map_or((0, 0), |l: &StoreLayout| {
        let used = model.config.moe.as_ref().map_or(1, |m| m.router.n_expert_used);
        (l.bytes_for_least(used), l.bytes_for_all())
    });
    // All needs together have to be a number too.
    let kv = block.checked_mul(o.n_kv_blocks(n_ctx) as u64).filter(|&n| n < 1 << 62);
    // A wrong `ONCALL_ISA` has been refused when the engine started.
    let a_thread = scratch_bytes(Isa::get().unwrap_or(Isa::Scalar), model.widest()) as u64;
    Ok(Needs {
        base: BASE_BYTES + (o.n_threads_here() as u64).saturating_mul(a_thread),
        dense,
        kv: kv.ok_or(EngineError::Context { n_ctx })?,
        kv_block: block,
        buffers: model.buffer_bytes(o.n_sessions.max(1)),
        least_slots,
        all_slots,
        chunk: o.chunk,
    })
}

impl Memory {
    /// Bytes, and what bounds the memory that they are a share of, if they weren't asked for; `None` where nobody knows what the
    /// machine can spare.
    pub fn resolve(self) -> Option<(u64, Option<Bound>)> {
        match self {
            Memory::Bytes(n) => Some((n, None)),
            // What it holds already, when the budget is changed, it can hold on to.
            Memory::Auto => cpu::memory::bounded()
                .map(|(n, bound)| (n - n / HEADROOM + cpu::memory::resident().unwrap_or(0), Some(bound))),
        }
    }
}

/// What isn't done yet and would lower the smallest budget without changing the model's answer much.
fn advice(needs: &Needs, o: &EngineOptions) -> Vec<&'static str> {
    let mut all = Vec::new();
    if o.n_sessions > 1 {
        all.push("fewer sequences (--sequences)");
    }
    if needs.kv > needs.kv_block.saturating_mul(o.n_sessions.max(1) as u64) {
        all.push("a shorter context (-c)");
    }
    if [o.type_k, o.type_v].iter().any(|&t| t != KvType::Q8_0) {
        all.push("a q8_0 KV cache (-ctk q8_0 -ctv q8_0)");
    }
    all
}

impl Budget {
    /// Divides the memory. Where it's short, blocks of tokens are made shorter before slots are taken away.
    pub(super) fn new(needs: &Needs, o: &EngineOptions, memory: Memory) -> Result<Self, EngineError> {
        let (bytes, share_of) = memory.resolve().map_or((None, None), |(n, bound)| (Some(n), bound));
        let budget = bytes.unwrap_or(u64::MAX);
        let shares = needs.divide(budget).ok_or_else(|| EngineError::Budget {
            budget,
            share_of,
            smallest: needs.smallest(),
            advice: advice(needs, o),
        })?;
        Ok(Budget {
            bytes,
            share_of,
            dense: needs.dense,
            kv: needs.kv,
            activations: shares.activations,
            base: needs.base,
            slots: shares.slots,
            chunk: shares.chunk,
            least: needs.smallest(),
        })
    }
}

/// Blocks of the KV cache by which it is given room: slots leave some at a time, not one with every few tokens.
const KV_STEP: usize = 4;
/// Passes in a row that needed a quarter of the buffers, or of the KV cache's touched blocks, before the rest is given up. A
/// prompt's last, short block isn't the beginning of an answer's end.
const CALM_PASSES: usize = 8;

/// How the memory is shared out from pass to pass: what the KV cache and the buffers don't need yet, slots can have. A context of 4096
/// that holds 300 tokens, and buffers for 512 tokens while one at a time is written, would be the larger part of a tight budget.
pub(super) struct Room {
    needs: Needs,
    /// Blocks that the KV cache has room for.
    kv_blocks: usize,
    /// Tokens that the buffers have room for.
    n_tokens: usize,
    /// The largest of the last passes that needed far less, and how many they were.
    calm: (usize, usize),
    /// Likewise, of the blocks of the KV cache that were held.
    kv_calm: (usize, usize),
}

/// What changes before a pass.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Moves {
    /// Bytes of slots from now on.
    pub slots: u64,
    /// The buffers are to be given back first.
    pub drop_buffers: bool,
    /// So many blocks of the KV cache keep their memory, if free ones are to give it back first.
    pub keep_kv: Option<usize>,
}

impl Room {
    /// For an empty KV cache and blocks of one token.
    pub fn new(needs: Needs) -> Self {
        Room { needs, kv_blocks: 0, n_tokens: 1, calm: (0, 0), kv_calm: (0, 0) }
    }

    /// Tokens of a block all of whose logits are wanted: so many that these, here and in their session, take no more room than
    /// the buffers of the longest block, and what nobody needs.
    pub fn chunk_of_all_logits(&self, budget: &Budget, n_vocab: usize) -> usize {
        let buffers = &self.needs.buffers;
        let spare = budget.bytes.unwrap_or(u64::MAX).saturating_sub(self.needs.no_reads());
        let most = buffers.of(budget.chunk).saturating_add(spare);
        let bytes = |n: usize| buffers.of(n).saturating_add(8 * (n_vocab * (n - 1)) as u64);
        std::iter::successors(Some(budget.chunk.max(1)), |n| Some(n / 2))
            .find(|&n| n <= 1 || bytes(n) <= most)
            .unwrap_or(1)
    }

    /// What the engine needs.
    pub fn needs(&self) -> &Needs {
        &self.needs
    }

    /// Bytes of slots as things are.
    pub fn slots(&self, budget: &Budget) -> u64 {
        self.slots_with(budget, self.kv_blocks, self.n_tokens).unwrap_or(self.needs.least_slots.min(budget.slots))
    }

    /// Bytes of slots beside so many blocks of the KV cache and buffers for so many tokens; `None` if the least don't fit.
    fn slots_with(&self, budget: &Budget, kv_blocks: usize, n_tokens: usize) -> Option<u64> {
        self.needs.slots_now(budget.bytes.unwrap_or(u64::MAX), kv_blocks as u64, n_tokens)
    }

    /// Tokens that the buffers get room for with a block of so many.
    fn with_room(budget: &Budget, n_tokens: usize) -> usize {
        n_tokens.next_power_of_two().min(budget.chunk.max(n_tokens))
    }

    /// Tokens of the longest block that fits now. `kv_blocks` are those that the KV cache will have touched with a block of so many.
    pub fn chunk_now(&self, budget: &Budget, kv_blocks: impl Fn(usize) -> usize) -> usize {
        let fits = |n: usize| {
            let kv_blocks = self.kv_blocks.max(kv_blocks(n).next_multiple_of(KV_STEP));
            self.slots_with(budget, kv_blocks, Self::with_room(budget, n)).is_some()
        };
        std::iter::successors(Some(self.needs.chunk), |n| Some(n / 2))
            .take_while(|&n| n > budget.chunk)
            .find(|&n| fits(n))
            .unwrap_or(budget.chunk.max(1))
    }

    /// The buffers were given back.
    pub fn buffers_dropped(&mut self) {
        (self.n_tokens, self.calm) = (1, (0, 0));
    }

    /// The KV cache holds `held` of the blocks that it has touched: how many of these to keep, where far fewer were held in the last passes.
    fn kv_to_keep(&mut self, touched: usize, held: usize) -> Option<usize> {
        if held > touched / 4 {
            self.kv_calm = (0, 0);
            return None;
        }
        self.kv_calm = (self.kv_calm.0.max(held), self.kv_calm.1 + 1);
        if self.kv_calm.1 < CALM_PASSES {
            return None;
        }
        let keep = std::mem::take(&mut self.kv_calm).0.next_multiple_of(KV_STEP);
        (keep < touched).then_some(keep)
    }

    /// A pass of `n_tokens` comes, for which the KV cache will hold `held` of the `kv_blocks` that it has touched. `None` if everything can
    /// stay.
    pub fn before_pass(&mut self, budget: &Budget, n_tokens: usize, kv_blocks: usize, held: usize) -> Option<Moves> {
        let before = self.slots(budget);
        // Where everything has a slot, nobody needs the memory of free blocks.
        let keep_kv = if before < self.needs.all_slots { self.kv_to_keep(kv_blocks, held) } else { None };
        self.kv_blocks = keep_kv.unwrap_or(self.kv_blocks);
        let kv_blocks = keep_kv.unwrap_or(kv_blocks);
        self.kv_blocks = self.kv_blocks.max(kv_blocks.next_multiple_of(KV_STEP));
        let mut drop_buffers = false;
        if n_tokens < self.n_tokens && self.slots_with(budget, self.kv_blocks, self.n_tokens).is_none() {
            // A longer block had room when the KV cache was shorter.
            (self.n_tokens, drop_buffers, self.calm) = (Self::with_room(budget, n_tokens), true, (0, 0));
        } else if n_tokens > self.n_tokens {
            (self.n_tokens, self.calm) = (Self::with_room(budget, n_tokens), (0, 0));
        } else if n_tokens > self.n_tokens / 4 {
            self.calm = (0, 0);
        } else {
            self.calm = (self.calm.0.max(n_tokens), self.calm.1 + 1);
            // Where everything has a slot, nobody needs the buffers' memory.
            if self.calm.1 >= CALM_PASSES && before < self.needs.all_slots {
                (self.n_tokens, drop_buffers, self.calm) = (self.calm.0.next_power_of_two(), true, (0, 0));
            }
        }
        let slots = self.slots(budget);
        (slots != before || drop_buffers || keep_kv.is_some()).then_some(Moves { slots, drop_buffers, keep_kv })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::planner::BufferBytes;

    const NEEDS: Needs = Needs {
        base: 100,
        dense: 1000,
        kv: 6400,
        kv_block: 100,
        buffers: BufferBytes { fixed: 10, per_token: 10, pairs_per_token: 0, most_pairs: 0, per_pair: 0 },
        least_slots: 200,
        all_slots: 20_000,
        chunk: 64,
    };

    #[test]
    fn slots_have_what_nobody_needs_yet() {
        let budget = Budget::new(&NEEDS, &EngineOptions::default(), Memory::Bytes(10_000)).unwrap();
        assert_eq!((budget.chunk, budget.slots), (64, 10_000 - 100 - 1000 - 6400 - 650));
        let mut room = Room::new(NEEDS);
        let slots = |kv: u64, tokens: u64| 10_000 - 1100 - kv - 10 - 10 * tokens;
        assert_eq!(room.slots(&budget), slots(0, 1));
        // A prompt of 100 tokens in two blocks, then an answer.
        let moves = |slots, drop_buffers| Some(Moves { slots, drop_buffers, keep_kv: None });
        assert_eq!(room.before_pass(&budget, 64, 1, 1), moves(slots(400, 64), false));
        assert_eq!(room.before_pass(&budget, 36, 2, 2), None);
        for _ in 1..CALM_PASSES {
            assert_eq!(room.before_pass(&budget, 1, 2, 2), None);
        }
        assert_eq!(room.before_pass(&budget, 1, 2, 2), moves(slots(400, 1), true));
        assert_eq!(room.before_pass(&budget, 1, 4, 4), None);
        assert_eq!(room.before_pass(&budget, 1, 5, 5), moves(slots(800, 1), false));
        // What was touched stays touched for a while; and full, nothing is left but what was promised.
        assert_eq!(room.before_pass(&budget, 1, 5, 1), None);
        assert_eq!(room.before_pass(&budget, 64, 64, 64), moves(budget.slots, false));
    }

    #[test]
    fn all_logits_take_no_more_than_the_longest_block() {
        let budget = Budget::new(&NEEDS, &EngineOptions::default(), Memory::Bytes(10_000)).unwrap();
        let room = Room::new(NEEDS);
        // 650 bytes: 64 tokens without logits, 16 with 24 bytes of them each, 1 with any.
        for (n_vocab, n) in [(0, 64), (3, 16), (1000, 1)] {
            assert_eq!(room.chunk_of_all_logits(&budget, n_vocab), n);
        }
        let plenty =
            Budget::new(&NEEDS, &EngineOptions::default(), Memory::Bytes(NEEDS.no_reads() + 8000 * 64)).unwrap();
        assert_eq!(room.chunk_of_all_logits(&plenty, 1000), 64);
    }

    /// A full KV cache leaves room for blocks of 8 tokens, an empty one for 64: the blocks get shorter as it fills.
    #[test]
    fn a_block_is_as_long_as_what_the_kv_cache_has_not_touched_allows() {
        let bytes = NEEDS.base + NEEDS.dense + NEEDS.kv + NEEDS.least_slots + NEEDS.buffers.of(8);
        let budget = Budget::new(&NEEDS, &EngineOptions::default(), Memory::Bytes(bytes)).unwrap();
        assert_eq!(budget.chunk, 8);
        let mut room = Room::new(NEEDS);
        let mut chunks = Vec::new();
        let (mut blocks, mut held) = (0, 1);
        while blocks < 64 {
            let n = room.chunk_now(&budget, |_| blocks + 1);
            blocks += 1;
            if let Some(moves) = room.before_pass(&budget, n, blocks, blocks) {
                held = if moves.drop_buffers { n } else { held.max(n) };
            }
            let kv = NEEDS.kv_block * blocks as u64;
            let all = NEEDS.base + NEEDS.dense + kv + NEEDS.buffers.of(held) + room.slots(&budget);
            assert!(room.slots(&budget) >= NEEDS.least_slots && all <= bytes, "{all} of {bytes} at {blocks} blocks");
            chunks.push(n);
        }
        assert!(chunks.is_sorted_by(|a, b| a >= b), "{chunks:?}");
        assert_eq!((chunks[0], chunks[63]), (64, 8));
    }

    /// Only what isn't done yet.
    #[test]
    fn too_small_a_budget_is_told_with_what_would_lower_it() {
        let refused =
            |o: &EngineOptions, needs: &Needs| Budget::new(needs, o, Memory::Bytes(1 << 20)).unwrap_err().to_string();
        let needs = Needs { dense: 3 << 20, ..NEEDS };
        let o = EngineOptions::default();
        let text = refused(&o, &needs);
        assert!(text.contains("the least that works with this context is 4 MiB"), "{text}");
        assert!(
            text.contains("a shorter context (-c) or a q8_0 KV cache (-ctk q8_0 -ctv q8_0) would lower it"),
            "{text}"
        );
        let small = EngineOptions { type_k: KvType::Q8_0, type_v: KvType::Q8_0, ..o.clone() };
        let text = refused(&small, &needs);
        assert!(text.ends_with("a shorter context (-c) would lower it"), "{text}");
        let text = refused(&small, &Needs { kv: needs.kv_block, ..needs });
        assert!(text.ends_with("4 MiB"), "{text}");
        let text = refused(&EngineOptions { n_sessions: 8, ..o }, &needs);
        assert!(text.contains("fewer sequences (--sequences), a shorter context (-c) or a q8_0"), "{text}");
    }

    #[test]
    fn with_enough_memory_nothing_moves() {
        let budget = Budget::new(&NEEDS, &EngineOptions::default(), Memory::Bytes(NEEDS.no_reads())).unwrap();
        let mut room = Room::new(NEEDS);
        for (n_tokens, kv) in [(1, 1), (64, 9), (1, 64), (1, 64), (3, 64)].into_iter().cycle().take(100) {
            assert_eq!(room.before_pass(&budget, n_tokens, kv, kv), None);
        }
        assert_eq!(room.slots(&budget), NEEDS.all_slots);
    }
}
