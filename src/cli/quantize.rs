//! `oncall quantize`: a model again, in another number format.

use super::{Failure, output};
use crate::gguf::Gguf;
use crate::gguf::mixture::{MIXTURES, by_name};
use crate::gguf::requantize::{Plan, RequantizeError};
use clap::Args;
use std::path::PathBuf;

/// Flags of `quantize`.
#[derive(Args)]
pub(super) struct QuantizeArgs {
    /// The model to read
    #[arg(value_name = "FROM")]
    from: PathBuf,
    /// The file to write
    #[arg(value_name = "TO")]
    to: PathBuf,
    /// The mixture of formats: q4_0, q4_k_m, q8_0 and so on; a wrong one lists them all
    #[arg(value_name = "FORMAT")]
    format: String,
    /// Replace the file if it is there
    #[arg(long)]
    overwrite: bool,
}

pub(super) fn run(a: QuantizeArgs) -> Result<(), Failure> {
    let mixture = by_name(&a.format).ok_or_else(|| {
        let known: Vec<&str> = MIXTURES.iter().map(|m| m.name).collect();
        Failure::usage(format!("there is no format {:?}; there are {}", a.format, known.join(", ")))
    })?;
    let source = Gguf::open(&a.from)?;
    let plan = Plan::new(&source, mixture)?;
    output::catch_ctrl_c();
    let bar = output::bar("writing the model", "bytes");
    let result = plan.write(&a.to, a.overwrite, &mut |done, total| {
        // Nothing was in the way of beginning.
        if let Some(t) = plan.rounded_twice().filter(|_| done == 0) {
            output::note(&format!(
                "note: {} is in {} already and is rounded a second time; from the original model the result is better",
                t.name, t.format.name
            ));
        }
        bar.set_length(total);
        bar.set_position(done);
        !output::stopped()
    });
    bar.finish_and_clear();
    match result {
        Err(RequantizeError::Stopped) => return Err(Failure::interrupted()),
        other => other?,
    }
    let after = std::fs::metadata(&a.to).map_or(0, |m| m.len());
    output::note(&format!("{}: {}, from {}", a.to.display(), output::size(after), output::size(source.total_bytes())));
    Ok(())
}
