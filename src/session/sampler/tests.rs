use super::super::rng::Rng;
use super::*;
use proptest::prelude::*;

/// Nothing but the temperature.
fn plain() -> SamplingParams {
    SamplingParams { top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(1), ..Default::default() }
}

fn survivors(params: SamplingParams, logits: &[f32]) -> Vec<u32> {
    let mut sampler = Sampler::new(params).unwrap();
    let chosen = sampler.sample(&mut logits.to_vec()).unwrap();
    let ids: Vec<u32> = sampler.candidates().iter().map(|c| c.id).collect();
    assert!(ids.contains(&chosen));
    ids
}

/// The naive chain: whole vocabulary sorted, everything in f64, each filter as its paper says it.
mod naive {
    pub type List = Vec<(u32, f64)>;

    pub fn all(logits: &[f32]) -> List {
        let mut list: List = (0u32..).zip(logits).map(|(id, &x)| (id, f64::from(x))).collect();
        list.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        list
    }

    pub fn probs(list: &List, temp: f64) -> Vec<f64> {
        let max = list.iter().map(|x| x.1).fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = list.iter().map(|x| ((x.1 - max) / temp).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|x| x / sum).collect()
    }

    pub fn top_k(list: List, k: usize) -> List {
        list.into_iter().take(if k == 0 { usize::MAX } else { k }).collect()
    }

    pub fn typical(list: List, p: f32) -> List {
        if p >= 1.0 {
            return list;
        }
        let probs = probs(&list, 1.0);
        let surprise: Vec<f64> = probs.iter().map(|p| -p.ln()).collect();
        let entropy: f64 = probs.iter().zip(&surprise).map(|(p, s)| p * s).sum();
        let mut order: Vec<usize> = (0..list.len()).collect();
        order.sort_by(|&a, &b| (surprise[a] - entropy).abs().partial_cmp(&(surprise[b] - entropy).abs()).unwrap());
        let mut sum = 0.0;
        let mut keep = Vec::new();
        for i in order {
            keep.push(i);
            sum += probs[i];
            if sum > f64::from(p) {
                break;
            }
        }
        keep.sort();
        keep.into_iter().map(|i| list[i]).collect()
    }

    pub fn top_p(list: List, p: f32) -> List {
        let probs = probs(&list, 1.0);
        let mut sum = 0.0;
        let mut kept = Vec::new();
        for (x, prob) in list.into_iter().zip(probs) {
            kept.push(x);
            sum += prob;
            if p < 1.0 && sum >= f64::from(p) {
                break;
            }
        }
        kept
    }

    pub fn min_p(list: List, p: f32) -> List {
        let probs = probs(&list, 1.0);
        let least = probs[0] * f64::from(p) * (1.0 - 1e-12);
        list.into_iter().zip(probs).filter(|x| x.1 >= least).map(|x| x.0).collect()
    }
}

fn some_logits() -> impl Strategy<Value = Vec<f32>> {
    // Quarters give ties, the wide range gives probabilities that vanish.
    prop_oneof![
        prop::collection::vec(-8.0f32..8.0, 1..700),
        prop::collection::vec((-40i32..40).prop_map(|x| x as f32 / 4.0), 1..700),
        prop::collection::vec(-2000.0f32..2000.0, 1..50),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn top_k_keeps_the_best_in_order(logits in some_logits(), k in 1usize..600) {
        let want: Vec<u32> = naive::top_k(naive::all(&logits), k).iter().map(|x| x.0).collect();
        prop_assert_eq!(survivors(SamplingParams { top_k: k as i32, ..plain() }, &logits), want);
    }

    #[test]
    fn each_filter_agrees_with_the_naive_one(logits in some_logits(), p in 0.001f32..0.999) {
        let sorted = |params, logits: &[f32]| { let mut ids = survivors(params, logits); ids.sort(); ids };
        let ids = |list: naive::List| { let mut ids: Vec<u32> = list.iter().map(|x| x.0).collect(); ids.sort(); ids };
        let all = naive::all(&logits);
        prop_assert_eq!(sorted(SamplingParams { top_p: p, ..plain() }, &logits), ids(naive::top_p(all.clone(), p)));
        prop_assert_eq!(sorted(SamplingParams { min_p: p, ..plain() }, &logits), ids(naive::min_p(all.clone(), p)));
    }

    #[test]
    fn typical_agrees_with_the_naive_one(logits in prop::collection::vec(-8.0f32..8.0, 1..700), p in 0.001f32..0.999) {
        let want: Vec<u32> = naive::typical(naive::all(&logits), p).iter().map(|x| x.0).collect();
        prop_assert_eq!(survivors(SamplingParams { typical_p: p, ..plain() }, &logits), want);
    }

    #[test]
    fn the_chain_agrees_with_the_naive_one(
        logits in prop::collection::vec(-8.0f32..8.0, 1..700),
        (k, typical, top, min) in (0usize..120, 0.3f32..1.0, 0.3f32..1.0, 0.0f32..0.2),
    ) {
        let params = SamplingParams { top_k: k as i32, typical_p: typical, top_p: top, min_p: min, ..plain() };
        let want = naive::min_p(naive::top_p(naive::typical(naive::top_k(naive::all(&logits), k), typical), top), min);
        prop_assert_eq!(survivors(params, &logits), want.iter().map(|x| x.0).collect::<Vec<_>>());
    }

    #[test]
    fn greedy_is_the_first_of_the_best(logits in some_logits(), temp in -1.0f32..=0.0) {
        let best = naive::all(&logits)[0].0;
        let mut sampler = Sampler::new(SamplingParams { temp, ..Default::default() }).unwrap();
        prop_assert_eq!(sampler.sample(&mut logits.clone()), Ok(best));
    }

    #[test]
    fn penalties_follow_the_window(
        mut logits in prop::collection::vec(-8.0f32..8.0, 20),
        history in prop::collection::vec(0u32..24, 0..40),
        (n, repeat, presence, frequency) in (-1i32..20, 0.5f32..2.0, -2.0f32..2.0, -2.0f32..2.0),
    ) {
        let original = logits.clone();
        let params = SamplingParams {
            repeat_last_n: n, repeat_penalty: repeat, presence_penalty: presence, frequency_penalty: frequency, ..plain()
        };
        let mut sampler = Sampler::new(params).unwrap();
        history.iter().for_each(|&t| sampler.accept(t));
        sampler.sample(&mut logits).unwrap();
        let window = &history[if n < 0 { 0 } else { history.len().saturating_sub(n as usize) }..];
        for (id, (&before, &after)) in original.iter().zip(&logits).enumerate() {
            let count = window.iter().filter(|&&t| t as usize == id).count();
            let mut want = f64::from(before);
            if count > 0 {
                want = if want <= 0.0 { want * f64::from(repeat) } else { want / f64::from(repeat) };
                want -= f64::from(presence) + count as f64 * f64::from(frequency);
            }
            prop_assert!((f64::from(after) - want).abs() < 1e-4, "token {} {} {}", id, after, want);
        }
    }

    #[test]
    fn a_mask_is_a_ban(logits in some_logits(), bits in prop::collection::vec(any::<u32>(), 22), seed: u64) {
        let params = SamplingParams { seed: Some(seed), ..Default::default() };
        let banned: Vec<u32> = (0..logits.len() as u32).filter(|t| bits[*t as usize / 32] >> (t % 32) & 1 == 0).collect();
        let bias = banned.iter().map(|&t| (t, f32::NEG_INFINITY)).collect();
        let masked = Sampler::new(params.clone()).unwrap().sample_masked(&mut logits.clone(), &bits);
        let biased = Sampler::new(SamplingParams { logit_bias: bias, ..params }).unwrap().sample(&mut logits.clone());
        prop_assert_eq!(&masked, &biased);
        match masked {
            Ok(t) => prop_assert!(!banned.contains(&t)),
            Err(e) => prop_assert_eq!(e, SamplerError::NoCandidate { n_vocab: logits.len() }),
        }
    }

    #[test]
    fn logprobs_are_the_log_softmax(logits in some_logits(), n in 0usize..30, pick in any::<prop::sample::Index>()) {
        let token = pick.index(logits.len());
        let list = naive::all(&logits);
        let max = list[0].1;
        let log_sum = max + list.iter().map(|x| (x.1 - max).exp()).sum::<f64>().ln();
        let got = logprobs(&logits, token as u32, n).unwrap();
        prop_assert!((f64::from(got.token) - (f64::from(logits[token]) - log_sum)).abs() < 1e-3);
        prop_assert_eq!(got.top.len(), n.min(logits.len()));
        for (got, want) in got.top.iter().zip(&list) {
            prop_assert_eq!(got.0, want.0);
            prop_assert!((f64::from(got.1) - (want.1 - log_sum)).abs() < 1e-3);
        }
    }

    /// Whatever is thrown at it, an answer or an error comes back.
    #[test]
    fn any_logits_are_answered(
        bits in prop::collection::vec(any::<u32>(), 0..80),
        (temp, k, p) in (any::<f32>(), any::<i32>(), any::<f32>()),
    ) {
        let params = SamplingParams { temp, top_k: k, top_p: p, logit_bias: vec![(0, p)], repeat_penalty: 1.5, ..plain() };
        let mut logits: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        if let Ok(mut sampler) = Sampler::new(params) {
            sampler.accept(1);
            let odd = logits.iter().any(|x| !x.is_finite());
            match sampler.sample(&mut logits) {
                Ok(t) => prop_assert!(!odd && (t as usize) < logits.len()),
                Err(e) => prop_assert!(odd || logits.is_empty(), "{}", e),
            }
        }
    }
}

/// Draws so often and compares with the probabilities: Pearson's chi-square against its 99.9% point (Wilson-Hilferty).
fn chi_square(params: SamplingParams, logits: &[f32], probs: &[(u32, f64)]) {
    const DRAWS: u32 = 200_000;
    let mut sampler = Sampler::new(params).unwrap();
    let mut seen = HashMap::new();
    let mut buffer = logits.to_vec();
    for _ in 0..DRAWS {
        buffer.copy_from_slice(logits);
        *seen.entry(sampler.sample(&mut buffer).unwrap()).or_insert(0u32) += 1;
    }
    let mut statistic = 0.0;
    for (id, p) in probs {
        let want = p * f64::from(DRAWS);
        assert!(want > 5.0, "too rare for the test: token {id}");
        let got = seen.remove(id).unwrap_or(0);
        statistic += (f64::from(got) - want).powi(2) / want;
    }
    assert!(seen.is_empty(), "drew what was filtered out: {seen:?}");
    let df = (probs.len() - 1) as f64;
    let limit = df * (1.0 - 2.0 / (9.0 * df) + 3.09 * (2.0 / (9.0 * df)).sqrt()).powi(3);
    assert!(statistic < limit, "chi-square {statistic:.1}, limit {limit:.1}");
}

/// Numbers that need no mathematical library, so that they are the same everywhere: -6 to 6 in steps of 1/256.
fn fixed_logits(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| (rng.next_u64() % 3073) as f32 / 256.0 - 6.0).collect()
}

#[test]
fn draws_follow_the_distribution() {
    let logits = fixed_logits(60, 3);
    for (seed, temp) in [(1u64, 1.0f32), (2, 0.8), (3, 2.5)] {
        let params = SamplingParams { temp, min_p: 0.02, top_k: 30, seed: Some(seed), ..plain() };
        let list = naive::min_p(naive::top_k(naive::all(&logits), 30), 0.02);
        let probs = naive::probs(&list, f64::from(temp));
        let probs: Vec<(u32, f64)> = list.iter().zip(probs).map(|(x, p)| (x.0, p)).collect();
        chi_square(params, &logits, &probs);
    }
    // Unfiltered and unsorted.
    let flat = [0.0f32, 1.0, -1.0, 0.5];
    let list = naive::all(&flat);
    let probs: Vec<(u32, f64)> = list.iter().zip(naive::probs(&list, 1.0)).map(|(x, p)| (x.0, p)).collect();
    chi_square(SamplingParams { temp: 1.0, ..plain() }, &flat, &probs);
}

#[test]
fn a_seed_is_a_promise() {
    let mut sampler = Sampler::new(SamplingParams { seed: Some(42), temp: 1.5, ..Default::default() }).unwrap();
    let draw = |sampler: &mut Sampler| -> Vec<u32> {
        (0..16).map(|i| sampler.sample(&mut fixed_logits(1000, i)).unwrap()).collect()
    };
    let first = draw(&mut sampler);
    assert_eq!(first, [876, 281, 524, 54, 810, 907, 512, 380, 885, 86, 578, 806, 329, 889, 792, 552]);
    assert_ne!(draw(&mut sampler), first);
    sampler.reset();
    assert_eq!(draw(&mut sampler), first);
    assert_eq!(sampler.seed(), 42);
}

/// A draw takes one random number however many candidates there were, so a neighbouring choice can't shift the rest.
#[test]
fn each_draw_takes_one_number() {
    let params = SamplingParams { seed: Some(9), ..Default::default() };
    let mut a = Sampler::new(params.clone()).unwrap();
    let mut b = Sampler::new(params).unwrap();
    a.sample(&mut [50.0, 0.0, 0.0]).unwrap();
    b.sample(&mut fixed_logits(100, 1)).unwrap();
    for i in 0..20 {
        assert_eq!(a.sample(&mut fixed_logits(100, i)), b.sample(&mut fixed_logits(100, i)));
    }
}

#[test]
fn a_missing_seed_is_chosen_and_reported() {
    let free = SamplingParams::default();
    let mut a = Sampler::new(free.clone()).unwrap();
    let mut b = Sampler::new(SamplingParams { seed: Some(a.seed()), ..free }).unwrap();
    for i in 0..20 {
        assert_eq!(a.sample(&mut fixed_logits(100, i)), b.sample(&mut fixed_logits(100, i)));
    }
}

#[test]
fn zeros_of_both_signs_tie() {
    let greedy = SamplingParams { temp: 0.0, ..Default::default() };
    assert_eq!(Sampler::new(greedy.clone()).unwrap().sample(&mut [-1.0, -0.0, 0.0]), Ok(1));
    assert_eq!(Sampler::new(greedy).unwrap().sample(&mut [-1.0, 0.0, -0.0]), Ok(1));
}

#[test]
fn broken_logits_are_errors() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut logits = fixed_logits(5000, 1);
        logits[4321] = bad;
        let error = Sampler::new(plain()).unwrap().sample(&mut logits).unwrap_err();
        assert!(error.to_string().starts_with(&format!("the logit of token 4321 is {bad}")), "{error}");
        assert!(logprobs(&logits, 0, 1).is_err());
    }
    assert_eq!(Sampler::new(plain()).unwrap().sample(&mut []), Err(SamplerError::NoCandidate { n_vocab: 0 }));
    let biased = SamplingParams { logit_bias: vec![(10, 1.0)], ..plain() };
    let error = Sampler::new(biased).unwrap().sample(&mut [0.0; 10]).unwrap_err();
    assert_eq!(error.to_string(), "logit_bias names token 10, but the model has only tokens 0 to 9");
    let error = Sampler::new(plain()).unwrap().sample_masked(&mut [0.0; 33], &[1]).unwrap_err();
    assert_eq!(error, SamplerError::MaskTooShort { bits: 32, n_vocab: 33 });
    assert!(logprobs(&[0.0], 1, 1).is_err());
}

#[test]
fn parameters_out_of_range_are_named() {
    let d = SamplingParams::default;
    for (params, name) in [
        (SamplingParams { temp: f32::NAN, ..d() }, "temp"),
        (SamplingParams { top_p: 1.1, ..d() }, "top_p"),
        (SamplingParams { min_p: -0.1, ..d() }, "min_p"),
        (SamplingParams { typical_p: f32::NAN, ..d() }, "typical_p"),
        (SamplingParams { repeat_penalty: 0.0, ..d() }, "repeat_penalty"),
        (SamplingParams { repeat_last_n: -2, ..d() }, "repeat_last_n"),
        (SamplingParams { presence_penalty: f32::INFINITY, ..d() }, "presence_penalty"),
        (SamplingParams { frequency_penalty: -101.0, ..d() }, "frequency_penalty"),
        (SamplingParams { logit_bias: vec![(0, f32::INFINITY)], ..d() }, "logit_bias"),
    ] {
        let error = Sampler::new(params).unwrap_err().to_string();
        assert!(error.starts_with(&format!("sampling parameter {name} is ")), "{error}");
    }
    assert_eq!(
        Sampler::new(SamplingParams { top_p: 1.5, ..d() }).unwrap_err().to_string(),
        "sampling parameter top_p is 1.5; it must be 0 to 1"
    );
    assert!(Sampler::new(SamplingParams { top_k: -1, temp: -1.0, repeat_last_n: -1, ..d() }).is_ok());
}
