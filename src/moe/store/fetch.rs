//! Experts of one layer on their way to being computed.

use super::lanes::parts_of;
use super::layout::N_PARTS;
use super::slots::Place;
use super::{ExpertStore, Shared, State};
use crate::cpu::sync::MutexGuard;
use crate::ops::matmul::Packed;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How often a pass that waits for a read looks whether it is to stop.
const TICK: Duration = Duration::from_millis(50);

/// Why an expert couldn't be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// It was asked to stop.
    #[error("stopped before all experts were read")]
    Stopped,
    /// A read failed.
    #[error("reading expert {expert} of layer {layer} failed: {why}")]
    Read {
        /// The layer.
        layer: usize,
        /// The expert in it.
        expert: u32,
        /// What the reader said.
        why: String,
    },
}

/// An expert that is resident and pinned.
#[derive(Clone, Copy)]
pub struct Ready<'a> {
    /// Its index in the layer.
    pub expert: u32,
    /// (n_ff_exp, n_embd)
    pub gate: Packed<'a>,
    /// (n_ff_exp, n_embd)
    pub up: Packed<'a>,
    /// (n_embd, n_ff_exp)
    pub down: Packed<'a>,
}

/// Experts of one layer. Those it has lent stay pinned until the next call.
pub struct Fetch<'a> {
    store: &'a ExpertStore,
    layer: usize,
    /// Not yet lent.
    wanted: Vec<u32>,
    /// Those that were lent last. They don't live as long as `'a` says: nobody else may see that.
    ready: Vec<Ready<'a>>,
    /// Their slots.
    held: Vec<u32>,
}

impl ExpertStore {
    /// Asks for experts of a layer, each with the number of tokens that want it, most needed first. Missing ones begin to be read.
    pub fn fetch(&self, layer: usize, wanted: &[(u32, u32)]) -> Fetch<'_> {
        let shared = &*self.shared;
        let mut s = shared.lock();
        s.likely.clear();
        for &(expert, n) in wanted {
            let key = shared.layout.key(layer, expert);
            let was_ahead = s.slots.want(key, n);
            let place = s.slots.place(key);
            s.stats.uses += 1;
            s.stats.hits += u64::from(place != Place::Absent);
            s.stats.ahead_hits += u64::from(was_ahead);
            match place {
                // What failed before is tried again.
                Place::Absent => drop(s.failed.remove(&key)),
                Place::Loading(_) => s.hurry(key),
                Place::Resident(_) => {}
            }
        }
        // The guesses were about this layer: what wasn't wanted may leave.
        s.slots.unguard();
        let wanted = wanted.iter().map(|w| w.0).collect();
        let fetch = Fetch { store: self, layer, wanted, ready: Vec::new(), held: Vec::new() };
        fetch.order_missing(&mut s);
        drop(s);
        fetch
    }
}

impl State {
    /// What was read ahead is waited for now: its parts that haven't begun come before all that isn't.
    fn hurry(&mut self, key: u32) {
        let jobs: Vec<_> = self.ahead.iter().copied().filter(|j| j.key == key).collect();
        self.ahead.retain(|j| j.key != key);
        self.demand.extend(jobs);
    }
}

impl<'a> Fetch<'a> {
    fn keys(&self) -> impl Iterator<Item = u32> + '_ {
        self.wanted.iter().map(|&e| self.store.shared.layout.key(self.layer, e))
    }

    /// The next experts that can be computed: first all that are resident, then others as they arrive, those of one call in the order of
    /// their numbers; `None` when all have been lent. Once `stop` is true it waits no longer. Unpins those of the call before, which end
    /// here:
    ///
    /// ```compile_fail,E0499
    /// fn keep(mut fetch: oncall::moe::Fetch<'_>) -> usize {
    ///     let first = fetch.next(None).unwrap().unwrap()[0];
    ///     let _others = fetch.next(None);
    ///     first.gate.n_rows()
    /// }
    /// ```
    ///
    /// # Errors
    /// When a read failed, or it was to stop. The store stays usable.
    #[allow(clippy::should_implement_trait)] // it can fail, and lends
    pub fn next(&mut self, stop: Option<&AtomicBool>) -> Result<Option<&[Ready<'_>]>, FetchError> {
        self.ready.clear();
        let shared = &*self.store.shared;
        let mut s = shared.lock();
        self.held.drain(..).for_each(|slot| s.slots.unpin(slot));
        loop {
            if stop.is_some_and(|stop| stop.load(Relaxed)) {
                return Err(FetchError::Stopped);
            }
            self.collect(&mut s);
            if self.keys().any(|key| s.failed.contains_key(&key)) {
                return Err(self.give_up(s));
            }
            self.order_missing(&mut s);
            if !s.likely.is_empty() {
                // Slots that came free may be read ahead into.
                shared.work.notify_one();
            }
            if !self.ready.is_empty() || self.wanted.is_empty() {
                break;
            }
            let began = Instant::now();
            s = shared.arrived.wait_timeout(s, TICK).unwrap_or_else(|e| e.into_inner()).0;
            s.stats.stall_ns += began.elapsed().as_nanos() as u64;
        }
        drop(s);
        self.ready.sort_unstable_by_key(|r| r.expert);
        Ok(if self.ready.is_empty() { None } else { Some(&self.ready) })
    }

    /// Pins what is resident and moves it to `ready`.
    fn collect(&mut self, s: &mut State) {
        let shared: &'a Shared = &self.store.shared;
        let (layer, ready, held) = (self.layer, &mut self.ready, &mut self.held);
        self.wanted.retain(|&expert| {
            let Place::Resident(slot) = s.slots.place(shared.layout.key(layer, expert)) else { return true };
            s.slots.pin(slot);
            held.push(slot);
            ready.extend(shared.ready(layer, expert, slot));
            false
        });
    }

    /// Waits until nothing that was asked for is on its way, so that no trace of the failure meets a later call.
    fn give_up(&self, mut s: MutexGuard<'_, State>) -> FetchError {
        let shared = &*self.store.shared;
        // Before what failed is read ahead again.
        let found = self.keys().find_map(|key| Some((key, s.failed.remove(&key)?)));
        while self.keys().any(|key| matches!(s.slots.place(key), Place::Loading(_))) {
            s = shared.arrived.wait(s).unwrap_or_else(|e| e.into_inner());
        }
        self.keys().for_each(|key| drop(s.failed.remove(&key)));
        let (key, why) = found.unwrap_or_else(|| (shared.layout.key(self.layer, 0), "a read failed".into()));
        let (layer, expert) = shared.layout.layer_and_expert(key);
        FetchError::Read { layer, expert, why }
    }

    /// Drops what nobody waits for any more and hasn't begun to be read: it would hold up whoever comes next.
    fn cancel(&self, s: &mut State) {
        s.likely.clear();
        let jobs = std::mem::take(&mut s.demand);
        for job in jobs {
            if self.keys().any(|key| key == job.key) {
                s.slots.end_part(job.slot, false);
            } else {
                s.demand.push_back(job);
            }
        }
        self.store.shared.arrived.notify_all();
    }

    /// Gives slots to missing experts while there are any, and has them read: one whole expert after the other, so that
    /// the first can be computed while the others are read.
    fn order_missing(&self, s: &mut State) {
        let shared = &*self.store.shared;
        let before = s.demand.len();
        let absent: Vec<u32> = self.keys().filter(|&key| s.slots.place(key) == Place::Absent).collect();
        s.unplaced = absent.len();
        for key in absent {
            let Some((slot, evicted)) = s.slots.take(key) else { break };
            s.count_evicted(&shared.layout, evicted);
            s.slots.begin(key, slot, false);
            s.unplaced -= 1;
            s.demand.extend(parts_of(key, slot));
        }
        if s.demand.len() > before {
            shared.work.notify_all();
        }
    }
}

impl Shared {
    /// A pinned expert's matrices.
    fn ready(&self, layer: usize, expert: u32, slot: u32) -> Option<Ready<'_>> {
        let (parts, _) = self.layout.layers[layer].as_ref()?;
        let packed: [Packed<'_>; N_PARTS] = std::array::from_fn(|i| {
            let (p, at) = (&parts[i], self.layout.part_of_slot(slot, i).start);
            assert!(at + p.n_bytes <= self.arena.len());
            // SAFETY: in bounds (asserted); the slot is resident and pinned, so nobody writes it until it's unpinned, and `Fetch` lends
            // this for no longer than that.
            let data = unsafe { std::slice::from_raw_parts(self.arena.as_ptr().add(at), p.n_bytes) };
            Packed::new(p.format, self.isa, p.n_rows, p.n_cols, data)
        });
        let [gate, up, down] = packed;
        Some(Ready { expert, gate, up, down })
    }
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        let mut s = self.store.shared.lock();
        self.held.drain(..).for_each(|slot| s.slots.unpin(slot));
        self.keys().for_each(|key| s.slots.spare(key));
        s.unplaced = 0;
        if !self.wanted.is_empty() {
            self.cancel(&mut s);
        }
    }
}
