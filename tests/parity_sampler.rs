//! The sampler against llama.cpp's: on the same logits the same tokens are left, with the same probabilities.
#![cfg(feature = "llama-cpp")]

mod common;

use common::llama::{Chain, Link};
use common::vocab::Random;
use oncall::session::sampler::{Sampler, SamplingParams};
use std::collections::BTreeMap;

/// llama.cpp sums probabilities in f32, oncall in f64; a wrong exponent, order or factor is off by far more.
const RELATIVE: f64 = 1e-4;
/// What a sum of 3000 probabilities in f32 may be off by: a token whose sum ends so near to the limit may fall on either side.
const EDGE: f32 = 1e-5;
/// Rounds in which that may happen, of [`ROUNDS`].
const MAX_AT_THE_EDGE: usize = 6;
const ROUNDS: usize = 300;

/// A sampling that does nothing; tests switch on what they look at.
fn neutral() -> SamplingParams {
    SamplingParams { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(1), ..SamplingParams::default() }
}

/// llama.cpp's chain of the same parameters, in the order of its own tools: bias, penalties, top-k, typical, top-p,
/// min-p, temperature.
fn chain(p: &SamplingParams, n_vocab: usize) -> Chain {
    Chain::new(&[
        Link::LogitBias(n_vocab, &p.logit_bias),
        Link::Penalties {
            n_vocab,
            last_n: p.repeat_last_n,
            repeat: p.repeat_penalty,
            frequency: p.frequency_penalty,
            presence: p.presence_penalty,
        },
        Link::TopK(p.top_k),
        Link::Typical(p.typical_p),
        Link::TopP(p.top_p),
        Link::MinP(p.min_p),
        Link::Temp(p.temp),
    ])
}

/// Softmax of (token, logit) pairs.
fn probabilities(logits: impl Iterator<Item = (u32, f64)> + Clone) -> BTreeMap<u32, f64> {
    let max = logits.clone().fold(f64::NEG_INFINITY, |max, (_, x)| max.max(x));
    let weights: BTreeMap<u32, f64> = logits.map(|(id, x)| (id, (x - max).exp())).collect();
    let sum: f64 = weights.values().sum();
    weights.into_iter().filter(|(_, w)| *w > 0.0).map(|(id, w)| (id, w / sum)).collect()
}

fn ours(p: &SamplingParams, history: &[u32], logits: &[f32]) -> BTreeMap<u32, f64> {
    let mut sampler = Sampler::new(p.clone()).unwrap();
    history.iter().for_each(|&token| sampler.accept(token));
    let chosen = sampler.sample(&mut logits.to_vec()).unwrap();
    if p.temp <= 0.0 {
        return BTreeMap::from([(chosen, 1.0)]);
    }
    let left = probabilities(sampler.candidates().iter().map(|c| (c.id, f64::from(c.logit) / f64::from(p.temp))));
    assert!(left.contains_key(&chosen), "{chosen} was drawn and isn't among {left:?}");
    left
}

fn theirs(p: &SamplingParams, history: &[u32], logits: &[f32]) -> BTreeMap<u32, f64> {
    let mut chain = chain(p, logits.len());
    history.iter().for_each(|&token| chain.accept(token));
    probabilities(chain.apply(logits).iter().map(|&(id, x)| (id, f64::from(x))))
}

/// What differs, if anything.
fn difference(ours: &BTreeMap<u32, f64>, theirs: &BTreeMap<u32, f64>) -> Option<String> {
    if !ours.keys().eq(theirs.keys()) {
        let only = |a: &BTreeMap<u32, f64>, b: &BTreeMap<u32, f64>| {
            a.iter().filter(|(id, _)| !b.contains_key(id)).map(|(id, p)| (*id, *p)).collect::<Vec<_>>()
        };
        return Some(format!("only ours {:?}, only theirs {:?}", only(ours, theirs), only(theirs, ours)));
    }
    let far = ours.iter().find(|(id, p)| (theirs[*id] / **p - 1.0).abs() > RELATIVE);
    far.map(|(id, p)| format!("token {id} has {p}, llama.cpp gives it {}", theirs[id]))
}

/// Whether the reference's tokens lie between ours for sums of probability a little lower and a little higher.
fn at_the_edge(p: &SamplingParams, history: &[u32], logits: &[f32], theirs: &BTreeMap<u32, f64>) -> bool {
    let with = |by: f32| {
        let moved = |x: f32| if x < 1.0 { (x + by).clamp(0.0, 1.0) } else { x };
        let p = SamplingParams { top_p: moved(p.top_p), typical_p: moved(p.typical_p), ..p.clone() };
        ours(&p, history, logits)
    };
    let (fewer, more) = (with(-EDGE), with(EDGE));
    fewer.keys().all(|id| theirs.contains_key(id)) && theirs.keys().all(|id| more.contains_key(id))
}

/// Logits as models give them: one or a few tokens above a broad rest. No two are equal: which of equals stays is an
/// engine's own choice.
fn logits(random: &mut Random, n: usize) -> Vec<f32> {
    let spread = [0.5, 2.0, 6.0][random.below(3)];
    let mut uniform = || random.below(1 << 24) as f32 / (1 << 24) as f32;
    let mut row: Vec<f32> = (0..n).map(|_| spread * ((0..6).map(|_| uniform()).sum::<f32>() - 3.0)).collect();
    for _ in 0..(uniform() * 5.0) as usize {
        row[(uniform() * n as f32) as usize] += 10.0 * uniform();
    }
    for i in 0..n {
        row[i] += 1e-4 * (i as f32 / n as f32 - 0.5);
    }
    row
}

/// Tokens said before: few different ones, so that they come again.
fn history(random: &mut Random, n_vocab: usize) -> Vec<u32> {
    let n = random.below(90);
    (0..n).map(|_| (random.below(20) * 7 % n_vocab) as u32).collect()
}

/// Compares on many rows of logits and histories.
fn check(name: &str, params: impl Fn(&mut Random) -> SamplingParams) {
    let mut random = Random(name.len() as u64 + 17);
    let (mut n_left, mut n_at_the_edge) = (0, 0);
    for round in 0..ROUNDS {
        let n_vocab = [5, 100, 3000][random.below(3)];
        let (row, said) = (logits(&mut random, n_vocab), history(&mut random, n_vocab));
        let p = params(&mut random);
        let (a, b) = (ours(&p, &said, &row), theirs(&p, &said, &row));
        if let Some(difference) = difference(&a, &b) {
            assert!(at_the_edge(&p, &said, &row, &b), "{name}, round {round}, {n_vocab} tokens, {p:?}: {difference}");
            n_at_the_edge += 1;
        }
        n_left += a.len();
    }
    println!(
        "note: {name}: equal in {} of {ROUNDS} rounds, {n_at_the_edge} on the edge, {:.0} tokens left in the mean",
        ROUNDS - n_at_the_edge,
        n_left as f64 / ROUNDS as f64
    );
    assert!(n_at_the_edge <= MAX_AT_THE_EDGE, "{name}: {n_at_the_edge} rounds aren't chance");
}

fn one_of<T: Copy>(random: &mut Random, values: &[T]) -> T {
    values[random.below(values.len())]
}

#[test]
fn top_k() {
    check("top-k", |r| SamplingParams { top_k: one_of(r, &[1, 2, 5, 40, 200, 0, -1]), ..neutral() });
}

#[test]
fn top_p() {
    check("top-p", |r| SamplingParams { top_p: one_of(r, &[0.0, 0.1, 0.5, 0.9, 0.95, 0.999]), ..neutral() });
}

#[test]
fn min_p() {
    check("min-p", |r| SamplingParams { min_p: one_of(r, &[0.01, 0.05, 0.2, 0.9, 1.0]), ..neutral() });
}

#[test]
fn typical() {
    check("typical", |r| SamplingParams { typical_p: one_of(r, &[0.1, 0.5, 0.9, 0.99]), ..neutral() });
}

#[test]
fn temperature() {
    check("temperature", |r| SamplingParams { temp: one_of(r, &[0.0, -1.0, 0.1, 0.8, 1.0, 1.7]), ..neutral() });
}

#[test]
fn repeat_penalty() {
    check("repeat penalty", |r| SamplingParams {
        repeat_penalty: one_of(r, &[1.1, 1.5, 0.8]),
        repeat_last_n: one_of(r, &[0, 1, 8, 64]),
        ..neutral()
    });
}

#[test]
fn presence_and_frequency_penalty() {
    check("presence and frequency penalty", |r| SamplingParams {
        presence_penalty: one_of(r, &[0.0, 0.5, -1.0]),
        frequency_penalty: one_of(r, &[0.0, 0.3, -0.2]),
        repeat_last_n: one_of(r, &[0, 3, 64]),
        ..neutral()
    });
}

#[test]
fn logit_bias() {
    check("logit bias", |r| SamplingParams {
        logit_bias: vec![(0, 5.0), (2, one_of(r, &[-3.0, f32::NEG_INFINITY])), (4, 0.25)],
        ..neutral()
    });
}

/// All of them at once, as users combine them. No token is banned: llama.cpp's typical sampling takes the logarithm of
/// a banned token's probability of zero, and from the NaN that follows its order is arbitrary.
#[test]
fn whole_chain() {
    check("whole chain", |r| SamplingParams {
        temp: one_of(r, &[0.0, 0.3, 0.8, 1.2]),
        top_k: one_of(r, &[0, 10, 40]),
        top_p: one_of(r, &[1.0, 0.95, 0.6]),
        min_p: one_of(r, &[0.0, 0.05, 0.2]),
        typical_p: one_of(r, &[1.0, 0.9]),
        repeat_penalty: one_of(r, &[1.0, 1.1]),
        repeat_last_n: one_of(r, &[16, 64]),
        presence_penalty: one_of(r, &[0.0, 0.4]),
        frequency_penalty: one_of(r, &[0.0, 0.1]),
        seed: Some(3),
        logit_bias: vec![(1, one_of(r, &[0.0, 2.0, -8.0]))],
    });
}

/// What users get who ask for nothing.
#[test]
fn defaults() {
    check("defaults", |_| SamplingParams { seed: Some(2), ..SamplingParams::default() });
}

/// A mistake shows: the comparison isn't blind.
#[test]
fn a_wrong_parameter_shows() {
    let mut random = Random(5);
    let row = logits(&mut random, 1000);
    let (a, b) = (SamplingParams { top_k: 40, ..neutral() }, SamplingParams { top_k: 41, ..neutral() });
    assert_ne!(ours(&a, &[], &row).len(), theirs(&b, &[], &row).len());
    let (a, b) = (SamplingParams { temp: 0.8, ..neutral() }, SamplingParams { temp: 0.801, ..neutral() });
    let (a, b) = (ours(&a, &[], &row), theirs(&b, &[], &row));
    assert!(a.iter().any(|(id, p)| (b[id] / p - 1.0).abs() > RELATIVE));
}
