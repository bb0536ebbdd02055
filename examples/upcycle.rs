//! Makes a mixture of experts that talks sense from a dense model.
//!
//! `cargo run --release --example upcycle -- --help`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use oncall::gguf::Gguf;
use oncall::gguf::mixture::{self, Mixture};
use oncall::synth::SynthError;
use oncall::synth::upcycle::{self, upcycle};

/// Turn a dense GGUF model of the llama architecture into a mixture of experts.
///
/// Each expert is the dense feed-forward network plus small noise of its own, and the router is random. Whatever
/// experts it picks, the text stays about as good as the dense model's: a mixture of experts that can be talked to,
/// without training and without a large download.
#[derive(Parser)]
#[command(after_help = "Example, after models/fetch-smollm2.sh:
  upcycle models/cache/SmolLM2-135M-Instruct.Q4_1.gguf models/cache/smolmoe-q4_0.gguf")]
struct Args {
    /// The dense model
    dense: PathBuf,

    /// The file to write; it appears under this name when it is complete
    out: PathBuf,

    /// Experts of each layer
    #[arg(long, default_value_t = 8)]
    experts: u32,

    /// Experts that a token uses
    #[arg(long, default_value_t = 2)]
    used: u32,

    /// Size of each expert's noise against its weights; from about 0.1 on the text suffers
    #[arg(long, default_value_t = 0.02)]
    noise: f32,

    /// Number formats of the experts, as llama-quantize names them; other tensors keep theirs
    #[arg(long, value_parser = mixture, default_value = "q4_0")]
    quant: &'static Mixture,

    /// Spread of the router's weights: larger ones make one expert count for more than the others
    #[arg(long, default_value_t = 0.1)]
    router_std: f32,

    /// Another seed makes other experts
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Replace the file if it is there already
    #[arg(long)]
    force: bool,
}

fn mixture(name: &str) -> Result<&'static Mixture, String> {
    mixture::by_name(name).ok_or_else(|| "no such mixture".into())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), SynthError> {
    let dense = Gguf::open(&args.dense)?;
    let options = upcycle::Options {
        n_expert: args.experts,
        n_expert_used: args.used,
        noise: args.noise,
        mixture: args.quant,
        router_std: args.router_std,
        seed: args.seed,
    };
    let bar = ProgressBar::new(0);
    bar.set_style(
        ProgressStyle::with_template("{bar:40} {binary_bytes}/{binary_total_bytes} {eta} left")
            .expect("a valid template"),
    );
    upcycle(&dense, &options, &args.out, args.force, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    println!("{}", args.out.display());
    Ok(())
}
