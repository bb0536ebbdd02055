//! The scheduler: sequences that run, sequences that wait, and one step after the other.

use super::plan::{self, Running};
use super::prefix::{NodeId, Prefixes};
use super::{Event, Finished, QueueStats, Sink, lock};
use crate::engine::generate::{Finish, Piece, Writer};
use crate::engine::{EngineError, Input, Session, Want};
use crate::ops::kv::{HeldBlock, KV_BLOCK, KvError, KvPool, SeqKv};
use std::cmp::Reverse;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};

/// The order in which sequences are served: by priority, then by arrival.
pub(super) type Rank = (Reverse<i32>, u64);
/// Waiting sequences that are looked at in a step while those before them wait for a common beginning.
const LOOK_AT: usize = 256;
/// Tokens of a beginning that isn't whole blocks are taken over from so many on: that copies a block, which takes as long as computing
/// some tokens.
const WORTH_COPYING: usize = 16;

/// A request on its way.
pub(super) struct Sequence {
    pub rank: Rank,
    /// Its part of the KV cache; empty while it waits.
    pub session: Session,
    pub writer: Writer,
    /// The prompt and what was written.
    pub tokens: Vec<u32>,
    pub n_prompt: usize,
    /// Tokens of the prompt that needn't be computed, at its first start.
    pub n_shared: Option<usize>,
    /// Its full blocks, all of which are in the tree.
    pub path: Vec<NodeId>,
    pub cancelled: Arc<AtomicBool>,
    pub sink: Sink,
}

impl Sequence {
    fn view(&self) -> Running {
        let (len, kv) = (self.session.tokens().len(), self.session.kv());
        Running { blocks: kv.n_blocks(), own: kv.n_own_blocks(), ..self.view_with(len) }
    }

    /// As if it had `len` tokens, in blocks that it shares.
    fn view_with(&self, len: usize) -> Running {
        let n_ctx = self.session.engine().n_ctx();
        let most = self.writer.n_predict().map_or(n_ctx, |n| n.saturating_add(self.n_prompt).min(n_ctx));
        Running {
            len,
            todo: self.tokens.len() - len,
            blocks: plan::blocks_for(len),
            own: 0,
            most: plan::blocks_for(most),
        }
    }

    /// Blocks of its text that could come from the tree: the last token's logits have to be computed.
    fn n_shareable(&self) -> usize {
        (self.tokens.len() - 1) / KV_BLOCK
    }

    /// Of the first `n` tokens of this text, those with which the other one begins, too. The last token of that one doesn't count:
    /// its logits have to be computed.
    fn n_common(&self, n: usize, other: &Sequence) -> usize {
        let most = n.min(other.tokens.len() - 1);
        self.tokens[..n].iter().zip(&other.tokens[..most]).take_while(|(a, b)| a == b).count()
    }

    /// Whether it's computing more of the other text's beginning than the `n` tokens that are there.
    fn is_computing_for(&self, other: &Sequence, n: usize) -> bool {
        let done = self.session.tokens().len();
        done < self.n_prompt && self.n_common(self.n_prompt, other) >= n.max(done) + WORTH_COPYING
    }

    /// The next token, and those after it that need no further pass.
    fn choose(&mut self) -> Result<Vec<Piece>, EngineError> {
        let mut pieces = Vec::new();
        loop {
            let n_before = self.tokens.len() + pieces.len();
            pieces.extend(self.writer.next(self.session.engine(), self.session.logits(), n_before)?);
            if !self.writer.knows_next() {
                return Ok(pieces);
            }
        }
    }

    fn finished(&self, finish: Finish) -> Finished {
        Finished {
            finish,
            n_prompt: self.n_prompt,
            n_shared: self.n_shared.unwrap_or(0),
            n_written: self.writer.n_written(),
            seed: self.writer.seed(),
        }
    }
}

/// See the [module](self).
pub(super) struct Scheduler {
    max_sequences: usize,
    /// In the order of their rank.
    running: Vec<Sequence>,
    /// In the order of their rank.
    waiting: Vec<Sequence>,
    prefixes: Arc<Mutex<Prefixes<HeldBlock>>>,
    /// Those that are done, and their last events: for the caller to hand out, when the figures count them.
    pub ended: Vec<(Sequence, Event)>,
    pub stats: QueueStats,
}

impl Scheduler {
    pub fn new(max_sequences: usize, pool: &KvPool) -> Self {
        let (running, waiting, ended, stats) = Default::default();
        let prefixes = Arc::new(Mutex::new(Prefixes::new()));
        let keeper: Weak<Mutex<Prefixes<HeldBlock>>> = Arc::downgrade(&prefixes);
        pool.add_keeper(keeper);
        Scheduler { max_sequences: max_sequences.max(1), running, waiting, prefixes, ended, stats }
    }

    /// Takes a request up.
    pub fn add(&mut self, s: Sequence) {
        self.stats.n_submitted += 1;
        match s.writer.finish() {
            Some(finish) => self.end(s, finish),
            None => insert(&mut self.waiting, s),
        }
    }

    /// One pass through the model. False when there is nothing left to do.
    pub fn step(&mut self) -> bool {
        self.drop_cancelled();
        self.admit();
        if !self.running.is_empty() {
            let n_tokens = self.make_room();
            match self.forward(&n_tokens) {
                Ok(()) => self.take_results(&n_tokens),
                Err(e) => self.failed(e, &n_tokens),
            }
        }
        self.stats.n_running = self.running.len();
        self.stats.n_waiting = self.waiting.len();
        self.stats.n_kept_blocks = lock(&self.prefixes).n_blocks();
        !(self.running.is_empty() && self.waiting.is_empty())
    }

    /// Lets go of all blocks and sequences; dropping these tells that they weren't done.
    pub fn abandon(&mut self) -> Vec<Sequence> {
        lock(&self.prefixes).clear();
        self.running.drain(..).chain(self.waiting.drain(..)).collect()
    }

    fn end(&mut self, s: Sequence, finish: Finish) {
        match finish {
            Finish::Cancelled => self.stats.n_cancelled += 1,
            _ => self.stats.n_finished += 1,
        }
        let done = s.finished(finish);
        self.ended(s, Event::Finished(done));
    }

    fn fail(&mut self, s: Sequence, error: Arc<EngineError>) {
        self.stats.n_failed += 1;
        self.ended(s, Event::Failed(error));
    }

    fn ended(&mut self, mut s: Sequence, event: Event) {
        // Who hears of it can have its blocks.
        s.session.truncate(0);
        self.ended.push((s, event));
    }

    fn drop_cancelled(&mut self) {
        let gone = |s: &mut Sequence| s.cancelled.load(Relaxed);
        let mut cancelled: Vec<Sequence> = self.running.extract_if(.., gone).collect();
        cancelled.extend(self.waiting.extract_if(.., gone));
        cancelled.into_iter().for_each(|s| self.end(s, Finish::Cancelled));
    }

    /// Lets those join who find room, in the order of their rank. One whose beginning another is just computing waits for it, so
    /// that it is computed once.
    fn admit(&mut self) {
        let mut i = 0;
        while i < self.waiting.len().min(LOOK_AT) {
            let s = &self.waiting[i];
            let n_there = lock(&self.prefixes).path(&s.tokens, s.n_shareable()).len() * KV_BLOCK;
            if self.running.iter().any(|r| r.is_computing_for(s, n_there)) {
                i += 1;
                continue;
            }
            // From here on the beginning is its own: nobody else's need of blocks evicts it.
            let pool = s.session.kv().pool().clone();
            let (path, kv) = lock(&self.prefixes).begin(&pool, &s.tokens, s.n_shareable());
            match self.room_for(s, &kv) {
                Some(n_yield) => {
                    let s = self.waiting.remove(i);
                    // They stand behind it in the queue.
                    (0..n_yield).for_each(|_| self.preempt());
                    self.join(s, path, kv);
                }
                None if self.running.is_empty() => {
                    // Nobody will give blocks back: sessions outside of the queue hold them.
                    drop(kv);
                    let s = self.waiting.remove(i);
                    let (wanted, free) = (plan::blocks_for(s.tokens.len()), pool.n_available());
                    self.fail(s, Arc::new(KvError::Full { wanted, free, total: pool.n_blocks() }.into()));
                }
                None => break,
            }
        }
    }

    /// How many of the running have to yield so that this one can join with its beginning; `None` if it has to wait. Only those of
    /// lower priority do.
    fn room_for(&self, s: &Sequence, kv: &SeqKv) -> Option<usize> {
        let views: Vec<Running> = self.running.iter().map(Sequence::view).collect();
        let n_below = self.running.iter().filter(|r| r.rank.0 > s.rank.0).count();
        plan::join(&views, n_below, self.max_sequences, kv.pool().n_available(), &s.view_with(kv.len()))
    }

    fn join(&mut self, mut s: Sequence, path: Vec<NodeId>, kv: SeqKv) {
        let kv = self.copied(&s, kv.len()).unwrap_or(kv);
        let n = kv.len();
        s.session = Session::with_tokens(s.session.engine().clone(), kv, s.tokens[..n].to_vec());
        match s.n_shared {
            None => {
                s.n_shared = Some(n);
                self.stats.n_prompt += s.n_prompt as u64;
                self.stats.n_shared += n as u64;
            }
            Some(_) => self.stats.n_recomputed += (s.tokens.len() - n) as u64,
        }
        s.path = path;
        insert(&mut self.running, s);
    }

    /// What a running sequence has computed of this one's beginning, if that is enough more than the `n` tokens in whole blocks.
    fn copied(&self, s: &Sequence, n: usize) -> Option<SeqKv> {
        let common = |r: &Sequence| r.n_common(r.session.tokens().len(), s);
        let (len, from) = self.running.iter().map(|r| (common(r), r)).max_by_key(|c| c.0)?;
        // One block is copied to go on in, and one in forking, for a moment.
        if len < n + WORTH_COPYING || s.session.kv().pool().n_available() < 2 {
            return None;
        }
        let mut kv = from.session.kv().fork().ok()?;
        kv.truncate(len);
        kv.reserve(1).ok()?;
        Some(kv)
    }

    /// Sends the last one back to wait: its blocks are needed. What it has written stays; its part of the KV cache will be computed
    /// again, to the same bytes.
    fn preempt(&mut self) {
        if let Some(mut s) = self.running.pop() {
            s.session.truncate(0);
            s.path.clear();
            self.stats.n_preempted += 1;
            insert(&mut self.waiting, s);
        }
    }

    /// Plans a step, and sees to it that the blocks that it takes can be had. The tokens of each running sequence.
    fn make_room(&mut self) -> Vec<usize> {
        let free = self.running[0].session.kv().pool().n_available();
        let views: Vec<Running> = self.running.iter().map(Sequence::view).collect();
        // The budget, and with it the room for activations, may change between two steps.
        let max_tokens = self.running[0].session.engine().chunk_now(self.running.len());
        let n_tokens = plan::step(&views, free, max_tokens);
        while self.running.len() > n_tokens.len() {
            self.preempt();
        }
        n_tokens
    }

    fn forward(&mut self, n_tokens: &[usize]) -> Result<(), EngineError> {
        let engine = self.running[0].session.engine().clone();
        let mut inputs: Vec<Input<'_>> = Vec::with_capacity(self.running.len());
        for (s, &n) in self.running.iter_mut().zip(n_tokens).filter(|(_, n)| **n > 0) {
            let at = s.session.tokens().len();
            let want = if at + n == s.tokens.len() { Want::Last } else { Want::Nothing };
            let (tokens, written) = (&s.tokens[at..at + n], at >= s.n_prompt);
            inputs.push(Input { session: &mut s.session, tokens, written, want });
        }
        if inputs.is_empty() {
            let pool = self.running[0].session.kv().pool();
            return Err(KvError::Full { wanted: 1, free: pool.n_available(), total: pool.n_blocks() }.into());
        }
        engine.forward(&mut inputs)?;
        self.stats.n_steps += 1;
        self.stats.n_computed += n_tokens.iter().sum::<usize>() as u64;
        Ok(())
    }

    /// Puts new full blocks into the tree, written ones too: what was written is the beginning of a conversation's next turn.
    fn keep_blocks(&mut self) {
        let mut prefixes = lock(&self.prefixes);
        for s in &mut self.running {
            for i in s.path.len()..s.session.tokens().len() / KV_BLOCK {
                let hold = || s.session.kv().hold(i);
                let Some((id, block)) = prefixes.insert(&s.path, &s.tokens, hold) else { break };
                s.session.kv_mut().share(i, block);
                s.path.push(id);
            }
        }
    }

    /// Chooses the next tokens and hands them out.
    fn take_results(&mut self, n_tokens: &[usize]) {
        self.keep_blocks();
        let Some(engine) = self.running.first().map(|s| s.session.engine().clone()) else { return };
        let mut pieces: Vec<Option<Result<Vec<Piece>, EngineError>>> = Vec::new();
        pieces.resize_with(self.running.len(), || None);
        engine.team().each_row_of_two((&mut self.running, 1), (&mut pieces, 1), &|i, s, pieces| {
            let ([s], [pieces]) = (s, pieces) else { return };
            let complete = n_tokens[i] > 0 && s.session.tokens().len() == s.tokens.len();
            *pieces = complete.then(|| s.choose());
        });
        for (s, piece) in std::mem::take(&mut self.running).into_iter().zip(pieces) {
            match piece {
                None => self.running.push(s),
                Some(Ok(pieces)) => self.hand_out(s, pieces),
                Some(Err(e)) => self.fail(s, Arc::new(e)),
            }
        }
    }

    fn hand_out(&mut self, mut s: Sequence, pieces: Vec<Piece>) {
        for piece in pieces {
            self.stats.n_written += u64::from(piece.token.is_some());
            s.tokens.extend(piece.token);
            s.sink.send(Event::Piece(piece));
        }
        if s.sink.ended {
            return self.end(s, Finish::Cancelled);
        }
        match s.writer.finish() {
            Some(finish) => self.end(s, finish),
            None => self.running.push(s),
        }
    }

    /// A step failed. If the KV cache was full, because somebody outside took blocks, the last one yields; what else goes wrong
    /// concerns all who were in the step.
    fn failed(&mut self, error: EngineError, n_tokens: &[usize]) {
        if matches!(error, EngineError::Kv(KvError::Full { .. })) && self.running.len() > 1 {
            return self.preempt();
        }
        let error = Arc::new(error);
        let alone = self.running.len() == 1;
        for (s, &n) in std::mem::take(&mut self.running).into_iter().zip(n_tokens) {
            if n > 0 || alone { self.fail(s, error.clone()) } else { self.running.push(s) }
        }
    }
}

/// Puts a sequence where its rank belongs.
fn insert(list: &mut Vec<Sequence>, s: Sequence) {
    let at = list.partition_point(|x| x.rank < s.rank);
    list.insert(at, s);
}
