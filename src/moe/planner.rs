//! What fits where, and how fast it will be: arithmetic over a model's sizes, a machine's rates and a hit-rate curve. Pure.

use super::policy::POLICIES;
use super::replay::replay_shared;
use super::trace::{Trace, TraceHeader, TraceWriter};
use super::{Pick, trace};
use crate::synth::rng::Rng;

/// Buffers for a block of tokens, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct BufferBytes {
    /// However short the block is.
    pub fixed: u64,
    /// For each token.
    pub per_token: u64,
    /// Pairs of a token and an expert for each token.
    pub pairs_per_token: usize,
    /// Pairs that are computed together, unless one expert has more: it can have one for each token.
    pub most_pairs: usize,
    /// For each pair that is computed together with others.
    pub per_pair: u64,
}

impl BufferBytes {
    /// Those of a block of `n_tokens`.
    pub fn of(&self, n_tokens: usize) -> u64 {
        let pairs = n_tokens.saturating_mul(self.pairs_per_token).min(self.most_pairs.max(n_tokens));
        let (tokens, pairs) =
            ((n_tokens as u64).saturating_mul(self.per_token), (pairs as u64).saturating_mul(self.per_pair));
        self.fixed.saturating_add(tokens).saturating_add(pairs)
    }
}

/// What a model needs of memory; all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Needs {
    /// The program, its tokeniser, and small things.
    pub base: u64,
    /// Dense weights.
    pub dense: u64,
    /// The KV cache, full.
    pub kv: u64,
    /// The KV cache of one block of positions.
    pub kv_block: u64,
    /// Buffers for a block of tokens.
    pub buffers: BufferBytes,
    /// The fewest slots that work.
    pub least_slots: u64,
    /// Slots for every expert.
    pub all_slots: u64,
    /// Tokens of a prompt that go through the layers together where there is room.
    pub chunk: usize,
}

/// How a budget is divided, besides what is fixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Tokens of a prompt that go through the layers together.
    pub chunk: usize,
    /// Bytes of buffers for them.
    pub activations: u64,
    /// Bytes of slots for experts.
    pub slots: u64,
}

impl Needs {
    /// Everything but slots.
    fn fixed(&self, chunk: usize) -> u64 {
        [self.dense, self.kv, self.buffers.of(chunk)].into_iter().fold(self.base, u64::saturating_add)
    }

    /// The smallest budget that works.
    pub fn smallest(&self) -> u64 {
        self.fixed(1).saturating_add(self.least_slots)
    }

    /// The budget from which on nothing is read twice.
    pub fn no_reads(&self) -> u64 {
        self.fixed(self.chunk.max(1)).saturating_add(self.all_slots)
    }

    /// The budget from which on `n_used` of every layer's `n` experts have slots at a moment as of [`Needs::slots_now`]: a token's.
    pub fn one_cycle(&self, (n, n_used): (usize, usize), n_kv_blocks: u64) -> u64 {
        let slots = (u128::from(self.all_slots) * n_used as u128).div_ceil(n.max(1) as u128) as u64;
        self.now(n_kv_blocks).fixed(1).saturating_add(slots)
    }

    /// While the KV cache holds so many blocks.
    fn now(&self, n_kv_blocks: u64) -> Needs {
        Needs { kv: self.kv.min(self.kv_block.saturating_mul(n_kv_blocks)), ..*self }
    }

    /// Divides a budget; `None` if it's too small. Where it's short, blocks of tokens are made shorter before slots are
    /// taken away.
    pub fn divide(&self, budget: u64) -> Option<Shares> {
        let mut chunk = self.chunk.max(1);
        while chunk > 1 && self.fixed(chunk).saturating_add(self.least_slots) > budget {
            chunk /= 2;
        }
        let left = budget.checked_sub(self.fixed(chunk))?;
        (left >= self.least_slots).then(|| Shares {
            chunk,
            activations: self.buffers.of(chunk),
            slots: left.min(self.all_slots),
        })
    }

    /// Bytes of slots at a moment when the KV cache holds so many blocks and a pass has so many tokens: what these don't
    /// need yet is the slots'. `None` if the budget is too small for it.
    pub fn slots_now(&self, budget: u64, n_kv_blocks: u64, n_tokens: usize) -> Option<u64> {
        let fixed = self.now(n_kv_blocks).fixed(n_tokens);
        Some(budget.checked_sub(fixed)?.min(self.all_slots)).filter(|&slots| slots >= self.least_slots)
    }

    /// The share of all experts that have a slot with this many bytes of slots.
    pub fn share(&self, slots: u64) -> f64 {
        if self.all_slots == 0 { 1.0 } else { slots as f64 / self.all_slots as f64 }
    }
}

/// What is assumed about which experts a text uses.
pub enum Routing {
    /// A recorded run.
    Recorded(Trace),
    /// Like trained models: see [`typical_trace`].
    Typical(Trace),
    /// All experts alike, each token anew: the worst case.
    Uniform,
}

impl Routing {
    /// The share of an answer's expert uses that find the expert at hand when this share of all experts has a slot. Slots are empty
    /// before its prompt: even where every expert has one, some are read for the first time (not with `Uniform`, which has no beginning).
    pub fn hit_rate(&self, share: f64) -> f64 {
        let share = share.clamp(0.0, 1.0);
        match self {
            Routing::Uniform => share,
            Routing::Recorded(t) | Routing::Typical(t) => {
                let slots = share * (t.header.n_layer * t.header.n_expert) as f64;
                replay_shared(t, POLICIES[0].1, slots as usize).hit_rate()
            }
        }
    }
}

/// What a token costs.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Cost {
    /// Seconds of computing, everything at hand; `None` where there was too little memory to measure.
    pub compute_s: Option<f64>,
    /// Bytes of the experts that it uses.
    pub used_expert_bytes: u64,
    /// Layers with experts.
    pub n_moe_layer: usize,
    /// Experts of each that a token uses.
    pub n_expert_used: usize,
    /// What reading costs; `None` where nobody has measured it.
    #[serde(flatten)]
    pub reading: Option<Reading>,
}

/// What reading experts costs.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Reading {
    /// Seconds of a token's computing while experts are read all the time: reading takes time of the cores and of the memory.
    pub beside_s: f64,
    /// Bytes of experts a second that are read and packed while nothing computes.
    pub disk_rate: f64,
    /// The same of what wasn't read before, or long ago: what is below a virtual disk may keep what is read again.
    pub first_rate: f64,
    /// As `disk_rate`, while all threads compute.
    pub disk_rate_beside: f64,
}

impl Reading {
    /// The same while the disk hasn't read anything before.
    fn at_first(self) -> Self {
        Self { disk_rate: self.first_rate, ..self }
    }

    /// Seconds of one of so many equal layers that reads so many bytes, all of which compute for `compute_s` alone. Computing and reading go on
    /// together and slow each other down, until one is done and the other has the machine to itself.
    fn layer_s(&self, compute_s: f64, layers: f64, bytes: f64) -> f64 {
        let (compute_s, beside_s) = (compute_s / layers, self.beside_s / layers);
        let beside = self.disk_rate_beside.min(self.disk_rate);
        let left = bytes - beside_s * beside;
        if left >= 0.0 {
            return beside_s + left / self.disk_rate;
        }
        let read_s = bytes / beside;
        read_s + compute_s * (1.0 - read_s / beside_s)
    }
}

impl Cost {
    /// Seconds of a token whose every use of an expert finds it at hand with this probability; `None` if what it does hasn't been measured.
    ///
    /// Layer by layer: the time in which one layer waits for its misses isn't made up by others that have none. So it isn't the mean
    /// number of misses that counts but how many fall together, which is taken as binomial.
    fn token_s(&self, hit_rate: f64, reading: Option<Reading>) -> Option<f64> {
        let (n, layers) = (self.n_expert_used, self.n_moe_layer.max(1) as f64);
        let expert = self.used_expert_bytes as f64 / (layers * n.max(1) as f64);
        let miss = 1.0 - hit_rate;
        if expert == 0.0 || miss <= 0.0 {
            return self.compute_s;
        }
        let (compute_s, reading) = (self.compute_s?, reading?);
        // Logarithms, since the binomial coefficients of thousands of experts are too large.
        let mut ln_choose = 0.0;
        let mut token_s = 0.0;
        for k in 0..=n {
            let ln_hits = if k < n { (n - k) as f64 * hit_rate.ln() } else { 0.0 };
            let probability = (ln_choose + k as f64 * miss.ln() + ln_hits).exp();
            token_s += probability * layers * reading.layer_s(compute_s, layers, k as f64 * expert);
            ln_choose += ((n - k) as f64 / (k + 1) as f64).ln();
        }
        Some(token_s)
    }
}

/// What is to be expected of a budget.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Forecast {
    /// The budget in bytes.
    pub bytes: u64,
    /// Bytes of slots.
    pub slots_bytes: u64,
    /// The share of all experts that have a slot.
    pub slot_share: f64,
    /// Tokens of a prompt that go through the layers together.
    pub chunk: usize,
    /// The share of expert uses that find the expert at hand.
    pub hit_rate: f64,
    /// Bytes that a token reads.
    pub bytes_per_token: u64,
    /// Seconds of a token's computing; `None` where there was too little memory to measure.
    pub compute_s: Option<f64>,
    /// Seconds that a token's reading takes alone; it goes on beside the computing.
    pub disk_s: Option<f64>,
    /// Tokens written in a second: computing and reading go on together and slow each other down, and a layer waits for its misses.
    pub tokens_per_s: Option<f64>,
    /// The same while the disk hasn't read the experts before.
    pub first_tokens_per_s: Option<f64>,
}

/// The forecast for a budget, for writing while the KV cache holds so many blocks; `None` if the budget is too small for the
/// whole context.
pub fn forecast(needs: &Needs, cost: &Cost, routing: &Routing, budget: u64, n_kv_blocks: u64) -> Option<Forecast> {
    let shares = needs.divide(budget)?;
    let slots = needs.slots_now(budget, n_kv_blocks, 1)?;
    let slot_share = needs.share(slots);
    let hit_rate = routing.hit_rate(slot_share);
    let bytes_per_token = (cost.used_expert_bytes as f64 * (1.0 - hit_rate)) as u64;
    let speed = |reading| cost.token_s(hit_rate, reading).map(|s| 1.0 / s.max(1e-9));
    let disk_s =
        if bytes_per_token == 0 { Some(0.0) } else { cost.reading.map(|r| bytes_per_token as f64 / r.disk_rate) };
    Some(Forecast {
        bytes: budget,
        slots_bytes: slots,
        slot_share,
        chunk: shares.chunk,
        hit_rate,
        bytes_per_token,
        compute_s: cost.compute_s,
        disk_s,
        tokens_per_s: speed(cost.reading),
        first_tokens_per_s: speed(cost.reading.map(Reading::at_first)),
    })
}

/// Layers of a typical trace: enough that shares of slots between them are fine.
const TYPICAL_LAYERS: usize = 8;
/// Its tokens: a prompt, and an answer, which counts.
const TYPICAL_TOKENS: (u32, u32) = (32, 224);

/// A made-up run of a model with so many experts whose routers are as unequal as trained ones: an expert's score is its own
/// popularity, drawn once (standard deviation 1.8), and what lasts (1.2 times an autoregression of 0.5) and what doesn't
/// (1) of the text; the best `n_expert_used` are taken; the first layer has no popularity. Its hit rates are within 5 points
/// of the recorded Qwen3-30B-A3B's.
pub fn typical_trace(n_expert: usize, n_expert_used: usize) -> Trace {
    let header = TraceHeader {
        model: "typical".into(),
        arch: "none".into(),
        n_layer: TYPICAL_LAYERS,
        n_expert,
        n_expert_used,
        layer_bytes: vec![(0, 0); TYPICAL_LAYERS],
    };
    let write = || -> Result<Trace, trace::TraceError> {
        let mut text = Vec::new();
        let mut w = TraceWriter::new(&mut text, &header)?;
        for layer in 0..TYPICAL_LAYERS {
            let mut rng = Rng::new(layer as u64, "typical routing");
            let popularity = if layer == 0 { 0.0 } else { 1.8 };
            let mu: Vec<f32> = (0..n_expert).map(|_| popularity * rng.normal()).collect();
            let mut lasting: Vec<f32> = (0..n_expert).map(|_| rng.normal()).collect();
            for step in 0..TYPICAL_TOKENS.0 + TYPICAL_TOKENS.1 {
                let mut scores: Vec<(f32, u32)> = Vec::with_capacity(n_expert);
                for e in 0..n_expert {
                    lasting[e] = 0.5 * lasting[e] + 0.75f32.sqrt() * rng.normal();
                    scores.push((mu[e] + 1.2 * lasting[e] + rng.normal(), e as u32));
                }
                scores.sort_by(|a, b| b.0.total_cmp(&a.0));
                let weight = 1.0 / n_expert_used as f32;
                let picks: Vec<Pick> = scores[..n_expert_used].iter().map(|s| Pick { expert: s.1, weight }).collect();
                let phase = if step < TYPICAL_TOKENS.0 { trace::Phase::Prefill } else { trace::Phase::Decode };
                w.token((0, phase, step), layer, &picks, |_| false)?;
            }
        }
        Trace::read(&text[..])
    };
    write().expect("a trace in memory, of sizes that a model's configuration was checked for")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUFFERS: BufferBytes =
        BufferBytes { fixed: 8, per_token: 8, pairs_per_token: 1, most_pairs: 100, per_pair: 2 };
    const NEEDS: Needs = Needs {
        base: 64,
        dense: 1000,
        kv: 300,
        kv_block: 30,
        buffers: BUFFERS,
        least_slots: 80,
        all_slots: 4000,
        chunk: 16,
    };

    #[test]
    fn a_budget_is_divided_to_the_byte() {
        assert_eq!(NEEDS.smallest(), 64 + 1000 + 300 + 18 + 80);
        assert_eq!(NEEDS.divide(NEEDS.smallest() - 1), None);
        assert_eq!(NEEDS.divide(NEEDS.smallest()), Some(Shares { chunk: 1, activations: 18, slots: 80 }));
        assert_eq!(NEEDS.divide(NEEDS.no_reads()), Some(Shares { chunk: 16, activations: 168, slots: 4000 }));
        assert!(NEEDS.divide(NEEDS.no_reads() - 1).unwrap().slots < 4000);
        assert_eq!(NEEDS.divide(u64::MAX).unwrap().slots, 4000);
    }

    #[test]
    fn from_one_cycle_on_a_token_s_experts_have_slots() {
        let cycle = NEEDS.one_cycle((8, 3), 2);
        assert_eq!(cycle, 64 + 1000 + 2 * 30 + 18 + 4000 * 3 / 8);
        assert_eq!(NEEDS.share(NEEDS.slots_now(cycle, 2, 1).unwrap()), 3.0 / 8.0);
    }

    #[test]
    fn pairs_of_a_long_block_are_computed_some_at_a_time() {
        let buffers = BufferBytes { fixed: 1, per_token: 10, pairs_per_token: 8, most_pairs: 100, per_pair: 1000 };
        assert_eq!([1, 12, 13, 100, 150].map(|n| buffers.of(n)), [8_011, 96_121, 100_131, 101_001, 151_501]);
    }

    #[test]
    fn computing_and_reading_go_on_together() {
        let reading = Reading { beside_s: 0.01, disk_rate: 10_000.0, first_rate: 5_000.0, disk_rate_beside: 10_000.0 };
        let cost = Cost {
            compute_s: Some(0.01),
            used_expert_bytes: 1000,
            n_moe_layer: 1,
            n_expert_used: 1,
            reading: Some(reading),
        };
        let f = |budget| forecast(&NEEDS, &cost, &Routing::Uniform, budget, 10).unwrap();
        // A short block leaves fifteen tokens' buffers to the slots.
        let half = f(NEEDS.no_reads() - 2000 - 150);
        assert_eq!((half.hit_rate, half.bytes_per_token), (0.5, 500));
        // Half of the tokens read for 100 ms, or 200 at first, the others compute for 10.
        assert!((half.tokens_per_s.unwrap() - 1.0 / 0.055).abs() < 1e-9);
        assert!((half.first_tokens_per_s.unwrap() - 1.0 / 0.105).abs() < 1e-9);
        assert!((f(NEEDS.no_reads()).tokens_per_s.unwrap() - 100.0).abs() < 1e-9);
        // Half as fast while there is reading: of 10 ms alone and 20 beside, 5 ms of reading leave three quarters.
        let slowed =
            |bytes, disk_rate_beside| Reading { beside_s: 0.02, disk_rate_beside, ..reading }.layer_s(0.01, 1.0, bytes);
        assert_eq!([0.0, 50.0, 200.0, 300.0].map(|b| slowed(b, 10_000.0)), [0.01, 0.0125, 0.02, 0.03]);
        // Beside computing half is read in the same time: after 20 ms 100 bytes are there, and the rest comes at the full rate.
        assert_eq!([0.0, 50.0, 100.0, 300.0].map(|b| slowed(b, 5_000.0)), [0.01, 0.015, 0.02, 0.04]);
        // Two layers of 5 ms that use two experts of 250 bytes each: with one miss of four uses, 9 of 16 layers have none, 6 wait for 25 ms
        // and 1 for 50.
        let layers = Cost { n_moe_layer: 2, n_expert_used: 2, ..cost };
        let want = 2.0 * (9.0 * 0.005 + 6.0 * 0.025 + 0.05) / 16.0;
        assert!((layers.token_s(0.75, cost.reading).unwrap() - want).abs() < 1e-12);
        // Nothing at hand; and so many experts that the numbers of ways to choose some of them are too large.
        assert!((layers.token_s(0.0, cost.reading).unwrap() - 0.1).abs() < 1e-12);
        let many = Cost { n_expert_used: 4096, ..layers };
        assert!((many.token_s(0.5, cost.reading).unwrap() - 0.05).abs() < 1e-6);
        let blind = Cost { reading: None, ..cost };
        assert_eq!(forecast(&NEEDS, &blind, &Routing::Uniform, NEEDS.smallest(), 10).unwrap().tokens_per_s, None);
        assert!(forecast(&NEEDS, &blind, &Routing::Uniform, NEEDS.no_reads(), 10).unwrap().tokens_per_s.is_some());
        let blind = Cost { compute_s: None, ..cost };
        assert_eq!(forecast(&NEEDS, &blind, &Routing::Uniform, NEEDS.no_reads(), 10).unwrap().tokens_per_s, None);
    }

    /// Against the recorded trace, whose default policy gives 49.7, 57.3, 76.3 and 93.4.
    #[test]
    fn the_typical_trace_is_like_a_recorded_one() {
        let routing = Routing::Typical(typical_trace(128, 6));
        for (slots, want) in [(9.0, 0.50), (12.0, 0.57), (24.0, 0.76), (48.0, 0.93)] {
            let got = routing.hit_rate(slots / 128.0);
            assert!((got - want).abs() < 0.05, "{slots} slots: {got:.3}, recorded {want}");
        }
    }

    proptest! {
        #[test]
        fn more_memory_is_never_worse(a in 0u64..8000, b in 0u64..8000, chunk in 1usize..64) {
            let needs = Needs { chunk, ..NEEDS };
            let (a, b) = (a.min(b), a.max(b));
            match (needs.divide(a), needs.divide(b)) {
                (Some(x), Some(y)) => {
                    prop_assert!(x.chunk <= y.chunk);
                    prop_assert!(x.slots <= y.slots || x.chunk < y.chunk);
                    let total = needs.base + needs.dense + needs.kv + x.activations + x.slots;
                    prop_assert!(total <= a && x.slots >= needs.least_slots);
                }
                (Some(_), None) => prop_assert!(false, "{a} works and {b} doesn't"),
                (None, _) => prop_assert!(a < needs.smallest()),
            }
        }
    }
}
