//! The expert store: experts live in slots of a fixed arena, are read from the file when the router calls them,
//! and leave when the policy says so.
//!
//! A slot holds one expert: gate, up and down, packed for the kernels when it is filled. A slot is empty,
//! loading, or resident; a resident slot that is being computed with is pinned. Experts of layers with larger
//! matrices have slots of their own size (a class), so that no slot wastes memory on a smaller expert.
//! A model that fits is the same path with a slot for every expert.

#![allow(unsafe_code)]

use super::policy::{MakePolicy, Policy};
use super::reader::{Job, Reader, Source};
use crate::cpu::{Isa, Pages};
use crate::ops::matmul::{Packed, pack_in_place};
use crate::quant::Format;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// Slots and parts begin at multiples of this: a direct read needs it, and vectors like it.
const ALIGN: usize = 4096;

/// One matrix of every expert of a layer: expert e is `n_bytes` at `offset + e * stride`.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The tensor's index in the model.
    pub tensor: usize,
    /// Where expert 0 begins in the tensor.
    pub offset: u64,
    /// From one expert to the next.
    pub stride: u64,
    /// Bytes of one expert's matrix.
    pub n_bytes: usize,
    /// Its number format.
    pub format: &'static Format,
    /// Output width.
    pub n_rows: usize,
    /// Input width.
    pub n_cols: usize,
}

/// The experts of a layer: gate, up, down.
pub type LayerParts = [Part; 3];

/// What the store has done so far.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct StoreStats {
    /// Experts asked for, each counted once for each layer of each pass.
    pub uses: u64,
    /// Those that were resident or on their way.
    pub hits: u64,
    /// Bytes read from the file because an expert was missing.
    pub bytes_read: u64,
    /// Experts that left their slot.
    pub evictions: u64,
    /// Nanoseconds that computing waited for reads.
    pub stall_ns: u64,
}

/// Why an expert couldn't be had.
#[derive(Clone, Debug, thiserror::Error)]
#[error("reading expert {expert} of layer {layer} failed: {why}")]
pub struct FetchError {
    /// The layer.
    pub layer: usize,
    /// The expert in it.
    pub expert: u32,
    /// What the reader said.
    pub why: String,
}

/// Slots of one size.
#[derive(Clone, Debug)]
struct Class {
    slot_bytes: usize,
    /// Where each part begins in a slot.
    starts: [usize; 3],
    /// Experts of all layers of this class.
    n_experts: usize,
    n_slots: usize,
    /// Index of the first slot, and its place in the arena.
    first_slot: usize,
    base: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Absent,
    Loading(u32),
    Resident(u32),
}

#[derive(Clone, Copy, Default)]
struct Slot {
    owner: Option<u32>,
    pins: u32,
    /// Parts still to be read.
    missing: u8,
    /// A part couldn't be.
    failed: bool,
}

struct State {
    places: Vec<Place>,
    slots: Vec<Slot>,
    free: Vec<Vec<u32>>,
    policy: Box<dyn Policy>,
    now: u64,
    failed: HashMap<usize, String>,
    stats: StoreStats,
}

struct Shared {
    layers: Vec<Option<(LayerParts, usize)>>,
    classes: Vec<Class>,
    n_expert: usize,
    isa: Isa,
    arena: Pages,
    source: Arc<dyn Source>,
    state: Mutex<State>,
    arrived: Condvar,
}

/// Experts in slots, filled on demand.
pub struct ExpertStore {
    shared: Arc<Shared>,
    reader: Reader,
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

/// The sizes of a store, before it is made: what the planner and the budget need.
#[derive(Clone, Debug)]
pub struct StoreLayout {
    layers: Vec<Option<(LayerParts, usize)>>,
    classes: Vec<Class>,
    n_expert: usize,
}

impl StoreLayout {
    /// Sizes for these layers (`None` for a dense one), each with `n_expert` experts.
    pub fn new(layers: Vec<Option<LayerParts>>, n_expert: usize) -> Self {
        let mut classes: Vec<Class> = Vec::new();
        let layers = layers
            .into_iter()
            .map(|parts| {
                parts.map(|parts| {
                    let room = parts.map(|p| p.n_bytes.next_multiple_of(ALIGN));
                    let slot_bytes = room.iter().sum();
                    let starts = [0, room[0], room[0] + room[1]];
                    let same = |c: &Class| c.slot_bytes == slot_bytes && c.starts == starts;
                    let class = classes.iter().position(same).unwrap_or_else(|| {
                        let empty = Class { slot_bytes, starts, n_experts: 0, n_slots: 0, first_slot: 0, base: 0 };
                        classes.push(empty);
                        classes.len() - 1
                    });
                    classes[class].n_experts += n_expert;
                    (parts, class)
                })
            })
            .collect();
        StoreLayout { layers, classes, n_expert }
    }

    /// Bytes of slots for every expert.
    pub fn bytes_for_all(&self) -> u64 {
        self.classes.iter().map(|c| (c.n_experts * c.slot_bytes) as u64).sum()
    }

    /// Bytes of the fewest slots that work: `at_once` experts of each class.
    pub fn bytes_for_least(&self, at_once: usize) -> u64 {
        self.classes.iter().map(|c| (at_once.min(c.n_experts) * c.slot_bytes) as u64).sum()
    }

    /// Gives each class the same share of its experts within `bytes`; the number of slots in all.
    fn divide(&mut self, bytes: u64) -> usize {
        let all = self.bytes_for_all().max(1);
        let (mut first_slot, mut base) = (0, 0);
        for c in &mut self.classes {
            let share = (c.n_experts as u128 * u128::from(bytes) / u128::from(all)) as usize;
            c.n_slots = share.clamp(1, c.n_experts);
            (c.first_slot, c.base) = (first_slot, base);
            first_slot += c.n_slots;
            base += c.n_slots * c.slot_bytes;
        }
        first_slot
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn key(&self, layer: usize, expert: u32) -> usize {
        layer * self.n_expert + expert as usize
    }

    /// Where a part of a slot begins in the arena.
    fn part_at(&self, layer: usize, slot: u32, part: usize) -> usize {
        let class = &self.classes[self.layers[layer].as_ref().map_or(0, |l| l.1)];
        class.base + (slot as usize - class.first_slot) * class.slot_bytes + class.starts[part]
    }

    /// Reads and packs one part of an expert into its slot, and reports.
    fn load(&self, layer: usize, expert: u32, slot: u32, part: usize) {
        let result = self.layers[layer].as_ref().map_or(Ok(()), |(parts, _)| {
            let p = &parts[part];
            let at = self.part_at(layer, slot, part);
            assert!(at + p.n_bytes <= self.arena.len());
            // SAFETY: in bounds (asserted); the slot is loading, so nobody reads it, and this part of it has one job.
            let data = unsafe { std::slice::from_raw_parts_mut(self.arena.as_ptr().add(at), p.n_bytes) };
            self.source.read(p.tensor, p.offset + u64::from(expert) * p.stride, data)?;
            pack_in_place(p.format, self.isa, p.n_rows, p.n_cols, data, &mut Vec::new());
            Ok(())
        });
        self.finish(self.key(layer, expert), slot, result);
    }

    fn finish(&self, key: usize, slot: u32, result: Result<(), String>) {
        let mut s = self.lock();
        if let Err(why) = result {
            s.slots[slot as usize].failed = true;
            s.failed.insert(key, why);
        }
        s.slots[slot as usize].missing -= 1;
        if s.slots[slot as usize].missing == 0 {
            if s.slots[slot as usize].failed {
                s.places[key] = Place::Absent;
                s.slots[slot as usize].owner = None;
                let class = self.class_of_slot(slot);
                s.free[class].push(slot);
            } else {
                s.places[key] = Place::Resident(slot);
            }
            drop(s);
            self.arrived.notify_all();
        }
    }

    fn class_of_slot(&self, slot: u32) -> usize {
        self.classes.iter().rposition(|c| c.first_slot <= slot as usize).unwrap_or(0)
    }

    /// A pinned expert's matrices.
    fn ready(&self, layer: usize, expert: u32, slot: u32) -> Option<Ready<'_>> {
        let (parts, _) = self.layers[layer].as_ref()?;
        let packed = |i: usize| {
            let (p, at) = (&parts[i], self.part_at(layer, slot, i));
            assert!(at + p.n_bytes <= self.arena.len());
            // SAFETY: in bounds (asserted); the slot is resident and pinned, so nobody writes it.
            let data = unsafe { std::slice::from_raw_parts(self.arena.as_ptr().add(at), p.n_bytes) };
            Packed::new(p.format, self.isa, p.n_rows, p.n_cols, data)
        };
        Some(Ready { expert, gate: packed(0), up: packed(1), down: packed(2) })
    }
}

impl ExpertStore {
    /// A store with as many slots as fit into `bytes` (at least one of each size, at most one for each expert),
    /// filled by `lanes` reading threads.
    ///
    /// # Errors
    /// When the system has no memory for the arena or refuses to start threads.
    pub fn new(
        mut layout: StoreLayout,
        bytes: u64,
        isa: Isa,
        policy: MakePolicy,
        source: Arc<dyn Source>,
        lanes: usize,
    ) -> std::io::Result<Self> {
        let n_slots = layout.divide(bytes);
        let n_experts = layout.layers.len() * layout.n_expert;
        let free = layout
            .classes
            .iter()
            .map(|c| (c.first_slot as u32..(c.first_slot + c.n_slots) as u32).rev().collect())
            .collect();
        let arena_bytes = layout.classes.iter().map(|c| c.n_slots * c.slot_bytes).sum();
        let state = State {
            places: vec![Place::Absent; n_experts],
            slots: vec![Slot::default(); n_slots],
            free,
            policy: policy(layout.layers.len(), layout.n_expert),
            now: 0,
            failed: HashMap::new(),
            stats: StoreStats::default(),
        };
        let shared = Arc::new(Shared {
            layers: layout.layers,
            classes: layout.classes,
            n_expert: layout.n_expert,
            isa,
            arena: Pages::new(arena_bytes)?,
            source,
            state: Mutex::new(state),
            arrived: Condvar::new(),
        });
        Ok(ExpertStore { shared, reader: Reader::new(lanes)? })
    }

    /// Tells the policy that `n_tokens` more tokens are coming.
    pub fn advance(&self, n_tokens: u64) {
        self.shared.lock().now += n_tokens;
    }

    /// What was done so far.
    pub fn stats(&self) -> StoreStats {
        self.shared.lock().stats
    }

    /// Slots, and experts in all.
    pub fn n_slots(&self) -> (usize, usize) {
        (self.shared.lock().slots.len(), self.shared.classes.iter().map(|c| c.n_experts).sum())
    }

    /// Whether the expert is in a slot now.
    pub fn is_resident(&self, layer: usize, expert: u32) -> bool {
        matches!(self.shared.lock().places[self.shared.key(layer, expert)], Place::Resident(_))
    }

    /// Asks for experts of a layer, each with the number of tokens that want it, most needed first.
    pub fn fetch(&self, layer: usize, wanted: &[(u32, u32)]) -> Fetch<'_> {
        let mut s = self.shared.lock();
        let now = s.now;
        for &(expert, n) in wanted {
            let key = self.shared.key(layer, expert);
            s.stats.uses += 1;
            s.stats.hits += u64::from(s.places[key] != Place::Absent);
            s.policy.used(key, n, now);
        }
        let wanted = wanted.iter().map(|w| w.0).collect();
        Fetch { store: self, layer, wanted, held: Vec::new() }
    }

    /// Takes a slot for an expert: a free one, or the one whose expert the policy would rather lose.
    fn take_slot(&self, s: &mut State, layer: usize) -> Option<u32> {
        let class = self.shared.layers[layer].as_ref()?.1;
        if let Some(slot) = s.free[class].pop() {
            return Some(slot);
        }
        let c = &self.shared.classes[class];
        let victim = (c.first_slot..c.first_slot + c.n_slots)
            .filter_map(|slot| {
                let key = s.slots[slot].owner? as usize;
                let idle = s.slots[slot].pins == 0 && s.places[key] == Place::Resident(slot as u32);
                idle.then(|| (s.policy.rank(key) + s.policy.layer_rank(key / self.shared.n_expert), slot, key))
            })
            .min_by(|a, b| a.0.total_cmp(&b.0))?;
        s.places[victim.2] = Place::Absent;
        s.stats.evictions += 1;
        Some(victim.1 as u32)
    }
}

/// Experts of one layer on their way to being computed. Those it has handed out stay pinned until the next call.
pub struct Fetch<'a> {
    store: &'a ExpertStore,
    layer: usize,
    /// Not yet handed out.
    wanted: Vec<u32>,
    held: Vec<u32>,
}

impl<'a> Fetch<'a> {
    /// The next experts that can be computed: first all that are resident, then others as they arrive, in any
    /// order; `None` when all have been handed out. Unpins those of the call before.
    ///
    /// # Errors
    /// When a read failed. The store stays usable.
    pub fn next(&mut self, out: &mut Vec<Ready<'a>>) -> Result<bool, FetchError> {
        out.clear();
        let shared = &*self.store.shared;
        let mut s = shared.lock();
        for slot in self.held.drain(..) {
            s.slots[slot as usize].pins -= 1;
        }
        loop {
            self.collect(&mut s, out);
            if self.wanted.iter().any(|&e| s.failed.contains_key(&shared.key(self.layer, e))) {
                return Err(self.give_up(s));
            }
            let jobs = self.order_missing(&mut s);
            self.store.reader.submit(jobs);
            if !out.is_empty() || self.wanted.is_empty() {
                return Ok(!out.is_empty());
            }
            let began = Instant::now();
            s = shared.arrived.wait(s).unwrap_or_else(|e| e.into_inner());
            s.stats.stall_ns += began.elapsed().as_nanos() as u64;
        }
    }

    /// Pins what is resident and moves it to `out`.
    fn collect(&mut self, s: &mut State, out: &mut Vec<Ready<'a>>) {
        let shared: &'a Shared = &self.store.shared;
        let (layer, held) = (self.layer, &mut self.held);
        self.wanted.retain(|&expert| {
            let Place::Resident(slot) = s.places[shared.key(layer, expert)] else { return true };
            s.slots[slot as usize].pins += 1;
            held.push(slot);
            out.extend(shared.ready(layer, expert, slot));
            false
        });
    }

    /// Waits until nothing that was asked for is on its way, so that no trace of the failure meets a later call.
    fn give_up(&self, mut s: MutexGuard<'_, State>) -> FetchError {
        let shared = &*self.store.shared;
        let keys: Vec<usize> = self.wanted.iter().map(|&e| shared.key(self.layer, e)).collect();
        while keys.iter().any(|&k| matches!(s.places[k], Place::Loading(_))) {
            s = shared.arrived.wait(s).unwrap_or_else(|e| e.into_inner());
        }
        let mut first = None;
        for (&expert, key) in self.wanted.iter().zip(keys) {
            let why = s.failed.remove(&key);
            first = first.or(why.map(|why| FetchError { layer: self.layer, expert, why }));
        }
        first.unwrap_or(FetchError { layer: self.layer, expert: 0, why: "a read failed".into() })
    }

    /// Gives slots to missing experts while there are any, and makes the jobs that fill them: gate and up of all
    /// before down, because that's the order in which they are needed.
    fn order_missing(&self, s: &mut State) -> Vec<Job> {
        let shared = &self.store.shared;
        let mut begun = Vec::new();
        for &expert in &self.wanted {
            let key = shared.key(self.layer, expert);
            if s.places[key] != Place::Absent {
                continue;
            }
            let Some(slot) = self.store.take_slot(s, self.layer) else { break };
            s.slots[slot as usize] = Slot { owner: Some(key as u32), pins: 0, missing: 3, failed: false };
            s.places[key] = Place::Loading(slot);
            let bytes = shared.layers[self.layer].as_ref().map_or(0, |l| l.0.iter().map(|p| p.n_bytes as u64).sum());
            s.stats.bytes_read += bytes;
            begun.push((expert, slot));
        }
        let mut jobs: Vec<Job> = Vec::with_capacity(3 * begun.len());
        for part in 0..3 {
            for &(expert, slot) in &begun {
                let (shared, layer) = (shared.clone(), self.layer);
                jobs.push(Box::new(move || shared.load(layer, expert, slot, part)));
            }
        }
        jobs
    }
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        let mut s = self.store.shared.lock();
        for slot in self.held.drain(..) {
            s.slots[slot as usize].pins -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::policy;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::time::Duration;

    const N_EMBD: usize = 8;
    const N_FF: usize = 32;
    const N_EXPERT: usize = 6;

    /// Weights that say whose they are; reads take as long as the seed says, and fail when they are told to.
    struct Fake {
        seed: u64,
        n_reads: AtomicU64,
        failing: AtomicU64,
    }

    impl Fake {
        fn new(seed: u64) -> Arc<Self> {
            Arc::new(Fake { seed, n_reads: AtomicU64::new(0), failing: AtomicU64::new(0) })
        }
    }

    /// The value of all weights of a part of an expert.
    fn weight(tensor: usize, expert: u32) -> f32 {
        (tensor * 100) as f32 + expert as f32
    }

    impl Source for Fake {
        fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) -> Result<(), String> {
            let n = self.n_reads.fetch_add(1, Relaxed);
            let wait = (self.seed.wrapping_add(n).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) * 20;
            std::thread::sleep(Duration::from_micros(wait));
            let fails = self.failing.try_update(Relaxed, Relaxed, |f| f.checked_sub(1)).is_ok();
            if fails {
                return Err("the disk said no".into());
            }
            let expert = (offset as usize / buf.len()) as u32;
            buf.chunks_mut(4).for_each(|w| w.copy_from_slice(&weight(tensor, expert).to_le_bytes()));
            Ok(())
        }
    }

    fn layout(n_layer: usize) -> StoreLayout {
        let format = crate::quant::by_name("f32").unwrap();
        let n_bytes = N_FF * N_EMBD * 4;
        let part = |tensor, n_rows, n_cols| Part {
            tensor,
            offset: 0,
            stride: n_bytes as u64,
            n_bytes,
            format,
            n_rows,
            n_cols,
        };
        let layer =
            |l: usize| [part(3 * l, N_FF, N_EMBD), part(3 * l + 1, N_FF, N_EMBD), part(3 * l + 2, N_EMBD, N_FF)];
        StoreLayout::new((0..n_layer).map(|l| Some(layer(l))).collect(), N_EXPERT)
    }

    fn store(n_layer: usize, n_slots: usize, lanes: usize, source: Arc<Fake>) -> ExpertStore {
        let l = layout(n_layer);
        let bytes = l.bytes_for_all() / (n_layer * N_EXPERT) as u64 * n_slots as u64;
        ExpertStore::new(l, bytes, Isa::best(), policy::POLICIES[0].1, source, lanes).unwrap()
    }

    /// Fetches experts and checks that each comes once, with its own weights.
    fn fetch(store: &ExpertStore, layer: usize, wanted: &[u32]) -> Result<(), FetchError> {
        let wanted: Vec<(u32, u32)> = wanted.iter().map(|&e| (e, 1)).collect();
        let mut fetch = store.fetch(layer, &wanted);
        let (mut ready, mut seen) = (Vec::new(), Vec::new());
        while fetch.next(&mut ready)? {
            for r in &ready {
                for (i, p) in [r.gate, r.up, r.down].into_iter().enumerate() {
                    assert_eq!(first_weight(p), weight(3 * layer + i, r.expert));
                }
                seen.push(r.expert);
            }
        }
        seen.sort_unstable();
        let mut want: Vec<u32> = wanted.iter().map(|w| w.0).collect();
        want.sort_unstable();
        assert_eq!(seen, want);
        Ok(())
    }

    /// All weights of a part are the same, so a product with (1, 0, 0 …) gives that weight.
    fn first_weight(p: Packed<'_>) -> f32 {
        use crate::ops::matmul::{Acts, OutRows, matmul_groups};
        let mut acts = Acts::new();
        acts.reset(1, p.n_cols(), &[p.format().act]);
        let mut x = vec![0.0; p.n_cols()];
        x[0] = 1.0;
        acts.put(0, &x);
        let mut out = vec![0.0; p.n_rows()];
        matmul_groups(p, 0..p.n_groups(), &acts, &[0], OutRows::new(&mut out, p.n_rows()));
        assert!(out.iter().all(|v| v == &out[0]));
        out[0]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(120))]
        #[test]
        fn any_schedule_gives_every_expert_its_own_weights(
            seed: u64,
            n_slots in 1usize..13,
            lanes in 1usize..5,
            passes in proptest::collection::vec((0usize..2, proptest::collection::btree_set(0u32..N_EXPERT as u32, 1..N_EXPERT)), 1..12),
        ) {
            let store = store(2, n_slots, lanes, Fake::new(seed));
            for (layer, wanted) in passes {
                store.advance(1);
                fetch(&store, layer, &wanted.into_iter().collect::<Vec<_>>()).unwrap();
            }
            let s = store.stats();
            prop_assert!(s.hits <= s.uses);
        }
    }

    #[test]
    fn what_fits_is_read_once() {
        let source = Fake::new(1);
        let store = store(2, 12, 2, source.clone());
        for _ in 0..5 {
            for layer in 0..2 {
                fetch(&store, layer, &[0, 1, 2, 3, 4, 5]).unwrap();
            }
        }
        assert_eq!(source.n_reads.load(Relaxed), 2 * 6 * 3);
        assert_eq!(store.stats().evictions, 0);
    }

    #[test]
    fn a_failed_read_is_an_error_and_the_next_try_succeeds() {
        for n_failures in 1..9 {
            let source = Fake::new(n_failures);
            let store = store(2, 3, 3, source.clone());
            fetch(&store, 0, &[1, 2]).unwrap();
            source.failing.store(n_failures, Relaxed);
            let error = fetch(&store, 1, &[0, 3, 5, 4]).unwrap_err();
            assert_eq!((error.layer, error.why.as_str()), (1, "the disk said no"));
            source.failing.store(0, Relaxed);
            for layer in [1, 0, 1] {
                fetch(&store, layer, &[0, 1, 2, 3, 4, 5]).unwrap();
            }
        }
    }
}
