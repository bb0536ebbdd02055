//! Writing: sample a token, put it at the end, hand out its text.

use super::{EngineError, Session};
use crate::session::sampler::{Sampler, SamplingParams};
use crate::session::stop::StopMatcher;
use crate::session::tokenizer::StreamDecoder;

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
}

/// A token and the text that became certain with it.
#[derive(Debug)]
pub struct Piece {
    /// The token; `None` for text that was held back until the end.
    pub token: Option<u32>,
    /// The text, which may be empty.
    pub text: String,
}

/// A text being written at the end of a session.
pub struct Generation<'s> {
    session: &'s mut Session,
    sampler: Sampler,
    stops: StopMatcher,
    decoder: StreamDecoder,
    params: GenerationParams,
    n_written: usize,
    finish: Option<Finish>,
    logits: Vec<f32>,
}

impl<'s> Generation<'s> {
    /// Writes on from the session's last token, whose logits must be there (see [`Session::feed`]).
    ///
    /// # Errors
    /// A parameter out of its range; an empty session.
    pub fn new(session: &'s mut Session, params: GenerationParams) -> Result<Self, EngineError> {
        if session.logits().is_empty() {
            return Err(EngineError::Empty);
        }
        let mut sampler = Sampler::new(params.sampling.clone())?;
        session.tokens().iter().for_each(|&t| sampler.accept(t));
        let stops = StopMatcher::new(params.stop.iter().cloned())?;
        let decoder = StreamDecoder::new(params.show_special);
        Ok(Generation { session, sampler, stops, decoder, params, n_written: 0, finish: None, logits: Vec::new() })
    }

    /// Why it ended, if it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Tokens written.
    pub fn n_written(&self) -> usize {
        self.n_written
    }

    /// The seed that was used.
    pub fn seed(&self) -> u64 {
        self.sampler.seed()
    }

    /// The next token and its text; `None` when it is over. The token is in the session when the call after returns:
    /// the pass that computes what follows it is only done when that's asked for.
    ///
    /// # Errors
    /// When the file can't be read or the logits aren't numbers. What was written stays in the session.
    #[allow(clippy::should_implement_trait)] // it can fail, and borrows
    pub fn next(&mut self) -> Result<Option<Piece>, EngineError> {
        if self.finish.is_some() {
            return Ok(None);
        }
        if self.params.n_predict == Some(self.n_written) {
            return Ok(self.end(Finish::Length));
        }
        let engine = self.session.engine().clone();
        let n_vocab = engine.config().n_vocab;
        let all = self.session.logits();
        self.logits.clear();
        self.logits.extend_from_slice(&all[all.len() - n_vocab..]);
        let token = self.sampler.sample(&mut self.logits)?;
        if engine.tokenizer().is_eog(token) && !self.params.ignore_eos {
            return Ok(self.end(Finish::Stop));
        }
        if self.session.tokens().len() >= engine.n_ctx() {
            return Ok(self.end(Finish::ContextFull));
        }
        self.sampler.accept(token);
        self.session.feed(&[token], &mut |_| true)?;
        self.n_written += 1;
        let out = self.stops.push(self.decoder.push(engine.tokenizer(), token));
        if out.stop.is_some() {
            self.finish = Some(Finish::StopString);
        }
        Ok(Some(Piece { token: Some(token), text: out.text }))
    }

    /// Ends it, and hands out what was held back.
    fn end(&mut self, why: Finish) -> Option<Piece> {
        self.finish = Some(why);
        let mut text = self.stops.push(self.decoder.finish()).text;
        text.push_str(&self.stops.finish());
        (!text.is_empty()).then_some(Piece { token: None, text })
    }
}
