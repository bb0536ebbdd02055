//! What this machine can do, measured: how fast memory and a disk are read, and what limits a process here.

use super::Pages;
use super::direct::{self, BLOCK};
use super::memory::for_measuring;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// From the disk into our memory, past the page cache.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// Huge pages' size, on the machines that have them by the size of 4 KiB pages.
const HUGE: usize = 2 << 20;

/// Bytes a second of random reads. The two differ where something below the file caches what is read, as a virtual machine's
/// host does.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Rate {
    /// Of what wasn't read before, or long ago.
    pub first: f64,
    /// Of what was read shortly before: as experts are, which are read again and again.
    pub again: f64,
}

/// A file for measuring reads.
pub struct DiskProbe {
    file: File,
    len: u64,
    mode: Mode,
}

impl DiskProbe {
    /// Opens a file of at least a few reads' length.
    ///
    /// # Errors
    /// The system's: where it or the file system has no direct reads, that is what it says.
    pub fn open(path: &Path, mode: Mode) -> io::Result<Self> {
        // Asked before it is opened: opening a pipe would wait for its other end.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it isn't a file: reads can't be measured on it"));
        }
        let file = match mode {
            Mode::Buffered => File::open(path)?,
            Mode::Direct => direct::open(path)?,
        };
        let probe = DiskProbe { len: file.metadata()?.len(), file, mode };
        // Some file systems accept the flag and refuse the read.
        let mut one = Pages::new(BLOCK)?;
        probe.file.read_at(&mut one, 0)?;
        Ok(probe)
    }

    /// Whether random reads of `n_bytes` can be measured on the file.
    pub fn is_long_enough(&self, n_bytes: usize) -> bool {
        self.len >= 4 * n_bytes as u64
    }

    /// Bytes of memory that [`DiskProbe::rate`] takes.
    pub fn room_for(n_bytes: usize, in_flight: usize) -> usize {
        (n_bytes.next_multiple_of(BLOCK) * in_flight.max(1)).next_multiple_of(HUGE) + HUGE
    }

    /// How fast random reads of `n_bytes` are, `in_flight` at a time, in two rounds of about `time` each: the second reads what the
    /// first has read. What the page cache holds of the file is dropped before each, as far as the system does that.
    ///
    /// The buffers lie in huge pages like the experts' slots: a virtual disk reads into few long pieces of memory up to five
    /// times as fast as into many of 4 KiB (1.3 MB at a time: 1.1 and 4.9 GB/s). `and_then` is what becomes of each read, told which
    /// of the `in_flight` threads has it; it's part of the time.
    ///
    /// # Errors
    /// A read's, or that the file is too short for random reads of this size.
    pub fn rate(
        &self,
        n_bytes: usize,
        in_flight: usize,
        time: Duration,
        and_then: &(dyn Fn(usize, &[u8]) + Sync),
    ) -> io::Result<Rate> {
        let n_bytes = n_bytes.next_multiple_of(BLOCK);
        if !self.is_long_enough(n_bytes) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file is too short to measure reads on"));
        }
        let in_flight = in_flight.max(1);
        let mut pages = Pages::new(Self::room_for(n_bytes, in_flight))?;
        let at = pages.as_ptr().align_offset(HUGE);
        let buffers = &mut pages[at..][..n_bytes * in_flight];
        buffers.chunks_mut(BLOCK).for_each(|p| p[0] = 1);
        let mut counts = vec![u64::MAX; in_flight];
        let first = self.round(n_bytes, buffers, &mut counts, time, and_then)?;
        let again = self.round(n_bytes, buffers, &mut counts, time, and_then)?;
        Ok(Rate { first, again })
    }

    /// Bytes a second of as many lanes as there are counts. A lane begins anew after so many reads; their number takes the count's
    /// place.
    fn round(
        &self,
        n_bytes: usize,
        buffers: &mut [u8],
        counts: &mut [u64],
        time: Duration,
        and_then: &(dyn Fn(usize, &[u8]) + Sync),
    ) -> io::Result<f64> {
        self.forget();
        let places = (self.len - n_bytes as u64) / BLOCK as u64;
        let began = Instant::now();
        let lane = |lane: usize, buf: &mut [u8], count: u64| -> io::Result<u64> {
            let mut n = 0;
            let mut random = 0u64;
            while n == 0 || began.elapsed() < time {
                if n % count == 0 {
                    random = (lane as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((n_bytes as u64) << 17) | 1;
                }
                // xorshift64 (Marsaglia 2003)
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = ((u128::from(random) * u128::from(places + 1)) >> 64) as u64 * BLOCK as u64;
                self.file.read_exact_at(buf, at)?;
                and_then(lane, buf);
                n += 1;
            }
            Ok(n)
        };
        let done = std::thread::scope(|s| {
            let lanes = buffers.chunks_exact_mut(n_bytes).zip(counts.iter()).enumerate();
            let threads: Vec<_> = lanes.map(|(i, (buf, &count))| s.spawn(move || lane(i, buf, count))).collect();
            let join =
                |t: std::thread::ScopedJoinHandle<'_, _>| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
            threads.into_iter().map(join).collect::<io::Result<Vec<u64>>>()
        })?;
        let rate = done.iter().sum::<u64>() as f64 * n_bytes as f64 / began.elapsed().as_secs_f64();
        counts.copy_from_slice(&done);
        Ok(rate)
    }

    /// Asks the system to drop the file's pages.
    fn forget(&self) {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if self.mode == Mode::Buffered {
            // Refusal makes the figure too good, not wrong to use: the page cache would serve the model as well.
            let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }
}

/// Bytes that most caches don't hold, and several times as many.
pub const UNCACHED: (u64, u64) = (64 << 20, 192 << 20);

/// Bytes a second at which `n_threads` threads read memory that no cache holds; `None` if so much can't be spared.
///
/// # Errors
/// When the system has no memory for it.
pub fn memory_rate(n_threads: usize, time: Duration) -> io::Result<Option<f64>> {
    memory_rate_within(u64::MAX, n_threads, time)
}

/// As [`memory_rate`], with so many bytes at most.
///
/// # Errors
/// When the system has no memory for it.
pub fn memory_rate_within(most: u64, n_threads: usize, time: Duration) -> io::Result<Option<f64>> {
    let Some(n_bytes) = for_measuring(UNCACHED.0, UNCACHED.1.min(most)) else { return Ok(None) };
    let mut pages = Pages::new(n_bytes as usize)?;
    // Written once: untouched pages are all the same zero page, which is in the cache.
    pages.chunks_mut(BLOCK).for_each(|p| p[0] = 1);
    let part = pages.len() / n_threads.max(1) / 64 * 64;
    let (done, began) = (AtomicU64::new(0), Instant::now());
    std::thread::scope(|s| {
        for mine in pages.chunks_exact(part) {
            let done = &done;
            s.spawn(move || {
                while began.elapsed() < time {
                    std::hint::black_box(sum(mine));
                    done.fetch_add(part as u64, Relaxed);
                }
            });
        }
    });
    Ok(Some(done.load(Relaxed) as f64 / began.elapsed().as_secs_f64()))
}

/// Bytes a second at which one thread uses memory for the first time, of `n_bytes` or as much of it as `time` suffices for: the system
/// clears pages, and where this machine is a virtual one that gave free memory back to its host, the host has to find them again.
///
/// # Errors
/// When the system has no memory for it.
pub fn first_use_rate(n_bytes: usize, time: Duration) -> io::Result<f64> {
    let mut pages = Pages::new(n_bytes.next_multiple_of(HUGE))?;
    let (mut n_touched, began) = (0, Instant::now());
    for piece in pages.chunks_mut(HUGE) {
        piece.chunks_mut(BLOCK).for_each(|page| page[0] = 1);
        n_touched += piece.len();
        if began.elapsed() > time {
            break;
        }
    }
    Ok(n_touched as f64 / began.elapsed().as_secs_f64())
}

/// Reads all bytes; independent sums, so that none waits for another.
fn sum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 16];
    for line in bytes.as_chunks::<128>().0 {
        for (s, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *s = s.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    sums.iter().fold(0, |a, &b| a.wrapping_add(b))
}

/// Whether memory comes in huge pages: `always`, `madvise` (when asked for) or `never`; `None` where the system doesn't say.
pub fn huge_pages() -> Option<String> {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_string())
}

/// Bytes that the system reads ahead on the disk that a file lies on; `None` where it doesn't say.
pub fn read_ahead(path: &Path) -> Option<u64> {
    let dev = std::fs::metadata(path).ok()?.dev();
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let text = std::fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")).ok()?;
    Some(text.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_s_reads_are_timed() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![1u8; 1 << 20]).unwrap();
        let time = Duration::from_millis(20);
        let probe = DiskProbe::open(&path, Mode::Buffered).unwrap();
        let rate = probe.rate(64 << 10, 2, time, &|_, _| ()).unwrap();
        assert!(rate.first > 1e6 && rate.again > 1e6, "{rate:?}");
        let e = probe.rate(512 << 10, 1, time, &|_, _| ()).unwrap_err();
        assert!(e.to_string().contains("too short"), "{e}");
        if let Ok(direct) = DiskProbe::open(&path, Mode::Direct) {
            assert!(
                direct.rate(100, 1, time, &|_, _| ()).unwrap().again > 1e4,
                "it is rounded up to what the disk can do"
            );
        }
        assert!(DiskProbe::open(&dir.path().join("none"), Mode::Direct).is_err());
        for other in [dir.path(), Path::new("/dev/zero")] {
            let e = DiskProbe::open(other, Mode::Buffered).map(drop).unwrap_err();
            assert!(e.to_string().contains("isn't a file"), "{e}");
        }
    }

    #[test]
    fn memory_is_read_at_a_plausible_rate() {
        let rate = memory_rate(2, Duration::from_millis(30)).unwrap().unwrap();
        assert!((1e8..1e13).contains(&rate), "{rate}");
        assert_eq!(sum(&[1; 256]), u64::from_le_bytes([1; 8]) * 32);
    }

    #[test]
    fn memory_is_used_for_the_first_time_at_a_plausible_rate() {
        let rate = first_use_rate(16 << 20, Duration::from_millis(50)).unwrap();
        assert!((1e6..1e12).contains(&rate), "{rate}");
    }
}
