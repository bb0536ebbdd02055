//! A loaded model and its timelines. Begin here: [`Engine::load`], [`Engine::session`], [`Generation`]; for many texts [`Engine::submit`].

mod account;
mod batch_plan;
mod budget;
mod chat;
mod error;
mod generate;
pub mod measure;
mod options;
pub mod outline;
mod saved;
mod scheduler;
mod timeline;

use account::Ledger;
pub use account::{Account, Histogram, Loading, Phase};
pub use batch_plan::{BatchPlan, BatchShape, plan_batch};
use budget::Room;
pub use budget::{Budget, Memory};
pub use error::EngineError;
pub use generate::{Finish, Generation, GenerationParams, Piece};
pub use options::{DEFAULT_CHUNK, EngineOptions};
pub use scheduler::{Event, Finished, Queue, QueueStats, Request, Stream, Ticket};
pub use timeline::Session;

use crate::arch::{self, Block, Buffers, Config, Decoder, Dense, Machine};
use crate::cpu::{Isa, Team};
use crate::gguf::{Gguf, WriteError};
use crate::moe::heat::{self, Heat};
use crate::moe::recorder::Recorder;
use crate::moe::trace::{self, TraceHeader};
use crate::moe::{DiskSource, ExpertStore, StoreOptions, StoreStats};
use crate::ops::attention::KvBatch;
use crate::ops::kv::{KV_BLOCK, KvPool, SeqKv};
use crate::session::grammar::{GrammarError, Grammars};
use crate::session::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// The model that is in the program itself: tiny, trained on a grammar of stories.
static EMBEDDED: &[u8] = include_bytes!("../../models/tinymoe-stories-Q8_0.gguf");
/// Its file's name.
pub const EMBEDDED_NAME: &str = "tinymoe-stories-Q8_0.gguf";

/// The bytes of the model that is in the program itself.
pub fn embedded_bytes() -> &'static [u8] {
    EMBEDDED
}

/// Threads that read experts. Two to four are best on the disks that were measured; eight are worse.
const READ_LANES: usize = 3;

/// Layers that the metadata leaves out are no error, but hardly meant.
fn warn_of_unused_layers(gguf: &Gguf, n_layer: usize) {
    let n = gguf.tensors().iter().filter(|t| outline::layer_of(t).is_some_and(|l| l >= n_layer)).count();
    if n > 0 {
        tracing::warn!(
            file = gguf.name(),
            "{n} of its tensors are of layers that it doesn't use: block_count is {n_layer}"
        );
    }
}

/// What former runs have learned of this model's experts, and where that is kept.
fn known_heat(gguf: &Gguf, model: &Decoder) -> Option<(PathBuf, Heat)> {
    let n_expert = model.config.moe.as_ref()?.router.n_expert;
    let identity = heat::identity(gguf);
    let path = heat::path_for(identity)?;
    let known = Heat::load(&path, identity, model.config.n_layer, n_expert);
    Some((path, known))
}

impl Drop for Inner {
    /// Ends the trace, if nobody has yet ([`Engine::end_recording`] says whether that worked), and keeps what was learned of the
    /// experts' heat: that it couldn't be kept spoils nothing but the next start.
    fn drop(&mut self) {
        let Some(recorder) = &self.recorder else { return };
        if let Err(e) = recorder.end() {
            tracing::warn!("{e}");
        }
        let Some((path, heat)) = &mut self.heat else { return };
        heat.learn(&recorder.uses(), recorder.n_expert_used());
        match heat.save(path) {
            // It keeps what it has learned.
            Err(e @ WriteError::Busy { .. }) => tracing::debug!("another run of the model ends just now: {e}"),
            Err(e) => tracing::warn!(path = %path.display(), "the experts' heat isn't kept: {e}"),
            Ok(()) => {}
        }
    }
}

/// Who watches the routers; nobody where there are none.
fn recorder(gguf: &Gguf, model: &Decoder, o: &EngineOptions) -> Result<Option<Recorder>, EngineError> {
    let c = &model.config;
    let Some(moe) = &c.moe else {
        return if o.record.is_some() { Err(EngineError::NoExperts { file: gguf.name().into() }) } else { Ok(None) };
    };
    let header = TraceHeader {
        model: gguf.name().into(),
        arch: c.arch.clone(),
        n_layer: c.n_layer,
        n_expert: moe.router.n_expert,
        n_expert_used: moe.router.n_expert_used,
        layer_bytes: outline::layer_bytes(gguf, c.n_layer, moe.router.n_expert),
    };
    Ok(Some(Recorder::new(&header, o.record.as_deref())?))
}

/// Slots of so many bytes for a model's experts, if it has some.
fn store(
    gguf: &Arc<Gguf>,
    model: &Decoder,
    o: &EngineOptions,
    isa: Isa,
    bytes: u64,
) -> std::io::Result<Option<ExpertStore>> {
    let Some(layout) = model.store_layout() else { return Ok(None) };
    let source = Arc::new(DiskSource::new(gguf.clone(), o.io));
    let options = StoreOptions { bytes, isa, policy: o.policy, lanes: READ_LANES, lookahead: o.lookahead };
    ExpertStore::new(layout, &options, source).map(Some)
}

struct Inner {
    gguf: Arc<Gguf>,
    model: Decoder,
    dense: Dense,
    store: Option<ExpertStore>,
    recorder: Option<Recorder>,
    heat: Option<(PathBuf, Heat)>,
    kv: Arc<KvPool>,
    team: Team,
    tokenizer: Arc<Tokenizer>,
    isa: Isa,
    n_ctx: usize,
    options: EngineOptions,
    budget: Mutex<Budget>,
    room: Mutex<Room>,
    ledger: Mutex<Ledger>,
    loading: Loading,
    /// One pass at a time; its buffers stay.
    buffers: Mutex<Buffers>,
    queue: OnceLock<scheduler::Closes>,
    grammars: OnceLock<Result<Grammars, GrammarError>>,
}

/// A loaded model. Cheap to clone: clones share it.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

/// One sequence's part of a pass.
pub struct Input<'a> {
    /// The session.
    pub session: &'a mut Session,
    /// Its next tokens.
    pub tokens: &'a [u32],
    /// Whether they were written, not given: a pass of such tokens alone counts as writing.
    pub written: bool,
    /// Which of their logits are wanted.
    pub want: Want,
}

/// Which tokens' logits a pass should give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None of them.
    Nothing,
    /// The last one's.
    Last,
    /// Everyone's.
    All,
}

impl Engine {
    /// Loads the model in a file, or in the first of a split model's files. `progress` is told (bytes done, bytes in all).
    ///
    /// # Errors
    /// Whatever is wrong with the file or the model in it, or what the system refuses.
    pub fn load(
        path: &Path,
        options: &EngineOptions,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, EngineError> {
        let began = Instant::now();
        Self::ready(began, Gguf::open(path)?, options, progress)
    }

    /// Loads the model that is in the program itself.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn embedded(options: &EngineOptions) -> Result<Self, EngineError> {
        let began = Instant::now();
        Self::ready(began, Gguf::from_static(EMBEDDED_NAME, EMBEDDED)?, options, &|_, _| ())
    }

    /// Loads the model of a file that is open already.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn from_gguf(gguf: Gguf, o: &EngineOptions, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Self, EngineError> {
        Self::ready(Instant::now(), gguf, o, progress)
    }

    /// Loads a model whose file was about to be opened when it `began`.
    fn ready(
        began: Instant,
        gguf: Gguf,
        o: &EngineOptions,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, EngineError> {
        let gguf = Arc::new(gguf);
        let of_model = |source| EngineError::Model { file: gguf.name().into(), source };
        let system = |what| move |source| EngineError::System { what, source };
        let isa = Isa::get()?;
        let (model, loader) = arch::declare(&gguf, isa, o.n_expert_used).map_err(of_model)?;
        let tokenizer = Tokenizer::from_metadata(gguf.metadata())
            .map_err(|source| EngineError::Tokenizer { file: gguf.name().into(), source })?;
        o.check_lossy(&model.config)?;
        let n_ctx = o.n_ctx_of(&model.config);
        let n_blocks = o.n_kv_blocks(n_ctx);
        let total = loader.declared_bytes();
        let room = Room::new(budget::needs(o, &model, total, n_ctx)?);
        let budget = Budget::new(room.needs(), o, o.memory)?;
        let kv = KvPool::new(&model.kv_layers(), o.type_k, o.type_v, n_blocks)?;
        let (done, began_reading) = (std::sync::atomic::AtomicU64::new(0), Instant::now());
        let dense = loader
            .read(o.stop.as_deref(), &|n| progress(done.fetch_add(n, std::sync::atomic::Ordering::Relaxed) + n, total))
            .map_err(of_model)?;
        let read = began_reading.elapsed();
        let bytes = o.expert_bytes.unwrap_or_else(|| room.slots(&budget));
        let store = store(&gguf, &model, o, isa, bytes)
            .map_err(system("addresses for slots of all experts (ulimit -v bounds them), or threads"))?;
        warn_of_unused_layers(&gguf, model.config.n_layer);
        let recorder = recorder(&gguf, &model, o)?;
        let heat = o.heat.then(|| known_heat(&gguf, &model)).flatten();
        if let (Some(store), Some((_, heat))) = (&store, &heat) {
            store.warm_up(heat.hottest());
        }
        let n_threads = o.n_threads_here();
        let team = Team::new(n_threads).map_err(system("threads"))?;
        tracing::info!(model = gguf.name(), %isa, n_threads, n_ctx, dense_bytes = dense.n_bytes(), "loaded");
        Ok(Engine(Arc::new(Inner {
            gguf,
            model,
            dense,
            store,
            recorder,
            heat,
            kv,
            team,
            tokenizer: Arc::new(tokenizer),
            isa,
            n_ctx,
            options: o.clone(),
            budget: Mutex::new(budget),
            room: Mutex::new(room),
            ledger: Mutex::default(),
            loading: Loading::new(began.elapsed(), read, done.into_inner()),
            buffers: Mutex::default(),
            queue: OnceLock::new(),
            grammars: OnceLock::new(),
        })))
    }

    /// A new, empty timeline. Its KV cache comes from a pool for `n_sessions` full contexts, which the queue uses too; where that is empty,
    /// feeding fails with [`KvError::Full`](crate::ops::kv::KvError).
    pub fn session(&self) -> Session {
        Session::new(self.clone(), SeqKv::new(&self.0.kv))
    }

    /// The model's sizes.
    pub fn config(&self) -> &Config {
        &self.0.model.config
    }

    /// The model's file.
    pub fn gguf(&self) -> &Gguf {
        &self.0.gguf
    }

    /// Weight bytes that one token must read: every matrix once, of the experts those that are used. Its row of the embedding isn't counted.
    pub fn active_bytes(&self) -> u64 {
        let (n, used) = outline::n_experts(self.config());
        outline::active(self.gguf(), n, used).iter().map(|a| a.bytes).sum()
    }

    /// The model's tokeniser.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.0.tokenizer
    }

    /// What it was loaded with.
    pub fn options(&self) -> &EngineOptions {
        &self.0.options
    }

    /// The instruction set that it computes with.
    pub fn isa(&self) -> Isa {
        self.0.isa
    }

    /// Positions that a session can hold.
    pub fn n_ctx(&self) -> usize {
        self.0.n_ctx
    }

    /// Sequences that its queue runs at the same time.
    pub fn n_sessions(&self) -> usize {
        self.0.options.n_sessions.max(1)
    }

    /// How its memory is divided.
    pub fn budget(&self) -> Budget {
        *self.0.budget.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Gives the engine more or less memory while it's loaded, between two passes: it waits for one that runs. What is written doesn't change.
    ///
    /// # Errors
    /// When it's less than the least that works with the sessions that it was loaded for; nothing is changed then.
    pub fn set_memory_budget(&self, memory: Memory) -> Result<Budget, EngineError> {
        let e = &*self.0;
        let mut buffers = e.buffers.lock().unwrap_or_else(|e| e.into_inner());
        let mut room = e.room.lock().unwrap_or_else(|e| e.into_inner());
        let budget = Budget::new(room.needs(), &e.options, memory)?;
        *self.0.budget.lock().unwrap_or_else(|e| e.into_inner()) = budget;
        *buffers = Buffers::default();
        room.buffers_dropped();
        if let Some(store) = &e.store {
            store.resize(e.options.expert_bytes.unwrap_or_else(|| room.slots(&budget)));
        }
        Ok(budget)
    }

    /// Tokens of a block all of whose logits are wanted.
    fn chunk_of_all_logits(&self) -> usize {
        let room = self.0.room.lock().unwrap_or_else(|e| e.into_inner());
        room.chunk_of_all_logits(&self.budget(), self.config().n_vocab)
    }

    /// Tokens of the longest block, of this many sequences, for which there is room now.
    fn chunk_now(&self, n_seqs: usize) -> usize {
        let (e, budget) = (&*self.0, self.budget());
        if e.store.is_none() || e.options.expert_bytes.is_some() {
            return budget.chunk.max(1);
        }
        let used = e.kv.n_blocks() - e.kv.n_free();
        // A sequence may open a block besides those that it fills, and copy a shared one.
        let with = |n: usize| e.kv.n_touched().max(used + n.div_ceil(KV_BLOCK) + 2 * n_seqs).min(e.kv.n_blocks());
        e.room.lock().unwrap_or_else(|e| e.into_inner()).chunk_now(&budget, with)
    }

    /// Shares the memory out anew for a pass of `n_tokens` whose places in the KV cache are reserved.
    fn make_room(&self, buffers: &mut Buffers, n_tokens: usize) {
        let e = &*self.0;
        let Some(store) = e.store.as_ref().filter(|_| e.options.expert_bytes.is_none()) else { return };
        let mut room = e.room.lock().unwrap_or_else(|e| e.into_inner());
        let held = e.kv.n_blocks() - e.kv.n_free();
        if let Some(moves) = room.before_pass(&self.budget(), n_tokens, e.kv.n_touched(), held) {
            if let Some(n) = moves.keep_kv {
                e.kv.discard_free(n.saturating_sub(held));
            }
            if moves.drop_buffers {
                *buffers = Buffers::default();
            }
            store.resize(moves.slots);
        }
    }

    /// The threads that compute.
    fn team(&self) -> &Team {
        &self.0.team
    }

    /// How many threads compute.
    pub fn n_threads(&self) -> usize {
        self.0.team.n_threads()
    }

    /// Where the time of all passes so far went.
    pub fn account(&self) -> Account {
        self.ledger().account(self.store_stats())
    }

    /// How it was loaded.
    pub fn loading(&self) -> Loading {
        self.0.loading
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.ledger.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Slots, and experts in all; `None` for a dense model.
    pub fn n_slots(&self) -> Option<(usize, usize)> {
        self.0.store.as_ref().map(ExpertStore::n_slots)
    }

    /// How often each expert was used so far, (n_layer x n_expert), and whether it is in a slot; `None` for a dense model.
    pub fn expert_uses(&self) -> Option<Vec<(u64, bool)>> {
        let (recorder, store) = (self.0.recorder.as_ref()?, self.0.store.as_ref()?);
        Some(recorder.uses().into_iter().zip(store.residency()).collect())
    }

    /// Gives the trace of [`EngineOptions::record`] its name: it's whole. What comes after isn't recorded.
    ///
    /// # Errors
    /// When that fails; the trace is removed then.
    pub fn end_recording(&self) -> Result<(), EngineError> {
        self.0.recorder.as_ref().map_or(Ok(()), |r| Ok(r.end()?))
    }

    /// Runs the next tokens of one or more sessions through the model together. Each session's logits are then in
    /// [`Session::logits`]. Tokens of all sessions together are one block: the caller bounds it.
    ///
    /// # Errors
    /// When a context is full, a token doesn't exist, a session is another engine's, the file can't be read, or
    /// [`EngineOptions::stop`] is true. No session's tokens are changed then.
    pub fn forward(&self, inputs: &mut [Input<'_>]) -> Result<Duration, EngineError> {
        let e = &*self.0;
        let n_vocab = e.model.config.n_vocab;
        let (mut tokens, mut wanted) = (Vec::new(), Vec::new());
        for i in inputs.iter_mut() {
            if !Arc::ptr_eq(&i.session.engine().0, &self.0) {
                return Err(EngineError::OtherEngine);
            }
            i.session.check_room(i.tokens.len())?;
            i.session.catch_up(false)?;
        }
        for i in inputs.iter() {
            if let Some(&token) = i.tokens.iter().find(|&&t| t as usize >= n_vocab) {
                return Err(EngineError::NoSuchToken { token, n_vocab });
            }
            let first = tokens.len() as u32;
            tokens.extend_from_slice(i.tokens);
            let end = tokens.len() as u32;
            wanted.extend(match i.want {
                Want::Nothing => end..end,
                Want::Last => end.saturating_sub(1).max(first)..end,
                Want::All => first..end,
            });
        }
        if tokens.is_empty() {
            return Ok(Duration::ZERO);
        }
        let mut buffers: MutexGuard<'_, Buffers> = e.buffers.lock().unwrap_or_else(|e| e.into_inner());
        let is_decode = inputs.iter().all(|i| i.written || i.tokens.is_empty());
        let began = Instant::now();
        self.ledger().begin(self.store_stats());
        let result = self.pass(inputs, &mut buffers, &tokens, &wanted, is_decode);
        let took = began.elapsed();
        self.ledger().end(is_decode, result.as_ref().ok().map(|()| tokens.len()), took, self.store_stats());
        result?;
        let mut logits = &buffers.logits[..wanted.len() * n_vocab];
        for i in inputs {
            let n = match i.want {
                Want::Nothing => 0,
                Want::Last => i.tokens.len().min(1),
                Want::All => i.tokens.len(),
            };
            let (own, rest) = logits.split_at(n * n_vocab);
            i.session.took(i.tokens, own);
            logits = rest;
        }
        Ok(took)
    }

    /// One block through the layers; its logits are in the buffers, and the sessions' KV caches have it.
    fn pass(
        &self,
        inputs: &mut [Input<'_>],
        buffers: &mut Buffers,
        tokens: &[u32],
        wanted: &[u32],
        is_decode: bool,
    ) -> Result<(), EngineError> {
        let e = &*self.0;
        let began = Instant::now();
        if let Some(store) = &e.store {
            store.begin_pass(inputs.iter().map(|i| i.tokens.len() as u64).max().unwrap_or(0));
        }
        let kv = KvBatch::new(inputs.iter_mut().map(|i| (i.session.kv_mut(), i.tokens.len())))?;
        // Many logits are as large as the buffers of a long block.
        let as_large_as = if wanted.len() > self.n_sessions() { self.budget().chunk } else { 1 };
        self.make_room(buffers, tokens.len().max(as_large_as));
        let mut block = Block { tokens, kv, wanted };
        let machine = Machine {
            team: &e.team,
            dense: &e.dense,
            experts: e.store.as_ref(),
            lossy: e.options.lossy,
            recorder: e.recorder.as_ref(),
            stop: e.options.stop.as_deref(),
        };
        e.recorder.as_ref().inspect(|r| r.discard());
        e.model.forward(&machine, buffers, &e.gguf, &mut block)?;
        if let Some(r) = &e.recorder {
            r.finish(if is_decode { trace::Phase::Decode } else { trace::Phase::Prefill })?;
        }
        block.kv.advance();
        if let Some(store) = &e.store {
            store.end_pass(tokens.len(), began.elapsed());
        }
        Ok(())
    }

    fn store_stats(&self) -> StoreStats {
        self.0.store.as_ref().map(ExpertStore::stats).unwrap_or_default()
    }
}
