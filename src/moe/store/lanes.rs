//! The threads that read parts of experts into slots: what a pass waits for first, then what it will probably want, then
//! what fills free slots. Each lane reads into a buffer of its own and packs from there into the slot, while other lanes keep the
//! disk busy.

use super::layout::{N_PARTS, room_for};
use super::slots::{PartEnd, Place};
use super::{Shared, State};
use crate::cpu::Pages;
use crate::cpu::sync::thread;
use crate::ops::matmul::pack;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// One part of an expert, to be read into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PartJob {
    pub key: u32,
    pub slot: u32,
    pub part: usize,
}

/// The parts of an expert that was given a slot, in the order in which they're needed.
pub(super) fn parts_of(key: u32, slot: u32) -> impl Iterator<Item = PartJob> {
    (0..N_PARTS).map(move |part| PartJob { key, slot, part })
}

/// The reading threads.
pub(super) struct Lanes {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Lanes {
    pub fn new(shared: &Arc<Shared>, n: usize) -> std::io::Result<Self> {
        let mut lanes = Lanes { shared: shared.clone(), threads: Vec::new() };
        for i in 0..n.max(1) {
            let (shared, buffer) = (shared.clone(), Buffer::new(shared.layout.room_for_piece())?);
            let thread = thread::Builder::new().name(format!("oncall-read-{i}"));
            lanes.threads.push(thread.spawn(move || serve(&shared, buffer))?);
        }
        Ok(lanes)
    }
}

impl Drop for Lanes {
    /// Reads that have begun are finished; those that haven't are dropped.
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
    }
}

/// A lane's buffer, in a huge page where there are any: disks read faster into few long pieces of memory than into many pages
/// (`cpu::probe`), and what was read is still in the cache when it's packed.
struct Buffer {
    pages: Pages,
    at: usize,
    len: usize,
}

impl Buffer {
    /// Bytes of a huge page.
    const HUGE: usize = 2 << 20;

    fn new(len: usize) -> std::io::Result<Self> {
        let pages = Pages::new(len.next_multiple_of(Self::HUGE) + Self::HUGE)?;
        let at = pages.as_ptr().align_offset(Self::HUGE);
        assert!(at <= Self::HUGE);
        Ok(Buffer { pages, at, len })
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.pages[self.at..][..self.len]
    }
}

fn serve(shared: &Shared, mut buffer: Buffer) {
    let mut s = shared.lock();
    while !s.stop {
        let Some(job) = s.next_job(shared) else {
            s = shared.work.wait(s).unwrap_or_else(|e| e.into_inner());
            continue;
        };
        s.count_busy();
        s.reading.0 += 1;
        drop(s);
        let result = catch_unwind(AssertUnwindSafe(|| shared.load(job, buffer.bytes())))
            .unwrap_or_else(|_| Err("reading it panicked, which is a bug in oncall".into()));
        s = shared.lock();
        s.count_busy();
        s.reading.0 -= 1;
        shared.ended(&mut s, job, result);
    }
}

impl State {
    fn next_job(&mut self, shared: &Shared) -> Option<PartJob> {
        if let Some(job) = self.demand.pop_front() {
            self.stats.demand_bytes += shared.layout.part_bytes(job.key, job.part);
            return Some(job);
        }
        if self.ahead.is_empty() {
            self.order_ahead(shared)?;
        }
        let job = self.ahead.pop_front()?;
        self.stats.ahead_bytes += shared.layout.part_bytes(job.key, job.part);
        Some(job)
    }

    /// Has one more expert read ahead, if there's one to read and a slot for it.
    fn order_ahead(&mut self, shared: &Shared) -> Option<()> {
        // A slot that comes free belongs to who is waited for: read ahead into it, an expert would have to leave again at once.
        while self.unplaced == 0
            && let Some(&key) = self.likely.front()
        {
            let slot = if self.slots.place(key) == Place::Absent { Some(self.slots.take_ahead(key)?) } else { None };
            self.likely.pop_front();
            if let Some((slot, evicted)) = slot {
                self.count_evicted(&shared.layout, evicted);
                self.begin_ahead(shared, key, slot);
                return Some(());
            }
        }
        let key = self.next_warm()?;
        let slot = self.slots.take_free(key)?;
        // Once: what can't be read isn't tried for ever.
        self.warm[shared.layout.class_of_key(key)].pop_front();
        self.begin_ahead(shared, key, slot);
        Some(())
    }

    /// The hottest absent expert for which a slot is free. Those for which there is none wait until there is.
    pub(super) fn next_warm(&mut self) -> Option<u32> {
        let slots = &self.slots;
        for of_class in &mut self.warm {
            while of_class.front().is_some_and(|w| slots.place(w.1) != Place::Absent) {
                of_class.pop_front();
            }
        }
        let free = self.warm.iter().enumerate().filter(|(class, _)| slots.has_free(*class));
        free.filter_map(|(_, of_class)| of_class.front()).min().map(|w| w.1)
    }

    fn begin_ahead(&mut self, shared: &Shared, key: u32, slot: u32) {
        // What failed before is tried again.
        self.failed.remove(&key);
        self.slots.begin(key, slot, true);
        self.ahead.extend(parts_of(key, slot));
        shared.work.notify_all();
    }
}

impl Shared {
    /// Reads one part of an expert and packs it into its slot.
    fn load(&self, job: PartJob, buffer: &mut [u8]) -> Result<(), String> {
        let (layer, expert) = self.layout.layer_and_expert(job.key);
        let Some((parts, _)) = &self.layout.layers[layer] else { return Err(format!("layer {layer} has no experts")) };
        let p = &parts[job.part];
        let range = self.layout.part_of_slot(job.slot, job.part);
        assert!(range.len() >= p.n_bytes && range.end <= self.arena.len());
        // SAFETY: in bounds (asserted); the slot is loading, so nobody reads it, and this part of it has one job.
        let data = unsafe { std::slice::from_raw_parts_mut(self.arena.as_ptr().add(range.start), p.n_bytes) };
        let row_bytes = p.row_bytes();
        let pieces = data.chunks_mut((p.piece_rows() * row_bytes).max(1));
        let mut offset = p.offset + u64::from(expert) * p.stride;
        for (i, piece) in pieces.enumerate() {
            // A large part of a slow disk takes seconds.
            if i > 0 && self.lock().stop {
                return Err("the model is being closed".into());
            }
            let buffer = &mut buffer[..room_for(piece.len())];
            let at = self.source.read(p.tensor, offset, piece.len(), buffer)?;
            pack(p.format, self.isa, piece.len() / row_bytes, p.n_cols, &buffer[at..at + piece.len()], piece);
            offset += piece.len() as u64;
        }
        Ok(())
    }

    fn ended(&self, s: &mut State, job: PartJob, result: Result<(), String>) {
        let ok = result.is_ok();
        if let Err(why) = result {
            tracing::debug!(key = job.key, part = job.part, %why, "reading an expert failed");
            s.failed.insert(job.key, why);
        }
        if s.slots.end_part(job.slot, ok) != PartEnd::More {
            self.arrived.notify_all();
            // A slot may have become free to read ahead into.
            if !s.likely.is_empty() || s.next_warm().is_some() {
                self.work.notify_one();
            }
        }
    }
}
