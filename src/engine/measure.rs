//! What the planner measures: how fast a token's matrices are computed, alone and beside the lanes that read experts. And what an
//! engine is held against: how fast memory and the model's disk are read here.

use super::outline::{self, Active, Outline};
use super::{Engine, EngineError, Phase, READ_LANES};
use crate::arch::Buffers;
use crate::cpu::probe::{self, DiskProbe, Mode, Rate, UNCACHED};
use crate::cpu::{Isa, Pages, Team, memory};
use crate::moe::planner::Reading;
use crate::ops::matmul::{Acts, MAX_LANES, OutRows, Packed, Product, matmul, pack};
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long a format is measured, and a round of reading.
const TIME: Duration = Duration::from_millis(120);
const DISK_TIME: Duration = Duration::from_millis(200);

impl Outline {
    /// Seconds that a token's matrices take here with everything at hand, measured on made-up matrices of the same formats:
    /// as large as the model's, or large enough that no cache holds them. Threads wait for each other as often as in the model.
    /// `None` if there's too little memory to measure.
    ///
    /// # Errors
    /// When the system refuses threads or memory.
    pub fn measure_compute(&self) -> Result<Option<f64>, EngineError> {
        let Some(room) = Room::here() else { return Ok(None) };
        let team = Team::new(self.n_threads).map_err(system)?;
        let mut seconds = 0.0;
        for a in &self.active {
            let made = Made::new(a, Isa::get()?, self.step_bytes(), room.matrix);
            seconds += a.bytes as f64 / made.map_err(system)?.rate(&team);
        }
        Ok(Some(seconds))
    }

    /// Bytes of weights between two moments at which threads wait for each other, in the mean.
    fn step_bytes(&self) -> usize {
        let bytes: u64 = self.active.iter().map(|a| a.bytes).sum();
        bytes as usize / (STEPS_A_LAYER * self.config.n_layer).max(1)
    }

    /// How fast experts are read and packed, alone and beside computing, and what it costs a token that computes for so many seconds alone:
    /// as many lanes as the store has read pieces of experts' size at random places, at first while nothing computes, then while all threads do.
    /// `None` if there's too little memory to measure.
    ///
    /// # Errors
    /// When the system refuses threads or memory, and a read's.
    pub fn measure_reading(&self, disk: &DiskProbe, compute_s: f64) -> Result<Option<Reading>, EngineError> {
        let most = self.active.iter().max_by_key(|a| a.bytes);
        let (Some(a), isa) = (most, Isa::get()?) else {
            let rate = f64::INFINITY;
            return Ok(Some(Reading {
                beside_s: compute_s,
                disk_rate: rate,
                first_rate: rate,
                disk_rate_beside: rate,
            }));
        };
        let (n_rows, row_bytes) = self.part.as_ref().map_or((1, 4096), |p| (p.piece_rows(), p.row_bytes()));
        // A header may claim rows of any length.
        let Some(room) = Room::here().filter(|r| n_rows * row_bytes <= r.slots) else { return Ok(None) };
        let team = Team::new(self.n_threads).map_err(system)?;
        let mut made = Made::new(a, isa, self.step_bytes(), room.matrix).map_err(system)?;
        let slots = (0..READ_LANES).map(|_| Slots::new(room.slots).map(Mutex::new));
        let slots: Vec<Mutex<Slots>> = slots.collect::<io::Result<_>>().map_err(system)?;
        let into_slot = |lane: usize, bytes: &[u8]| {
            let Some(p) = &self.part else { return };
            let mut slots = slots[lane].lock().unwrap_or_else(|e| e.into_inner());
            pack(p.format, isa, n_rows, p.n_cols, &bytes[..n_rows * row_bytes], slots.next(n_rows * row_bytes));
        };
        let read = || {
            let rate = disk.rate(n_rows * row_bytes, READ_LANES, DISK_TIME, &into_slot);
            rate.map_err(|source| EngineError::System { what: "reads of the model's file", source })
        };
        let Rate { first, again: disk_rate } = read()?;
        let alone = made.rate(&team);
        let (disk_rate_beside, beside) = std::thread::scope(|s| {
            let reading = s.spawn(read);
            let (began, mut n_bytes) = (Instant::now(), 0);
            while !reading.is_finished() {
                made.once(&team);
                n_bytes += made.pages.len();
            }
            let beside = n_bytes as f64 / began.elapsed().as_secs_f64();
            (reading.join().unwrap_or_else(|p| std::panic::resume_unwind(p)), beside)
        });
        let disk_rate_beside = disk_rate_beside?.again.min(disk_rate);
        Ok(Some(Reading {
            beside_s: compute_s * (alone / beside).max(1.0),
            disk_rate,
            first_rate: first.min(disk_rate),
            disk_rate_beside,
        }))
    }
}

/// How long memory is measured, and each of two rounds of reading.
const LIMIT_TIME: Duration = Duration::from_millis(100);
/// What a measurement takes besides its buffers: its threads' stacks, small things.
const ASIDE: u64 = 4 << 20;

impl Engine {
    /// Bytes of weights that a phase's passes read from memory: of each pass every matrix once, of experts those that were used. What a pass
    /// of one token reads is [`Engine::active_bytes`].
    pub fn weights_read(&self, phase: &Phase) -> f64 {
        let n = outline::n_experts(self.config()).0;
        let dense: u64 = outline::active(self.gguf(), n, 0).iter().map(|a| a.bytes).sum();
        phase.passes as f64 * dense as f64 + phase.store.uses as f64 * outline::expert_bytes(self.gguf(), n)
    }

    /// Bytes a second at which the engine's threads read memory that no cache holds, measured for a tenth of a second within what the budget
    /// leaves. Where that's too little, experts leave their slots for it, if they `may_evict`; otherwise it isn't measured.
    ///
    /// # Errors
    /// Why it isn't measured.
    pub fn measure_memory(&self, may_evict: bool) -> Result<f64, String> {
        let rate = self.with_room(UNCACHED.0, may_evict, |most| {
            probe::memory_rate_within(most, self.n_threads(), LIMIT_TIME).map_err(|e| e.to_string())
        })?;
        rate?.ok_or_else(|| TOO_LITTLE.into())
    }

    /// Bytes a second of random direct reads on the model's disk, as large and as many at a time as the engine reads experts, without what
    /// becomes of them. In two rounds of a tenth of a second, within the budget as [`Engine::measure_memory`].
    ///
    /// # Errors
    /// Why it isn't measured.
    pub fn measure_disk(&self, may_evict: bool) -> Result<Rate, String> {
        let n = outline::n_experts(self.config()).0;
        let part = outline::largest_part(self.gguf(), n).ok_or("the model has no experts to read")?;
        let file = outline::experts_file(self.gguf()).filter(|f| f.in_memory().is_none());
        let path = file.ok_or("the model is in the program, not on a disk")?.path();
        // Buffered reads would be the page cache's, or cost the model its place there.
        let probe = DiskProbe::open(path, Mode::Direct).map_err(|e| format!("no direct reads: {e}"))?;
        let n_bytes = part.piece_rows() * part.row_bytes();
        let least = DiskProbe::room_for(n_bytes, READ_LANES) as u64;
        self.with_room(least, may_evict, |_| {
            probe.rate(n_bytes, READ_LANES, LIMIT_TIME, &|_, _| ()).map_err(|e| e.to_string())
        })?
    }

    /// Does something that takes up to so many bytes as it is told, at least `least`, while no pass runs.
    fn with_room<T>(&self, least: u64, may_evict: bool, f: impl FnOnce(u64) -> T) -> Result<T, String> {
        let e = &*self.0;
        let mut buffers = e.buffers.lock().unwrap_or_else(|e| e.into_inner());
        let mut spare = self.spare();
        let evicts = spare < least && may_evict;
        if evicts {
            *buffers = Buffers::default();
            e.room.lock().unwrap_or_else(|e| e.into_inner()).buffers_dropped();
            e.store.as_ref().inspect(|s| s.resize(0));
            spare = self.spare();
        }
        let done = (spare >= least).then(|| f(spare));
        if let Some(store) = e.store.as_ref().filter(|_| evicts) {
            let room = e.room.lock().unwrap_or_else(|e| e.into_inner());
            store.resize(e.options.expert_bytes.unwrap_or_else(|| room.slots(&self.budget())));
        }
        done.ok_or_else(|| TOO_LITTLE.into())
    }

    /// What the budget leaves, now and when all slots are filled, which happens in the background.
    fn spare(&self) -> u64 {
        let Some(bytes) = self.budget().bytes else { return u64::MAX };
        let e = &*self.0;
        let empty = e.store.as_ref().map_or(0, |store| {
            let filled = store.residency().into_iter().filter(|&r| r).count();
            let (n, all) = store.n_slots();
            let room = e.room.lock().unwrap_or_else(|e| e.into_inner());
            room.needs().all_slots / all.max(1) as u64 * n.saturating_sub(filled) as u64
        });
        let held = memory::resident().unwrap_or(bytes);
        bytes.saturating_sub(held).saturating_sub(empty).saturating_sub(ASIDE)
    }
}

const TOO_LITTLE: &str = "the budget leaves too little memory to measure";

fn system(source: io::Error) -> EngineError {
    EngineError::System { what: "threads, or memory for a measurement", source }
}

/// Bytes of a made-up matrix, and of each lane's slots beside it.
///
/// The most is several times what last-level caches hold: with 96, 192 and 384 MiB of matrix, and a cache of 32, a token of the OLMoE
/// shape took 17.1, 19.4 and 20.6 ms.
struct Room {
    matrix: u64,
    slots: usize,
}

impl Room {
    /// A lane's slots are a sixth of the matrix; `None` if that can't be spared.
    fn here() -> Option<Self> {
        let all = |matrix: u64| matrix + READ_LANES as u64 * matrix / 6;
        let n = memory::for_measuring(all(UNCACHED.0), all(UNCACHED.1))?;
        let slots = n / (6 + READ_LANES as u64);
        Some(Room { matrix: 6 * slots, slots: slots as usize })
    }
}

/// Memory that no cache holds, as slots are.
struct Slots {
    pages: Pages,
    at: usize,
}

impl Slots {
    fn new(n_bytes: usize) -> io::Result<Self> {
        let mut pages = Pages::new(n_bytes)?;
        pages.chunks_mut(4096).for_each(|p| p[0] = 1);
        Ok(Slots { pages, at: 0 })
    }

    /// The next `n_bytes` of it; from the beginning once it's used up.
    fn next(&mut self, n_bytes: usize) -> &mut [u8] {
        if self.at + n_bytes > self.pages.len() {
            self.at = 0;
        }
        let at = self.at;
        self.at += n_bytes.next_multiple_of(64);
        &mut self.pages[at..][..n_bytes]
    }
}

/// Whole blocks of every format, whatever a header claims.
const MAX_COLUMNS: usize = 16384;
/// Moments in a layer at which threads wait for each other: after the projections, attention, its output, the router, gate and up,
/// and down.
const STEPS_A_LAYER: usize = 6;

/// A matrix of zeros, and one token to multiply it with. Zeros are as much work as anything: no kernel looks for them, and no denormal
/// slows it. Packed they are the same zeros.
struct Made {
    of: Active,
    isa: Isa,
    n_rows: usize,
    n_cols: usize,
    /// Rows, in groups, that the team does before it waits for all.
    step_groups: usize,
    pages: Pages,
    acts: Acts,
    out: Vec<f32>,
}

impl Made {
    /// As large as all the model's matrices of the format, `most` bytes at most.
    fn new(a: &Active, isa: Isa, step_bytes: usize, most: u64) -> io::Result<Self> {
        let n_cols = a.n_cols.clamp(a.format.block_len, MAX_COLUMNS);
        let row_bytes = n_cols / a.format.block_len * a.format.block_bytes;
        let n_rows = (a.all.min(most) as usize / row_bytes).next_multiple_of(MAX_LANES).max(MAX_LANES);
        let mut pages = Pages::new(n_rows * row_bytes)?;
        pages.chunks_mut(4096).for_each(|p| p[0] = 0);
        let mut acts = Acts::default();
        acts.reset(1, n_cols, &[a.format.act]);
        acts.put(0, &vec![1.0; n_cols]);
        let n_groups = Packed::new(a.format, isa, n_rows, n_cols, &pages).n_groups();
        let step_groups = (step_bytes.min(pages.len()) * n_groups).div_ceil(pages.len()).clamp(1, n_groups);
        Ok(Made { of: *a, isa, n_rows, n_cols, step_groups, pages, acts, out: vec![0.0; n_rows] })
    }

    /// The token goes through the matrix.
    fn once(&mut self, team: &Team) {
        let w = Packed::new(self.of.format, self.isa, self.n_rows, self.n_cols, &self.pages);
        let mut product = Product::new(w, &self.acts, &[0], OutRows::new(&mut self.out, self.n_rows));
        for first in (0..w.n_groups()).step_by(self.step_groups) {
            product.groups = first..(first + self.step_groups).min(w.n_groups());
            matmul(team, std::slice::from_mut(&mut product));
        }
    }

    /// Bytes a second, alone: the middle one of several times.
    fn rate(&mut self, team: &Team) -> f64 {
        self.once(team);
        let (began, mut seconds) = (Instant::now(), Vec::new());
        while seconds.len() < 3 || began.elapsed() < TIME {
            let t = Instant::now();
            self.once(team);
            seconds.push(t.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        self.pages.len() as f64 / seconds[seconds.len() / 2].max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{EngineOptions, Memory};

    #[test]
    fn slots_come_one_after_the_other_and_hold_pieces_of_any_size() {
        let mut slots = Slots::new(8192).unwrap();
        let at = |slots: &mut Slots, n: usize| slots.next(n).as_ptr() as usize - slots.pages.as_ptr() as usize;
        assert_eq!([at(&mut slots, 100), at(&mut slots, 100), at(&mut slots, 8192)], [0, 128, 0]);
        assert_eq!([slots.next(8192).len(), slots.next(8192).len()], [8192; 2]);
    }

    /// A pass of one token reads what is said to be active.
    #[test]
    fn what_a_token_reads_is_what_is_active() {
        let o = EngineOptions { n_ctx: Some(64), n_threads: Some(1), ..Default::default() };
        let engine = Engine::embedded(&o).unwrap();
        engine.session().feed(&[5], &mut |_| true).unwrap();
        engine.session().feed(&[7], &mut |_| true).unwrap();
        let read = engine.weights_read(&engine.account().prefill);
        assert!((read / (2 * engine.active_bytes()) as f64 - 1.0).abs() < 1e-6, "{read}");
    }

    /// Measuring takes no more than the budget leaves, and slots come back.
    #[test]
    fn limits_are_measured_within_the_budget() {
        let o = EngineOptions { n_ctx: Some(64), n_threads: Some(1), ..Default::default() };
        let engine = Engine::embedded(&o).unwrap();
        let rate = engine.measure_memory(false).unwrap();
        assert!((1e8..1e13).contains(&rate), "{rate}");
        assert!(engine.measure_disk(true).unwrap_err().contains("in the program"));
        let mut session = engine.session();
        session.feed(&[5, 6, 7], &mut |_| true).unwrap();
        let (slots, logits) = (engine.n_slots(), session.logits().to_vec());
        engine.set_memory_budget(Memory::Bytes(engine.budget().least)).unwrap();
        // This test's process may hold less than is set aside for it, but not 64 MiB less besides.
        let little = engine.n_slots();
        assert!(engine.spare() < UNCACHED.0 && little < slots);
        assert_eq!(engine.measure_memory(true).unwrap_err(), TOO_LITTLE);
        assert_eq!(engine.n_slots(), little);
        engine.set_memory_budget(Memory::Auto).unwrap();
        session.truncate(0);
        session.feed(&[5, 6, 7], &mut |_| true).unwrap();
        assert!(session.logits() == logits);
    }

    /// A header may claim any number of bytes between two waits.
    #[test]
    fn a_made_up_matrix_has_at_least_one_step() {
        let format = crate::quant::FORMATS.iter().find(|f| f.name == "q8_0").unwrap();
        let of = Active { format, bytes: 1 << 20, all: 1 << 20, n_cols: 64 };
        let made = |step_bytes| Made::new(&of, Isa::Scalar, step_bytes, 1 << 20).unwrap();
        assert_eq!(made(0).step_groups, 1);
        let all = made(usize::MAX);
        let w = Packed::new(format, Isa::Scalar, all.n_rows, all.n_cols, &all.pages);
        assert_eq!(all.step_groups, w.n_groups());
    }
}
