//! The router: which experts a token uses, and with what weight. Pure arithmetic over one token's scores.
//!
//! The variants are those of llama.cpp's graph builder: softmax over all experts (Mixtral, Qwen, OLMoE, Granite),
//! sigmoid (DeepSeek-V3), softmax over the chosen (gpt-oss); a bias that counts for choosing only; groups of
//! experts of which the best are kept (DeepSeek-V3, arXiv 2412.19437); weights normalised and scaled or not.

/// How scores become probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all experts, then the best are chosen.
    Softmax,
    /// Each expert's own sigmoid.
    Sigmoid,
    /// The best scores are chosen, then softmax over the chosen.
    SoftmaxOfChosen,
}

/// A layer's rules for choosing experts.
#[derive(Clone, Debug)]
pub struct Router {
    /// Experts in the layer.
    pub n_expert: usize,
    /// Experts chosen for each token.
    pub n_expert_used: usize,
    /// How scores become probabilities.
    pub gating: Gating,
    /// Whether the chosen weights are divided by their sum.
    pub norm_weights: bool,
    /// What the weights are multiplied by in the end.
    pub scale: f32,
    /// Equal groups that the experts are divided into; 1 for none.
    pub n_group: usize,
    /// Groups that experts may be chosen from.
    pub n_group_used: usize,
}

/// An expert chosen for a token, with the weight of its output.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Pick {
    /// The expert's index in its layer.
    pub expert: u32,
    /// The weight of its output in the sum.
    pub weight: f32,
}

/// The sum of chosen weights is never taken as less than this (the smallest normal f16, as llama.cpp clamps it).
const MIN_WEIGHT_SUM: f32 = 6.103_515_6e-5;

impl Router {
    /// Chooses experts from one token's `scores` (n_expert), best first, into `picks` (n_expert_used).
    /// `bias` (n_expert) is added for choosing only. Equal scores go to the lower index. `scores` is overwritten.
    pub fn route(&self, scores: &mut [f32], bias: Option<&[f32]>, picks: &mut [Pick]) {
        assert!(scores.len() == self.n_expert && picks.len() == self.n_expert_used);
        match self.gating {
            Gating::Softmax => softmax(scores),
            Gating::Sigmoid => scores.iter_mut().for_each(|s| *s = 1.0 / (1.0 + (-*s).exp())),
            Gating::SoftmaxOfChosen => {}
        }
        // What isn't a number is chosen, so that it shows in the output.
        let mut rank = |e: usize| {
            let score = scores[e] + bias.map_or(0.0, |b| b[e]);
            if score.is_nan() { f32::INFINITY } else { score }
        };
        if self.n_group > 1 {
            let choice: Vec<f32> = (0..self.n_expert).map(&mut rank).collect();
            let allowed = self.best_groups(&choice);
            let size = self.n_expert / self.n_group;
            choose(picks, self.n_expert, |e| if allowed[e / size] { choice[e] } else { f32::NEG_INFINITY });
        } else {
            choose(picks, self.n_expert, rank);
        }
        for p in picks.iter_mut() {
            p.weight = scores[p.expert as usize];
        }
        self.finish_weights(picks);
    }

    /// Which groups are kept: those whose two best experts have the largest sum.
    fn best_groups(&self, choice: &[f32]) -> Vec<bool> {
        let mut sums: Vec<(f32, usize)> = choice
            .chunks(self.n_expert / self.n_group)
            .enumerate()
            .map(|(g, c)| {
                let (mut a, mut b) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
                for &s in c {
                    (a, b) = if s > a { (s, a) } else { (a, b.max(s)) };
                }
                (if b.is_finite() { a + b } else { a }, g)
            })
            .collect();
        sums.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)));
        let mut allowed = vec![false; self.n_group];
        sums.iter().take(self.n_group_used).for_each(|&(_, g)| allowed[g] = true);
        allowed
    }

    /// How probable an expert is against another, by their scores as [`Router::route`] leaves them.
    pub(super) fn odds(&self, score: f32, than: f32) -> f32 {
        if self.gating == Gating::SoftmaxOfChosen { (score - than).exp() } else { score / than }
    }

    pub(super) fn finish_weights(&self, picks: &mut [Pick]) {
        if self.gating == Gating::SoftmaxOfChosen {
            let max = picks.iter().fold(f32::NEG_INFINITY, |m, p| m.max(p.weight));
            picks.iter_mut().for_each(|p| p.weight = (p.weight - max).exp());
            let sum: f32 = picks.iter().map(|p| p.weight).sum();
            picks.iter_mut().for_each(|p| p.weight /= sum);
        }
        if self.norm_weights {
            let sum = picks.iter().map(|p| p.weight).sum::<f32>().max(MIN_WEIGHT_SUM);
            picks.iter_mut().for_each(|p| p.weight /= sum);
        }
        if self.scale != 0.0 && self.scale != 1.0 {
            picks.iter_mut().for_each(|p| p.weight *= self.scale);
        }
    }
}

/// Fills `picks` with the experts of highest `score`, best first, the lower index first among equals.
fn choose(picks: &mut [Pick], n_expert: usize, mut score: impl FnMut(usize) -> f32) {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(picks.len() + 1);
    for e in 0..n_expert {
        let s = score(e);
        if best.len() < picks.len() || s > best[best.len() - 1].0 {
            let at = best.partition_point(|b| b.0 >= s);
            best.insert(at, (s, e as u32));
            best.truncate(picks.len());
        }
    }
    for (p, b) in picks.iter_mut().zip(best) {
        p.expert = b.1;
    }
}

fn softmax(x: &mut [f32]) {
    let max = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let mut sum = 0.0;
    for v in x.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    x.iter_mut().for_each(|v| *v /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn router(n_expert: usize, n_expert_used: usize, gating: Gating) -> Router {
        Router { n_expert, n_expert_used, gating, norm_weights: false, scale: 1.0, n_group: 1, n_group_used: 1 }
    }

    fn route(r: &Router, scores: &[f32], bias: Option<&[f32]>) -> Vec<Pick> {
        let mut picks = vec![Pick::default(); r.n_expert_used];
        r.route(&mut scores.to_vec(), bias, &mut picks);
        picks
    }

    #[test]
    fn softmax_before_or_after_choosing() {
        let scores = [0.0, 2.0, 1.0, 2.0];
        let all = route(&router(4, 2, Gating::Softmax), &scores, None);
        assert_eq!([all[0].expert, all[1].expert], [1, 3], "equal scores go to the lower index");
        let e: f32 = scores.iter().map(|s| (s - 2.0f32).exp()).sum();
        assert!((all[0].weight - 1.0 / e).abs() < 1e-6);
        let chosen = route(&router(4, 2, Gating::SoftmaxOfChosen), &scores, None);
        assert!((chosen[0].weight - 0.5).abs() < 1e-6 && (chosen[1].weight - 0.5).abs() < 1e-6);
    }

    #[test]
    fn bias_counts_for_choosing_only() {
        let r = Router { norm_weights: true, scale: 2.0, ..router(3, 2, Gating::Sigmoid) };
        let picks = route(&r, &[1.0, 0.0, -1.0], Some(&[0.0, 0.0, 5.0]));
        assert_eq!([picks[0].expert, picks[1].expert], [2, 0]);
        let s = |x: f32| 1.0 / (1.0 + (-x).exp());
        let sum = s(-1.0) + s(1.0);
        assert!((picks[0].weight - 2.0 * s(-1.0) / sum).abs() < 1e-6);
    }

    #[test]
    fn only_the_best_groups_are_open() {
        // Expert 0 is the best of all, but the pair in the second group has the larger sum.
        let r = Router { n_group: 2, n_group_used: 1, ..router(4, 2, Gating::Sigmoid) };
        let picks = route(&r, &[3.0, -9.0, 2.0, 2.5], None);
        assert_eq!([picks[0].expert, picks[1].expert], [3, 2]);
    }

    #[test]
    fn vanishing_weights_are_not_blown_up() {
        let r = Router { norm_weights: true, ..router(2, 1, Gating::Sigmoid) };
        assert!(route(&r, &[-40.0, -50.0], None)[0].weight < 1e-6);
    }

    #[test]
    fn what_is_not_a_number_is_chosen_and_shows() {
        for gating in [Gating::Softmax, Gating::Sigmoid, Gating::SoftmaxOfChosen] {
            for n_group in [1, 2] {
                let r = Router { n_group, norm_weights: true, ..router(4, 2, gating) };
                let picks = route(&r, &[1.0, 3.0, 2.0, f32::NAN], None);
                assert!(picks.iter().any(|p| p.weight.is_nan()), "{gating:?}, {n_group} groups: {picks:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn picks_are_the_best_distinct_experts(scores in proptest::collection::vec(-8f32..8.0, 1..130), k in 1usize..9) {
            let k = k.min(scores.len());
            let picks = route(&router(scores.len(), k, Gating::SoftmaxOfChosen), &scores, None);
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
            let want: Vec<u32> = order[..k].iter().map(|&e| e as u32).collect();
            prop_assert_eq!(picks.iter().map(|p| p.expert).collect::<Vec<_>>(), want);
            prop_assert!((picks.iter().map(|p| p.weight).sum::<f32>() - 1.0).abs() < 1e-5);
        }

        #[test]
        fn hostile_scores_do_not_panic(bits in proptest::collection::vec(any::<u32>(), 8)) {
            let scores: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
            for gating in [Gating::Softmax, Gating::Sigmoid, Gating::SoftmaxOfChosen] {
                let r = Router { n_group: 4, n_group_used: 2, norm_weights: true, ..router(8, 3, gating) };
                let picks = route(&r, &scores, Some(&scores));
                prop_assert!(picks.iter().all(|p| p.expert < 8));
            }
        }
    }
}
