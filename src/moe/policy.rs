//! Which expert leaves when another needs its slot. Pure: told what was used and when, asked for a rank.
//!
//! Below one token's cycle (layers x experts used) a plain LRU never hits, because every expert is evicted just
//! before its next turn; the policies that count keep the popular ones. Figures of all of them: `docs/paging.md`.

/// An eviction policy over experts, each known by its index (layer x n_expert + expert).
///
/// An expert deserves its slot as much as `rank(expert) + layer_rank(layer)` says: the lowest leaves. The parts are
/// apart so that a store can keep the residents of a layer in order and compare only the first of each.
pub trait Policy: Send {
    /// The name that the command line knows it by.
    fn name(&self) -> &'static str;
    /// The expert was used by `n` tokens of the block that ends at `now` (a count of tokens). A layer's uses come
    /// together, and its next ones with a later `now`.
    fn used(&mut self, expert: usize, n: u32, now: u64);
    /// How much the expert deserves its slot, among those of its layer. It changes only when the expert is used, or
    /// is among [`Policy::each_changed`].
    fn rank(&self, expert: usize) -> f64;
    /// What is added to the ranks of all experts of a layer; it may change whenever an expert is used.
    fn layer_rank(&self, _layer: usize) -> f64 {
        0.0
    }
    /// Names the experts whose rank has changed since the last call without their being used.
    fn each_changed(&mut self, _f: &mut dyn FnMut(usize)) {}
}

/// Makes a policy for (n_layer, n_expert).
pub type MakePolicy = fn(n_layer: usize, n_expert: usize) -> Box<dyn Policy>;

/// Every policy, the default first.
pub static POLICIES: &[(&str, MakePolicy)] = &[
    ("stay", |l, e| Box::new(Stay::new(l, e))),
    ("dlfu", |l, e| Box::new(Dlfu::new(l * e))),
    ("lru", |l, e| Box::new(Lru::new(l * e))),
    ("lfu", |l, e| Box::new(Lfu::new(l * e))),
];

/// The policy of this name.
pub fn by_name(name: &str) -> Option<MakePolicy> {
    POLICIES.iter().find(|p| p.0 == name).map(|p| p.1)
}

/// Tokens after which a use counts half. On the Qwen3-30B-A3B trace 8 to 12 are the best of 2 to 64, on gpt-oss-120b's 6 to 8.
pub const HALF_LIFE: f64 = 8.0;

/// Decayed LFU in which the experts of a layer's last token stay until its next one, unless much hotter ones need the
/// room: what was just used comes again with three to four times the probability that its heat alone would say.
///
/// A layer's heats fade when it is used, not when the token begins: layers that have had their turn and layers that
/// still wait for it are compared as of their own last token. Of equals, those go whose layer's next turn is farthest.
pub struct Stay {
    n_expert: usize,
    /// log2 of the heat, as of time 0, with the bonus of those that stay.
    ranks: Vec<f64>,
    layers: Vec<LayerUse>,
    /// The layer of the last use.
    at: usize,
    /// Whose bonus has ended.
    changed: Vec<usize>,
}

/// A layer's last block.
#[derive(Clone, Default)]
struct LayerUse {
    /// When it ended.
    now: u64,
    /// Its length, as far as the layer can tell.
    n_tokens: u64,
    /// The experts that it used.
    stay: Vec<usize>,
}

impl Stay {
    /// What the experts of the last token gain: two bits, a factor of 4.
    const BONUS: f64 = 2.0;
    /// What a whole token's distance to a layer's next turn costs: half a bit.
    const DISTANCE: f64 = 0.5;

    fn new(n_layer: usize, n_expert: usize) -> Self {
        Stay {
            n_expert,
            ranks: vec![f64::NEG_INFINITY; n_layer * n_expert],
            layers: vec![LayerUse::default(); n_layer],
            at: 0,
            changed: Vec::new(),
        }
    }

    /// What one use in a block of so many tokens counts: the block's uses are taken as spread evenly over it.
    fn share(n_tokens: u64) -> f64 {
        let fade = (-1.0 / HALF_LIFE).exp2();
        (1.0 - fade.powf(n_tokens as f64)) / (n_tokens as f64 * (1.0 - fade))
    }
}

impl Policy for Stay {
    fn name(&self) -> &'static str {
        "stay"
    }
    fn used(&mut self, expert: usize, n: u32, now: u64) {
        self.at = expert / self.n_expert;
        let layer = &mut self.layers[self.at];
        if layer.now != now {
            layer.n_tokens = now.saturating_sub(layer.now).max(1);
            layer.now = now;
            for e in layer.stay.drain(..) {
                self.ranks[e] -= Self::BONUS;
                self.changed.push(e);
            }
        }
        let (now, n_tokens) = (now as f64 / HALF_LIFE, layer.n_tokens.max(1));
        let staying = layer.stay.contains(&expert);
        let before = self.ranks[expert] - if staying { Self::BONUS } else { 0.0 };
        let heat = (before - now).exp2() + f64::from(n) * Self::share(n_tokens);
        self.ranks[expert] = heat.log2() + now + Self::BONUS;
        if !staying {
            layer.stay.push(expert);
        }
    }
    fn rank(&self, expert: usize) -> f64 {
        self.ranks[expert]
    }
    fn layer_rank(&self, layer: usize) -> f64 {
        let n_layer = self.layers.len();
        let distance = (layer + n_layer - self.at - 1) % n_layer;
        -(self.layers[layer].now as f64) / HALF_LIFE - Self::DISTANCE * distance as f64 / n_layer as f64
    }
    fn each_changed(&mut self, f: &mut dyn FnMut(usize)) {
        self.changed.drain(..).for_each(f);
    }
}

/// Decayed least frequently used: a use counts 1 and loses half of that every [`HALF_LIFE`] tokens.
///
/// All heats fade alike, so their order doesn't change with time, and the rank is the logarithm of the heat that an
/// expert would have had at time 0.
struct Dlfu {
    /// log2 of the heat, as of time 0.
    ranks: Vec<f64>,
}

impl Dlfu {
    fn new(n: usize) -> Self {
        Dlfu { ranks: vec![f64::NEG_INFINITY; n] }
    }
}

impl Policy for Dlfu {
    fn name(&self) -> &'static str {
        "dlfu"
    }
    fn used(&mut self, expert: usize, n: u32, now: u64) {
        let now = now as f64 / HALF_LIFE;
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
        // A count is worth more than any recency: recency is scaled into less than one.
        self.count[expert] as f64 + self.recent.rank(expert) / 2f64.powi(40)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The order in which experts 0..n of one layer would leave.
    fn leaving(p: &dyn Policy, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| p.rank(a).total_cmp(&p.rank(b)));
        order
    }

    #[test]
    fn each_policy_keeps_what_its_name_says() {
        let order = |name: &str| {
            let mut p = by_name(name).unwrap()(1, 3);
            for now in 1..5 {
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
        assert_eq!(order("stay"), [0, 2, 1]);
    }

    #[test]
    fn the_last_token_s_experts_stay_and_then_don_t() {
        let mut p = Stay::new(2, 3);
        p.used(0, 1, 1);
        p.used(0, 1, 2);
        p.used(1, 1, 3); // cooler than 0, but just used
        assert!(p.rank(1) > p.rank(0));
        p.used(3, 1, 3); // the other layer ends nobody's stay
        assert!(p.rank(1) > p.rank(0));
        p.used(2, 1, 4);
        assert!(p.rank(0) > p.rank(1) && p.rank(2) > p.rank(0));
        let mut changed = Vec::new();
        p.each_changed(&mut |e| changed.push(e));
        assert_eq!(changed, [0, 0, 1], "0 stayed twice, then 1");
    }

    #[test]
    fn equals_go_from_the_layer_whose_turn_is_farthest() {
        let mut p = Stay::new(3, 1);
        for now in 1..4 {
            (0..3).for_each(|e| p.used(e, 1, now));
        }
        p.used(0, 1, 4);
        p.used(1, 1, 4); // layer 2 comes next, then 0, then 1
        let worth = |e| p.rank(e) + p.layer_rank(e);
        assert!(worth(2) < worth(1), "one use less, and a token behind");
        p.used(2, 1, 4);
        let worth = |e| p.rank(e) + p.layer_rank(e);
        assert!(worth(0) > worth(1) && worth(1) > worth(2));
    }

    #[test]
    fn a_prompt_s_uses_count_as_if_spread_over_it() {
        let (mut one_by_one, mut block) = (Stay::new(1, 2), Stay::new(1, 2));
        for now in 1..=64 {
            one_by_one.used(0, 1, now);
        }
        block.used(0, 64, 64);
        assert!((one_by_one.rank(0) - block.rank(0)).abs() < 1e-9);
    }

    #[test]
    fn names_are_the_registry_s() {
        for (name, make) in POLICIES {
            assert_eq!(make(1, 1).name(), *name);
        }
    }

    proptest! {
        /// What a store that keeps an order relies on: a rank changes by use, or it is reported; and never to NaN.
        #[test]
        fn ranks_change_only_by_use_or_with_a_report(
            blocks in prop::collection::vec((1u64..50, prop::collection::vec((0usize..12, 1u32..20), 1..8)), 1..40),
        ) {
            for (name, make) in POLICIES {
                let (n_layer, n_expert) = (3, 4);
                let mut p = make(n_layer, n_expert);
                let mut now = 0;
                for (n_tokens, uses) in &blocks {
                    now += n_tokens;
                    for layer in 0..n_layer {
                        let before: Vec<f64> = (0..12).map(|e| p.rank(e)).collect();
                        let mut told = [false; 12];
                        for &(e, n) in uses.iter().filter(|u| u.0 / n_expert == layer) {
                            if !told[e] {
                                p.used(e, n, now);
                            }
                            told[e] = true;
                        }
                        p.each_changed(&mut |e| told[e] = true);
                        for e in 0..12 {
                            prop_assert!(told[e] || p.rank(e) == before[e], "{name}: {e}");
                            prop_assert!(!(p.rank(e) + p.layer_rank(e / n_expert)).is_nan(), "{name}: {e}");
                        }
                    }
                }
            }
        }
    }
}
