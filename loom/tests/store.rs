//! The expert store under every order in which its threads can meet, up to a bound on how often one is interrupted. loom itself says
//! when all threads wait for each other.

use loom::sync::Mutex;
use oncall_loom::cpu::Isa;
use oncall_loom::moe::policy::POLICIES;
use oncall_loom::moe::source::Source;
use oncall_loom::moe::store::{ExpertStore, FetchError, Part, Ready, StoreLayout, StoreOptions};
use oncall_loom::quant::Format;
use std::sync::Arc;

const N_BYTES: usize = 4;
/// Experts of a layer.
const N_EXPERT: usize = 3;
const N_PARTS: usize = 3;

/// How often a run may interrupt a thread that needn't wait, unless LOOM_MAX_PREEMPTIONS says otherwise. With 2 all models end in
/// seconds, with 3 in minutes.
const PREEMPTIONS: usize = 2;

/// Runs a model in every order.
fn every_order(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(PREEMPTIONS);
    builder.max_branches = 100_000;
    builder.check(model);
}

/// A disk that notes what is read, in the order in which reads begin.
struct Disk {
    state: Mutex<State>,
}

struct State {
    /// (tensor, expert)
    reads: Vec<(usize, u32)>,
    /// Reads that will fail.
    failing: usize,
}

impl Disk {
    fn new(failing: usize) -> Arc<Self> {
        Arc::new(Disk { state: Mutex::new(State { reads: Vec::new(), failing }) })
    }

    fn reads(&self) -> Vec<(usize, u32)> {
        self.state.lock().unwrap().reads.clone()
    }
}

/// What all bytes of a part of an expert are.
fn byte(tensor: usize, expert: u32) -> u8 {
    (1 + tensor * N_EXPERT) as u8 + expert as u8
}

impl Source for Disk {
    fn read(&self, tensor: usize, offset: u64, n_bytes: usize, buf: &mut [u8]) -> Result<usize, String> {
        let expert = (offset / n_bytes as u64) as u32;
        self.state.lock().unwrap().reads.push((tensor, expert));
        // Half of it is there when another thread has its turn.
        buf[..n_bytes / 2].fill(byte(tensor, expert));
        let mut s = self.state.lock().unwrap();
        if s.failing > 0 {
            s.failing -= 1;
            return Err("the disk said no".into());
        }
        drop(s);
        buf[n_bytes / 2..n_bytes].fill(byte(tensor, expert));
        Ok(0)
    }
}

fn layout(n_layer: usize) -> StoreLayout {
    let part = |tensor| Part {
        tensor,
        offset: 0,
        stride: N_BYTES as u64,
        n_bytes: N_BYTES,
        format: &Format,
        n_rows: 1,
        n_cols: 1,
    };
    let layer = |l: usize| Some([0, 1, 2].map(|p| part(N_PARTS * l + p)));
    StoreLayout::new((0..n_layer).map(layer).collect(), N_EXPERT)
}

fn bytes(n_slots: usize) -> u64 {
    layout(1).bytes_for_all() / N_EXPERT as u64 * n_slots as u64
}

fn store(n_layer: usize, n_slots: usize, lanes: usize, disk: &Arc<Disk>) -> ExpertStore {
    let o = StoreOptions { bytes: bytes(n_slots), isa: Isa, policy: POLICIES[0].1, lanes, lookahead: true };
    ExpertStore::new(layout(n_layer), &o, disk.clone()).unwrap()
}

/// Asks for experts, and checks that each comes once, whole, and stays as it is while it's held.
fn fetch(store: &ExpertStore, disk: &Disk, layer: usize, wanted: &[u32]) -> Result<(), FetchError> {
    let with_tokens: Vec<(u32, u32)> = wanted.iter().map(|&e| (e, 1)).collect();
    let mut fetch = store.fetch(layer, &with_tokens);
    let mut seen = Vec::new();
    while let Some(ready) = fetch.next(None)? {
        assert_own_weights(ready, disk, layer);
        seen.extend(ready.iter().map(|r| r.expert));
    }
    seen.sort_unstable();
    assert_eq!(seen, wanted);
    Ok(())
}

/// What was handed out is whole, and stays so while others have a turn.
fn assert_own_weights(ready: &[Ready<'_>], disk: &Disk, layer: usize) {
    for _ in 0..2 {
        for r in ready {
            for (part, p) in [r.gate, r.up, r.down].into_iter().enumerate() {
                assert_eq!(p.0, [byte(N_PARTS * layer + part, r.expert); N_BYTES]);
            }
        }
        disk.reads();
    }
}

/// Each read at most once: nothing is read that is there or on its way.
fn assert_each_once(mut reads: Vec<(usize, u32)>, n: usize) {
    assert_eq!(reads.len(), n, "{reads:?}");
    reads.sort_unstable();
    reads.dedup();
    assert_eq!(reads.len(), n, "{reads:?}");
}

#[test]
fn two_lanes_fill_one_slot_after_the_other() {
    every_order(|| {
        let disk = Disk::new(0);
        let store = store(1, 1, 2, &disk);
        fetch(&store, &disk, 0, &[0, 1]).unwrap();
        drop(store);
        assert_each_once(disk.reads(), 2 * N_PARTS);
    });
}

#[test]
fn what_is_on_its_way_ahead_is_not_read_again() {
    every_order(|| {
        let disk = Disk::new(0);
        let store = store(2, 4, 2, &disk);
        store.ahead(1, &[2]);
        fetch(&store, &disk, 1, &[0, 2]).unwrap();
        let stats = store.stats();
        assert_eq!((stats.uses, stats.evictions), (2, 0));
        assert_eq!(stats.hits, stats.ahead_hits);
        drop(store);
        assert_each_once(disk.reads(), 2 * N_PARTS);
    });
}

/// What is waited for comes before what may be wanted later: one read of the latter may have begun, and an expert whose slot was
/// taken, but none begins while something that is waited for could.
#[test]
fn demand_comes_before_reading_ahead_and_warming_up() {
    every_order(|| {
        let disk = Disk::new(0);
        let store = store(2, 6, 1, &disk);
        store.warm_up([(1, 1), (1, 2)]);
        let begun = {
            let mut fetch = store.fetch(0, &[(0, 1)]);
            let begun = disk.reads().len();
            while fetch.next(None).unwrap().is_some() {}
            begun
        };
        let reads = disk.reads();
        drop(store);
        let demand: Vec<usize> = (0..reads.len()).filter(|&i| reads[i].0 < N_PARTS).collect();
        assert_eq!(demand.len(), N_PARTS);
        let others = (begun..demand[N_PARTS - 1]).filter(|i| !demand.contains(i)).count();
        assert!(others <= 1, "{others} other reads after {begun}: {reads:?}");
    });
}

/// What a pass waits for or computes with stays, whatever is read ahead meanwhile.
#[test]
fn reading_ahead_takes_no_slot_that_is_wanted_or_held() {
    every_order(|| {
        let disk = Disk::new(0);
        let store = store(2, 2, 1, &disk);
        let mut fetch = store.fetch(0, &[(0, 1), (1, 1)]);
        store.ahead(1, &[2]);
        while let Some(ready) = fetch.next(None).unwrap() {
            assert_own_weights(ready, &disk, 0);
        }
        drop(fetch);
        drop(store);
        let wanted = disk.reads().into_iter().filter(|r| r.0 < N_PARTS).collect();
        assert_each_once(wanted, 2 * N_PARTS);
    });
}

#[test]
fn a_failed_read_is_an_error_and_the_next_try_succeeds() {
    for (failing, wanted) in [(1, &[0, 1][..]), (2, &[0])] {
        every_order(move || {
            let disk = Disk::new(failing);
            let store = store(1, 2, 2, &disk);
            let error = fetch(&store, &disk, 0, wanted).unwrap_err();
            assert!(matches!(&error, FetchError::Read { why, .. } if why == "the disk said no"), "{error}");
            fetch(&store, &disk, 0, wanted).unwrap();
        });
    }
}

/// A read ahead that failed is made again when it's waited for; one that fails while it's waited for is an error.
#[test]
fn what_failed_ahead_is_tried_again() {
    every_order(|| {
        let disk = Disk::new(1);
        let store = store(2, 4, 1, &disk);
        store.ahead(1, &[0]);
        let had_failed = disk.state.lock().unwrap().failing == 0 && !store.at_hand(1)[0];
        if let Err(e) = fetch(&store, &disk, 1, &[0]) {
            assert!(!had_failed && matches!(e, FetchError::Read { layer: 1, expert: 0, .. }));
            fetch(&store, &disk, 1, &[0]).unwrap();
        }
    });
}

/// A pass that ends early leaves reads behind; the next one waits for their slot.
#[test]
fn a_slot_is_not_taken_while_it_is_read_into() {
    every_order(|| {
        let disk = Disk::new(0);
        let store = store(2, 1, 2, &disk);
        drop(store.fetch(0, &[(0, 1)]));
        fetch(&store, &disk, 1, &[1]).unwrap();
    });
}

/// A pass that stops drops what hasn't begun to be read, the next one reads it.
#[test]
fn what_a_stopped_pass_wanted_is_there_for_the_next() {
    every_order(|| {
        let disk = Disk::new(0);
        let store = store(1, 2, 1, &disk);
        let stop = std::sync::atomic::AtomicBool::new(true);
        assert!(matches!(store.fetch(0, &[(0, 1), (1, 1)]).next(Some(&stop)), Err(FetchError::Stopped)));
        fetch(&store, &disk, 0, &[0, 2]).unwrap();
    });
}

/// Whatever is still to be read, the threads end.
#[test]
fn a_store_can_be_dropped_at_any_moment() {
    every_order(|| {
        let disk = Disk::new(0);
        let store = store(2, 4, 2, &disk);
        store.warm_up([(0, 2)]);
        drop(store.fetch(0, &[(0, 1)]));
        drop(store);
        assert!(disk.reads().len() <= 2 * N_PARTS);
    });
}

#[test]
fn slots_are_given_up_as_soon_as_they_are_read() {
    every_order(|| {
        let disk = Disk::new(0);
        let store = store(2, 2, 1, &disk);
        drop(store.fetch(0, &[(0, 1), (1, 1)]));
        store.resize(bytes(1));
        assert_eq!(store.n_slots(), (1, 2 * N_EXPERT));
        fetch(&store, &disk, 0, &[1]).unwrap();
        store.resize(bytes(6));
        fetch(&store, &disk, 1, &[2]).unwrap();
    });
}
