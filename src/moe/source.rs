//! Where experts' bytes come from, and whether reads go past the page cache.

use super::store::room_for;
use crate::gguf::{DirectFile, Gguf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Where experts' bytes come from: a model file, or a test that injects faults.
pub trait Source: Send + Sync {
    /// Reads `n_bytes` from `offset` of the `tensor`-th tensor into `buf`, which begins at a page and has [`room_for`] them;
    /// they begin where the result says. The error says which tensor and offset, and why.
    fn read(&self, tensor: usize, offset: u64, n_bytes: usize, buf: &mut [u8]) -> Result<usize, String>;
}

/// How a model's file is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoMode {
    /// As is faster here, found out while reading.
    #[default]
    Auto,
    /// Past the page cache; through it where the file system can't do that.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// A model's files, read directly or through the page cache.
pub struct DiskSource {
    gguf: Arc<Gguf>,
    /// By file; `None` where direct reads aren't to be had.
    direct: Vec<Option<DirectFile>>,
    mode: IoMode,
    rates: Rates,
}

impl DiskSource {
    /// Opens the files of a model once more.
    pub fn new(gguf: Arc<Gguf>, mode: IoMode) -> Self {
        let open = |i| if mode == IoMode::Buffered { None } else { gguf.open_direct(i) };
        let direct = (0..gguf.files().len()).map(open).collect();
        DiskSource { gguf, direct, mode, rates: Rates::default() }
    }
}

impl Source for DiskSource {
    fn read(&self, tensor: usize, offset: u64, n_bytes: usize, buf: &mut [u8]) -> Result<usize, String> {
        let t = &self.gguf.tensors()[tensor];
        let direct =
            self.direct[t.file].as_ref().filter(|_| self.mode == IoMode::Direct || self.rates.next_is_direct());
        let began = Instant::now();
        let at = match direct {
            Some(file) => {
                assert!(buf.len() >= room_for(n_bytes));
                self.gguf.read_direct(file, t, offset, n_bytes, buf)
            }
            None => self.gguf.read_at(t, offset, &mut buf[..n_bytes]).map(|()| 0),
        };
        // How fast a disk fails says nothing.
        if at.is_ok() {
            self.rates.took(direct.is_some(), n_bytes, began.elapsed());
        }
        at.map_err(|e| e.to_string())
    }
}

/// One read in so many is made the other way, to see whether that has become faster.
const EXPLORE: u64 = 64;
/// Reads at the start that alternate.
const PROBE: u64 = 16;

/// What direct and buffered reads have reached lately. A file in the page cache is read several times faster through it; one
/// that isn't only fills it with what's wanted once, so buffered reads must win clearly.
#[derive(Default)]
struct Rates {
    n: AtomicU64,
    /// Nanoseconds for a MiB, averaged over about eight reads: buffered and direct. 0 before the first.
    ns: [AtomicU64; 2],
}

impl Rates {
    fn next_is_direct(&self) -> bool {
        let n = self.n.fetch_add(1, Relaxed);
        if n < PROBE {
            return n.is_multiple_of(2);
        }
        self.prefers_direct() != n.is_multiple_of(EXPLORE)
    }

    fn prefers_direct(&self) -> bool {
        let [buffered, direct] = [0, 1].map(|i| self.ns[i].load(Relaxed));
        direct == 0 || buffered == 0 || direct * 3 < buffered * 4
    }

    fn took(&self, direct: bool, n_bytes: usize, took: Duration) {
        let now = took.as_nanos() as u64 * (1 << 20) / n_bytes.max(1) as u64;
        let average = &self.ns[usize::from(direct)];
        let before = average.load(Relaxed);
        average.store(if before == 0 { now.max(1) } else { (before * 7 + now) / 8 }, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes `n` reads that take so long a MiB, and counts the direct ones.
    fn run(rates: &Rates, n: usize, direct_us: u64, buffered_us: u64) -> usize {
        (0..n)
            .filter(|_| {
                let direct = rates.next_is_direct();
                rates.took(direct, 1 << 20, Duration::from_micros(if direct { direct_us } else { buffered_us }));
                direct
            })
            .count()
    }

    #[test]
    fn the_faster_way_is_taken_and_the_other_still_tried() {
        let rates = Rates::default();
        let n = run(&rates, 1000, 1000, 200);
        assert!((5..60).contains(&n), "{n} direct, though the file is in the page cache");
        let n = run(&rates, 2000, 1000, 2000);
        assert!(n > 1000, "{n} direct, after the file has left the page cache");
        let n = run(&rates, 1000, 1000, 900);
        assert!(n > 900, "{n} direct, where buffered reads aren't clearly faster");
    }
}
