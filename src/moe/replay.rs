//! Any policy over a recorded trace, beside the optimum that knows the future. Pure.

use super::policy::{MakePolicy, Policy};
use super::trace::{Phase, Trace};

/// Who competes for slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// All layers, as in the store.
    Global,
    /// Each layer's experts among themselves.
    Layer,
}

/// What came of it. Written tokens count where there are any; the tokens before them fill the slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// Uses of experts.
    pub uses: u64,
    /// Of them, those that found the expert at hand.
    pub hits: u64,
    /// Tokens.
    pub tokens: u64,
    /// Bytes that were missing, where the trace knows the experts' sizes.
    pub bytes_read: u64,
}

impl Outcome {
    /// The share of uses that were hits.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / self.uses.max(1) as f64
    }
}

/// Replays a policy with `slots` for each layer of the trace.
pub fn replay(trace: &Trace, make: MakePolicy, slots: usize, sharing: Sharing) -> Outcome {
    let h = &trace.header;
    let mut policy = make(h.n_layer, h.n_expert);
    run(trace, slots, sharing, &mut Online { policy: &mut *policy, n_expert: h.n_expert })
}

/// Replays a policy with `slots` in all, shared by all layers.
pub fn replay_shared(trace: &Trace, make: MakePolicy, slots: usize) -> Outcome {
    let h = &trace.header;
    let mut policy = make(h.n_layer, h.n_expert);
    run_groups(trace, slots, 1, &mut Online { policy: &mut *policy, n_expert: h.n_expert })
}

/// Belady's optimum: whoever is needed last leaves.
pub fn optimum(trace: &Trace, slots: usize, sharing: Sharing) -> Outcome {
    run(trace, slots, sharing, &mut Belady::new(trace))
}

/// What a replay asks who should leave.
trait Judge {
    /// The token's uses in a layer begin at the `at`-th use of the trace.
    fn used(&mut self, key: usize, now: u64, at: usize);
    /// The lowest leaves.
    fn rank(&self, key: usize) -> f64;
}

struct Online<'a> {
    policy: &'a mut dyn Policy,
    n_expert: usize,
}

impl Judge for Online<'_> {
    fn used(&mut self, key: usize, now: u64, _: usize) {
        self.policy.used(key, 1, now);
    }
    fn rank(&self, key: usize) -> f64 {
        self.policy.rank(key) + self.policy.layer_rank(key / self.n_expert)
    }
}

struct Belady {
    /// For each use of the trace, when its expert is used again: an index of uses, or their number.
    next: Vec<usize>,
    /// For each expert, as of now.
    next_of: Vec<usize>,
}

impl Belady {
    fn new(trace: &Trace) -> Self {
        let h = &trace.header;
        let keys: Vec<usize> = trace
            .tokens()
            .flat_map(|t| t.1)
            .map(|&(layer, expert)| layer as usize * h.n_expert + expert as usize)
            .collect();
        let (mut next, mut next_of) = (vec![0; keys.len()], vec![keys.len(); h.n_layer * h.n_expert]);
        for (i, &key) in keys.iter().enumerate().rev() {
            next[i] = std::mem::replace(&mut next_of[key], i);
        }
        Belady { next, next_of }
    }
}

impl Judge for Belady {
    fn used(&mut self, key: usize, _: u64, at: usize) {
        self.next_of[key] = self.next[at];
    }
    fn rank(&self, key: usize) -> f64 {
        -(self.next_of[key] as f64)
    }
}

/// As the store does it: a layer's uses are told first, then each miss takes a slot, which no expert of the same token and
/// layer has to give while there is another.
fn run(trace: &Trace, slots: usize, sharing: Sharing, judge: &mut dyn Judge) -> Outcome {
    match sharing {
        Sharing::Global => run_groups(trace, slots.saturating_mul(trace.header.n_layer), 1, judge),
        Sharing::Layer => run_groups(trace, slots, trace.header.n_layer, judge),
    }
}

/// With `cap` slots for each of 1 or n_layer groups of layers.
fn run_groups(trace: &Trace, cap: usize, n_groups: usize, judge: &mut dyn Judge) -> Outcome {
    let h = &trace.header;
    // The residents of each group.
    let mut groups: Vec<Vec<usize>> = vec![Vec::new(); n_groups];
    let mut resident = vec![false; h.n_layer * h.n_expert];
    let counted = if trace.tokens().any(|t| t.0 == Phase::Decode) { Phase::Decode } else { Phase::Prefill };
    let (mut outcome, mut at) = (Outcome::default(), 0);
    for (now, (phase, uses)) in trace.tokens().enumerate() {
        outcome.tokens += u64::from(phase == counted);
        for of_layer in uses.chunk_by(|a, b| a.0 == b.0) {
            let layer = of_layer[0].0 as usize;
            let keys: Vec<usize> = of_layer.iter().map(|u| layer * h.n_expert + u.1 as usize).collect();
            for &key in &keys {
                judge.used(key, now as u64 + 1, at);
                at += 1;
            }
            if phase == counted {
                let hits = keys.iter().filter(|&&k| resident[k]).count() as u64;
                outcome.uses += keys.len() as u64;
                outcome.hits += hits;
                let missing = (keys.len() as u64 - hits).saturating_mul(h.layer_bytes[layer].0);
                outcome.bytes_read = outcome.bytes_read.saturating_add(missing);
            }
            let group = &mut groups[if n_groups == 1 { 0 } else { layer }];
            let missing: Vec<usize> = keys.iter().copied().filter(|&k| !resident[k]).collect();
            for key in missing {
                resident[key] = true;
                if group.len() < cap {
                    group.push(key);
                } else if let Some(place) = victim(group, &keys, judge) {
                    resident[std::mem::replace(&mut group[place], key)] = false;
                } else {
                    resident[key] = false;
                }
            }
        }
    }
    outcome
}

/// Whose slot is given away; one of the same token's experts only if there is nobody else.
fn victim(group: &[usize], wanted: &[usize], judge: &dyn Judge) -> Option<usize> {
    let rank = |&i: &usize| (wanted.contains(&group[i]), judge.rank(group[i]));
    let order = |a: &(bool, f64), b: &(bool, f64)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1));
    (0..group.len()).map(|i| (rank(&i), i)).min_by(|a, b| order(&a.0, &b.0)).map(|r| r.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::policy::POLICIES;
    use proptest::prelude::*;

    /// A trace of one expert a token and layer.
    fn trace(n_layer: usize, n_expert: usize, experts: &[u32]) -> Trace {
        let mut text = format!("# route_trace v1\n# n_layer={n_layer} n_expert={n_expert} n_expert_used=1\n");
        text += "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n";
        for (i, e) in experts.iter().enumerate() {
            text += &format!("0,1,{},{},0,{e},1,0,0\n", i / n_layer, i % n_layer);
        }
        Trace::read(text.as_bytes()).unwrap()
    }

    #[test]
    fn the_textbook_s_example() {
        // Silberschatz et al., Operating System Concepts: 3 frames, 9 faults at the optimum and 12 with LRU.
        let pages = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1];
        let t = trace(1, 8, &pages);
        assert_eq!(optimum(&t, 3, Sharing::Global), Outcome { uses: 20, hits: 11, tokens: 20, bytes_read: 0 });
        let lru = POLICIES.iter().find(|p| p.0 == "lru").unwrap().1;
        assert_eq!(replay(&t, lru, 3, Sharing::Layer).hits, 8);
    }

    #[test]
    fn below_a_cycle_lru_never_hits_and_the_default_does() {
        // Four layers with a popular expert each, two slots in all: half of one token's cycle.
        let experts: Vec<u32> = (0..400u32).map(|i| if (i / 4 + i) % 4 > 0 { 0 } else { 1 + i % 7 }).collect();
        let t = trace(4, 8, &experts);
        let cap = |make| replay_shared(&t, make, 2);
        assert_eq!(cap(POLICIES.iter().find(|p| p.0 == "lru").unwrap().1).hits, 0);
        assert!(cap(POLICIES[0].1).hits > 0);
    }

    proptest! {
        /// Nobody is better than the optimum, everything is at hand with a slot for every expert but for first uses, and more
        /// slots never hurt the optimum.
        #[test]
        fn the_optimum_is_a_bound(experts in prop::collection::vec(0u32..6, 2..200), slots in 1usize..6) {
            let t = trace(2, 6, &experts[..experts.len() / 2 * 2]);
            for sharing in [Sharing::Global, Sharing::Layer] {
                let best = optimum(&t, slots, sharing);
                prop_assert!(optimum(&t, slots + 1, sharing).hits >= best.hits);
                let mut seen: Vec<_> = t.tokens().flat_map(|t| t.1).collect();
                seen.sort();
                seen.dedup();
                for (name, make) in POLICIES {
                    let got = replay(&t, *make, slots, sharing);
                    prop_assert!(got.hits <= best.hits, "{name}: {} of {}", got.hits, best.hits);
                    prop_assert_eq!(got.uses, best.uses);
                    let all = replay(&t, *make, 6, sharing);
                    prop_assert_eq!(all.uses - all.hits, seen.len() as u64, "{}", name);
                }
            }
        }
    }
}
