//! A session: one timeline of tokens with its part of the KV cache.

use super::generate::Writer;
use super::{Engine, EngineError, GenerationParams, Input, Want};
use crate::arch::PassError;
use crate::ops::kv::SeqKv;
use crate::session::sampler::check_finite;

/// A conversation or text so far: feed it tokens, then write with [`Generation`](super::Generation). Dropping it frees its part of the
/// KV cache.
pub struct Session {
    engine: Engine,
    kv: SeqKv,
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

impl Session {
    pub(super) fn new(engine: Engine, kv: SeqKv) -> Self {
        Session { engine, kv, tokens: Vec::new(), logits: Vec::new() }
    }

    pub(super) fn with_tokens(engine: Engine, kv: SeqKv, tokens: Vec<u32>) -> Self {
        Session { engine, kv, tokens, logits: Vec::new() }
    }

    pub(super) fn kv_mut(&mut self) -> &mut SeqKv {
        &mut self.kv
    }

    pub(super) fn kv(&self) -> &SeqKv {
        &self.kv
    }

    pub(super) fn check_room(&self, wanted: usize) -> Result<(), EngineError> {
        let (used, n_ctx) = (self.tokens.len(), self.engine.n_ctx());
        if wanted > n_ctx - used.min(n_ctx) {
            let advice = if n_ctx < self.engine.config().n_ctx_train {
                "ask for a longer one (-c, up to what the model was trained for) or shorten the text"
            } else {
                "shorten the text, or ask for a longer context (-c), though answers get worse beyond what the model was trained for"
            };
            return Err(EngineError::ContextFull { wanted, used, n_ctx, advice });
        }
        Ok(())
    }

    pub(super) fn took(&mut self, tokens: &[u32], logits: &[f32]) {
        self.tokens.extend_from_slice(tokens);
        // A long block's logits aren't kept room for.
        if self.logits.capacity() / 4 > logits.len() {
            self.logits = Vec::new();
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
    }

    /// The engine that it belongs to.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The logits of the last pass: (n_wanted, n_vocab). Empty before the first.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Whether a text can be written like this: to be known before a long prompt is read.
    ///
    /// # Errors
    /// A parameter out of its range, a grammar with a mistake.
    pub fn check(&self, params: &GenerationParams) -> Result<(), EngineError> {
        Writer::new(&self.engine, params.clone(), &[]).map(drop)
    }

    /// Puts tokens at the end, in chunks; the last one's logits are then in [`Session::logits`]. After each chunk
    /// `progress` is told how many are done, and ends it by returning false: the chunks so far stay. [`super::EngineOptions::stop`] ends it in the
    /// middle of a chunk.
    ///
    /// # Errors
    /// As [`Engine::forward`]; nothing is fed if they don't all fit.
    pub fn feed(&mut self, tokens: &[u32], progress: &mut dyn FnMut(usize) -> bool) -> Result<(), EngineError> {
        self.check_room(tokens.len())?;
        let chunk = self.engine.budget().chunk;
        let n_chunks = tokens.len().div_ceil(chunk);
        for (i, part) in tokens.chunks(chunk).enumerate() {
            let want = if i + 1 == n_chunks { Want::Last } else { Want::Nothing };
            match self.forward(part, want) {
                Err(EngineError::Pass(PassError::Stopped)) => break,
                result => result?,
            }
            if !progress((i * chunk) + part.len()) {
                break;
            }
        }
        Ok(())
    }

    /// As [`Session::feed`], but gives the logits of every token: `each` is called with a chunk's first index among
    /// `tokens` and its logits, (n, n_vocab).
    ///
    /// # Errors
    /// As [`Engine::forward`]; a logit that isn't a number.
    pub fn feed_all(&mut self, tokens: &[u32], each: &mut dyn FnMut(usize, &[f32])) -> Result<(), EngineError> {
        self.check_room(tokens.len())?;
        let chunk = self.engine.chunk_of_all_logits();
        for (i, part) in tokens.chunks(chunk).enumerate() {
            self.forward(part, Want::All)?;
            self.logits.chunks(self.engine.config().n_vocab).try_for_each(check_finite)?;
            each(i * chunk, &self.logits);
        }
        Ok(())
    }

    fn forward(&mut self, tokens: &[u32], want: Want) -> Result<(), EngineError> {
        // Who feeds a token at a time writes.
        let (engine, written) = (self.engine.clone(), tokens.len() <= 1);
        engine.forward(&mut [Input { session: self, tokens, written, want }]).map(|_| ())
    }

    /// Puts the first of these tokens, which were written, at the end, in one pass; how many.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub(super) fn feed_written(&mut self, tokens: &[u32]) -> Result<usize, EngineError> {
        let engine = self.engine.clone();
        let n = tokens.len().min(engine.budget().chunk.max(1));
        engine.forward(&mut [Input { session: self, tokens: &tokens[..n], written: true, want: Want::Last }])?;
        Ok(n)
    }

    /// Forgets the tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.kv.truncate(len);
        self.logits.clear();
    }

    /// Makes the timeline be `tokens`, keeping what it has in common with them: only the rest is computed. At least
    /// the last token is, so that its logits are there.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn feed_from_common(
        &mut self,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize) -> bool,
    ) -> Result<usize, EngineError> {
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let keep = common.min(tokens.len().saturating_sub(1));
        self.truncate(keep);
        self.feed(&tokens[keep..], progress)?;
        Ok(keep)
    }
}
