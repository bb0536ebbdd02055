//! The command line: thin front ends that parse, call the engine and print.

mod args;
mod batch;
mod bench;
mod chat;
mod doctor;
mod experts;
mod figures;
mod logits;
mod output;
mod perplexity;
mod plan;
mod quantize;
mod replay;
mod run;
mod show;
mod tokenize;

use args::Cli;
use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// What can be asked for.
#[derive(Subcommand)]
enum Command {
    /// Continue a prompt, or answer it where the model has a chat template
    Run(run::RunArgs),
    /// Talk with a model
    Chat(chat::ChatArgs),
    /// Answer a file of requests (OpenAI's batch JSONL), many at a time
    Batch(batch::BatchArgs),
    /// Say what is in a model file: architecture, sizes, experts, formats, what each part weighs
    Show(show::ShowArgs),
    /// Turn text into tokens
    Tokenize(tokenize::TokenizeArgs),
    /// Measure how well a model predicts a text
    Perplexity(perplexity::PerplexityArgs),
    /// Measure the speed of reading a prompt and of writing
    Bench(bench::BenchArgs),
    /// Write a model again in another number format
    Quantize(quantize::QuantizeArgs),
    /// Write the logits of a sequence of tokens to a file, for other tools to compare
    Logits(logits::LogitsArgs),
    /// Say what fits into which memory and how fast that will be, before anything is loaded
    Plan(plan::PlanArgs),
    /// Say what this machine has and can do, and what limits it
    Doctor(doctor::DoctorArgs),
    /// Draw which experts a text uses
    Experts(experts::ExpertsArgs),
    /// Say what a cache of experts would have hit in a recorded run, for each policy
    Replay(replay::ReplayArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print a manual page (roff), to be read with `oncall man run | man -l -`
    Man {
        /// Of this command [default: of oncall]
        command: Option<String>,
    },
}

/// Why a command failed: what to print, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    fn new(message: impl Into<String>) -> Self {
        Failure { message: message.into(), code: 1 }
    }

    fn usage(message: impl Into<String>) -> Self {
        Failure { message: message.into(), code: 2 }
    }

    /// After Ctrl-C.
    fn interrupted() -> Self {
        Failure { message: String::new(), code: 130 }
    }
}

/// Why a file couldn't be read, and what to do.
fn unreadable(e: &std::io::Error) -> String {
    use std::io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, NotFound, PermissionDenied};
    match e.kind() {
        NotFound | NotADirectory => "there is no such file: check its name and its directory".into(),
        PermissionDenied => "you may not read it: `chmod u+r` on it if it's yours, or give another file".into(),
        IsADirectory => "it is a directory: give a file in it".into(),
        InvalidData => "it isn't UTF-8 text: convert it first (`iconv -t UTF-8`)".into(),
        _ => e.to_string(),
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(e: E) -> Self {
        Failure::new(e.to_string())
    }
}

/// Runs the command line and returns its exit code.
pub fn main() -> ExitCode {
    // What spoils nothing but should be known, such as a damaged heat file, is a warning.
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::WARN.into())
        .with_env_var("ONCALL_LOG")
        .from_env_lossy();
    let colours = anstream::AutoStream::choice(&std::io::stderr()) != anstream::ColorChoice::Never;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        // It would panic where stderr can't be written.
        .log_internal_errors(false)
        .init();
    let args: Vec<_> = std::env::args_os().collect();
    let command = |()| {
        args::refuse_foreign(&args)?;
        run(Cli::parse_from(args::rewrite(args.into_iter())).command)
    };
    match output::handle_ctrl_c().and_then(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(f) => {
            if !f.message.is_empty() {
                output::error(&f.message);
            }
            ExitCode::from(f.code)
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    let result = match command {
        Command::Run(a) => run::run(a),
        Command::Chat(a) => chat::run(a),
        Command::Batch(a) => batch::run(a),
        Command::Show(a) => show::run(a),
        Command::Tokenize(a) => tokenize::run(a),
        Command::Perplexity(a) => perplexity::run(a),
        Command::Bench(a) => bench::run(a),
        Command::Quantize(a) => quantize::run(a),
        Command::Logits(a) => logits::run(a),
        Command::Plan(a) => plan::run(a),
        Command::Doctor(a) => doctor::run(a),
        Command::Experts(a) => experts::run(a),
        Command::Replay(a) => replay::run(a),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "oncall", &mut script);
            output::bytes(&script)
        }
        Command::Man { command } => man(command.as_deref()),
    };
    let recording = args::take_recording();
    match result {
        // Nobody reads on: that's how `| head` ends a command, not a failure.
        Err(f) if f.code == output::BROKEN_PIPE => {}
        other => other?,
    }
    // A trace that was asked for and isn't there is a failure. After another one it's a warning.
    recording.map_or(Ok(()), |engine| Ok(engine.end_recording()?))
}

/// A command's page, or the program's.
fn man(command: Option<&str>) -> Result<(), Failure> {
    let mut all = Cli::command();
    all.build();
    let page_of = match command {
        None => all,
        Some(name) => all
            .find_subcommand(name)
            .cloned()
            .ok_or_else(|| Failure::usage(format!("there is no command {name:?}; `oncall --help` lists them")))?,
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(page_of).render(&mut page)?;
    output::bytes(&page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// clap wraps what it can: a line that ends in the middle of a sentence ends there in a narrow terminal too.
    #[test]
    fn explanations_are_one_line_each() {
        for name in ["plan", "doctor", "replay", "experts"] {
            let help = Cli::command().find_subcommand(name).unwrap().get_after_help().unwrap().to_string();
            let (prose, examples) = help.split_once("\n\n").unwrap();
            assert!(!prose.contains('\n') && examples.starts_with("Examples:"), "{name}: {prose}");
        }
    }
}
