//! Where the time went: for each phase computing and waiting for the disk, what was read, and how the waits were spread.

use crate::moe::StoreStats;
use std::time::Duration;

/// What an engine has done in each phase.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Account {
    /// Passes in which a session got several tokens.
    pub prefill: Phase,
    /// Passes in which each session got one.
    pub decode: Phase,
    /// What the expert store did before passes and between them: it fills free slots with experts that were hot in former runs.
    pub between: StoreStats,
}

/// How a model came into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Loading {
    /// Seconds from opening the file until the engine was ready.
    pub total_s: f64,
    /// Of these, seconds in which the weights that stay in memory were read and laid out.
    pub read_s: f64,
    /// Their bytes. Experts come later, when they are used.
    pub bytes: u64,
    /// Bytes of them a second of `read_s`; `None` if that took no time.
    pub bytes_per_s: Option<f64>,
}

impl Loading {
    pub(super) fn new(total: Duration, read: Duration, bytes: u64) -> Self {
        let read_s = read.as_secs_f64();
        let bytes_per_s = (read_s > 0.0).then(|| bytes as f64 / read_s);
        Loading { total_s: total.as_secs_f64(), read_s, bytes, bytes_per_s }
    }
}

/// Passes of one kind.
#[derive(Clone, Debug, Default)]
pub struct Phase {
    /// Passes of the model, without those that were given up.
    pub passes: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Seconds of the passes, also of those that failed or were stopped, less those of waiting.
    pub compute_s: f64,
    /// Seconds in which computing waited for reads.
    pub stalled_s: f64,
    /// Seconds outside of passes, such as those of choosing tokens, where somebody has measured the whole.
    pub other_s: Option<f64>,
    /// What the expert store did in them.
    pub store: StoreStats,
    /// Waits of a pass.
    pub stalls: Histogram,
}

impl serde::Serialize for Phase {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(serde::Serialize)]
        struct Fields<'a> {
            passes: u64,
            tokens: u64,
            compute_s: f64,
            stalled_s: f64,
            #[serde(skip_serializing_if = "Option::is_none")]
            other_s: Option<f64>,
            misses: u64,
            #[serde(flatten)]
            store: &'a StoreStats,
            stall_p50_s: Option<f64>,
            stall_p95_s: Option<f64>,
            stall_p99_s: Option<f64>,
        }
        let stall = |q| self.stalls.quantile(q).map(|d| d.as_secs_f64());
        let fields = Fields {
            passes: self.passes,
            tokens: self.tokens,
            compute_s: self.compute_s,
            stalled_s: self.stalled_s,
            other_s: self.other_s,
            misses: self.store.misses(),
            store: &self.store,
            stall_p50_s: stall(0.5),
            stall_p95_s: stall(0.95),
            stall_p99_s: stall(0.99),
        };
        fields.serialize(serializer)
    }
}

impl Phase {
    /// A pass of so many tokens; of one that was given up only its time and its reads count.
    fn add(&mut self, n_tokens: Option<usize>, took: Duration, store: &StoreStats) {
        let stall = Duration::from_nanos(store.stall_ns).min(took);
        self.compute_s += (took - stall).as_secs_f64();
        self.stalled_s += stall.as_secs_f64();
        self.store = self.store.and(store);
        if let Some(n_tokens) = n_tokens {
            self.passes += 1;
            self.tokens += n_tokens as u64;
            self.stalls.add(stall);
        }
    }

    fn since(&self, before: &Phase) -> Phase {
        Phase {
            passes: self.passes - before.passes,
            tokens: self.tokens - before.tokens,
            compute_s: self.compute_s - before.compute_s,
            stalled_s: self.stalled_s - before.stalled_s,
            other_s: None,
            store: self.store.since(&before.store),
            stalls: self.stalls.since(&before.stalls),
        }
    }

    /// Says how long the whole phase took, what happened outside of passes included.
    pub fn took(&mut self, seconds: f64) {
        self.other_s = Some((seconds - self.pass_s()).max(0.0));
    }

    /// Seconds of the passes, waiting included.
    pub fn pass_s(&self) -> f64 {
        self.compute_s + self.stalled_s
    }

    /// Bytes read for each token.
    pub fn bytes_per_token(&self) -> f64 {
        self.store.bytes_read() as f64 / self.tokens.max(1) as f64
    }
}

impl Account {
    /// What was done since an earlier moment.
    pub fn since(&self, before: &Account) -> Account {
        Account {
            prefill: self.prefill.since(&before.prefill),
            decode: self.decode.since(&before.decode),
            between: self.between.since(&before.between),
        }
    }

    /// What the expert store did in all.
    pub fn store(&self) -> StoreStats {
        self.prefill.store.and(&self.decode.store).and(&self.between)
    }
}

/// An account that is being kept. What the store does belongs to the pass that runs, or is between two.
#[derive(Default)]
pub(super) struct Ledger {
    account: Account,
    /// The store up to which all is accounted for.
    seen: StoreStats,
    in_pass: bool,
}

impl Ledger {
    /// A pass begins.
    pub fn begin(&mut self, store: StoreStats) {
        self.catch_up(store);
        self.in_pass = true;
    }

    /// The pass has ended, with so many tokens; `None` if it was given up.
    pub fn end(&mut self, is_decode: bool, n_tokens: Option<usize>, took: Duration, store: StoreStats) {
        self.in_pass = false;
        let phase = if is_decode { &mut self.account.decode } else { &mut self.account.prefill };
        phase.add(n_tokens, took, &store.since(&self.seen));
        self.seen = store;
    }

    /// The account up to now, without a pass that still runs.
    pub fn account(&mut self, store: StoreStats) -> Account {
        self.catch_up(store);
        self.account.clone()
    }

    fn catch_up(&mut self, store: StoreStats) {
        if !self.in_pass {
            self.account.between = self.account.between.and(&store.since(&self.seen));
            self.seen = store;
        }
    }
}

/// Buckets of a quarter of an octave.
const PER_OCTAVE: f64 = 4.0;
const N_BUCKETS: usize = 160;

/// How durations are spread, in a fixed space.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// Of each bucket how many there are, and their nanoseconds together.
    buckets: [(u64, u64); N_BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: [(0, 0); N_BUCKETS] }
    }
}

impl Histogram {
    fn add(&mut self, d: Duration) {
        let ns = d.as_nanos() as u64;
        // Bucket 0 is under a nanosecond.
        let bucket = ((ns as f64).max(0.5).log2() * PER_OCTAVE).floor() as i64 + 1;
        let (n, sum) = &mut self.buckets[bucket.clamp(0, N_BUCKETS as i64 - 1) as usize];
        (*n, *sum) = (*n + 1, *sum + ns);
    }

    fn since(&self, before: &Histogram) -> Histogram {
        let bucket = |i: usize| (self.buckets[i].0 - before.buckets[i].0, self.buckets[i].1 - before.buckets[i].1);
        Histogram { buckets: std::array::from_fn(bucket) }
    }

    /// The duration that a share `q` of them doesn't exceed, to a tenth; `None` if there are none. It's the mean of those in its bucket, so
    /// that one alone is what it was.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let all: u64 = self.buckets.iter().map(|b| b.0).sum();
        let rank = ((all as f64 * q).ceil() as u64).clamp(1, all.max(1));
        let mut seen = 0;
        let (n, sum) = self.buckets.iter().find(|b| {
            seen += b.0;
            seen >= rank
        })?;
        Some(Duration::from_nanos(sum / n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_a_tenth() {
        let mut h = Histogram::default();
        assert_eq!(h.quantile(0.5), None);
        (1..=1000).for_each(|ms| h.add(Duration::from_millis(ms)));
        for (q, ms) in [(0.5, 500.0), (0.95, 950.0), (0.99, 990.0)] {
            let got = h.quantile(q).unwrap().as_secs_f64() * 1e3;
            assert!((got / ms - 1.0).abs() < 0.1, "{q}: {got}");
        }
        let before = h.clone();
        h.add(Duration::ZERO);
        assert_eq!(h.since(&before).quantile(1.0), Some(Duration::ZERO));
    }

    /// "Waiting 81 ms in all, 87 in the median" of one pass was not to be understood.
    #[test]
    fn a_quantile_is_no_more_than_there_was() {
        let mut h = Histogram::default();
        h.add(Duration::from_millis(81));
        assert_eq!(h.quantile(0.5), Some(Duration::from_millis(81)));
        h.add(Duration::from_millis(3));
        assert_eq!([0.5, 0.99].map(|q| h.quantile(q)), [3, 81].map(|ms| Some(Duration::from_millis(ms))));
    }

    #[test]
    fn what_is_read_between_passes_is_accounted_for() {
        let read = |bytes| StoreStats { ahead_bytes: bytes, ..StoreStats::default() };
        let took = Duration::from_millis(1);
        let mut ledger = Ledger::default();
        ledger.begin(read(100));
        assert_eq!(ledger.account(read(150)).store(), read(100), "what a pass does is its own");
        ledger.end(true, Some(1), took, read(200));
        let before = ledger.account(read(230));
        assert_eq!((before.between, before.decode.store), (read(130), read(100)));
        ledger.begin(read(230));
        ledger.end(false, Some(4), took, read(240));
        let since = ledger.account(read(241)).since(&before);
        assert_eq!((since.between, since.prefill.store, since.store()), (read(1), read(10), read(11)));
    }

    /// "Waiting for the disk 0.0 ms, everything else 12.42 s, 265 MB to warm up" after Ctrl-C in a prompt.
    #[test]
    fn a_pass_that_was_given_up_is_of_its_phase() {
        let read =
            |bytes, ms: u64| StoreStats { demand_bytes: bytes, stall_ns: ms * 1_000_000, ..StoreStats::default() };
        let mut ledger = Ledger::default();
        ledger.begin(read(0, 0));
        ledger.end(false, None, Duration::from_millis(100), read(70, 90));
        let mut a = ledger.account(read(70, 90));
        a.prefill.took(0.1);
        assert_eq!((a.prefill.passes, a.prefill.tokens, a.prefill.stalls.quantile(0.5)), (0, 0, None));
        assert_eq!((a.between.bytes_read(), a.prefill.store.bytes_read()), (0, 70));
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(a.prefill.stalled_s, 0.09) && near(a.prefill.compute_s, 0.01), "{:?}", a.prefill);
        assert!(near(a.prefill.other_s.unwrap(), 0.0));
    }

    #[test]
    fn a_phase_adds_up() {
        let store = StoreStats { uses: 8, hits: 6, stall_ns: 2_000_000, demand_bytes: 100, ..StoreStats::default() };
        let mut phase = Phase::default();
        phase.add(Some(1), Duration::from_millis(10), &store);
        let before = phase.clone();
        phase.add(Some(1), Duration::from_millis(10), &store);
        assert_eq!((phase.passes, phase.tokens, phase.store.uses), (2, 2, 16));
        assert!((phase.compute_s - 0.016).abs() < 1e-9 && (phase.stalled_s - 0.004).abs() < 1e-9);
        assert_eq!(phase.since(&before).store.hits, 6);
        assert_eq!(phase.bytes_per_token(), 100.0);
        phase.took(0.025);
        let json = serde_json::to_value(&phase).unwrap();
        let near = |name: &str, want: f64| (json[name].as_f64().unwrap() - want).abs() < 1e-9;
        assert!(json["misses"] == 4 && near("other_s", 0.005) && near("stall_p99_s", 0.002), "{json}");
    }
}
