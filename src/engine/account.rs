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
}

/// Passes of one kind.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Phase {
    /// Passes of the model.
    pub passes: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Seconds of the passes less those of waiting.
    pub compute_s: f64,
    /// Seconds in which computing waited for reads.
    pub stalled_s: f64,
    /// What the expert store did in them.
    #[serde(flatten)]
    pub store: StoreStats,
    /// Waits of a pass.
    #[serde(skip)]
    pub stalls: Histogram,
}

impl Phase {
    pub(super) fn add(&mut self, n_tokens: usize, took: Duration, store: &StoreStats) {
        let stall = Duration::from_nanos(store.stall_ns).min(took);
        self.passes += 1;
        self.tokens += n_tokens as u64;
        self.compute_s += (took - stall).as_secs_f64();
        self.stalled_s += stall.as_secs_f64();
        self.store = self.store.and(store);
        self.stalls.add(stall);
    }

    fn since(&self, before: &Phase) -> Phase {
        Phase {
            passes: self.passes - before.passes,
            tokens: self.tokens - before.tokens,
            compute_s: self.compute_s - before.compute_s,
            stalled_s: self.stalled_s - before.stalled_s,
            store: self.store.since(&before.store),
            stalls: self.stalls.since(&before.stalls),
        }
    }

    /// Bytes read for each token.
    pub fn bytes_per_token(&self) -> f64 {
        self.store.bytes_read() as f64 / self.tokens.max(1) as f64
    }
}

impl Account {
    /// What was done since an earlier moment.
    pub fn since(&self, before: &Account) -> Account {
        Account { prefill: self.prefill.since(&before.prefill), decode: self.decode.since(&before.decode) }
    }
}

/// Buckets of a quarter of an octave: a quantile is right to a tenth.
const PER_OCTAVE: f64 = 4.0;
const N_BUCKETS: usize = 160;

/// How durations are spread, in a fixed space.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    counts: [u64; N_BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: [0; N_BUCKETS] }
    }
}

impl Histogram {
    fn add(&mut self, d: Duration) {
        // Bucket 0 is under a nanosecond.
        let bucket = ((d.as_nanos() as f64).max(0.5).log2() * PER_OCTAVE).floor() as i64 + 1;
        self.counts[bucket.clamp(0, N_BUCKETS as i64 - 1) as usize] += 1;
    }

    fn since(&self, before: &Histogram) -> Histogram {
        Histogram { counts: std::array::from_fn(|i| self.counts[i] - before.counts[i]) }
    }

    /// The duration that a share `q` of them doesn't exceed, to a tenth; `None` if there are none.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let n: u64 = self.counts.iter().sum();
        let rank = ((n as f64 * q).ceil() as u64).clamp(1, n.max(1));
        let mut seen = 0;
        let bucket = self.counts.iter().position(|&c| {
            seen += c;
            seen >= rank && n > 0
        })?;
        let middle = ((bucket as f64 - 0.5) / PER_OCTAVE).exp2();
        Some(if bucket == 0 { Duration::ZERO } else { Duration::from_nanos(middle as u64) })
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

    #[test]
    fn a_phase_adds_up() {
        let store = StoreStats { uses: 8, hits: 6, stall_ns: 2_000_000, demand_bytes: 100, ..StoreStats::default() };
        let mut phase = Phase::default();
        phase.add(1, Duration::from_millis(10), &store);
        let before = phase.clone();
        phase.add(1, Duration::from_millis(10), &store);
        assert_eq!((phase.passes, phase.tokens, phase.store.uses), (2, 2, 16));
        assert!((phase.compute_s - 0.016).abs() < 1e-9 && (phase.stalled_s - 0.004).abs() < 1e-9);
        assert_eq!(phase.since(&before).store.hits, 6);
        assert_eq!(phase.bytes_per_token(), 100.0);
    }
}
