//! Families of models: configuration, weights and forward pass of each.
//!
//! `decoder` holds the forward pass that decoder-only transformers share; an architecture's file says what is
//! particular to it, and one line in [`ARCHES`] makes it known.

mod config;
mod decoder;
mod deepseek2;
mod ffn;
mod gpt_oss;
mod gqa;
mod granitemoe;
mod llama;
mod mla;
mod olmoe;
mod pass;
mod qwen2moe;
mod qwen3moe;
mod weights;

pub use config::{Config, Keys, MoeConfig, RopeConfig};
pub use decoder::Decoder;
pub use pass::{Block, Buffers, Machine};
pub use weights::{Dense, Loader, Matrix};

/// An architecture: its name in a file, and how its weights are declared.
pub struct Arch {
    /// `general.architecture`.
    pub name: &'static str,
    load: fn(&mut Loader<'_>, Config) -> Result<Decoder, ModelError>,
}

/// Every architecture that oncall runs.
pub static ARCHES: &[Arch] = &[
    Arch { name: "llama", load: llama::load },
    Arch { name: "qwen2moe", load: qwen2moe::load },
    Arch { name: "qwen3moe", load: qwen3moe::load },
    Arch { name: "olmoe", load: olmoe::load },
    Arch { name: "granitemoe", load: granitemoe::load },
    Arch { name: "gpt-oss", load: gpt_oss::load },
    Arch { name: "deepseek2", load: deepseek2::load },
];

/// Reads a model's configuration and declares its weights. With `n_expert_used` tokens use fewer experts than the model was
/// trained with, which is lossy.
///
/// # Errors
/// An unknown architecture, a key or tensor that is missing or impossible.
pub fn declare(
    gguf: &crate::gguf::Gguf,
    isa: crate::cpu::Isa,
    n_expert_used: Option<usize>,
) -> Result<(Decoder, Loader<'_>), ModelError> {
    declare_with(gguf, isa, n_expert_used, false)
}

/// The same from the header alone, for a file that isn't all there: sizes are right, weights aren't. With the bytes of the
/// dense weights.
///
/// # Errors
/// As [`declare`].
pub fn describe(
    gguf: &crate::gguf::Gguf,
    isa: crate::cpu::Isa,
    n_expert_used: Option<usize>,
) -> Result<(Decoder, u64), ModelError> {
    let (decoder, loader) = declare_with(gguf, isa, n_expert_used, true)?;
    Ok((decoder, loader.declared_bytes()))
}

fn declare_with(
    gguf: &crate::gguf::Gguf,
    isa: crate::cpu::Isa,
    n_expert_used: Option<usize>,
    describe: bool,
) -> Result<(Decoder, Loader<'_>), ModelError> {
    let name = gguf.metadata().required_str("general.architecture")?;
    let arch = ARCHES.iter().find(|a| a.name == name).ok_or_else(|| ModelError::UnknownArch {
        name: name.into(),
        known: ARCHES.iter().map(|a| a.name).collect::<Vec<_>>().join(", "),
    })?;
    let n_vocab = gguf.metadata().required_strings("tokenizer.ggml.tokens")?.len();
    let mut config = Config::read(gguf.metadata(), arch.name, n_vocab)?;
    config.fewer_experts = n_expert_used;
    let mut loader = Loader::new(gguf, arch.name, isa, describe);
    let decoder = (arch.load)(&mut loader, config)?;
    if let (Some(wanted), None) = (n_expert_used, &decoder.config.moe) {
        return Err(ModelError::NoExperts { wanted });
    }
    Ok((decoder, loader))
}

/// Why a pass ended early.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// It was asked to.
    #[error("stopped in the middle of a pass")]
    Stopped,
    /// An expert couldn't be read.
    #[error("{0}")]
    Fetch(crate::moe::FetchError),
    /// An embedding couldn't be read.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<crate::moe::FetchError> for PassError {
    fn from(e: crate::moe::FetchError) -> Self {
        match e {
            crate::moe::FetchError::Stopped => PassError::Stopped,
            e => PassError::Fetch(e),
        }
    }
}

/// What is wrong with a model that its file's format allows.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file itself.
    #[error(transparent)]
    Gguf(#[from] crate::gguf::GgufError),
    /// A metadata key that is missing or of the wrong type.
    #[error(transparent)]
    Key(#[from] crate::gguf::KeyError),
    /// An architecture that oncall doesn't know.
    #[error("the architecture {name:?} isn't known to oncall: it runs {known}")]
    UnknownArch {
        /// `general.architecture`.
        name: String,
        /// The known ones.
        known: String,
    },
    /// A key that the architecture needs.
    #[error("the metadata key {key:?} is missing: the file is damaged or was converted by an older tool")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A key whose value can't be.
    #[error("the metadata key {key:?} can't be right: {why}")]
    Impossible {
        /// The key.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// A tensor that the architecture needs.
    #[error("the tensor {tensor:?} is missing: the file is damaged, or not a {arch} model as oncall knows it")]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The architecture.
        arch: String,
    },
    /// A tensor of another shape than the metadata say.
    #[error("the tensor {tensor:?} is {found}, but the metadata say {expected}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// Fewer experts were asked for of a dense model.
    #[error("--experts {wanted}: this model has no experts, every token uses all of it; leave it out")]
    NoExperts {
        /// What was asked for.
        wanted: usize,
    },
    /// More experts than the model uses were asked for, or none.
    #[error("--experts {wanted}: this model's tokens use {has}, and fewer can be asked for, down to 1")]
    FewerExperts {
        /// What was asked for.
        wanted: usize,
        /// What the model uses.
        has: usize,
    },
    /// It was asked to.
    #[error("loading it was stopped")]
    Stopped,
    /// No memory for the weights.
    #[error("no memory for {bytes} bytes of {what}: {source}")]
    Memory {
        /// How much was asked for.
        bytes: u64,
        /// For what.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
}
