use super::slots::PartEnd;
use super::*;
use crate::moe::policy::{self, POLICIES};
use crate::ops::matmul::Packed;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

const N_EMBD: usize = 8;
const N_FF: usize = 32;
const N_EXPERT: usize = 6;
const PART_BYTES: usize = N_FF * N_EMBD * 4;

/// Weights that say whose they are, as if read directly from anywhere in a file; reads take as long as the seed says, and fail
/// when they are told to.
struct Fake {
    seed: u64,
    n_reads: AtomicU64,
    /// So many more reads fail.
    failing: AtomicU64,
    /// One read in so many fails, as the seed says; 0 for none.
    one_in: AtomicU64,
    /// Reads wait while this is held.
    gate: std::sync::Mutex<()>,
    panics: AtomicBool,
}

impl Fake {
    fn new(seed: u64) -> Arc<Self> {
        Arc::new(Fake {
            seed,
            n_reads: AtomicU64::new(0),
            failing: AtomicU64::new(0),
            one_in: AtomicU64::new(0),
            gate: std::sync::Mutex::new(()),
            panics: AtomicBool::new(false),
        })
    }
}

/// The value of all weights of a part of an expert.
fn weight(tensor: usize, expert: u32) -> f32 {
    (tensor * 100) as f32 + expert as f32
}

impl Source for Fake {
    fn read(&self, tensor: usize, offset: u64, n_bytes: usize, buf: &mut [u8]) -> Result<usize, String> {
        assert!(buf.len() >= room_for(n_bytes) && (buf.as_ptr() as usize).is_multiple_of(4096));
        let n = self.n_reads.fetch_add(1, Relaxed);
        let random = self.seed.wrapping_add(n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        drop(self.gate.lock());
        std::thread::sleep(Duration::from_micros((random >> 60) * 20));
        assert!(!self.panics.swap(false, Relaxed), "a bug");
        if self.failing.try_update(Relaxed, Relaxed, |f| f.checked_sub(1)).is_ok() {
            return Err("the disk said no".into());
        }
        if (random >> 20).checked_rem(self.one_in.load(Relaxed)) == Some(0) {
            return Err("the disk said no".into());
        }
        let expert = (offset as usize / PART_BYTES) as u32;
        let at = (random >> 40) as usize % 128 * 32;
        buf.fill(0xff);
        buf[at..at + n_bytes].chunks_mut(4).for_each(|w| w.copy_from_slice(&weight(tensor, expert).to_le_bytes()));
        Ok(at)
    }
}

fn layout(n_layer: usize) -> StoreLayout {
    let format = crate::quant::by_name("f32").unwrap();
    let n_bytes = PART_BYTES;
    let part =
        |tensor, n_rows, n_cols| Part { tensor, offset: 0, stride: n_bytes as u64, n_bytes, format, n_rows, n_cols };
    let layer = |l: usize| [part(3 * l, N_FF, N_EMBD), part(3 * l + 1, N_FF, N_EMBD), part(3 * l + 2, N_EMBD, N_FF)];
    StoreLayout::new((0..n_layer).map(|l| Some(layer(l))).collect(), N_EXPERT)
}

/// Bytes of `n` slots.
fn bytes(n_layer: usize, n: usize) -> u64 {
    layout(n_layer).bytes_for_all() / (n_layer * N_EXPERT) as u64 * n as u64
}

fn store_with(
    n_layer: usize,
    n_slots: usize,
    lanes: usize,
    policy: policy::MakePolicy,
    source: Arc<Fake>,
) -> ExpertStore {
    let o = StoreOptions { bytes: bytes(n_layer, n_slots), isa: Isa::best(), policy, lanes, lookahead: true };
    ExpertStore::new(layout(n_layer), &o, source).unwrap()
}

fn store(n_layer: usize, n_slots: usize, lanes: usize, source: Arc<Fake>) -> ExpertStore {
    store_with(n_layer, n_slots, lanes, POLICIES[0].1, source)
}

/// Fetches experts and checks that each comes once, with its own weights.
fn fetch(store: &ExpertStore, layer: usize, wanted: &[u32], ahead: Option<(usize, &[u32])>) -> Result<(), FetchError> {
    let wanted: Vec<(u32, u32)> = wanted.iter().map(|&e| (e, 1)).collect();
    let mut fetch = store.fetch(layer, &wanted);
    if let Some((layer, likely)) = ahead {
        store.ahead(layer, likely);
    }
    let mut seen = Vec::new();
    while let Some(ready) = fetch.next(None)? {
        assert!(ready.is_sorted_by_key(|r| r.expert));
        for r in ready {
            for (i, p) in [r.gate, r.up, r.down].into_iter().enumerate() {
                assert_eq!(first_weight(p), weight(3 * layer + i, r.expert));
            }
            seen.push(r.expert);
        }
        store.shared.lock().slots.check();
    }
    seen.sort_unstable();
    let mut want: Vec<u32> = wanted.iter().map(|w| w.0).collect();
    want.sort_unstable();
    assert_eq!(seen, want);
    Ok(())
}

/// All weights of a part are the same, so a product with (1, 0, 0 …) gives that weight.
fn first_weight(p: Packed<'_>) -> f32 {
    use crate::ops::matmul::{Acts, OutRows, Product, matmul_here};
    let mut acts = Acts::new();
    acts.reset(1, p.n_cols(), &[p.format().act]);
    let mut x = vec![0.0; p.n_cols()];
    x[0] = 1.0;
    acts.put(0, &x);
    let mut out = vec![0.0; p.n_rows()];
    matmul_here(&mut Product::new(p, &acts, &[0], OutRows::new(&mut out, p.n_rows())));
    assert!(out.iter().all(|v| v == &out[0]));
    out[0]
}

/// One pass over a layer: what it wants, what it guesses of the other layer, and how many slots there are from then on.
type Step = (usize, Vec<u32>, Vec<u32>, Option<usize>);

fn step() -> impl Strategy<Value = Step> {
    let some = || proptest::collection::btree_set(0u32..N_EXPERT as u32, 1..N_EXPERT);
    let slots = proptest::option::weighted(0.3, 1usize..=2 * N_EXPERT);
    (0usize..2, some(), some(), slots)
        .prop_map(|(layer, want, guess, n)| (layer, want.into_iter().collect(), guess.into_iter().collect(), n))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn any_schedule_gives_every_expert_its_own_weights(
        seed: u64,
        n_slots in 1usize..13,
        lanes in 1usize..5,
        policy in 0..POLICIES.len(),
        steps in proptest::collection::vec(step(), 1..12),
    ) {
        let store = store_with(2, n_slots, lanes, POLICIES[policy].1, Fake::new(seed));
        if seed.is_multiple_of(2) {
            store.warm_up([(1, 3), (0, 2), (1, 0)]);
        }
        for (layer, want, guess, resize) in steps {
            store.begin_pass(1);
            fetch(&store, layer, &want, Some((1 - layer, &guess))).unwrap();
            if let Some(n) = resize {
                store.resize(bytes(2, n));
                prop_assert_eq!(store.n_slots(), (n, 12));
            }
            store.shared.lock().slots.check();
        }
        let s = store.stats();
        prop_assert!(s.hits <= s.uses && s.wasted_bytes <= s.ahead_bytes && s.ahead_hits <= s.hits);
    }

    /// Reads fail anywhere, waited for or ahead: an error or the right weights, never anything else, and all is well when the disk is.
    #[test]
    fn faults_in_any_schedule_are_errors_and_pass(
        seed: u64,
        n_slots in 1usize..13,
        lanes in 1usize..5,
        one_in in 2u64..12,
        steps in proptest::collection::vec(step(), 1..12),
    ) {
        let source = Fake::new(seed);
        source.one_in.store(one_in, Relaxed);
        let store = store(2, n_slots, lanes, source.clone());
        store.warm_up([(1, 3), (0, 2), (1, 0)]);
        for (layer, want, guess, resize) in steps {
            store.begin_pass(1);
            if let Err(e) = fetch(&store, layer, &want, Some((1 - layer, &guess))) {
                let FetchError::Read { layer: of, expert, why } = &e else { return Err(TestCaseError::fail(e.to_string())) };
                prop_assert!(*of == layer && want.contains(expert) && why == "the disk said no", "{}", e);
            }
            if let Some(n) = resize {
                store.resize(bytes(2, n));
            }
            store.shared.lock().slots.check();
        }
        source.one_in.store(0, Relaxed);
        for layer in 0..2 {
            // What was on its way when the disk got well may still be an error, once.
            let all = [0, 1, 2, 3, 4, 5];
            fetch(&store, layer, &all, None).or_else(|_| fetch(&store, layer, &all, None)).unwrap();
        }
    }

    #[test]
    fn slots_never_contradict_themselves(
        n_slots in 1usize..13,
        steps in proptest::collection::vec((0u8..8, 0u32..12, 0usize..13), 1..200),
    ) {
        let mut s = Slots::new(layout(2), &[n_slots], POLICIES[0].1(2, 6));
        let (mut loading, mut pinned) = (Vec::new(), Vec::new());
        for (what, key, n) in steps {
            match what {
                0 | 1 if s.place(key) == Place::Absent => {
                    let taken = if what == 0 { s.take(key) } else { s.take_ahead(key) };
                    if let Some((slot, evicted)) = taken {
                        prop_assert!(evicted.is_none_or(|e| s.place(e.key) == Place::Absent));
                        s.begin(key, slot, what == 1);
                        loading.extend([slot; 3]);
                    }
                }
                2 | 3 if !loading.is_empty() => {
                    let slot = loading.swap_remove(n % loading.len());
                    let more = loading.contains(&slot);
                    prop_assert_eq!(s.end_part(slot, what == 2) == PartEnd::More, more);
                }
                4 => {
                    s.advance(1);
                    s.want(key, n as u32);
                }
                5 => match s.place(key) {
                    Place::Resident(slot) => { s.pin(slot); pinned.push(slot); }
                    _ => s.spare(key),
                },
                6 if !pinned.is_empty() => s.unpin(pinned.swap_remove(n % pinned.len())),
                7 if n.is_multiple_of(2) => s.guard(key),
                7 => while s.shrink(0, n) != Ok(None) && s.shrink(0, n) != Err(()) {},
                _ => s.unguard(),
            }
            s.check();
        }
    }
}

#[test]
fn what_fits_is_read_once() {
    let source = Fake::new(1);
    let store = store(2, 12, 2, source.clone());
    for _ in 0..5 {
        for layer in 0..2 {
            fetch(&store, layer, &[0, 1, 2, 3, 4, 5], None).unwrap();
        }
    }
    // Gate and up, of 32 rows, are read in two pieces, down, of 8 rows, in one.
    assert_eq!(source.n_reads.load(Relaxed), 2 * 6 * 5);
    assert_eq!(store.stats().evictions, 0);
    assert!(!store.wants_ahead(1), "nothing is absent");
}

#[test]
fn a_right_guess_is_a_hit_and_a_wrong_one_is_counted() {
    let store = store(2, 6, 1, Fake::new(3));
    fetch(&store, 0, &[0, 1], Some((1, &[2, 3]))).unwrap();
    let all_in = |s: &State| s.likely.is_empty() && s.ahead.is_empty();
    while !all_in(&store.shared.lock()) {
        std::thread::yield_now();
    }
    fetch(&store, 1, &[2, 4], None).unwrap();
    let s = store.stats();
    assert_eq!((s.uses, s.hits, s.ahead_hits), (4, 1, 1));
    let expert = layout(2).expert_bytes(0);
    assert_eq!((s.demand_bytes, s.ahead_bytes, s.wasted_bytes), (3 * expert, 2 * expert, 0));
    // The wrong one leaves first: nobody has ever used it.
    store.begin_pass(1);
    fetch(&store, 0, &[3, 4, 5], None).unwrap();
    assert_eq!(store.stats().wasted_bytes, expert);
}

#[test]
fn a_failed_read_is_an_error_and_the_next_try_succeeds() {
    for n_failures in 1..9 {
        let source = Fake::new(n_failures);
        let store = store(2, 3, 3, source.clone());
        fetch(&store, 0, &[1, 2], None).unwrap();
        source.failing.store(n_failures, Relaxed);
        let error = fetch(&store, 1, &[0, 3, 5, 4], None).unwrap_err();
        let FetchError::Read { layer, why, .. } = error else { panic!("{error}") };
        assert_eq!((layer, why.as_str()), (1, "the disk said no"));
        source.failing.store(0, Relaxed);
        for layer in [1, 0, 1] {
            fetch(&store, layer, &[0, 1, 2, 3, 4, 5], None).unwrap();
        }
    }
}

/// A disk that doesn't answer for a while: the pass waits, and goes on when it does.
#[test]
fn a_stalled_disk_is_waited_for() {
    let source = Fake::new(4);
    let store = store(2, 6, 2, source.clone());
    fetch(&store, 0, &[0], None).unwrap();
    let before = store.stats().stall_ns;
    let stall = Duration::from_millis(300);
    let gate = source.gate.lock().unwrap();
    std::thread::scope(|s| {
        let pass = s.spawn(|| fetch(&store, 0, &[0, 1, 2], Some((1, &[0, 1]))));
        std::thread::sleep(stall);
        assert!(!pass.is_finished(), "nothing could be read yet");
        drop(gate);
        pass.join().unwrap().unwrap();
    });
    assert!(store.stats().stall_ns - before > stall.as_nanos() as u64 / 2);
}

/// The disk doesn't answer: the pass ends all the same, and what it hadn't begun to read isn't read.
#[test]
fn a_pass_that_is_to_stop_waits_for_no_read_and_leaves_none_behind() {
    let source = Fake::new(4);
    let store = store(2, 6, 1, source.clone());
    let gate = source.gate.lock().unwrap();
    let stop = AtomicBool::new(false);
    let mut pass = store.fetch(0, &[(0, 1), (1, 1), (2, 1), (3, 1)]);
    let error = std::thread::scope(|s| {
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(200));
            stop.store(true, Relaxed);
        });
        pass.next(Some(&stop)).map(drop).unwrap_err()
    });
    assert!(matches!(error, FetchError::Stopped), "{error}");
    assert!(store.stats().stall_ns > 50_000_000, "it waited until then");
    drop(pass);
    store.shared.lock().slots.check();
    drop(gate);
    while store.shared.lock().slots.n_absent() < 12 {
        std::thread::yield_now();
    }
    let part = layout(2).expert_bytes(0) / 3;
    assert_eq!(store.stats().demand_bytes, part, "one part had begun");
    fetch(&store, 0, &[0, 1, 2, 3], None).unwrap();
}

#[test]
fn what_failed_ahead_is_read_when_it_is_wanted() {
    let source = Fake::new(5);
    let store = store(2, 6, 2, source.clone());
    source.failing.store(6, Relaxed);
    store.ahead(1, &[0, 1]);
    while source.failing.load(Relaxed) > 0 || store.shared.lock().slots.n_absent() < 12 {
        std::thread::yield_now();
    }
    fetch(&store, 1, &[0, 1, 2], None).unwrap();
}

/// Read ahead in vain, then again: what the first try met is no error of the second, which a pass waits for.
#[test]
fn what_failed_ahead_and_is_read_ahead_again_is_there() {
    let source = Fake::new(6);
    let store = store(2, 6, 1, source.clone());
    source.failing.store(3, Relaxed);
    store.ahead(1, &[0]);
    while source.failing.load(Relaxed) > 0 || store.shared.lock().slots.n_absent() < 12 {
        std::thread::yield_now();
    }
    let gate = source.gate.lock().unwrap();
    store.ahead(1, &[0]);
    while !store.at_hand(1)[0] {
        std::thread::yield_now();
    }
    std::thread::scope(|s| {
        let pass = s.spawn(|| fetch(&store, 1, &[0], None));
        while store.stats().uses == 0 {
            std::thread::yield_now();
        }
        drop(gate);
        pass.join().unwrap().unwrap();
    });
}

#[test]
fn a_panic_in_a_reading_thread_is_an_error() {
    let source = Fake::new(2);
    let store = store(1, 3, 1, source.clone());
    source.panics.store(true, Relaxed);
    assert!(fetch(&store, 0, &[0], None).unwrap_err().to_string().contains("bug"));
    fetch(&store, 0, &[0, 1], None).unwrap();
}

#[test]
fn warming_up_fills_free_slots_and_evicts_nobody() {
    let store = store(2, 4, 2, Fake::new(9));
    fetch(&store, 0, &[0, 1], None).unwrap();
    store.warm_up([(1, 5), (1, 4), (1, 3), (1, 2)]);
    while store.shared.lock().slots.n_absent() > 8 {
        std::thread::yield_now();
    }
    let resident: Vec<usize> = store.residency().iter().enumerate().filter(|(_, r)| **r).map(|(i, _)| i).collect();
    assert!(resident.contains(&0) && resident.contains(&1), "{resident:?}");
    assert!(store.shared.lock().next_warm().is_none(), "two have no slot");
    assert_eq!(store.stats().evictions, 0);
}

/// Experts of two sizes: when one size has no free slots, the other's are filled; and what found none comes when there is one again.
#[test]
fn warming_up_fills_free_slots_of_every_size() {
    let mut layers = layout(2).layers.into_iter().map(|l| l.map(|l| l.0)).collect::<Vec<_>>();
    layers[1].as_mut().unwrap().iter_mut().for_each(|p| (p.n_rows, p.n_bytes) = (p.n_rows / 2, p.n_bytes / 2));
    let layout = StoreLayout::new(layers, N_EXPERT);
    assert_eq!(layout.classes.len(), 2);
    let half = layout.bytes_for_all() / 2;
    let o = StoreOptions { bytes: half, isa: Isa::best(), policy: POLICIES[0].1, lanes: 1, lookahead: true };
    let all = layout.bytes_for_all();
    let store = ExpertStore::new(layout, &o, Fake::new(9)).unwrap();
    let first = (0..6).map(|e| (0, e));
    store.warm_up(first.chain((0..6).map(|e| (1, e))));
    let wait_for = |n_absent| {
        let began = Instant::now();
        while store.shared.lock().slots.n_absent() > n_absent {
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", store.residency());
            std::thread::yield_now();
        }
    };
    wait_for(6);
    assert_eq!(
        (store.at_hand(0), store.at_hand(1)),
        ([true, true, true, false, false, false].into(), [true, true, true, false, false, false].into())
    );
    store.resize(all);
    wait_for(0);
}
