//! What a run did, how fast, and where its time went: a line, a table, or fields of a JSON object.

use super::output;
use crate::cpu::memory;
use crate::engine::{Account, Budget, Engine, Finish, Phase};
use crate::moe::Losses;
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
    pub held: Held,
    #[serde(flatten)]
    pub process: ProcessFigures,
}

/// What the engine took.
#[derive(Default, Serialize)]
pub(super) struct Held {
    /// How its memory is divided.
    pub budget: Option<Budget>,
    /// Experts that have a slot now, and experts in all.
    pub slots: Option<usize>,
    pub experts: Option<usize>,
}

impl Held {
    pub fn now(engine: &Engine) -> Self {
        let (slots, experts) = engine.n_slots().unzip();
        Held { budget: Some(engine.budget()), slots, experts }
    }

    /// `1.50 GiB taken, nine tenths of what the system can spare; 120 of 384 experts have a slot now, 90.0 MiB of slots stay when the
    /// context is full; prompts are read 512 tokens at a time`
    fn text(&self) -> Option<String> {
        let b = self.budget.as_ref()?;
        let share = b.share_of.map_or(String::new(), |bound| format!(", nine tenths of {bound}"));
        let mut text = format!("{} taken{share}", b.bytes.map_or("all there is".into(), output::memory));
        if let (Some(slots), Some(all)) = (self.slots, self.experts) {
            let least = output::memory(b.slots);
            text +=
                &format!("; {slots} of {all} experts have a slot now, {least} of slots stay when the context is full");
        }
        Some(text + &format!("; prompts are read at least {} at a time", output::counted(b.chunk, "token")))
    }
}

/// What was given up, for people; `None` if nothing was.
pub(super) fn losses(l: Losses) -> Option<String> {
    let parts = [(l.left_out, "left out"), (l.dropped, "dropped"), (l.replaced, "replaced")];
    let all: Vec<String> = parts.iter().filter(|p| p.0 > 0).map(|(n, what)| format!("{n} {what}")).collect();
    (!all.is_empty()).then(|| format!("lossy: uses of experts {}", all.join(", ")))
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
        ProcessFigures { peak_memory: memory::peak(), major_faults: memory::major_faults() }
    }
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
            held: Held::default(),
            process: ProcessFigures::default(),
        }
    }

    /// What the engine did in between, and what it took for it.
    pub fn of_engine(&mut self, engine: &Engine, account: Account) {
        self.account = account;
        self.account.prefill.took(self.prefill_s);
        self.account.decode.took(self.decode_s);
        self.held = Held::now(engine);
        self.process = ProcessFigures::now();
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
        let store = self.account.store();
        if let Some(hit_rate) = store.hit_rate() {
            line += &format!(", experts {:.1}% at hand, {} read", 100.0 * hit_rate, output::size(store.bytes_read()));
        }
        let between = self.account.between.bytes_read();
        if between > 0 {
            line += &format!(" ({} of it to warm up)", output::size(between));
        }
        if let Some(peak) = self.process.peak_memory {
            line += &format!(", {} of memory at most", output::memory(peak));
        }
        if let Some(losses) = losses(store.losses()) {
            line += &format!(", {losses}");
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
        row("everything else", &|p, _| p.other_s.map_or("-".into(), seconds));
        if phases.iter().any(|(p, _)| p.store.uses > 0) {
            for (name, q) in [("wait of a pass, median", 0.5), ("  95 of 100 are under", 0.95), ("  99 of 100", 0.99)] {
                row(name, &|p, _| p.stalls.quantile(q).map_or("-".into(), |d| seconds(d.as_secs_f64())));
            }
            row("experts used", &|p, _| p.store.uses.to_string());
            row("  at hand", &|p, _| p.store.hit_rate().map_or("-".into(), |h| format!("{:.1} %", 100.0 * h)));
            row("  because read ahead", &|p, _| p.store.ahead_hits.to_string());
            row("  missing", &|p, _| p.store.misses().to_string());
            row("read when missing", &|p, _| output::size(p.store.demand_bytes));
            row("read ahead", &|p, _| output::size(p.store.ahead_bytes));
            row("  in vain", &|p, _| output::size(p.store.wasted_bytes));
            if phases.iter().any(|(p, _)| p.store.losses() != Losses::default()) {
                row("lossy: left out", &|p, _| p.store.left_out.to_string());
                row("lossy: dropped", &|p, _| p.store.dropped.to_string());
                row("lossy: replaced", &|p, _| p.store.replaced.to_string());
            }
            row("read for each token", &|p, _| {
                if p.tokens > 0 { output::size(p.bytes_per_token() as u64) } else { "-".into() }
            });
            let between = output::size(self.account.between.bytes_read());
            let _ = writeln!(t, "{:<28}{between:>12}", "read to warm up");
        }
        if let Some(held) = self.held.text() {
            let _ = writeln!(t, "{held}");
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
