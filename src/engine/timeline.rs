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
    /// Those that the KV cache holds, and pending ones: they are computed before or with what comes next.
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

    /// The tokens so far: what was fed, and all that was written.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many of the tokens have been computed. A token that was written is handed out as soon as it's known, and computed when something
    /// comes after it.
    pub fn n_computed(&self) -> usize {
        self.kv.len()
    }

    /// The logits of the last pass: (n_wanted, n_vocab). Empty before the first, after [`Session::truncate`], and when feeding was stopped:
    /// a [`Generation`](super::Generation) computes what it needs of them itself.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Puts a token that was written at the end, to be computed later.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// Gives its part of the KV cache back. The tokens stay, and are computed again when something comes after them.
    pub fn free_kv(&mut self) {
        self.kv.truncate(0);
        self.logits.clear();
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
    /// middle of a chunk. How many tokens were fed: all of them, unless it was ended.
    ///
    /// # Errors
    /// As [`Engine::forward`]; nothing is fed if they don't all fit.
    pub fn feed(&mut self, tokens: &[u32], progress: &mut dyn FnMut(usize) -> bool) -> Result<usize, EngineError> {
        self.check_room(tokens.len())?;
        let before = self.tokens.len();
        if tokens.is_empty() {
            return Ok(0);
        }
        self.tokens.extend_from_slice(tokens);
        let result = self.compute(false, &mut |n| progress(n.saturating_sub(before)));
        self.tokens.truncate(self.kv.len().max(before));
        match result {
            Ok(()) | Err(EngineError::Pass(PassError::Stopped)) => Ok(self.tokens.len() - before),
            Err(e) => Err(e),
        }
    }

    /// As [`Session::feed`], but gives the logits of every token: `each` is called with a chunk's first index among
    /// `tokens` and its logits, (n, n_vocab).
    ///
    /// # Errors
    /// As [`Engine::forward`]; a logit that isn't a number.
    pub fn feed_all(&mut self, tokens: &[u32], each: &mut dyn FnMut(usize, &[f32])) -> Result<(), EngineError> {
        self.check_room(tokens.len())?;
        let engine = self.engine.clone();
        let mut done = 0;
        while done < tokens.len() {
            let n = engine.chunk_of_all_logits().min(tokens.len() - done);
            let tokens = &tokens[done..done + n];
            engine.forward(&mut [Input { session: self, tokens, written: false, want: Want::All }])?;
            self.logits.chunks(engine.config().n_vocab).try_for_each(check_finite)?;
            each(done, &self.logits);
            done += n;
        }
        Ok(())
    }

    /// Computes the tokens that haven't been, in chunks as long as the memory allows at the time. `progress` is told how many of the text's
    /// tokens are done, and ends it by returning false.
    fn compute(&mut self, written: bool, progress: &mut dyn FnMut(usize) -> bool) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        while self.kv.len() < self.tokens.len() {
            let todo = self.tokens.split_off(self.kv.len());
            let n = engine.chunk_now(1).min(todo.len());
            let want = if n == todo.len() { Want::Last } else { Want::Nothing };
            let result = engine.forward(&mut [Input { session: self, tokens: &todo[..n], written, want }]);
            self.tokens.extend_from_slice(&todo[if result.is_ok() { n } else { 0 }..]);
            result?;
            if !progress(self.kv.len()) {
                break;
            }
        }
        Ok(())
    }

    /// Computes the tokens that haven't been, as `written` or as part of what is read.
    pub(super) fn catch_up(&mut self, written: bool) -> Result<(), EngineError> {
        self.compute(written, &mut |_| true)
    }

    /// As [`Session::catch_up`], and the last token again if its logits aren't there.
    pub(super) fn compute_logits(&mut self, written: bool) -> Result<(), EngineError> {
        if self.kv.len() == self.tokens.len() && self.logits.is_empty() {
            self.kv.truncate(self.tokens.len().saturating_sub(1));
        }
        self.catch_up(written)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{EngineOptions, Generation, Memory};
    use crate::session::sampler::SamplingParams;

    fn engine(o: EngineOptions) -> Engine {
        Engine::embedded(&EngineOptions { n_threads: Some(1), ..o }).unwrap()
    }

    /// The most probable tokens after the session's.
    fn write(session: &mut Session, n: usize) -> Vec<u32> {
        let sampling = SamplingParams { temp: 0.0, ..SamplingParams::default() };
        let params = GenerationParams { sampling, n_predict: Some(n), ignore_eos: true, ..GenerationParams::default() };
        let mut g = Generation::new(session, params).unwrap();
        std::iter::from_fn(|| g.next().unwrap()).filter_map(|p| p.token).collect()
    }

    fn text(n: usize) -> Vec<u32> {
        (0..n as u32).map(|i| 300 + i * 37 % 2500).collect()
    }

    #[test]
    fn writing_goes_on_where_it_ended() {
        let engine = engine(EngineOptions { n_ctx: Some(64), n_sessions: 2, ..EngineOptions::default() });
        let (mut one, mut two) = (engine.session(), engine.session());
        for s in [&mut one, &mut two] {
            s.feed(&text(20), &mut |_| true).unwrap();
        }
        let all = write(&mut one, 8);
        assert_eq!([write(&mut two, 5), write(&mut two, 3)].concat(), all);
        assert_eq!(two.tokens(), [text(20), all].concat());
        // What is fed next comes after the token that was written last.
        for s in [&mut one, &mut two] {
            s.feed(&[7], &mut |_| true).unwrap();
        }
        let input = Input { session: &mut two, tokens: &[8], written: false, want: Want::Last };
        engine.forward(&mut [input]).unwrap();
        one.feed(&[8], &mut |_| true).unwrap();
        assert!(one.tokens() == two.tokens() && one.logits() == two.logits());
    }

    #[test]
    fn a_prompt_that_was_stopped_can_be_written_on() {
        let engine = engine(EngineOptions { n_ctx: Some(64), n_sessions: 2, chunk: 8, ..EngineOptions::default() });
        let (mut whole, mut stopped) = (engine.session(), engine.session());
        assert_eq!(whole.feed(&text(16), &mut |_| true).unwrap(), 16);
        assert_eq!(stopped.feed(&text(30), &mut |n| n < 16).unwrap(), 16);
        assert!(stopped.logits().is_empty() && stopped.tokens() == text(16));
        let want = write(&mut whole, 4);
        assert_eq!(write(&mut stopped, 4), want);
        stopped.truncate(16);
        assert_eq!(write(&mut stopped, 4), want, "truncated");
        stopped.free_kv();
        assert_eq!(write(&mut stopped, 2), write(&mut whole, 2), "without its KV cache");
    }

    #[test]
    fn what_is_fed_a_token_at_a_time_is_read() {
        let engine = engine(EngineOptions { n_ctx: Some(64), chunk: 1, ..EngineOptions::default() });
        let mut session = engine.session();
        session.feed(&text(10), &mut |_| true).unwrap();
        write(&mut session, 4);
        let account = engine.account();
        assert_eq!((account.prefill.tokens, account.decode.tokens), (10, 3));
    }

    #[test]
    fn a_lowered_budget_holds_from_a_prompt_s_next_block_on() {
        let engine = engine(EngineOptions { n_ctx: Some(1024), ..EngineOptions::default() });
        let mut session = engine.session();
        let (mut sizes, mut before, mut next) = (Vec::new(), 0, 0);
        session
            .feed(&text(1020), &mut |n| {
                sizes.push(n - before);
                before = n;
                if sizes.len() == 1 {
                    engine.set_memory_budget(Memory::Bytes(engine.budget().least)).unwrap();
                    next = engine.chunk_now(1);
                }
                true
            })
            .unwrap();
        assert!(sizes[0] == 512 && next < 512 && sizes[1..].iter().all(|&n| n <= next), "{next}: {sizes:?}");
    }

    /// A context that is mostly empty doesn't make a prompt slow.
    #[test]
    fn a_block_has_the_memory_that_the_kv_cache_does_not_need_yet() {
        let o = EngineOptions { n_ctx: Some(4096), ..EngineOptions::default() };
        let least = engine(o.clone()).budget().least;
        let engine = engine(EngineOptions { memory: Memory::Bytes(least), ..o });
        assert_eq!(engine.budget().chunk, 1);
        let mut session = engine.session();
        session.feed(&text(500), &mut |_| true).unwrap();
        let passes = engine.account().prefill.passes;
        assert!(passes < 50, "{passes} passes for 500 tokens");
        let unbounded = self::engine(EngineOptions { n_ctx: Some(512), ..EngineOptions::default() });
        let mut other = unbounded.session();
        other.feed(&text(500), &mut |_| true).unwrap();
        assert!(session.logits() == other.logits());
    }

    #[test]
    fn slots_get_the_kv_cache_s_memory_back_when_it_is_free() {
        let o = EngineOptions { n_ctx: Some(1024), n_sessions: 8, chunk: 64, ..EngineOptions::default() };
        let least = engine(o.clone()).budget().least;
        let engine = engine(EngineOptions { memory: Memory::Bytes(least + (4 << 20)), ..o });
        let n_slots = || engine.n_slots().unwrap().0;
        let mut first = engine.session();
        first.feed(&text(10), &mut |_| true).unwrap();
        write(&mut first, 20);
        let free = n_slots();
        let mut many: Vec<Session> = (0..7).map(|_| engine.session()).collect();
        many.iter_mut().for_each(|s| assert_eq!(s.feed(&text(1000), &mut |_| true).unwrap(), 1000));
        assert!(n_slots() < free, "{} of {free}", n_slots());
        drop(many);
        write(&mut first, 30);
        assert_eq!(n_slots(), free);
        many = vec![engine.session()];
        many[0].feed(&text(1000), &mut |_| true).unwrap();
        let again = many[0].logits().to_vec();
        many[0].truncate(0);
        many[0].feed(&text(1000), &mut |_| true).unwrap();
        assert!(again == many[0].logits(), "memory that was given back is used again");
    }
}
