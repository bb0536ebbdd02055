//! The expert store: experts live in slots of a fixed arena, are read from the file when the router calls them,
//! and leave when the policy says so.
//!
//! A slot holds one expert: gate, up and down, packed for the kernels when it is filled. Experts of layers with larger
//! matrices have slots of their own size (a class), so that no slot wastes memory on a smaller expert. The arena has
//! addresses for all experts and memory for as many slots as the budget covers, which can change between passes.
//! A model that fits is the same path with a slot for every expert.
//!
//! `layout` knows sizes, `slots` who lives where, `lanes` reads, `fetch` hands out.

#![allow(unsafe_code)]

mod fetch;
mod lanes;
mod layout;
mod slots;
#[cfg(test)]
mod tests;

pub use fetch::{Fetch, FetchError, Ready};
pub use layout::{LayerParts, Part, StoreLayout, room_for};

use super::lookahead::Lookahead;
use super::lossy::Losses;
use super::policy::MakePolicy;
use super::source::Source;
use crate::cpu::sync::{Condvar, Mutex, MutexGuard};
use crate::cpu::{Isa, Pages};
use lanes::{Lanes, PartJob};
use slots::{Place, Slots};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A pass of more tokens than this wants nearly every expert of a layer: reading ahead is safe then.
const MANY_TOKENS: usize = 32;

/// What the store has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct StoreStats {
    /// Experts asked for, each counted once for each layer of each pass.
    pub uses: u64,
    /// Those that were resident or on their way.
    pub hits: u64,
    /// Of the hits, those that were there because they had been read ahead.
    pub ahead_hits: u64,
    /// Bytes read from the file because an expert was missing.
    pub demand_bytes: u64,
    /// Bytes read ahead.
    pub ahead_bytes: u64,
    /// Of these, bytes of experts that left before anybody asked for them.
    pub wasted_bytes: u64,
    /// Experts that left their slot.
    pub evictions: u64,
    /// Lossy: experts that were dropped because they weren't at hand.
    pub dropped: u64,
    /// Lossy: experts that others at hand stood in for.
    pub replaced: u64,
    /// Lossy: experts that weren't asked for, since tokens use fewer than the model was trained with.
    pub left_out: u64,
    /// Nanoseconds that computing waited for reads.
    pub stall_ns: u64,
    /// Nanoseconds in which at least one lane was reading, or packing what it had read.
    pub busy_ns: u64,
}

impl StoreStats {
    /// What was done since an earlier moment.
    pub fn since(&self, before: &StoreStats) -> StoreStats {
        self.each(before, |now, before| now - before)
    }

    /// This and that together.
    pub fn and(&self, more: &StoreStats) -> StoreStats {
        self.each(more, |a, b| a + b)
    }

    fn each(&self, other: &StoreStats, f: impl Fn(u64, u64) -> u64) -> StoreStats {
        StoreStats {
            uses: f(self.uses, other.uses),
            hits: f(self.hits, other.hits),
            ahead_hits: f(self.ahead_hits, other.ahead_hits),
            demand_bytes: f(self.demand_bytes, other.demand_bytes),
            ahead_bytes: f(self.ahead_bytes, other.ahead_bytes),
            wasted_bytes: f(self.wasted_bytes, other.wasted_bytes),
            evictions: f(self.evictions, other.evictions),
            dropped: f(self.dropped, other.dropped),
            replaced: f(self.replaced, other.replaced),
            left_out: f(self.left_out, other.left_out),
            stall_ns: f(self.stall_ns, other.stall_ns),
            busy_ns: f(self.busy_ns, other.busy_ns),
        }
    }

    /// Bytes read, by demand and ahead.
    pub fn bytes_read(&self) -> u64 {
        self.demand_bytes + self.ahead_bytes
    }

    /// Uses that weren't hits.
    pub fn misses(&self) -> u64 {
        self.uses - self.hits
    }

    /// Lossy: what was given up.
    pub fn losses(&self) -> Losses {
        Losses { dropped: self.dropped, replaced: self.replaced, left_out: self.left_out }
    }

    /// The share of uses that were hits; `None` if there were no uses.
    pub fn hit_rate(&self) -> Option<f64> {
        (self.uses > 0).then(|| self.hits as f64 / self.uses as f64)
    }
}

struct State {
    slots: Slots,
    /// Parts of experts that a pass waits for, most needed first.
    demand: VecDeque<PartJob>,
    /// Parts of experts that are being read ahead.
    ahead: VecDeque<PartJob>,
    /// Experts of the next layer to read ahead when there is no demand, most certain first.
    likely: VecDeque<u32>,
    /// Experts that a pass waits for and that have no slot yet: more are wanted than there are slots.
    unplaced: usize,
    /// Experts for slots that are still free, by class, the hottest first: their places among all, and their keys.
    warm: Vec<VecDeque<(usize, u32)>>,
    /// Why an expert's last read failed.
    failed: HashMap<u32, String>,
    lookahead: Lookahead,
    stats: StoreStats,
    /// Lanes that read or pack, and up to when their time is counted.
    reading: (usize, Instant),
    stop: bool,
}

struct Shared {
    layout: StoreLayout,
    isa: Isa,
    arena: Pages,
    source: Arc<dyn Source>,
    state: Mutex<State>,
    /// Something is to be read.
    work: Condvar,
    /// An expert has arrived, or won't.
    arrived: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Experts in slots, filled on demand.
pub struct ExpertStore {
    shared: Arc<Shared>,
    /// Ends the reading threads when it is dropped.
    _lanes: Lanes,
}

/// How a store is made.
pub struct StoreOptions {
    /// Bytes for slots: as many as fit, at least one of each size, at most one for each expert.
    pub bytes: u64,
    /// The kernels that experts are packed for.
    pub isa: Isa,
    /// Who leaves.
    pub policy: MakePolicy,
    /// Reading threads.
    pub lanes: usize,
    /// Whether the next layer's experts are read ahead; it is switched off by itself while it doesn't pay.
    pub lookahead: bool,
}

impl ExpertStore {
    /// A store whose slots are all empty.
    ///
    /// # Errors
    /// When the system has no address space for the arena or refuses to start threads.
    pub fn new(layout: StoreLayout, o: &StoreOptions, source: Arc<dyn Source>) -> std::io::Result<Self> {
        let n_slots = layout.divide(o.bytes);
        let policy = (o.policy)(layout.layers.len(), layout.n_expert);
        let state = State {
            slots: Slots::new(layout.clone(), &n_slots, policy),
            demand: VecDeque::new(),
            ahead: VecDeque::new(),
            likely: VecDeque::new(),
            unplaced: 0,
            warm: vec![VecDeque::new(); layout.classes.len()],
            failed: HashMap::new(),
            lookahead: Lookahead::new(o.lookahead),
            stats: StoreStats::default(),
            reading: (0, Instant::now()),
            stop: false,
        };
        let shared = Arc::new(Shared {
            arena: Pages::reserve(layout.bytes_for_all() as usize)?,
            layout,
            isa: o.isa,
            source,
            state: Mutex::new(state),
            work: Condvar::new(),
            arrived: Condvar::new(),
        });
        Ok(ExpertStore { _lanes: Lanes::new(&shared, o.lanes)?, shared })
    }

    /// A pass of the model begins, over `n_tokens` more of the longest sequence in it: time for the policy.
    pub fn begin_pass(&self, n_tokens: u64) {
        self.shared.lock().slots.advance(n_tokens);
    }

    /// A pass of `n_tokens` has ended.
    pub fn end_pass(&self, n_tokens: usize, took: Duration) {
        let mut s = self.shared.lock();
        if n_tokens <= MANY_TOKENS && !s.slots.is_whole() {
            s.lookahead.pass(took / n_tokens.max(1) as u32);
        }
    }

    /// What was done so far.
    pub fn stats(&self) -> StoreStats {
        let mut s = self.shared.lock();
        s.count_busy();
        s.stats
    }

    /// Slots, and experts in all.
    pub fn n_slots(&self) -> (usize, usize) {
        (self.shared.lock().slots.n_slots(), self.shared.layout.n_experts())
    }

    /// Whether each expert of each layer is resident. (n_layer x n_expert)
    pub fn residency(&self) -> Vec<bool> {
        let s = self.shared.lock();
        let n = (self.shared.layout.layers.len() * self.shared.layout.n_expert) as u32;
        (0..n).map(|key| matches!(s.slots.place(key), Place::Resident(_))).collect()
    }

    /// Which experts of a layer are resident or on their way. (n_expert)
    pub fn at_hand(&self, layer: usize) -> Vec<bool> {
        let s = self.shared.lock();
        let key = |e| self.shared.layout.key(layer, e);
        (0..self.shared.layout.n_expert as u32).map(|e| s.slots.place(key(e)) != Place::Absent).collect()
    }

    /// Counts what was given up.
    pub fn count_losses(&self, losses: Losses) {
        let mut s = self.shared.lock();
        s.stats.dropped += losses.dropped;
        s.stats.replaced += losses.replaced;
        s.stats.left_out += losses.left_out;
    }

    /// Whether [`ExpertStore::ahead`] would do anything for a pass of `n_tokens`.
    pub fn wants_ahead(&self, n_tokens: usize) -> bool {
        let s = self.shared.lock();
        s.slots.n_absent() > 0 && s.lookahead.is_on(n_tokens > MANY_TOKENS)
    }

    /// Experts that a later layer will probably want, most certain first. They are read when there is nothing else to read,
    /// until the next [`ExpertStore::fetch`]; those that are resident leave after all others until then.
    pub fn ahead(&self, layer: usize, likely: &[u32]) {
        let mut s = self.shared.lock();
        // Half of the slots at most: a demand must find one.
        let most = s.slots.n_slots() / 2;
        s.slots.unguard();
        s.likely.clear();
        for &expert in likely.iter().take(most) {
            let key = self.shared.layout.key(layer, expert);
            match s.slots.place(key) {
                Place::Absent => s.likely.push_back(key),
                _ => s.slots.guard(key),
            }
        }
        // Nobody is woken for nothing: with nearly all at hand those were half of all context switches.
        let to_read = !s.likely.is_empty();
        drop(s);
        if to_read {
            self.shared.work.notify_all();
        }
    }

    /// Fills free slots with these experts, (layer, expert) and the hottest first, when there is nothing else to read.
    pub fn warm_up(&self, hottest: impl IntoIterator<Item = (usize, u32)>) {
        let layout = &self.shared.layout;
        let mut s = self.shared.lock();
        s.warm.iter_mut().for_each(VecDeque::clear);
        for (i, (layer, expert)) in hottest.into_iter().enumerate() {
            let key = layout.key(layer, expert);
            s.warm[layout.class_of_key(key)].push_back((i, key));
        }
        drop(s);
        self.shared.work.notify_all();
    }

    /// Makes the slots fit into `bytes`, as [`StoreOptions::bytes`]; memory of slots that are given up goes back to the system.
    /// No pass may be running.
    pub fn resize(&self, bytes: u64) {
        let shared = &*self.shared;
        let mut s = shared.lock();
        s.likely.clear();
        s.slots.unguard();
        for (class, n) in shared.layout.divide(bytes).into_iter().enumerate() {
            while let Some(slot) = s.slots.grow(class, n) {
                shared.arena.prefer_huge(shared.layout.slot(slot));
            }
            loop {
                match s.slots.shrink(class, n) {
                    Ok(None) => break,
                    Ok(Some((slot, evicted))) => {
                        s.count_evicted(&shared.layout, evicted);
                        // SAFETY: the slot is parked now: nobody reads it, and it's filled before it is read again.
                        unsafe { shared.arena.discard(shared.layout.slot(slot)) };
                    }
                    // What is being read ahead arrives first.
                    Err(()) => s = shared.arrived.wait(s).unwrap_or_else(|e| e.into_inner()),
                }
            }
        }
        let more_to_warm = s.next_warm().is_some();
        drop(s);
        if more_to_warm {
            shared.work.notify_all();
        }
    }
}

impl State {
    /// Counts the time up to now in which lanes were at work.
    fn count_busy(&mut self) {
        let now = Instant::now();
        if self.reading.0 > 0 {
            self.stats.busy_ns += (now - self.reading.1).as_nanos() as u64;
        }
        self.reading.1 = now;
    }

    fn count_evicted(&mut self, layout: &StoreLayout, evicted: Option<slots::Evicted>) {
        let Some(e) = evicted else { return };
        self.stats.evictions += 1;
        if e.wasted {
            self.stats.wasted_bytes += layout.expert_bytes(e.key);
        }
    }
}
