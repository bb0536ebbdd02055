//! `oncall logits`: what the model thinks after each token, for other tools to compare.

use super::args::ModelArgs;
use super::{Failure, output};
use crate::gguf::PartFile;
use clap::Args;
use std::io::Write;
use std::path::PathBuf;

/// Flags of `logits`.
#[derive(Args)]
#[command(
    after_help = "The file holds f32 in little-endian order, n_tokens rows of n_vocab.",
    mut_arg("no_heat", |a| a.hide(true))
)]
pub(super) struct LogitsArgs {
    /// The tokens: 1,2,3
    #[arg(long, value_name = "LIST", value_delimiter = ',', required = true)]
    tokens: Vec<u32>,
    /// Where to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) fn run(mut a: LogitsArgs) -> Result<(), Failure> {
    // Tokens that nobody wrote teach nothing about which experts will be wanted.
    a.model.no_heat = true;
    let engine = a.model.load()?;
    let mut session = engine.session();
    let mut file = PartFile::replace(&a.output)?;
    let mut written = Ok(());
    let n_vocab = engine.config().n_vocab;
    let bar = output::bar("computing logits", "tokens");
    bar.set_length(a.tokens.len() as u64);
    for part in a.tokens.chunks(a.model.ubatch_size as usize) {
        session.feed_all(part, &mut |_, logits| {
            if written.is_ok() {
                written = logits.iter().try_for_each(|l| file.write_all(&l.to_le_bytes()));
            }
            bar.inc((logits.len() / n_vocab) as u64);
        })?;
        if output::stopped() {
            return Err(Failure::interrupted());
        }
    }
    bar.finish_and_clear();
    written.map_err(|e| file.error(e))?;
    file.commit()?;
    output::note(&format!("{} x {n_vocab} logits in {}", a.tokens.len(), a.output.display()));
    Ok(())
}
