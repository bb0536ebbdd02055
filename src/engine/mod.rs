//! A loaded model and its timelines: the only interface that the front ends see.

mod batch_plan;
mod budget;
mod chat;
mod error;
mod generate;
mod saved;
mod scheduler;
mod timeline;

pub use batch_plan::{BatchPlan, BatchShape, plan_batch};
pub use budget::{Budget, Memory};
pub use error::EngineError;
pub use generate::{Finish, Generation, GenerationParams, Piece};
pub use scheduler::{Event, Finished, Queue, QueueStats, Request, Stream, Ticket};
pub use timeline::Session;

use crate::arch::{self, Block, Buffers, Config, Decoder, Dense, Machine};
use crate::cpu::{Isa, Team};
use crate::gguf::Gguf;
use crate::moe::{ExpertStore, StoreStats, policy};
use crate::ops::attention::KvBatch;
use crate::ops::kv::{KV_BLOCK, KvPool, KvType, SeqKv};
use crate::session::grammar::{GrammarError, Grammars};
use crate::session::tokenizer::Tokenizer;
use std::path::Path;
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

/// The context when none is asked for: the model's own, but not more than this.
const DEFAULT_CTX: usize = 4096;
/// Tokens of a prompt that go through the layers together when nothing else is asked for.
pub const DEFAULT_CHUNK: usize = 512;
/// Threads that read experts. Two to four are best on the disks that were measured; eight are worse.
const READ_LANES: usize = 4;

/// What an engine is loaded with.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Positions that a session can hold; `None` for the model's own, up to 4096; 0 for the model's own.
    pub n_ctx: Option<usize>,
    /// Sessions, or sequences of the queue, at the same time.
    pub n_sessions: usize,
    /// Positions of the KV cache for all of them together, at least one full session's; `None` for all of them full.
    pub kv_positions: Option<usize>,
    /// Threads that compute; `None` for one on each core that this process may use.
    pub n_threads: Option<usize>,
    /// Tokens of a prompt that go through the layers together.
    pub chunk: usize,
    /// How keys are stored.
    pub type_k: KvType,
    /// How values are stored.
    pub type_v: KvType,
    /// Memory for everything.
    pub memory: Memory,
    /// Bytes for expert slots, whatever the memory says: for tests and measurements.
    pub expert_bytes: Option<u64>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            n_ctx: None,
            n_sessions: 1,
            kv_positions: None,
            n_threads: None,
            chunk: DEFAULT_CHUNK,
            type_k: KvType::F16,
            type_v: KvType::F16,
            memory: Memory::Auto,
            expert_bytes: None,
        }
    }
}

/// The context's length, as asked for or by itself.
fn resolve_ctx(asked: Option<usize>, trained: usize) -> usize {
    match asked {
        Some(0) => trained,
        Some(n) => n,
        None => trained.min(DEFAULT_CTX),
    }
}

impl EngineOptions {
    /// Blocks of the KV cache for sessions of this length.
    fn n_kv_blocks(&self, n_ctx: usize) -> usize {
        let one = n_ctx.div_ceil(KV_BLOCK);
        let all = one.saturating_mul(self.n_sessions.max(1));
        self.kv_positions.map_or(all, |n| n.div_ceil(KV_BLOCK).max(one))
    }
}

struct Inner {
    gguf: Arc<Gguf>,
    model: Decoder,
    dense: Dense,
    store: Option<ExpertStore>,
    kv: Arc<KvPool>,
    team: Team,
    tokenizer: Tokenizer,
    isa: Isa,
    n_ctx: usize,
    budget: Budget,
    /// One pass at a time; its buffers stay.
    buffers: Mutex<Buffers>,
    n_sessions: usize,
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
        Self::from_gguf(Gguf::open(path)?, options, progress)
    }

    /// Loads the model that is in the program itself.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn embedded(options: &EngineOptions) -> Result<Self, EngineError> {
        Self::from_gguf(Gguf::from_static(EMBEDDED_NAME, EMBEDDED)?, options, &|_, _| ())
    }

    /// Loads the model of a file that is open already.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn from_gguf(gguf: Gguf, o: &EngineOptions, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Self, EngineError> {
        let gguf = Arc::new(gguf);
        let of_model = |source| EngineError::Model { file: gguf.name().into(), source };
        let system = |what| move |source| EngineError::System { what, source };
        let isa = Isa::get()?;
        let (model, loader) = arch::declare(&gguf, isa).map_err(of_model)?;
        let tokenizer = Tokenizer::from_metadata(gguf.metadata())
            .map_err(|source| EngineError::Tokenizer { file: gguf.name().into(), source })?;
        let n_ctx = resolve_ctx(o.n_ctx, model.config.n_ctx_train);
        let n_blocks = o.n_kv_blocks(n_ctx);
        let total = loader.declared_bytes();
        let budget = Budget::new(o, &model, total, n_ctx)?;
        let kv = KvPool::new(&model.kv_layers(), o.type_k, o.type_v, n_blocks)?;
        let done = std::sync::atomic::AtomicU64::new(0);
        let dense = loader
            .read(&|n| progress(done.fetch_add(n, std::sync::atomic::Ordering::Relaxed) + n, total))
            .map_err(of_model)?;
        let store = match model.store_layout() {
            None => None,
            Some(layout) => {
                let bytes = o.expert_bytes.unwrap_or(budget.slots);
                let store = ExpertStore::new(layout, bytes, isa, policy::POLICIES[0].1, gguf.clone(), READ_LANES);
                Some(store.map_err(system("memory for expert slots, or threads"))?)
            }
        };
        let n_threads = o.n_threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
        let team = Team::new(n_threads).map_err(system("threads"))?;
        tracing::info!(model = gguf.name(), %isa, n_threads, n_ctx, dense_bytes = dense.n_bytes(), "loaded");
        let (buffers, n_sessions, queue, grammars) = (Mutex::default(), o.n_sessions, OnceLock::new(), OnceLock::new());
        Ok(Engine(Arc::new(Inner {
            gguf,
            model,
            dense,
            store,
            kv,
            team,
            tokenizer,
            isa,
            n_ctx,
            budget,
            buffers,
            n_sessions,
            queue,
            grammars,
        })))
    }

    /// A new, empty timeline.
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

    /// Weight bytes that one token must read: every matrix once, of the experts those that are used, of the embedding
    /// a row.
    pub fn active_bytes(&self) -> u64 {
        let c = self.config();
        let tied = self.gguf().tensor("output.weight").is_none();
        let (n, used) = c.moe.as_ref().map_or((1, 1), |m| (m.router.n_expert as u64, m.router.n_expert_used as u64));
        let each = self.gguf().tensors().iter().map(|t| match &*t.name {
            "token_embd.weight" if !tied => t.n_bytes / t.n_rows().max(1),
            name if name.contains("_exps.") => t.n_bytes * used / n,
            _ => t.n_bytes,
        });
        each.sum()
    }

    /// The model's tokeniser.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.0.tokenizer
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
        self.0.n_sessions.max(1)
    }

    /// How its memory is divided.
    pub fn budget(&self) -> Budget {
        self.0.budget
    }

    /// Threads that compute.
    pub fn n_threads(&self) -> usize {
        self.0.team.n_threads()
    }

    /// What the expert store has done; `None` for a dense model.
    pub fn store_stats(&self) -> Option<StoreStats> {
        self.0.store.as_ref().map(ExpertStore::stats)
    }

    /// Slots, and experts in all; `None` for a dense model.
    pub fn n_slots(&self) -> Option<(usize, usize)> {
        self.0.store.as_ref().map(ExpertStore::n_slots)
    }

    /// Runs the next tokens of one or more sessions through the model together. Each session's logits are then in
    /// [`Session::logits`]. Tokens of all sessions together are one block: the caller bounds it.
    ///
    /// # Errors
    /// When a context is full, a token doesn't exist or the file can't be read. No session is changed then.
    pub fn forward(&self, inputs: &mut [Input<'_>]) -> Result<Duration, EngineError> {
        let e = &*self.0;
        let n_vocab = e.model.config.n_vocab;
        let began = Instant::now();
        let (mut tokens, mut wanted) = (Vec::new(), Vec::new());
        for i in inputs.iter() {
            i.session.check_room(i.tokens.len())?;
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
        if let Some(store) = &e.store {
            store.advance(inputs.iter().map(|i| i.tokens.len() as u64).max().unwrap_or(0));
        }
        let kv = KvBatch::new(inputs.iter_mut().map(|i| (i.session.kv_mut(), i.tokens.len())))?;
        let mut block = Block { tokens: &tokens, kv, wanted: &wanted };
        let machine = Machine { team: &e.team, dense: &e.dense, experts: e.store.as_ref() };
        e.model.forward(&machine, &mut buffers, &e.gguf, &mut block)?;
        block.kv.advance();
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
        Ok(began.elapsed())
    }
}
