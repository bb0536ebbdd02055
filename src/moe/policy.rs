//! Which expert leaves when another needs its slot. Pure: told what was used and when, asked for a score.
//!
//! Below one token's cycle (layers x experts used) a plain LRU never hits, because every expert is evicted just
//! before its next turn; the decayed LFU keeps the popular ones. Half-life and figures: `docs/paging.md`.

/// An eviction policy over experts, each known by its index (layer x n_expert + expert).
pub trait Policy: Send {
    /// The name that the command line knows it by.
    fn name(&self) -> &'static str;
    /// The expert was used by the token at `now` (a count of tokens), by `n` tokens of the block.
    fn used(&mut self, expert: usize, n: u32, now: u64);
    /// How much the expert deserves its slot at `now`: the lowest score leaves.
    fn score(&self, expert: usize, now: u64) -> f64;
}

/// Makes a policy for a number of experts.
pub type MakePolicy = fn(n_experts: usize) -> Box<dyn Policy>;

/// Every policy, the default first.
pub static POLICIES: &[(&str, MakePolicy)] =
    &[("dlfu", |n| Box::new(Dlfu::new(n))), ("lru", |n| Box::new(Lru::new(n))), ("lfu", |n| Box::new(Lfu::new(n)))];

/// The policy of this name.
pub fn by_name(name: &str) -> Option<MakePolicy> {
    POLICIES.iter().find(|p| p.0 == name).map(|p| p.1)
}

/// Decayed least frequently used: a use counts 1 and loses half of that every [`Dlfu::HALF_LIFE`] tokens.
pub struct Dlfu {
    /// Heat at the time of the last use, and that time.
    heat: Vec<(f64, u64)>,
}

impl Dlfu {
    /// Tokens after which a use counts half. On the Qwen3-30B-A3B trace 8 is the best of 2 to 64.
    pub const HALF_LIFE: f64 = 8.0;

    fn new(n: usize) -> Self {
        Dlfu { heat: vec![(0.0, 0); n] }
    }

    fn decayed(&self, expert: usize, now: u64) -> f64 {
        let (heat, at) = self.heat[expert];
        heat * (-(now.saturating_sub(at) as f64) / Self::HALF_LIFE).exp2()
    }
}

impl Policy for Dlfu {
    fn name(&self) -> &'static str {
        "dlfu"
    }
    fn used(&mut self, expert: usize, n: u32, now: u64) {
        self.heat[expert] = (self.decayed(expert, now) + n as f64, now);
    }
    fn score(&self, expert: usize, now: u64) -> f64 {
        self.decayed(expert, now)
    }
}

/// Least recently used.
struct Lru {
    last: Vec<u64>,
    clock: u64,
}

impl Lru {
    fn new(n: usize) -> Self {
        Lru { last: vec![0; n], clock: 0 }
    }
}

impl Policy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }
    fn used(&mut self, expert: usize, _: u32, _: u64) {
        self.clock += 1;
        self.last[expert] = self.clock;
    }
    fn score(&self, expert: usize, _: u64) -> f64 {
        self.last[expert] as f64
    }
}

/// Least frequently used; among equals the least recent.
struct Lfu {
    count: Vec<u64>,
    recent: Lru,
}

impl Lfu {
    fn new(n: usize) -> Self {
        Lfu { count: vec![0; n], recent: Lru::new(n) }
    }
}

impl Policy for Lfu {
    fn name(&self) -> &'static str {
        "lfu"
    }
    fn used(&mut self, expert: usize, n: u32, now: u64) {
        self.count[expert] += u64::from(n);
        self.recent.used(expert, n, now);
    }
    fn score(&self, expert: usize, now: u64) -> f64 {
        self.count[expert] as f64 + self.recent.score(expert, now) / (self.recent.clock + 1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order in which experts 0..n would leave.
    fn leaving(p: &dyn Policy, n: usize, now: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| p.score(a, now).total_cmp(&p.score(b, now)));
        order
    }

    #[test]
    fn each_policy_keeps_what_its_name_says() {
        let order = |name: &str| {
            let mut p = by_name(name).unwrap()(3);
            for now in 0..4 {
                p.used(0, 1, now); // often, long ago
            }
            p.used(1, 1, 30);
            p.used(2, 1, 31);
            p.used(1, 1, 32);
            leaving(&*p, 3, 33)
        };
        assert_eq!(order("lru"), [0, 2, 1]);
        assert_eq!(order("lfu"), [2, 1, 0]);
        assert_eq!(order("dlfu"), [0, 2, 1]);
    }

    #[test]
    fn names_are_the_registry_s() {
        for (name, make) in POLICIES {
            assert_eq!(make(1).name(), *name);
        }
    }
}
