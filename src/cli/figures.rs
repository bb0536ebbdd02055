//! What a run did, how fast, and where its time went: a line, a table, or fields of a JSON object.

use super::output;
use crate::engine::{Account, Finish, Phase};
use serde::Serialize;
use std::fmt::Write;
use std::time::Duration;

/// What a run did, and how fast.
#[derive(Serialize)]
pub(super) struct Figures {
    /// Tokens of the prompt that were computed.
    pub n_prompt: usize,
    /// Seconds for them.
    pub prefill_s: f64,
    /// Tokens written.
    pub n_written: usize,
    /// Those of them that went through the model, which the last ones needn't.
    pub n_decoded: usize,
    /// Seconds for these.
    pub decode_s: f64,
    /// The seed of the sampler; `None` if nothing was drawn.
    pub seed: Option<u64>,
    /// Why it ended; `None` after Ctrl-C.
    pub finish: Option<Finish>,
    /// Where the time went.
    #[serde(flatten)]
    pub account: Account,
    #[serde(flatten)]
    pub process: ProcessFigures,
}

/// What the system says of this process.
#[derive(Default, Serialize)]
pub(super) struct ProcessFigures {
    /// The most memory that it has held, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    /// Page faults that had to read from a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
}

impl ProcessFigures {
    pub fn now() -> Self {
        ProcessFigures { peak_memory: output::peak_memory(), major_faults: major_faults() }
    }
}

/// The 12th field of `/proc/self/stat`, counted behind the program's name, which may hold anything.
fn major_faults() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(9)?.parse().ok()
}

impl Figures {
    /// A prompt of so many tokens was read.
    pub fn new(n_prompt: usize, prefill: Duration) -> Self {
        Figures {
            n_prompt,
            prefill_s: prefill.as_secs_f64(),
            n_written: 0,
            n_decoded: 0,
            decode_s: 0.0,
            seed: None,
            finish: None,
            account: Account::default(),
            process: ProcessFigures::default(),
        }
    }

    /// One line for people.
    pub fn line(&self) -> String {
        // What the prompt's last pass gave was written in no time, and so was what a grammar left no choice about.
        let rate =
            |n: usize, s: f64| if n > 0 && s > 0.0 { format!(" at {:.1}/s", n as f64 / s) } else { String::new() };
        let mut line = format!(
            "read {}{}, wrote {}{}",
            output::counted(self.n_prompt, "token"),
            rate(self.n_prompt, self.prefill_s),
            self.n_written,
            rate(self.n_decoded, self.decode_s)
        );
        let store = self.account.prefill.store.and(&self.account.decode.store);
        if let Some(hit_rate) = store.hit_rate() {
            line += &format!(", experts {:.1}% at hand, {} read", 100.0 * hit_rate, output::size(store.bytes_read()));
        }
        if let Some(peak) = self.process.peak_memory {
            line += &format!(", {} of memory at most", output::memory(peak));
        }
        if store.dropped + store.replaced > 0 {
            line += &format!(", lossy: {} experts dropped, {} replaced", store.dropped, store.replaced);
        }
        line + &self.seed_said()
    }

    /// How a line ends.
    fn seed_said(&self) -> String {
        self.seed.map_or(String::new(), |seed| format!(", seed {seed}"))
    }

    /// Where the time went, for people.
    pub fn table(&self) -> String {
        let mut t = format!("{:<28}{:>12}{:>12}\n", "", "prompt", "answer");
        let phases = [(&self.account.prefill, self.prefill_s), (&self.account.decode, self.decode_s)];
        let mut row = |name: &str, value: &dyn Fn(&Phase, f64) -> String| {
            let [a, b] = phases.map(|(p, wall)| value(p, wall));
            // Writing to a String can't fail.
            let _ = writeln!(t, "{name:<28}{a:>12}{b:>12}");
        };
        row("tokens computed", &|p, _| p.tokens.to_string());
        row("tokens a second", &|p, wall| {
            if p.tokens > 0 && wall > 0.0 { format!("{:.1}", p.tokens as f64 / wall) } else { "-".into() }
        });
        row("computing", &|p, _| seconds(p.compute_s));
        row("waiting for the disk", &|p, _| seconds(p.stalled_s));
        row("reading and packing", &|p, _| seconds(p.store.busy_ns as f64 / 1e9));
        row("everything else", &|p, wall| seconds((wall - p.compute_s - p.stalled_s).max(0.0)));
        if phases.iter().any(|(p, _)| p.store.uses > 0) {
            for (name, q) in [("wait of a pass, median", 0.5), ("  95 of 100 are under", 0.95), ("  99 of 100", 0.99)] {
                row(name, &|p, _| p.stalls.quantile(q).map_or("-".into(), |d| seconds(d.as_secs_f64())));
            }
            row("experts used", &|p, _| p.store.uses.to_string());
            row("  at hand", &|p, _| p.store.hit_rate().map_or("-".into(), |h| format!("{:.1} %", 100.0 * h)));
            row("  because read ahead", &|p, _| p.store.ahead_hits.to_string());
            row("read when missing", &|p, _| output::size(p.store.demand_bytes));
            row("read ahead", &|p, _| output::size(p.store.ahead_bytes));
            row("  in vain", &|p, _| output::size(p.store.wasted_bytes));
            if phases.iter().any(|(p, _)| p.store.dropped + p.store.replaced > 0) {
                row("lossy: dropped", &|p, _| p.store.dropped.to_string());
                row("lossy: replaced", &|p, _| p.store.replaced.to_string());
            }
            row("read for each token", &|p, _| output::size(p.bytes_per_token() as u64));
        }
        let say = |v: Option<String>| v.unwrap_or_else(|| "unknown".into());
        let peak = say(self.process.peak_memory.map(output::memory));
        let faults = say(self.process.major_faults.map(|n| n.to_string()));
        let _ = writeln!(t, "memory at most {peak}, page faults with a read {faults}{}", self.seed_said());
        t
    }
}

/// `1.25 s`, `13.1 ms`.
fn seconds(s: f64) -> String {
    if s >= 1.0 { format!("{s:.2} s") } else { format!("{:.1} ms", 1e3 * s) }
}
