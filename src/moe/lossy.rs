//! Ways to read less that change the model's answer: off by default, named lossy where they can be asked for, and counted.
//!
//! Both look at which experts happen to be at hand, so what a model answers depends on the budget and on what came before:
//! promise 2 doesn't hold with them.

use super::router::{Pick, Router};

/// What may be given up. The default gives up nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lossy {
    /// An expert that isn't at hand is dropped if its share of the token's weight is less than this; the others share what it had.
    pub drop_cold: f32,
    /// An expert that isn't at hand, unless it's one of the token's two best, makes way for the best one at hand that isn't chosen
    /// yet, if that has at least 1 - this of its probability.
    pub prefer_resident: f32,
}

/// What was given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Losses {
    /// Experts dropped.
    pub dropped: u64,
    /// Experts that others stood in for.
    pub replaced: u64,
    /// Experts that weren't asked for, since tokens use fewer than the model was trained with.
    pub left_out: u64,
}

/// The best experts of a token, which nothing stands in for.
const PROTECTED: usize = 2;

impl Pick {
    /// No expert: the place of one that was dropped.
    pub const DROPPED: Pick = Pick { expert: u32::MAX, weight: 0.0 };

    /// Whether this is the place of an expert that was dropped.
    pub fn is_dropped(&self) -> bool {
        self.expert == u32::MAX
    }
}

impl Lossy {
    /// Whether nothing is given up.
    pub fn is_off(&self) -> bool {
        *self == Lossy::default()
    }

    /// Changes a token's `picks`, best first, that `router` chose by `scores` (n_expert, as [`Router::route`] leaves them).
    pub fn apply(&self, router: &Router, scores: &[f32], at_hand: &[bool], picks: &mut [Pick]) -> Losses {
        let mut losses = Losses::default();
        if self.prefer_resident > 0.0 {
            losses.replaced = self.replace(router, scores, at_hand, picks);
        }
        if self.drop_cold > 0.0 {
            losses.dropped = self.drop(at_hand, picks);
        }
        losses
    }

    fn replace(&self, router: &Router, scores: &[f32], at_hand: &[bool], picks: &mut [Pick]) -> u64 {
        let mut n = 0;
        for i in PROTECTED..picks.len() {
            let cold = picks[i].expert as usize;
            if at_hand[cold] {
                continue;
            }
            let free = |e: &usize| at_hand[*e] && picks.iter().all(|p| p.expert as usize != *e);
            let best = (0..scores.len()).filter(free).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
            if let Some(best) = best
                && router.odds(scores[best], scores[cold]) >= 1.0 - self.prefer_resident
            {
                picks[i] = Pick { expert: best as u32, weight: scores[best] };
                n += 1;
            }
        }
        if n > 0 {
            picks.iter_mut().for_each(|p| p.weight = scores[p.expert as usize]);
            router.finish_weights(picks);
        }
        n
    }

    fn drop(&self, at_hand: &[bool], picks: &mut [Pick]) -> u64 {
        let all: f32 = picks.iter().map(|p| p.weight).sum();
        let cold = |p: &Pick| !at_hand[p.expert as usize] && p.weight < self.drop_cold * all;
        let mut n = 0;
        // The best one stays: a token without any expert would be another model altogether.
        for p in picks.iter_mut().skip(1).filter(|p| cold(p)) {
            *p = Pick::DROPPED;
            n += 1;
        }
        let left: f32 = picks.iter().map(|p| p.weight).sum();
        if n > 0 && left > 0.0 {
            picks.iter_mut().for_each(|p| p.weight *= all / left);
        }
        n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::Gating;
    use proptest::prelude::*;

    fn router(gating: Gating, n_expert_used: usize) -> Router {
        Router { n_expert: 6, n_expert_used, gating, norm_weights: true, scale: 1.0, n_group: 1, n_group_used: 1 }
    }

    fn route(r: &Router, scores: &mut [f32]) -> Vec<Pick> {
        let mut picks = vec![Pick::default(); r.n_expert_used];
        r.route(scores, None, &mut picks);
        picks
    }

    #[test]
    fn a_cold_expert_of_little_weight_is_dropped_and_the_others_share_it() {
        let r = router(Gating::Softmax, 3);
        let mut scores = [3.0, 2.0, 0.0, -1.0, -1.0, -1.0];
        let mut picks = route(&r, &mut scores);
        let lossy = Lossy { drop_cold: 0.1, ..Lossy::default() };
        let losses = lossy.apply(&r, &scores, &[false; 6], &mut picks);
        assert_eq!(losses, Losses { dropped: 1, ..Losses::default() });
        assert!(picks[2].is_dropped());
        assert!((picks.iter().map(|p| p.weight).sum::<f32>() - 1.0).abs() < 1e-6);
        let mut warm = route(&r, &mut [3.0, 2.0, 0.0, -1.0, -1.0, -1.0]);
        assert_eq!(lossy.apply(&r, &scores, &[true; 6], &mut warm), Losses::default());
    }

    #[test]
    fn a_resident_expert_nearly_as_good_stands_in() {
        for gating in [Gating::Softmax, Gating::SoftmaxOfChosen] {
            let r = router(gating, 3);
            let raw = [3.0, 2.0, 1.0, 0.9, 0.0, -1.0];
            let at_hand = [true, true, false, true, true, true];
            for (margin, third) in [(0.05, 2), (0.2, 3)] {
                let mut scores = raw;
                let mut picks = route(&r, &mut scores);
                Lossy { prefer_resident: margin, ..Lossy::default() }.apply(&r, &scores, &at_hand, &mut picks);
                assert_eq!(picks[2].expert, third, "{gating:?}, margin {margin}");
                assert!((picks.iter().map(|p| p.weight).sum::<f32>() - 1.0).abs() < 1e-6);
            }
        }
    }

    proptest! {
        #[test]
        fn the_best_two_stay_nobody_is_chosen_twice_and_nothing_is_lost_when_all_are_at_hand(
            scores in prop::collection::vec(-5.0f32..5.0, 6),
            at_hand in prop::collection::vec(any::<bool>(), 6),
            drop_cold in 0.0f32..0.5,
            prefer_resident in 0.0f32..1.0,
            used in 1usize..6,
        ) {
            let r = router(Gating::Softmax, used);
            let mut scores = scores;
            let want = route(&r, &mut scores);
            let lossy = Lossy { drop_cold, prefer_resident };
            let mut picks = want.clone();
            prop_assert_eq!(lossy.apply(&r, &scores, &[true; 6], &mut picks), Losses::default());
            prop_assert_eq!(&picks, &want);
            lossy.apply(&r, &scores, &at_hand, &mut picks);
            prop_assert_eq!(picks[0].expert, want[0].expert);
            let mut chosen: Vec<u32> = picks.iter().filter(|p| !p.is_dropped()).map(|p| p.expert).collect();
            chosen.sort_unstable();
            prop_assert!(chosen.windows(2).all(|w| w[0] != w[1]));
            let sum: f32 = picks.iter().map(|p| p.weight).sum();
            prop_assert!((sum - 1.0).abs() < 1e-5);
        }
    }
}
