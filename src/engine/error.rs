//! What can go wrong, for those who use the engine.

use crate::arch::{ModelError, PassError};
use crate::cpu::IsaError;
use crate::gguf::{GgufError, KeyError, WriteError};
use crate::ops::kv::KvError;
use crate::session::grammar::GrammarError;
use crate::session::sampler::SamplerError;
use crate::session::stop::EmptyStop;
use crate::session::template::TemplateError;
use crate::session::tokenizer::TokenizerError;

/// Why a model couldn't be loaded or a text not be written. The engine stays usable after any of them.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The file.
    #[error("{0}")]
    Gguf(#[from] GgufError),
    /// The model in the file.
    #[error("{file}: {source}")]
    Model {
        /// The model file's name.
        file: String,
        /// What is wrong.
        source: ModelError,
    },
    /// The tokeniser in the file.
    #[error("{file}: {source}")]
    Tokenizer {
        /// The model file's name.
        file: String,
        /// What is wrong.
        source: TokenizerError,
    },
    /// `ONCALL_ISA`.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// A pass through the model.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The KV cache.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// Recording what the routers choose.
    #[error(transparent)]
    Record(#[from] crate::moe::recorder::RecordError),
    /// There's nothing to record.
    #[error("{file} has no experts: there is no routing to record")]
    NoExperts {
        /// The model file's name.
        file: String,
    },
    /// Sampling.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// A grammar or JSON schema.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    /// The file's metadata.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The chat template in the file.
    #[error("{file}: {source}")]
    Template {
        /// The model file's name.
        file: String,
        /// What is wrong.
        source: TemplateError,
    },
    /// A stop string.
    #[error(transparent)]
    Stop(#[from] EmptyStop),
    /// The text doesn't fit.
    #[error("{wanted} tokens don't fit into a context of {n_ctx}, of which {used} are used: {advice}")]
    ContextFull {
        /// Tokens that were to be added.
        wanted: usize,
        /// Tokens that are there.
        used: usize,
        /// The context's length.
        n_ctx: usize,
        /// What to do.
        advice: &'static str,
    },
    /// A token that the model doesn't have.
    #[error("token {token} isn't in the vocabulary of {n_vocab}")]
    NoSuchToken {
        /// The token.
        token: u32,
        /// The vocabulary's size.
        n_vocab: usize,
    },
    /// Nothing to go on from.
    #[error("there is no token to continue from: the text is empty and the model has no token that begins one")]
    Empty,
    /// The system has no memory or threads for it.
    #[error("the system refused {what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// The memory budget is too small.
    #[error(
        "{} MiB of memory are too little for this model: the least that works with this context is {} MiB; a shorter context \
         (-c) or a q8_0 KV cache (-ctk q8_0 -ctv q8_0) would lower it",
        budget >> 20,
        smallest.div_ceil(1 << 20)
    )]
    Budget {
        /// The budget.
        budget: u64,
        /// The smallest that works.
        smallest: u64,
    },
    /// The memory budget is too small for so many sequences.
    #[error(
        "{} MiB of memory are too little for {n} sequences of this model: the least that works with them is {} MiB; fewer of them \
         (--sequences), a shorter context (-c) or a q8_0 KV cache (-ctk q8_0 -ctv q8_0) would lower it",
        budget >> 20,
        smallest.div_ceil(1 << 20)
    )]
    BatchBudget {
        /// Sequences.
        n: usize,
        /// The budget.
        budget: u64,
        /// The smallest that works.
        smallest: u64,
    },
    /// The queue's worker is gone.
    #[error("the engine stopped before this was done: its queue's worker ended; load the model again")]
    Stopped,
    /// A file that was to be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A saved session.
    #[error("{path}: {why}")]
    Saved {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
}
