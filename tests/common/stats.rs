//! How far two sets of logits lie apart, in the measures that the parity tests bound.
#![allow(dead_code)] // each test uses its part

/// The index of the largest value; the first of equals.
pub fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, &x) in row.iter().enumerate() {
        if x > row[best] {
            best = i;
        }
    }
    best
}

/// Squared error over squared size of the reference; infinite if anything isn't finite, so that no bound passes.
pub fn nmse(ours: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(ours.len(), reference.len(), "the same number of logits");
    assert!(!reference.is_empty());
    let (mut error, mut size) = (0f64, 0f64);
    for (&a, &b) in ours.iter().zip(reference) {
        if !a.is_finite() || !b.is_finite() {
            return f64::INFINITY;
        }
        let (a, b) = (f64::from(a), f64::from(b));
        error += (a - b) * (a - b);
        size += b * b;
    }
    error / size
}

/// The logarithm of softmax, in f64.
pub fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    let log_sum = max + sum.ln();
    row.iter().map(|&x| f64::from(x) - log_sum).collect()
}

/// How the distributions of two engines agree over many positions.
#[derive(Debug)]
pub struct Agreement {
    /// Mean Kullback-Leibler divergence of ours from the reference, in nats a position.
    pub kl: f64,
    /// Share of positions whose most likely token is the same.
    pub top1: f64,
}

/// Compares logits of the shape (n_tokens, n_vocab) position by position.
pub fn agreement(ours: &[f32], reference: &[f32], n_vocab: usize) -> Agreement {
    assert_eq!(ours.len(), reference.len(), "the same number of logits");
    assert!(!ours.is_empty() && ours.len().is_multiple_of(n_vocab));
    let (mut kl, mut same, mut n) = (0f64, 0usize, 0usize);
    for (a, b) in ours.chunks(n_vocab).zip(reference.chunks(n_vocab)) {
        let (q, p) = (log_softmax(a), log_softmax(b));
        kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        same += usize::from(argmax(a) == argmax(b));
        n += 1;
    }
    Agreement { kl: kl / n as f64, top1: same as f64 / n as f64 }
}

/// Mean negative log-likelihood in nats of each token after the one before it: (n_tokens, n_vocab) logits.
pub fn nll(logits: &[f32], tokens: &[u32]) -> f64 {
    assert!(tokens.len() > 1 && logits.len().is_multiple_of(tokens.len()));
    let n_vocab = logits.len() / tokens.len();
    let sum: f64 = logits.chunks(n_vocab).zip(&tokens[1..]).map(|(row, &next)| -log_softmax(row)[next as usize]).sum();
    sum / (tokens.len() - 1) as f64
}

#[test]
fn measures_are_what_they_say() {
    assert_eq!(argmax(&[0.0, 2.0, 2.0, -1.0]), 1);
    assert_eq!(nmse(&[1.0, 1.0], &[1.0, 2.0]), 0.2);
    assert_eq!(nmse(&[f32::NAN], &[1.0]), f64::INFINITY);
    let even = [0.0f32; 4];
    assert!((nll(&[even, even].concat(), &[0, 3]) - 4f64.ln()).abs() < 1e-12);
    let a = agreement(&even, &[0.0, 0.0, 0.0, 3f32.ln()], 4);
    // 1/6 three times and 1/2 against 1/4 each
    let kl = 3.0 / 6.0 * (4f64 / 6.0).ln() + 0.5 * 2f64.ln();
    assert!((a.kl - kl).abs() < 1e-6 && a.top1 == 0.0, "{a:?}");
}
