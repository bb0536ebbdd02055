//! Whether reading ahead pays: decided by wall clock, not by hit rate. On an idle disk it hides reads behind computing; on a
//! busy one every wrong guess costs a right one's time (one engine lost 21% of its speed to it). Pure: told how long passes took.

use std::time::Duration;

/// Passes of one setting that are timed together.
const WINDOW: usize = 6;
/// Windows of each setting that are compared: the setting alternates in between, so that a drift of the machine meets both.
const ROUNDS: usize = 2;
/// Passes that a decision holds at first; twice as long each time that it's confirmed, up to [`LONGEST`].
const SHORTEST: usize = 96;
const LONGEST: usize = 1536;

/// Tries passes with and without, keeps what was faster, and tries again later.
pub struct Lookahead {
    allowed: bool,
    /// The setting that won last.
    best: bool,
    hold: usize,
    /// Passes of the present phase.
    n: usize,
    /// Times of the passes of a trial, without and with; empty while a decision holds.
    trial: Option<[Vec<Duration>; 2]>,
}

impl Lookahead {
    /// Reading ahead until that's shown not to pay, or never.
    pub fn new(allowed: bool) -> Self {
        Lookahead { allowed, best: true, hold: SHORTEST / 4, n: 0, trial: None }
    }

    /// Whether the next pass should read ahead. `safe`: it will want nearly every expert of the next layer, so that guesses can't miss.
    pub fn is_on(&self, safe: bool) -> bool {
        self.allowed && (safe || self.setting())
    }

    fn setting(&self) -> bool {
        match self.trial {
            None => self.best,
            Some(_) => (self.n / WINDOW).is_multiple_of(2) == self.best,
        }
    }

    /// A pass of a few tokens took so long a token.
    pub fn pass(&mut self, took: Duration) {
        let setting = self.setting();
        self.n += 1;
        match &mut self.trial {
            None if self.n >= self.hold => (self.trial, self.n) = (Some(Default::default()), 0),
            None => {}
            Some(times) => {
                times[usize::from(setting)].push(took);
                if self.n == 2 * ROUNDS * WINDOW {
                    self.decide();
                }
            }
        }
    }

    fn decide(&mut self) {
        let Some(mut times) = self.trial.take() else { return };
        let [without, with] = times.each_mut().map(|t| median(t));
        let best = with <= without;
        self.hold = if best == self.best { (self.hold * 2).clamp(SHORTEST, LONGEST) } else { SHORTEST };
        tracing::debug!(?without, ?with, "reading ahead {}", if best { "pays" } else { "doesn't pay" });
        (self.best, self.n) = (best, 0);
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs passes that cost so much with and without, and counts those with.
    fn run(l: &mut Lookahead, n: usize, with: u64, without: u64) -> usize {
        (0..n)
            .filter(|_| {
                let on = l.is_on(false);
                l.pass(Duration::from_micros(if on { with } else { without }));
                on
            })
            .count()
    }

    #[test]
    fn it_stays_on_where_it_pays_and_goes_off_where_it_does_not() {
        let mut l = Lookahead::new(true);
        let n = run(&mut l, 2000, 90, 100);
        assert!(n > 1900, "{n} of 2000 passes with");
        let n = run(&mut l, 10_000, 120, 100);
        assert!(n < 2000, "{n} of 10000 passes with, after it stopped paying");
        let n = run(&mut l, 10_000, 80, 100);
        assert!(n > 7000, "{n} of 10000 passes with, after it paid again");
    }

    #[test]
    fn a_wide_pass_always_reads_ahead_unless_that_is_forbidden() {
        let mut l = Lookahead::new(true);
        run(&mut l, 1000, 200, 100);
        assert!(l.is_on(true));
        assert!(!Lookahead::new(false).is_on(true));
    }
}
