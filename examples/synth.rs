//! Writes a model of random weights: a real model's shape without its download.
//!
//! `cargo run --release --example synth -- --list` shows the shapes.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use oncall::gguf::mixture::{self, MIXTURES, Mixture};
use oncall::synth::{self, Options, PRESETS, Preset};

/// Write a GGUF model of random weights with a real (or a tiny) model's shape.
///
/// It says nothing sensible. It is for measuring speed, memory and paging with the shapes of models that
/// nobody wants to download for that, and for comparing engines on tiny models of every architecture.
/// The same options make the same bytes on every machine. Files may be larger than memory.
#[derive(Parser)]
#[command(after_help = "Examples:
  synth --preset olmoe-1b-7b --quant q4_k_m --router-skew 1 --out olmoe.gguf
      4.2 GB; experts as unequal as a trained model's, so that a cache of experts has something to do
  synth --preset mixtral-8x7b --layers 4 --out few-layers.gguf
      a few layers of a large shape: enough to measure kernels with
  synth --preset tiny-deepseek2 --quant f32 --residual-gain 1 --out tiny.gguf
      nothing quantised, every layer counts: what two engines should agree on")]
struct Args {
    /// Shape and architecture, see --list
    #[arg(long, value_parser = preset, required_unless_present = "list")]
    preset: Option<&'static Preset>,

    /// Mixture of number formats, as llama-quantize names them, see --list
    #[arg(long, value_parser = mixture, default_value = "q4_0")]
    quant: &'static Mixture,

    /// The file to write; it appears under this name when it is complete
    #[arg(long, required_unless_present = "list")]
    out: Option<PathBuf>,

    /// Inequality of a layer's experts: 0 all alike (the worst case for a cache), 1 like trained models
    #[arg(long, default_value_t = 0.0)]
    router_skew: f32,

    /// Size of each layer's output against the residual stream; 1 for comparing engines (granitemoe: 40)
    #[arg(long, default_value_t = 0.1)]
    residual_gain: f32,

    /// Another seed makes other weights
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Layers, if not as many as the preset has
    #[arg(long)]
    layers: Option<u32>,

    /// Tokens in the vocabulary, if not as many as the preset has
    #[arg(long)]
    vocab: Option<u32>,

    /// Replace the file if it is there already
    #[arg(long)]
    force: bool,

    /// List the shapes and the mixtures
    #[arg(long)]
    list: bool,
}

fn preset(name: &str) -> Result<&'static Preset, String> {
    Preset::by_name(name).ok_or_else(|| "no such preset; --list shows them".into())
}

fn mixture(name: &str) -> Result<&'static Mixture, String> {
    mixture::by_name(name).ok_or_else(|| "no such mixture; --list shows them".into())
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.list {
        list();
        return ExitCode::SUCCESS;
    }
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn list() {
    println!(
        "{:24} {:11} {:>6} {:>6} {:>8} {:>5} {:>7}",
        "preset", "arch", "layers", "width", "experts", "used", "vocab"
    );
    for p in PRESETS {
        let (n_expert, used) = p.moe.as_ref().map_or((0, 0), |moe| (moe.n_expert, moe.n_expert_used));
        println!(
            "{:24} {:11} {:6} {:6} {:8} {:5} {:7}",
            p.name, p.arch, p.n_layer, p.n_embd, n_expert, used, p.n_vocab
        );
    }
    let names: Vec<&str> = MIXTURES.iter().map(|m| m.name).collect();
    println!("\nmixtures: {}", names.join(" "));
}

fn run(args: Args) -> Result<(), synth::SynthError> {
    let (Some(preset), Some(out)) = (args.preset, args.out) else { return Ok(()) };
    let options = Options {
        mixture: args.quant,
        seed: args.seed,
        residual_gain: args.residual_gain,
        router_skew: args.router_skew,
        n_layer: args.layers,
        n_vocab: args.vocab,
    };
    let bar = ProgressBar::new(0);
    bar.set_style(
        ProgressStyle::with_template("{bar:40} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left")
            .expect("a valid template"),
    );
    synth::write_with(preset, &options, &out, args.force, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    println!("{}", out.display());
    Ok(())
}
