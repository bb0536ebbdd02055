//! What a run did, how fast, where its time went, and what it reached of the machine's limits: a line, a table, or fields of a JSON object.

use super::output;
use crate::cpu::memory;
use crate::engine::{Account, Budget, Engine, Finish, Loading, Phase};
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
    #[serde(flatten)]
    pub stats: Stats,
}

/// Where the time went, what that reached, and what the engine took for it: the same for every command that runs a model.
#[derive(Default, Serialize)]
pub(super) struct Stats {
    #[serde(flatten)]
    pub account: Account,
    pub reached: Reached,
    #[serde(flatten)]
    pub held: Held,
    #[serde(flatten)]
    pub process: ProcessFigures,
}

/// What was reached of the machine's limits.
#[derive(Default, Serialize)]
pub(super) struct Reached {
    /// Weights that were read from memory in writing.
    pub memory: Reach,
    /// Experts that were read, while they were: the prompt's, the answer's and those between.
    pub disk: Reach,
}

/// A rate, and what it is held against.
#[derive(Default, Serialize)]
pub(super) struct Reach {
    /// What was reached; `None` if there was nothing to do.
    pub bytes_per_s: Option<f64>,
    /// What the machine gives.
    pub limit_bytes_per_s: Option<f64>,
    /// The same of what it hasn't read before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_first_bytes_per_s: Option<f64>,
    /// The share of the limit. It may be more than 1: a cache is faster than what it caches.
    pub share: Option<f64>,
    /// Why there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_measured: Option<String>,
}

impl Reach {
    fn of(bytes: f64, seconds: f64) -> Self {
        Reach { bytes_per_s: (bytes > 0.0 && seconds > 0.0).then(|| bytes / seconds), ..Self::default() }
    }

    /// Holds it against a limit.
    pub fn against(&mut self, limit: Result<f64, String>) {
        match limit {
            Ok(limit) => {
                self.limit_bytes_per_s = Some(limit);
                self.share = self.bytes_per_s.map(|r| r / limit);
                self.not_measured = None;
            }
            Err(why) => self.not_measured = Some(why),
        }
    }

    /// `61 %` of a rate; nothing was read, or nothing was measured.
    fn share_of(&self, bytes_per_s: Option<f64>) -> String {
        match (bytes_per_s, self.limit_bytes_per_s) {
            (None, _) => "-".into(),
            (_, None) => "not measured".into(),
            (Some(r), Some(limit)) => percent(r / limit),
        }
    }
}

impl Stats {
    /// Of what an engine did. Where somebody has measured how long the prompt and the answer took in all, what isn't its own is told too.
    pub fn new(engine: &Engine, account: Account, took: [Option<f64>; 2]) -> Self {
        let mut account = account;
        let phases = [&mut account.prefill, &mut account.decode];
        phases.into_iter().zip(took).for_each(|(p, took)| {
            took.inspect(|s| p.took(*s));
        });
        let store = account.store();
        let reached = Reached {
            memory: Reach::of(engine.weights_read(&account.decode), whole_s(&account.decode)),
            disk: Reach::of(store.bytes_read() as f64, store.busy_ns as f64 / 1e9),
        };
        Stats { account, reached, held: Held::now(engine), process: ProcessFigures::now() }
    }

    /// Measures what was made use of, for some tenths of a second. Experts may leave their slots for it if nothing is to come after it.
    pub fn measure(&mut self, engine: &Engine, is_the_end: bool) {
        let Reached { memory, disk } = &mut self.reached;
        if memory.bytes_per_s.is_some() && memory.limit_bytes_per_s.is_none() {
            memory.against(engine.measure_memory(is_the_end));
        }
        if disk.bytes_per_s.is_some() && disk.limit_bytes_per_s.is_none() {
            let rate = engine.measure_disk(is_the_end);
            disk.limit_first_bytes_per_s = rate.as_ref().ok().map(|r| r.first);
            disk.against(rate.map(|r| r.again));
        }
    }

    /// Where the time went, for people.
    pub fn table(&self) -> String {
        let account = &self.account;
        let all = [("prompt", &account.prefill), ("answer", &account.decode)];
        let ran = |(_, p): &(&str, &Phase)| p.passes > 0 || p.pass_s() > 0.0;
        let some = all.iter().any(ran);
        let phases: Vec<(&str, &Phase)> = all.into_iter().filter(|p| !some || ran(p)).collect();
        let mut table = Table { phases, text: String::new() };
        table.times();
        self.memory_rows(&mut table);
        if table.phases.iter().any(|(_, p)| p.store.uses > 0) {
            table.experts();
            self.disk_rows(&mut table);
        }
        table.text + &self.lines()
    }

    fn memory_rows(&self, t: &mut Table<'_>) {
        let memory = &self.reached.memory;
        let of = |p: &Phase| memory.bytes_per_s.filter(|_| std::ptr::eq(p, &self.account.decode));
        t.row("weights from memory", &|p| of(p).map_or("-".into(), rate));
        let limit = memory.limit_bytes_per_s.map_or("rate".into(), rate);
        t.row(&format!("  of the memory's {limit}"), &|p| memory.share_of(of(p)));
    }

    fn disk_rows(&self, t: &mut Table<'_>) {
        let disk = &self.reached.disk;
        let of = |p: &Phase| Reach::of(p.store.bytes_read() as f64, p.store.busy_ns as f64 / 1e9).bytes_per_s;
        t.row("while reading", &|p| of(p).map_or("-".into(), rate));
        let limit = disk.limit_bytes_per_s.map_or("rate".into(), rate);
        t.row(&format!("  of the disk's {limit}"), &|p| disk.share_of(of(p)));
        let between = output::size(self.account.between.bytes_read());
        let _ = writeln!(t.text, "{:<28}{between:>12}", "read to warm up");
    }

    /// What isn't of one phase.
    fn lines(&self) -> String {
        let mut t = String::new();
        let Reached { memory, disk } = &self.reached;
        for (what, reach) in [("memory", memory), ("disk", disk)] {
            if let Some(why) = &reach.not_measured {
                // Writing to a String can't fail.
                let _ = writeln!(t, "the {what}'s rate isn't measured: {why}");
            }
            if reach.share.is_some_and(|s| s > 1.0) {
                let cache = if what == "memory" { "the processor's caches hold" } else { "the page cache holds" };
                let _ = writeln!(t, "more than the {what} gives: {cache} some of what is read");
            }
        }
        if let (Some(first), Some(again)) = (disk.limit_first_bytes_per_s, disk.limit_bytes_per_s)
            && again > 1.5 * first
        {
            let _ = writeln!(t, "what the disk hasn't read before comes at {}", rate(first));
        }
        if let Some(l) = &self.held.loading {
            let speed = l.bytes_per_s.map_or(String::new(), |r| format!(", {}", rate(r)));
            let (total, read) = (seconds(l.total_s), seconds(l.read_s));
            let _ = writeln!(t, "ready after {total}: {} of weights read in {read}{speed}", output::size(l.bytes));
        }
        if let Some(held) = self.held.text() {
            let _ = writeln!(t, "{held}");
        }
        let say = |v: Option<String>| v.unwrap_or_else(|| "unknown".into());
        let peak = say(self.process.peak_memory.map(output::memory));
        let faults = say(self.process.major_faults.map(|n| n.to_string()));
        let _ = writeln!(t, "memory at most {peak}, page faults with a read {faults}");
        t
    }
}

/// Rows with a column for each phase that there was.
struct Table<'a> {
    phases: Vec<(&'static str, &'a Phase)>,
    text: String,
}

impl Table<'_> {
    fn row(&mut self, name: &str, value: &dyn Fn(&Phase) -> String) {
        let values: String = self.phases.iter().map(|(_, p)| format!("{:>13}", value(p))).collect();
        let _ = writeln!(self.text, "{name:<27}{values}");
    }

    fn times(&mut self) {
        let names: String = self.phases.iter().map(|(name, _)| format!("{name:>13}")).collect();
        let _ = writeln!(self.text, "{:<27}{names}", "");
        self.row("tokens computed", &|p| p.tokens.to_string());
        self.row("tokens a second", &|p| {
            if p.tokens > 0 && whole_s(p) > 0.0 { format!("{:.1}", p.tokens as f64 / whole_s(p)) } else { "-".into() }
        });
        self.row("computing", &|p| seconds(p.compute_s));
        self.row("waiting for the disk", &|p| seconds(p.stalled_s));
        self.row("reading and packing", &|p| seconds(p.store.busy_ns as f64 / 1e9));
        self.row("everything else", &|p| p.other_s.map_or("-".into(), seconds));
    }

    fn experts(&mut self) {
        for (name, q) in [("wait of a pass, median", 0.5), ("  95 of 100 are under", 0.95), ("  99 of 100", 0.99)] {
            self.row(name, &|p| p.stalls.quantile(q).map_or("-".into(), |d| seconds(d.as_secs_f64())));
        }
        self.row("experts used", &|p| p.store.uses.to_string());
        self.row("  cache hits", &|p| p.store.hit_rate().map_or("-".into(), |h| format!("{:.1} %", 100.0 * h)));
        self.row("  because read ahead", &|p| p.store.ahead_hits.to_string());
        self.row("  missing", &|p| p.store.misses().to_string());
        self.row("read when missing", &|p| output::size(p.store.demand_bytes));
        self.row("read ahead", &|p| output::size(p.store.ahead_bytes));
        self.row("  in vain", &|p| output::size(p.store.wasted_bytes));
        if self.phases.iter().any(|(_, p)| p.store.losses() != Losses::default()) {
            self.row("lossy: left out", &|p| p.store.left_out.to_string());
            self.row("lossy: dropped", &|p| p.store.dropped.to_string());
            self.row("lossy: replaced", &|p| p.store.replaced.to_string());
        }
        self.row("read for each token", &|p| {
            if p.tokens > 0 { output::size(p.bytes_per_token() as u64) } else { "-".into() }
        });
    }
}

/// Seconds of a phase, with what was done outside of passes where that is known.
fn whole_s(p: &Phase) -> f64 {
    p.pass_s() + p.other_s.unwrap_or(0.0)
}

/// What the engine took.
#[derive(Default, Serialize)]
pub(super) struct Held {
    /// How its memory is divided.
    pub budget: Option<Budget>,
    /// Experts that have a slot now, and experts in all.
    pub slots: Option<usize>,
    pub experts: Option<usize>,
    /// How it was loaded.
    pub loading: Option<Loading>,
}

impl Held {
    pub fn now(engine: &Engine) -> Self {
        let (slots, experts) = engine.n_slots().unzip();
        Held { budget: Some(engine.budget()), slots, experts, loading: Some(engine.loading()) }
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
            stats: Stats::default(),
        }
    }

    /// What the engine did in between, and what it took for it.
    pub fn of_engine(&mut self, engine: &Engine, account: Account) {
        self.stats = Stats::new(engine, account, [Some(self.prefill_s), Some(self.decode_s)]);
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
        let store = self.stats.account.store();
        if let Some(hit_rate) = store.hit_rate() {
            line +=
                &format!(", experts {:.1}% cache hits, {} read", 100.0 * hit_rate, output::size(store.bytes_read()));
        }
        let between = self.stats.account.between.bytes_read();
        if between > 0 {
            line += &format!(" ({} of it to warm up)", output::size(between));
        }
        if let Some(peak) = self.stats.process.peak_memory {
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
        format!("{}{}", self.stats.table().trim_end(), self.seed_said())
    }
}

/// `1.25 s`, `13.1 ms`.
fn seconds(s: f64) -> String {
    if s >= 1.0 { format!("{s:.2} s") } else { format!("{:.1} ms", 1e3 * s) }
}

/// `1.2 GB/s`.
pub(super) fn rate(bytes_per_s: f64) -> String {
    if bytes_per_s >= 1e9 {
        format!("{:.1} GB/s", bytes_per_s / 1e9)
    } else {
        format!("{}/s", output::size(bytes_per_s as u64))
    }
}

/// `61 %`.
pub(super) fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}
