//! Writing: sample a token, put it at the end, hand out its text.
//!
//! [`Writer`] is what a text being written knows besides its tokens; [`Generation`] drives one at the end of a session,
//! the scheduler drives many.

use super::{Engine, EngineError, Session};
use crate::session::grammar::{Grammar, GrammarState};
use crate::session::sampler::{Logprobs, Sampler, SamplingParams, logprobs};
use crate::session::stop::StopMatcher;
use crate::session::tokenizer::StreamDecoder;
use std::collections::VecDeque;

/// How to write.
#[derive(Clone, Debug, Default)]
pub struct GenerationParams {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens at most; `None` until the context is full.
    pub n_predict: Option<usize>,
    /// Texts that end it; they aren't handed out.
    pub stop: Vec<String>,
    /// Go on past tokens that end a text.
    pub ignore_eos: bool,
    /// Hand out the text of control tokens too.
    pub show_special: bool,
    /// With each token its log-probability and so many of the most likely ones; `None` for neither.
    pub logprobs: Option<usize>,
    /// What the text has to be like.
    pub grammar: Option<Grammar>,
}

/// Why it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended the text.
    Stop,
    /// A stop string came.
    StopString,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    ContextFull,
    /// Somebody ended it from outside.
    Cancelled,
}

/// A token and the text that became certain with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The token; `None` for text that was held back until the end.
    pub token: Option<u32>,
    /// The text, which may be empty.
    pub text: String,
    /// The model's opinion of the token, if it was asked for.
    pub logprobs: Option<Logprobs>,
}

/// A text being written: from the logits after the last token to the next token and its text.
pub(super) struct Writer {
    sampler: Sampler,
    stops: StopMatcher,
    decoder: StreamDecoder,
    grammar: Option<GrammarState>,
    /// The next tokens, where the grammar leaves no choice.
    forced: VecDeque<u32>,
    params: GenerationParams,
    n_written: usize,
    finish: Option<Finish>,
    /// A copy that the sampler may change. (n_vocab)
    logits: Vec<f32>,
}

impl Writer {
    /// A writer after these tokens.
    pub fn new(engine: &Engine, params: GenerationParams, before: &[u32]) -> Result<Self, EngineError> {
        let mut sampler = Sampler::new(params.sampling.clone())?;
        before.iter().for_each(|&t| sampler.accept(t));
        let stops = StopMatcher::new(params.stop.iter().cloned())?;
        let decoder = StreamDecoder::new(params.show_special);
        let mut grammar = params.grammar.as_ref().map(|g| engine.grammars()?.start(g)).transpose()?;
        let forced = grammar.as_mut().map_or(VecDeque::new(), |g| g.forced().into());
        let finish = (params.n_predict == Some(0)).then_some(Finish::Length);
        Ok(Writer { sampler, stops, decoder, grammar, forced, params, n_written: 0, finish, logits: Vec::new() })
    }

    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    pub fn n_written(&self) -> usize {
        self.n_written
    }

    pub fn seed(&self) -> u64 {
        self.sampler.seed()
    }

    /// Tokens at most; `None` until the context is full.
    pub fn n_predict(&self) -> Option<usize> {
        self.params.n_predict
    }

    /// Whether the next token is certain, so that [`Writer::next`] needs no logits for it.
    pub fn knows_next(&self) -> bool {
        self.finish.is_none() && !self.forced.is_empty() && self.params.logprobs.is_none()
    }

    /// Chooses the token after `n_before` tokens, of which the last gave these logits (n_vocab). `None` if it is over;
    /// [`Writer::finish`] then says why, as it does with the last token.
    pub fn next(&mut self, engine: &Engine, logits: &[f32], n_before: usize) -> Result<Option<Piece>, EngineError> {
        if self.finish.is_some() {
            return Ok(None);
        }
        let token = match self.forced.pop_front() {
            Some(token) => token,
            None => self.sample(logits)?,
        };
        let tokenizer = engine.tokenizer();
        if tokenizer.is_eog(token) && !self.params.ignore_eos {
            return Ok(self.end(Finish::Stop));
        }
        if n_before >= engine.n_ctx() {
            return Ok(self.end(Finish::ContextFull));
        }
        self.sampler.accept(token);
        self.n_written += 1;
        let out = self.stops.push(self.decoder.push(tokenizer, token));
        let mut text = out.text;
        if out.stop.is_some() {
            self.finish = Some(Finish::StopString);
        } else if self.accept(token)? {
            text.push_str(&self.rest(Finish::Stop));
        } else if self.params.n_predict == Some(self.n_written) {
            // No further pass is needed to know that this was the last one.
            text.push_str(&self.rest(Finish::Length));
        }
        let logprobs = self.params.logprobs.map(|n| logprobs(logits, token, n)).transpose()?;
        Ok(Some(Piece { token: Some(token), text, logprobs }))
    }

    fn sample(&mut self, logits: &[f32]) -> Result<u32, EngineError> {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        Ok(match &mut self.grammar {
            None => self.sampler.sample(&mut self.logits)?,
            Some(g) => self.sampler.sample_masked(&mut self.logits, g.mask()?)?,
        })
    }

    /// Tells the grammar; whether the text is complete.
    fn accept(&mut self, token: u32) -> Result<bool, EngineError> {
        let Some(grammar) = &mut self.grammar else { return Ok(false) };
        grammar.accept(token)?;
        if grammar.is_complete() {
            return Ok(true);
        }
        if self.forced.is_empty() {
            self.forced = grammar.forced().into();
        }
        Ok(false)
    }

    /// Ends it, and hands out what was held back.
    fn end(&mut self, why: Finish) -> Option<Piece> {
        let text = self.rest(why);
        (!text.is_empty()).then_some(Piece { token: None, text, logprobs: None })
    }

    fn rest(&mut self, why: Finish) -> String {
        self.finish = Some(why);
        let mut text = self.stops.push(self.decoder.finish()).text;
        text.push_str(&self.stops.finish());
        text
    }
}

/// A text being written at the end of a session.
pub struct Generation<'s> {
    session: &'s mut Session,
    writer: Writer,
}

impl<'s> Generation<'s> {
    /// Writes on from the session's last token, wherever that is: after a prompt that was stopped, from where it was stopped.
    ///
    /// # Errors
    /// A parameter out of its range; an empty session.
    pub fn new(session: &'s mut Session, params: GenerationParams) -> Result<Self, EngineError> {
        if session.tokens().is_empty() {
            return Err(EngineError::Empty);
        }
        let writer = Writer::new(session.engine(), params, session.tokens())?;
        Ok(Generation { session, writer })
    }

    /// Why it ended, if it has.
    pub fn finish(&self) -> Option<Finish> {
        self.writer.finish()
    }

    /// Tokens written.
    pub fn n_written(&self) -> usize {
        self.writer.n_written()
    }

    /// The seed that was used.
    pub fn seed(&self) -> u64 {
        self.writer.seed()
    }

    /// The next token and its text; `None` when it is over. The token is then in the session.
    ///
    /// # Errors
    /// When the file can't be read or the logits aren't numbers. What was written before stays in the session.
    #[allow(clippy::should_implement_trait)] // it can fail, and borrows
    pub fn next(&mut self) -> Result<Option<Piece>, EngineError> {
        if self.writer.finish().is_some() {
            return Ok(None);
        }
        if !self.writer.knows_next() {
            self.session.compute_logits(self.writer.n_written() > 0)?;
        }
        let engine = self.session.engine().clone();
        let all = self.session.logits();
        let last = &all[all.len().saturating_sub(engine.config().n_vocab)..];
        let piece = self.writer.next(&engine, last, self.session.tokens().len())?;
        if let Some(token) = piece.as_ref().and_then(|p| p.token) {
            self.session.push(token);
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineOptions;

    /// Text and logits, to the bit. Kernels keep one order of adding up on every instruction set; the routers' exponentials and the
    /// angles of positions come from the C library, and with glibc 2.36 nothing differed on x86-64 and arm64. Activations are rounded
    /// to eight bits before each matrix, which swallows most errors in a last place: those are for the operations' own tests.
    #[test]
    fn the_embedded_model_has_these_bits_on_every_machine() {
        let engine = Engine::embedded(&EngineOptions { n_threads: Some(2), ..EngineOptions::default() }).unwrap();
        let mut session = engine.session();
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut add = |logits: &[f32]| {
            logits.iter().for_each(|x| hash = (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3));
        };
        let prompt = engine.tokenizer().encode("Tell me a story about a fox named Max.\n", true, false);
        session.feed_all(&prompt, &mut |_, logits| add(logits)).unwrap();
        session.truncate(prompt.len() - 1);
        session.feed(&prompt[prompt.len() - 1..], &mut |_| true).unwrap();
        let sampling = SamplingParams { temp: 0.0, ..SamplingParams::default() };
        let params = GenerationParams { sampling, n_predict: Some(16), ..GenerationParams::default() };
        let mut generation = Generation::new(&mut session, params).unwrap();
        let mut text = String::new();
        while let Some(piece) = generation.next().unwrap() {
            text.push_str(&piece.text);
            add(generation.session.logits());
        }
        assert_eq!(text, "Once upon a time, a tiny fox called Max lived in a little home");
        assert_eq!(hash, 0xb8f2_a2ad_1582_7956, "{hash:#x}");
    }
}
