//! Who gets what of the next block of tokens: pure arithmetic over lengths and KV blocks.

use crate::ops::kv::KV_BLOCK;

/// A running sequence, as far as the plan has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Running {
    /// Positions in the KV cache.
    pub len: usize,
    /// Tokens that are known and not yet in the cache: one that was just written, or the rest of a prompt.
    pub todo: usize,
    /// KV blocks that it holds, shared ones too.
    pub blocks: usize,
    /// KV blocks that can be had when it is preempted.
    pub own: usize,
    /// KV blocks that it will hold at most.
    pub most: usize,
}

/// Blocks for this many positions.
pub(super) fn blocks_for(positions: usize) -> usize {
    positions.div_ceil(KV_BLOCK)
}

impl Running {
    /// More blocks that `n` further tokens take. A sequence begins to write where its own block begins or goes on in one that is
    /// its own, so nothing has to be copied.
    fn more(&self, n: usize) -> usize {
        blocks_for(self.len + n).saturating_sub(self.blocks)
    }

    /// More blocks that it takes for all that is known of it and for a block of its writing, if it may write so much.
    fn soon(&self) -> usize {
        (self.more(self.todo) + 1).min(self.most.saturating_sub(self.blocks))
    }
}

/// Shares out the tokens of a step: those who write one token each first, since nobody should wait for another's prompt, then
/// prompts in the order of the sequences.
fn share_out(seqs: &[Running], max_tokens: usize) -> Vec<usize> {
    let mut left = max_tokens;
    let mut n: Vec<usize> = vec![0; seqs.len()];
    let mut give = |writes: bool| {
        for (s, n) in seqs.iter().zip(&mut n).filter(|(s, _)| (s.todo == 1) == writes) {
            *n = s.todo.min(left);
            left -= *n;
        }
    };
    give(true);
    give(false);
    n
}

/// Plans a step for sequences in the order of their rank, the one that yields to nobody first. With `free` blocks to be had, as many of
/// the last ones are preempted as it takes for the others to go on. The first is never preempted: it takes fewer tokens if need be, and
/// none (an empty step) if not even one position is left for it. The tokens of each that stays; 0 for one that has to wait for the next
/// step.
pub(super) fn step(seqs: &[Running], free: usize, max_tokens: usize) -> Vec<usize> {
    let mut keep = seqs.len();
    let mut free = free;
    loop {
        let mut n_tokens = share_out(&seqs[..keep], max_tokens);
        let need: usize = seqs.iter().zip(&n_tokens).map(|(s, &n)| s.more(n)).sum();
        if need <= free {
            return n_tokens;
        }
        if keep == 1 {
            let room = (seqs[0].blocks + free) * KV_BLOCK;
            n_tokens[0] = n_tokens[0].min(room.saturating_sub(seqs[0].len));
            return n_tokens;
        }
        keep -= 1;
        free += seqs[keep].own;
    }
}

/// Whether one more sequence should join. It has to find room for all that is known of it and for a block of its writing, after what
/// the running ones will take likewise: joining only to be preempted at once would be computing for nothing.
fn may_join(seqs: &[Running], free: usize, joins: &Running) -> bool {
    // Alone it needs no reserve: there is nobody whom it could be in the way of.
    let wanted = if seqs.is_empty() { joins.more(joins.todo) } else { joins.soon() };
    seqs.iter().map(Running::soon).sum::<usize>() + wanted <= free
}

/// How many of the last sequences have to be preempted so that one more can join; of them the last `n_below` may be, being of lower
/// priority. `None` if it doesn't find a place and room with all of these gone: then nobody is.
pub(super) fn join(
    seqs: &[Running],
    n_below: usize,
    max_sequences: usize,
    free: usize,
    joins: &Running,
) -> Option<usize> {
    (0..=n_below).find(|n| {
        let (stay, leave) = seqs.split_at(seqs.len() - n);
        let free = free + leave.iter().map(|s| s.own).sum::<usize>();
        stay.len() < max_sequences && may_join(stay, free, joins)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_running() -> impl Strategy<Value = Running> {
        (0usize..400, prop_oneof![3 => Just(1usize), 2 => 1usize..700], 0usize..4, 0usize..20).prop_map(
            |(len, todo, extra, shared)| {
                let blocks = blocks_for(len) + extra;
                let most = blocks_for(len + todo).max(blocks) + shared % 3;
                Running { len, todo, blocks, own: blocks.saturating_sub(shared), most }
            },
        )
    }

    proptest! {
        #[test]
        fn a_step_keeps_to_its_bounds(
            seqs in prop::collection::vec(any_running(), 1..12),
            free in 0usize..40,
            max_tokens in 1usize..600,
        ) {
            let n_tokens = step(&seqs, free, max_tokens);
            let keep = n_tokens.len();
            prop_assert!(keep >= 1 && keep <= seqs.len());
            prop_assert!(n_tokens.iter().sum::<usize>() <= max_tokens);
            let freed: usize = seqs[keep..].iter().map(|s| s.own).sum();
            let need: usize = seqs.iter().zip(&n_tokens).map(|(s, &n)| s.more(n)).sum();
            prop_assert!(need <= free + freed, "never more blocks than there are");
            for (seq, &n) in seqs.iter().zip(&n_tokens) {
                prop_assert!(n <= seq.todo);
            }
            // Somebody always moves, or nobody can: no step is empty while the first has room.
            let room = (seqs[0].blocks + free + freed) * KV_BLOCK;
            prop_assert!(n_tokens.iter().any(|&n| n > 0) || room <= seqs[0].len);
            // Nobody is preempted for nothing.
            if keep < seqs.len() {
                let n = share_out(&seqs[..keep + 1], max_tokens);
                let need: usize = seqs.iter().zip(&n).map(|(s, &n)| s.more(n)).sum();
                prop_assert!(need > free + freed - seqs[keep].own);
            }
            // A prompt gets nothing before all who write have got their token.
            let waits = |write: bool| seqs.iter().zip(&n_tokens).any(|(q, &n)| (q.todo == 1) == write && n == 0);
            if keep > 1 && waits(true) {
                prop_assert!(seqs.iter().zip(&n_tokens).all(|(q, &n)| q.todo == 1 || n == 0));
            }
        }

        #[test]
        fn who_joins_finds_room(
            seqs in prop::collection::vec(any_running(), 0..8),
            free in 0usize..60,
            joins in any_running(),
        ) {
            if may_join(&seqs, free, &joins) {
                let mut all = seqs.clone();
                all.push(joins);
                // Even if everything known were computed in this very step, nobody would be preempted.
                prop_assert_eq!(step(&all, free, usize::MAX).len(), all.len());
            }
        }

        #[test]
        fn nobody_yields_for_nothing(
            seqs in prop::collection::vec(any_running(), 0..8),
            below in 0usize..8,
            max_sequences in 1usize..9,
            free in 0usize..60,
            joins in any_running(),
        ) {
            let n_below = below.min(seqs.len());
            let fits = |n: usize| {
                let own: usize = seqs[seqs.len() - n..].iter().map(|s| s.own).sum();
                seqs.len() - n < max_sequences && may_join(&seqs[..seqs.len() - n], free + own, &joins)
            };
            let n = join(&seqs, n_below, max_sequences, free, &joins);
            prop_assert!(n.is_none_or(|n| n <= n_below && fits(n) && (0..n).all(|n| !fits(n))));
            prop_assert!(n.is_some() || (0..=n_below).all(|n| !fits(n)));
        }
    }

    #[test]
    fn writers_come_before_prompts_and_the_last_yields() {
        let write = |len| Running { len, todo: 1, blocks: blocks_for(len), own: blocks_for(len), most: 9 };
        let prompt = Running { len: 0, todo: 500, blocks: 0, own: 0, most: 9 };
        assert_eq!(step(&[prompt, write(10), write(20)], 100, 102), [100, 1, 1]);
        // Both need a block, one is there: the younger leaves and gives two more.
        assert_eq!(step(&[write(64), write(128)], 1, 512), [1]);
        assert_eq!(step(&[write(64)], 0, 512), [0]);
        assert_eq!(step(&[prompt], 2, 512), [128]);
    }

    #[test]
    fn who_is_short_needs_no_room_to_grow() {
        let short = Running { len: 0, todo: 20, blocks: 0, own: 0, most: 1 };
        let long = Running { most: 9, ..short };
        assert!(may_join(&[short; 7], 8, &short) && !may_join(&[short; 8], 8, &short));
        assert!(may_join(&[short; 6], 8, &long) && !may_join(&[short; 7], 8, &long));
        assert!(!may_join(&[long; 4], 8, &short) && may_join(&[], 1, &long));
    }
}
