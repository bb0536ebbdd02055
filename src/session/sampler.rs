//! From logits to a token: llama.cpp's chain of samplers, in its order and with its defaults.
//!
//! grammar mask, logit bias, penalties, top-k, typical, top-p, min-p, temperature, draw.
//!
//! What is drawn depends on the seed, the parameters and the logits seen so far, on nothing else: ties are broken by the lower id,
//! sums are taken in f64 in one order, and each draw takes exactly one random number.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};

use super::rng::{Rng, random_seed};

#[cfg(test)]
mod tests;

/// How the next token is chosen. The defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits before the draw. At 0 and below the best token is taken and nothing is drawn.
    pub temp: f32,
    /// Only the best `top_k` tokens stay. 0 and below: all.
    pub top_k: i32,
    /// Only the best tokens stay that together reach this probability. 1: all.
    pub top_p: f32,
    /// Only tokens stay that are at least this fraction as likely as the best. 0: all.
    pub min_p: f32,
    /// Locally typical sampling (Meister et al. 2022): the tokens whose surprise is nearest to the entropy, up to this probability. 1: all.
    pub typical_p: f32,
    /// Tokens seen in the window lose by this factor. 1: off.
    pub repeat_penalty: f32,
    /// The window of the penalties in tokens. 0: no penalties, -1: everything since the start.
    pub repeat_last_n: i32,
    /// Taken once from the logit of every token in the window.
    pub presence_penalty: f32,
    /// Taken from a token's logit for each time that it is in the window.
    pub frequency_penalty: f32,
    /// The same seed draws the same tokens. `None`: one is chosen, see [`Sampler::seed`].
    pub seed: Option<u64>,
    /// Added to the logits of these tokens; negative infinity bans a token.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            logit_bias: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// Checks every parameter against its range.
    ///
    /// # Errors
    /// Names the first parameter that is out of its range, and the range.
    pub fn validate(&self) -> Result<(), SamplerError> {
        let check = |name: &'static str, value: f32, range: &'static str, ok: bool| {
            if ok { Ok(()) } else { Err(SamplerError::Parameter { name, value: value.to_string(), range }) }
        };
        let unit = |x: f32| (0.0..=1.0).contains(&x);
        check("temp", self.temp, "a finite number, 0 or less for the best token always", self.temp.is_finite())?;
        check("top_p", self.top_p, "0 to 1", unit(self.top_p))?;
        check("min_p", self.min_p, "0 to 1", unit(self.min_p))?;
        check("typical_p", self.typical_p, "0 to 1", unit(self.typical_p))?;
        let repeat = self.repeat_penalty;
        check("repeat_penalty", repeat, "above 0 and up to 100, 1 for none", repeat > 0.0 && repeat <= 100.0)?;
        if self.repeat_last_n < -1 {
            let value = self.repeat_last_n.to_string();
            return Err(SamplerError::Parameter {
                name: "repeat_last_n",
                value,
                range: "-1 (everything), 0 (off) or more",
            });
        }
        let hundred = |x: f32| (-100.0..=100.0).contains(&x);
        check("presence_penalty", self.presence_penalty, "-100 to 100", hundred(self.presence_penalty))?;
        check("frequency_penalty", self.frequency_penalty, "-100 to 100", hundred(self.frequency_penalty))?;
        for &(_, bias) in &self.logit_bias {
            check(
                "logit_bias",
                bias,
                "a finite number, or -inf to ban the token",
                bias.is_finite() || bias == f32::NEG_INFINITY,
            )?;
        }
        Ok(())
    }

    fn penalises(&self) -> bool {
        self.repeat_last_n != 0
            && (self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0)
    }
}

/// Why no token could be chosen.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum SamplerError {
    /// A parameter is out of its range.
    #[error("sampling parameter {name} is {value}; it must be {range}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// What was given.
        value: String,
        /// What would be accepted.
        range: &'static str,
    },
    /// The model produced a number that isn't one.
    #[error(
        "the logit of token {token} is {value}: the model's weights are damaged or its computation overflowed; \
         compare the file's checksum with its publisher's"
    )]
    NotFinite {
        /// The first such token.
        token: u32,
        /// NaN or an infinity.
        value: f32,
    },
    /// There is nothing to choose from.
    #[error("no token is left to choose from: the grammar and logit_bias together forbid all {n_vocab} tokens")]
    NoCandidate {
        /// How many there were.
        n_vocab: usize,
    },
    /// A token id that the model doesn't have.
    #[error("{what} names token {token}, but the model has only tokens 0 to {last}", last = n_vocab.saturating_sub(1))]
    NoSuchToken {
        /// Who asked for it.
        what: &'static str,
        /// The id.
        token: u32,
        /// How many tokens there are.
        n_vocab: usize,
    },
    /// The mask is for another vocabulary.
    #[error("the mask of allowed tokens has {bits} bits for a vocabulary of {n_vocab}")]
    MaskTooShort {
        /// Bits in the mask.
        bits: usize,
        /// How many tokens there are.
        n_vocab: usize,
    },
}

/// A token that a draw could have chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token.
    pub id: u32,
    /// Its logit after bias and penalties, before the temperature.
    pub logit: f32,
}

impl Candidate {
    /// Best first; the lower id wins a tie, which makes the order total (no logit is NaN) and the result reproducible.
    fn best_first(&self, other: &Self) -> Ordering {
        other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

/// One sequence's sampler: its parameters, its random numbers, its memory of what was said.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    seed: u64,
    rng: Rng,
    /// The penalties' window, oldest first; empty while the window is everything.
    window: VecDeque<u32>,
    /// How often each token is in the window.
    counts: HashMap<u32, u32>,
    /// The tokens that are still in the running.
    candidates: Vec<Candidate>,
    /// So many of them, from the front, are the best ones in order.
    n_sorted: usize,
    /// Unnormalised probabilities beside `candidates`.
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler that has seen nothing yet.
    ///
    /// # Errors
    /// A parameter is out of its range.
    pub fn new(params: SamplingParams) -> Result<Self, SamplerError> {
        params.validate()?;
        let seed = params.seed.unwrap_or_else(random_seed);
        Ok(Self {
            params,
            seed,
            rng: Rng::new(seed),
            window: VecDeque::new(),
            counts: HashMap::new(),
            candidates: Vec::new(),
            n_sorted: 0,
            weights: Vec::new(),
        })
    }

    /// The parameters it was made with.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The seed in use: the one given, or the one chosen in its place.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Back to the start: the window empty, the random numbers from the seed again.
    pub fn reset(&mut self) {
        self.rng = Rng::new(self.seed);
        self.window.clear();
        self.counts.clear();
    }

    /// Puts a token into the penalties' window. Call it for each token of the prompt that should count, and for each token sampled.
    pub fn accept(&mut self, token: u32) {
        if !self.params.penalises() {
            return;
        }
        *self.counts.entry(token).or_insert(0) += 1;
        let Ok(n) = usize::try_from(self.params.repeat_last_n) else { return };
        self.window.push_back(token);
        if self.window.len() > n
            && let Some(old) = self.window.pop_front()
            && let Some(count) = self.counts.get_mut(&old)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&old);
            }
        }
    }

    /// Chooses the next token. `logits // (n_vocab)` are changed in place by bias and penalties: take log-probabilities before.
    ///
    /// # Errors
    /// A logit isn't finite, `logit_bias` names a token outside the vocabulary, or it bans every token.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32, SamplerError> {
        check_finite(logits)?;
        self.choose(logits)
    }

    /// Chooses among the tokens whose bit is set in `allowed`: token `t` is bit `t % 32` of word `t / 32`.
    ///
    /// # Errors
    /// As [`Sampler::sample`], and if the mask is shorter than the vocabulary or nothing is left that it allows.
    pub fn sample_masked(&mut self, logits: &mut [f32], allowed: &[u32]) -> Result<u32, SamplerError> {
        check_finite(logits)?;
        if allowed.len() < logits.len().div_ceil(32) {
            return Err(SamplerError::MaskTooShort { bits: allowed.len().saturating_mul(32), n_vocab: logits.len() });
        }
        for (chunk, &word) in logits.chunks_mut(32).zip(allowed) {
            match word {
                u32::MAX => {}
                0 => chunk.fill(f32::NEG_INFINITY),
                _ => {
                    for (bit, logit) in chunk.iter_mut().enumerate() {
                        *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                    }
                }
            }
        }
        self.choose(logits)
    }

    /// What the last call chose from, best first unless nothing but the temperature was in force.
    pub fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    fn choose(&mut self, logits: &mut [f32]) -> Result<u32, SamplerError> {
        self.bias(logits)?;
        self.penalise(logits);
        let greedy = self.params.temp <= 0.0;
        // Only typical sampling can drop the best token, so otherwise the best is all that a greedy choice needs.
        let k =
            if greedy && self.params.typical_p >= 1.0 { 1 } else { usize::try_from(self.params.top_k).unwrap_or(0) };
        self.top_k(logits, k);
        if self.candidates.is_empty() {
            return Err(SamplerError::NoCandidate { n_vocab: logits.len() });
        }
        self.typical();
        if greedy {
            self.sort_best(1);
            self.candidates.truncate(1);
            return Ok(self.candidates[0].id);
        }
        self.top_p();
        self.min_p();
        Ok(self.draw())
    }

    fn bias(&self, logits: &mut [f32]) -> Result<(), SamplerError> {
        let n_vocab = logits.len();
        for &(token, bias) in &self.params.logit_bias {
            let logit = logits.get_mut(token as usize).ok_or(SamplerError::NoSuchToken {
                what: "logit_bias",
                token,
                n_vocab,
            })?;
            *logit = bounded(*logit + bias);
        }
        Ok(())
    }

    /// Keskar et al. 2019 for repetition (multiplied where dividing would reward a negative logit), then presence and frequency.
    fn penalise(&self, logits: &mut [f32]) {
        if !self.params.penalises() {
            return;
        }
        let SamplingParams { repeat_penalty, presence_penalty, frequency_penalty, .. } = self.params;
        for (&token, &count) in &self.counts {
            // The window may hold tokens from outside this vocabulary; they can't be chosen anyway.
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            let repeated = if *logit <= 0.0 { *logit * repeat_penalty } else { *logit / repeat_penalty };
            *logit = bounded(repeated - (count as f32 * frequency_penalty + presence_penalty));
        }
    }

    /// Fills `candidates`: the best `k` in order, or for `k == 0` all that aren't banned, by id.
    fn top_k(&mut self, logits: &[f32], k: usize) {
        let found = &mut self.candidates;
        found.clear();
        self.n_sorted = 0;
        let tokens = (0u32..).zip(logits).map(|(id, &logit)| Candidate { id, logit });
        if k == 0 || k >= logits.len() {
            found.extend(tokens.filter(|c| c.logit > f32::NEG_INFINITY));
            if k > 0 {
                self.sort_best(k);
            }
            return;
        }
        // A running threshold: most chunks hold nothing above the k-th best so far and cost one vectorised maximum.
        const CHUNK: usize = 64;
        let room = k.saturating_mul(2).max(256);
        let mut threshold = f32::NEG_INFINITY;
        for (chunk, first) in logits.chunks(CHUNK).zip((0u32..).step_by(CHUNK)) {
            if chunk.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a }) <= threshold {
                continue;
            }
            // Strictly above: among equals the earlier ids are already in.
            found.extend(
                (first..).zip(chunk).map(|(id, &logit)| Candidate { id, logit }).filter(|c| c.logit > threshold),
            );
            if found.len() >= room {
                let (_, kth, _) = found.select_nth_unstable_by(k - 1, Candidate::best_first);
                threshold = kth.logit;
                found.truncate(k);
            }
        }
        self.sort_best(k);
        self.candidates.truncate(k);
    }

    /// Makes the first `n` candidates the best `n` in order, leaving alone what already is.
    fn sort_best(&mut self, n: usize) {
        let n = n.min(self.candidates.len());
        if n <= self.n_sorted {
            return;
        }
        let rest = &mut self.candidates[self.n_sorted..];
        let want = n - self.n_sorted;
        if want < rest.len() {
            rest.select_nth_unstable_by(want - 1, Candidate::best_first);
        }
        rest[..want].sort_unstable_by(Candidate::best_first);
        self.n_sorted = n;
    }

    fn max_logit(&self) -> f32 {
        if self.n_sorted > 0 {
            self.candidates[0].logit
        } else {
            self.candidates.iter().fold(f32::NEG_INFINITY, |a, c| a.max(c.logit))
        }
    }

    /// The sum over all candidates of `exp((logit - max) / temp)`, in their present order.
    fn weigh(&mut self, max: f64, temp: f64) -> f64 {
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|c| ((f64::from(c.logit) - max) / temp).exp()));
        self.weights.iter().sum()
    }

    fn typical(&mut self) {
        let p = f64::from(self.params.typical_p);
        if p >= 1.0 {
            return;
        }
        self.sort_best(self.candidates.len());
        let max = f64::from(self.max_logit());
        let sum = self.weigh(max, 1.0);
        let log_sum = sum.ln();
        let surprise = |c: &Candidate| log_sum - (f64::from(c.logit) - max);
        let entropy: f64 = self.candidates.iter().zip(&self.weights).map(|(c, w)| w / sum * surprise(c)).sum();
        let distance = |c: &Candidate| (surprise(c) - entropy).abs();
        self.candidates.sort_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.best_first(b)));
        let mut reached = 0.0;
        let n = self.candidates.iter().position(|c| {
            reached += (-surprise(c)).exp();
            reached > p
        });
        if let Some(n) = n {
            self.candidates.truncate(n + 1);
        }
        self.n_sorted = 0;
        self.sort_best(self.candidates.len());
    }

    fn top_p(&mut self) {
        let p = f64::from(self.params.top_p);
        if p >= 1.0 {
            return;
        }
        let max = f64::from(self.max_logit());
        let sum = self.weigh(max, 1.0);
        // Few tokens usually reach p, so only a growing head of the candidates is ever sorted.
        let mut reached = 0.0;
        let mut i = 0;
        while i < self.candidates.len() {
            if i == self.n_sorted {
                self.sort_best((i * 4).max(256));
            }
            reached += (f64::from(self.candidates[i].logit) - max).exp() / sum;
            i += 1;
            if reached >= p {
                break;
            }
        }
        self.candidates.truncate(i);
        self.n_sorted = self.n_sorted.min(i);
    }

    fn min_p(&mut self) {
        if self.params.min_p <= 0.0 {
            return;
        }
        let least = f64::from(self.max_logit()) + f64::from(self.params.min_p).ln();
        self.candidates.retain(|c| f64::from(c.logit) >= least);
        self.n_sorted = self.n_sorted.min(self.candidates.len());
    }

    /// One random number, also when only one token is left, so that the next draw doesn't depend on how many there were.
    fn draw(&mut self) -> u32 {
        let u = self.rng.next_f64();
        let max = f64::from(self.max_logit());
        let target = self.weigh(max, f64::from(self.params.temp)) * u;
        let mut reached = 0.0;
        let hit = self.weights.iter().position(|w| {
            reached += w;
            reached > target
        });
        // Summed in the same order as the total, so something is always hit; the last is where rounding would lead.
        self.candidates[hit.unwrap_or(self.candidates.len() - 1)].id
    }
}

/// Bias and penalties may overflow the logits of a broken model; the order of the tokens survives.
fn bounded(logit: f32) -> f32 {
    if logit == f32::NEG_INFINITY { logit } else { logit.clamp(f32::MIN, f32::MAX) }
}

/// That the logits of a token are numbers. (n_vocab)
pub(crate) fn check_finite(logits: &[f32]) -> Result<(), SamplerError> {
    const EXPONENT: u32 = 0x7f80_0000;
    // Whole chunks without a branch vectorise; the culprit is looked for only if there is one.
    let clean = logits
        .chunks(1024)
        .all(|c| c.iter().fold(0u32, |bad, x| bad | u32::from(x.to_bits() & EXPONENT == EXPONENT)) == 0);
    if clean {
        return Ok(());
    }
    match (0u32..).zip(logits).find(|(_, x)| !x.is_finite()) {
        Some((token, &value)) => Err(SamplerError::NotFinite { token, value }),
        None => Ok(()),
    }
}

/// The model's own opinion of a token: natural logarithms of probabilities, before any sampling parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token asked for.
    pub token: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// The log-probability of `token` and of the `top_n` most likely tokens under `logits // (n_vocab)`, summed in f64.
///
/// # Errors
/// A logit isn't finite, or the token is outside the vocabulary.
pub fn logprobs(logits: &[f32], token: u32, top_n: usize) -> Result<Logprobs, SamplerError> {
    check_finite(logits)?;
    let n_vocab = logits.len();
    let logit = *logits.get(token as usize).ok_or(SamplerError::NoSuchToken { what: "logprobs", token, n_vocab })?;
    let max = f64::from(logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)));
    let log_sum = max + logits.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln();
    let mut best: Vec<Candidate> = (0u32..).zip(logits).map(|(id, &logit)| Candidate { id, logit }).collect();
    let n = top_n.min(n_vocab);
    if n > 0 && n < n_vocab {
        best.select_nth_unstable_by(n - 1, Candidate::best_first);
    }
    best.truncate(n);
    best.sort_unstable_by(Candidate::best_first);
    let log_p = |logit: f32| (f64::from(logit) - log_sum) as f32;
    Ok(Logprobs { token: log_p(logit), top: best.iter().map(|c| (c.id, log_p(c.logit))).collect() })
}
