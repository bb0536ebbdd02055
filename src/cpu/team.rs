//! A team of threads for hundreds of tiny parallel regions a token.
//!
//! rayon's work stealing costs tens of microseconds for each region and its sleeping workers are woken one by
//! one; decoding has regions of that size. Here a region is an epoch: opened by one store, its items handed
//! out by fetch-add, closed by the caller when they run out. The caller waits only for workers that came in,
//! so a worker that the system has put to sleep never holds a region up. Workers spin for a bounded time
//! after a region (the next one is usually microseconds away), then sleep.
//!
//! Which thread computes an item has no influence on its result: items write to disjoint places.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker looks for the next region before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

/// The gate's bits: 32 of epoch, one that says "open", 31 of workers inside.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const EPOCH: u64 = 1 << 32;

type Task = *const (dyn Fn(usize) + Sync);

struct Shared {
    gate: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<(Task, usize)>,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    stop: AtomicBool,
}

// SAFETY: `job` is written only while the gate is closed and nobody is inside, and read only by threads inside.
unsafe impl Sync for Shared {}
// SAFETY: the raw task pointer is only dereferenced between a region's opening and its end, while the caller's borrow lives.
unsafe impl Send for Shared {}

struct Worker {
    thread: Thread,
    asleep: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

/// Persistent threads that share the items of a region with the thread that calls [`Team::run`].
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// Regions don't nest and a team serves one caller at a time.
    turn: Mutex<()>,
}

impl Team {
    /// A team of `n_threads` in all, the caller of [`Team::run`] being one of them.
    ///
    /// # Errors
    /// If the system refuses to start a thread.
    pub fn new(n_threads: usize) -> std::io::Result<Self> {
        fn nothing(_: usize) {}
        const NOTHING: &(dyn Fn(usize) + Sync) = &nothing;
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new((NOTHING as Task, 0)),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let mut team = Team { shared, workers: Vec::new(), turn: Mutex::new(()) };
        for i in 1..n_threads.max(1) {
            let (shared, asleep) = (team.shared.clone(), Arc::new(AtomicBool::new(false)));
            let flag = asleep.clone();
            let handle =
                std::thread::Builder::new().name(format!("oncall-compute-{i}")).spawn(move || work(&shared, &flag))?;
            team.workers.push(Worker { thread: handle.thread().clone(), asleep, handle: Some(handle) });
        }
        Ok(team)
    }

    /// Threads in the team, the caller included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(i)` once for every `i` below `n_items`, on all threads, and returns when all calls have.
    /// A panic in `f` is carried to the caller after the region's end.
    pub fn run(&self, n_items: usize, f: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || n_items <= 1 {
            return (0..n_items).for_each(f);
        }
        let turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        let s = &*self.shared;
        // SAFETY: the gate is closed and nobody is inside: this thread alone sees `job`. The lifetime is erased,
        // and restored by leaving this function only when nobody is inside any more.
        unsafe {
            *s.job.get() = (std::mem::transmute::<&(dyn Fn(usize) + Sync), Task>(f), n_items);
        }
        s.next.store(0, Relaxed);
        let epoch = (s.gate.load(Relaxed) & !(OPEN | INSIDE)).wrapping_add(EPOCH);
        s.gate.store(epoch | OPEN, SeqCst);
        for w in &self.workers {
            if w.asleep.load(SeqCst) && w.asleep.swap(false, SeqCst) {
                w.thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| share(&s.next, n_items, f)));
        s.gate.fetch_and(!OPEN, SeqCst);
        let mut spins = 0u32;
        while s.gate.load(Acquire) & INSIDE != 0 {
            spins += 1;
            if spins.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let theirs = s.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        drop(turn);
        if let Some(p) = own.err().or(theirs) {
            resume_unwind(p);
        }
    }

    /// Calls `f` with each row of `out`, which are `width` long.
    pub fn each_row<T: Send>(&self, out: &mut [T], width: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) {
        let rows = Rows::new(out, width);
        // SAFETY: each item takes another row.
        self.run(rows.len, &|i| f(i, unsafe { rows.take(i) }));
    }

    /// Calls `f` with each row of `a` and the same row of `b`; each comes with the width of its rows.
    ///
    /// # Panics
    /// If they haven't as many rows.
    pub fn each_row_of_two<A: Send, B: Send>(
        &self,
        a: (&mut [A], usize),
        b: (&mut [B], usize),
        f: &(dyn Fn(usize, &mut [A], &mut [B]) + Sync),
    ) {
        let (a, b) = (Rows::new(a.0, a.1), Rows::new(b.0, b.1));
        assert_eq!(a.len, b.len, "as many rows");
        // SAFETY: each item takes another row of each.
        self.run(a.len, &|i| unsafe { f(i, a.take(i), b.take(i)) });
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for w in &mut self.workers {
            w.thread.unpark();
            if let Some(h) = w.handle.take() {
                let _ = h.join();
            }
        }
    }
}

/// Rows of a slice that threads take apart.
struct Rows<T> {
    ptr: *mut T,
    width: usize,
    len: usize,
}

// SAFETY: `take`'s callers hand each row to one thread.
unsafe impl<T: Send> Sync for Rows<T> {}

impl<T> Rows<T> {
    fn new(x: &mut [T], width: usize) -> Self {
        assert!(x.is_empty() || (width > 0 && x.len().is_multiple_of(width)), "whole rows");
        Rows { ptr: x.as_mut_ptr(), width, len: x.len() / width.max(1) }
    }

    /// # Safety
    /// No row is taken twice while the first taking lives, and the slice outlives both.
    #[allow(clippy::mut_from_ref)]
    unsafe fn take(&self, i: usize) -> &mut [T] {
        assert!(i < self.len);
        // SAFETY: in bounds (asserted); the caller promises that nobody else has this row.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.width), self.width) }
    }
}

/// Takes items until there are none.
fn share(next: &AtomicUsize, n_items: usize, f: &(dyn Fn(usize) + Sync)) {
    loop {
        let i = next.fetch_add(1, Relaxed);
        if i >= n_items {
            return;
        }
        f(i);
    }
}

/// A worker's life: wait for a region, come in, share its items, leave.
fn work(s: &Shared, asleep: &AtomicBool) {
    let mut seen = 0;
    loop {
        let Some(epoch) = wait(s, asleep, seen) else { return };
        seen = epoch;
        // SAFETY: this thread is counted inside, so the caller keeps the job alive and unchanged.
        let (task, n_items) = unsafe { *s.job.get() };
        // SAFETY: as above.
        let f = unsafe { &*task };
        if let Err(p) = catch_unwind(AssertUnwindSafe(|| share(&s.next, n_items, f))) {
            s.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(p);
        }
        s.gate.fetch_sub(1, Release);
    }
}

/// Waits for an open region newer than `seen` and goes in; its epoch, or `None` when the team ends.
fn wait(s: &Shared, asleep: &AtomicBool, seen: u64) -> Option<u64> {
    let (mut since, mut spins) = (Instant::now(), 0u32);
    loop {
        if s.stop.load(Relaxed) {
            return None;
        }
        let gate = s.gate.load(SeqCst);
        let epoch = gate / EPOCH;
        if gate & OPEN != 0 && epoch != seen {
            if s.gate.compare_exchange(gate, gate + 1, SeqCst, Relaxed).is_ok() {
                return Some(epoch);
            }
            continue;
        }
        spins += 1;
        std::hint::spin_loop();
        if spins % 64 == 0 && since.elapsed() > SPIN {
            asleep.store(true, SeqCst);
            let gate = s.gate.load(SeqCst);
            if (gate & OPEN == 0 || gate / EPOCH == seen) && !s.stop.load(SeqCst) {
                std::thread::park();
            }
            asleep.store(false, SeqCst);
            since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_once_for_any_team() {
        for n_threads in 1..=4 {
            let team = Team::new(n_threads).unwrap();
            for n in [0, 1, 2, 3, 17, 1000] {
                let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                for round in 1..=50 {
                    team.run(n, &|i| {
                        hits[i].fetch_add(1, Relaxed);
                    });
                    assert!(hits.iter().all(|h| h.load(Relaxed) == round));
                }
            }
        }
    }

    #[test]
    fn wakes_sleeping_workers() {
        let team = Team::new(3).unwrap();
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(1));
            let sum = AtomicUsize::new(0);
            team.run(100, &|i| {
                sum.fetch_add(i, Relaxed);
            });
            assert_eq!(sum.load(Relaxed), 4950);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_survives() {
        let team = Team::new(3).unwrap();
        let caught = catch_unwind(AssertUnwindSafe(|| team.run(64, &|i| assert!(i != 40, "item 40"))));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        team.run(10, &|i| {
            sum.fetch_add(i, Relaxed);
        });
        assert_eq!(sum.load(Relaxed), 45);
    }

    #[test]
    fn rows_are_handed_out_whole_and_once() {
        let team = Team::new(3).unwrap();
        let mut x = vec![0u32; 7 * 5];
        team.each_row(&mut x, 5, &|i, row| row.iter_mut().for_each(|v| *v += i as u32 + 1));
        assert!(x.chunks(5).enumerate().all(|(i, r)| r.iter().all(|&v| v == i as u32 + 1)));
        let mut y = vec![0u32; 7 * 2];
        team.each_row_of_two((&mut x, 5), (&mut y, 2), &|i, a, b| {
            a[0] += 100;
            b[1] = i as u32 + 1;
        });
        assert!(x.chunks(5).enumerate().all(|(i, r)| r[0] == i as u32 + 101 && r[1] == i as u32 + 1));
        assert!(y.chunks(2).enumerate().all(|(i, r)| r == [0, i as u32 + 1]));
    }
}
