//! What can go wrong, for those who use the engine.

use crate::arch::{ModelError, PassError};
use crate::cpu::{IsaError, memory::Bound};
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
    /// Something lossy that can't be.
    #[error("{flag} {value}: {why}")]
    Lossy {
        /// Its flag.
        flag: &'static str,
        /// What was asked for.
        value: f32,
        /// Why it can't be, and what to do.
        why: &'static str,
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
    /// The text is so long that it needn't be looked at.
    #[error(
        "a text of {n_bytes} bytes can't fit into a context of {n_ctx} tokens, the longest of which has {longest} bytes: shorten it, or ask for \
         a longer context (-c)"
    )]
    TextTooLong {
        /// Its length.
        n_bytes: usize,
        /// The context's length.
        n_ctx: usize,
        /// The longest token's.
        longest: usize,
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
    #[error("{}", too_little(*budget, *share_of, *smallest, advice))]
    Budget {
        /// The budget.
        budget: u64,
        /// What bounds the memory that it's a share of, if it wasn't asked for.
        share_of: Option<Bound>,
        /// The smallest that works.
        smallest: u64,
        /// What would lower it.
        advice: Vec<&'static str>,
    },
    /// No memory is as large as the context's KV cache.
    #[error(
        "a context of {n_ctx} tokens (-c) is too long: its KV cache would have more bytes than can be counted; ask for a shorter one"
    )]
    Context {
        /// The context's length.
        n_ctx: usize,
    },
    /// A session that another engine made.
    #[error(
        "the session belongs to another engine, whose keys and values this one can't read: begin one with this engine's `session` or `restore`, or \
         compute it with its own engine"
    )]
    OtherEngine,
    /// The queue was dropped, or its worker died of a mistake in the engine. A panic in a request's own callback doesn't do that.
    #[error(
        "the queue ended before this was done: submit it to another one; if it was the engine's own, load the model again"
    )]
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

/// The least is rounded up, so that what is quoted works.
fn too_little(budget: u64, share_of: Option<Bound>, smallest: u64, advice: &[&str]) -> String {
    let (mib, least) = (budget >> 20, smallest.div_ceil(1 << 20));
    let which = match share_of {
        None => format!("{mib} MiB of memory are"),
        Some(bound) => format!("{mib} MiB of memory, nine tenths of {bound}, are"),
    };
    let mut text = format!("{which} too little for this model: the least that works with this context is {least} MiB");
    if let Some((last, others)) = advice.split_last() {
        let others = if others.is_empty() { String::new() } else { format!("{} or ", others.join(", ")) };
        text += &format!("; {others}{last} would lower it");
    }
    text
}
