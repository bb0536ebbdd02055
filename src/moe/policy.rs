//! Which expert leaves when another needs its slot. Pure: told what was used and when, asked for a rank.
//!
//! Below one token's cycle (layers x experts used) a plain LRU never hits, because every expert is evicted just
//! before its next turn; the decayed LFU keeps the popular ones. Half-life and figures: `docs/paging.md`.

/// An eviction policy over experts, each known by its index (layer x n_expert + expert).
pub trait Policy: Send {
    /// The name that the command line knows it by.
    fn name(&self) -> &'static str;
    /// The expert was used by the token at `now` (a count of tokens), by `n` tokens of the block.
    fn used(&mut self, expert: usize, n: u32, now: u64);
    /// How much the expert deserves its slot: the lowest rank leaves. It changes only when that expert is used, so
    /// the store can keep residents in order instead of scanning them.
    fn rank(&self, expert: usize) -> f64;
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
///
/// All heats fade alike, so their order doesn't change with time, and the rank is the logarithm of the heat that an
/// expert would have had at time 0.
pub struct Dlfu {
    /// log2 of the heat, as of time 0.
    ranks: Vec<f64>,
}

impl Dlfu {
    /// Tokens after which a use counts half. On the Qwen3-30B-A3B trace 8 is the best of 2 to 64.
    pub const HALF_LIFE: f64 = 8.0;

    fn new(n: usize) -> Self {
        Dlfu { ranks: vec![f64::NEG_INFINITY; n] }
    }
}

impl Policy for Dlfu {
    fn name(&self) -> &'static str {
        "dlfu"
    }
    fn used(&mut self, expert: usize, n: u32, now: u64) {
        let now = now as f64 / Self::HALF_LIFE;
        let heat = (self.ranks[expert] - now).exp2() + f64::from(n);
        self.ranks[expert] = heat.log2() + now;
    }
    fn rank(&self, expert: usize) -> f64 {
        self.ranks[expert]
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
    fn rank(&self, expert: usize) -> f64 {
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
    fn rank(&self, expert: usize) -> f64 {
        self.count[expert] as f64 + self.recent.rank(expert) / (self.recent.clock + 1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order in which experts 0..n would leave.
    fn leaving(p: &dyn Policy, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| p.rank(a).total_cmp(&p.rank(b)));
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
            leaving(&*p, 3)
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
