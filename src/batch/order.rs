//! The order in which requests are served: by priority; among equals those that begin alike one after the other, otherwise as they came.

use std::cmp::Reverse;
use std::collections::HashMap;

/// Bytes of text that are compared at a time: about two KV blocks' worth of tokens.
const PIECE: usize = 512;
/// Pieces of a beginning that are looked at; what begins alike for longer is alike enough.
const N_PIECES: usize = 16;

/// A number for each longer beginning of a text; texts that begin alike begin with the same numbers.
pub(super) fn beginnings(text: &[u8]) -> Vec<u64> {
    let mut hash = super::Fnv::default();
    text.chunks_exact(PIECE)
        .take(N_PIECES)
        .map(|piece| {
            hash.write(piece);
            hash.finish()
        })
        .collect()
}

/// The order for texts with these priorities and beginnings: indices into `texts`. Among those of a priority a group that begins alike
/// stands where its first stood, and is ordered in itself likewise.
pub(super) fn order(priorities: &[i32], texts: &[Vec<u64>]) -> Vec<usize> {
    let mut first: HashMap<u64, usize> = HashMap::new();
    for (i, text) in texts.iter().enumerate() {
        for &b in text {
            first.entry(b).or_insert(i);
        }
    }
    // Whoever shares a beginning with nobody is the first of its own; at the end of its beginnings everyone is.
    let key = |i: usize| texts[i].iter().map(|b| first[b]).chain([i]);
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by(|&a, &b| Reverse(priorities[a]).cmp(&Reverse(priorities[b])).then_with(|| key(a).cmp(key(b))));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How many beginnings two texts share.
    fn common(a: &[u64], b: &[u64]) -> usize {
        a.iter().zip(b).take_while(|(a, b)| a == b).count()
    }

    proptest! {
        #[test]
        fn alike_stand_together_and_the_rest_as_it_came(
            texts in prop::collection::vec(prop::collection::vec(0u8..3, 0..4), 0..24)
        ) {
            let texts: Vec<Vec<u64>> = texts
                .iter()
                .map(|t| beginnings(&t.iter().flat_map(|&b| [b; PIECE]).chain([7; 100]).collect::<Vec<u8>>()))
                .collect();
            let order = order(&vec![0; texts.len()], &texts);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..texts.len()).collect::<Vec<_>>());
            // Between two texts stands none that has less in common with the first than they have.
            for i in 0..order.len() {
                for j in i + 1..order.len() {
                    let alike = common(&texts[order[i]], &texts[order[j]]);
                    for k in i + 1..j {
                        prop_assert!(common(&texts[order[i]], &texts[order[k]]) >= alike);
                    }
                }
            }
            // Groups come in the order of their first members, at every level.
            for depth in 0..4 {
                let mut seen: Vec<(&[u64], usize)> = Vec::new();
                for &i in &order {
                    let head = &texts[i][..depth.min(texts[i].len())];
                    if texts[i].len() >= depth && !seen.iter().any(|(h, _)| *h == head) {
                        let first = (0..texts.len()).find(|&j| texts[j].starts_with(head)).unwrap();
                        // Only groups within the same larger group are compared.
                        let sibling = seen.iter().rev().find(|(h, _)| h[..depth.saturating_sub(1)] == head[..depth.saturating_sub(1)]);
                        prop_assert!(sibling.is_none_or(|s| s.1 < first));
                        seen.push((head, first));
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_in_common_changes_nothing() {
        let texts: Vec<Vec<u64>> = (0..9).map(|i| beginnings(format!("{i}").repeat(2000).as_bytes())).collect();
        assert_eq!(order(&[7; 9], &texts), (0..9).collect::<Vec<_>>());
        let texts = [vec![1, 2], vec![5], vec![1, 3], vec![1, 2]];
        assert_eq!(order(&[0; 4], &texts), [0, 3, 2, 1]);
        assert_eq!(order(&[0, 0, 1, -1], &texts), [2, 0, 1, 3], "the urgent come first");
    }
}
