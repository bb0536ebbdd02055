//! `oncall batch`: a file of requests, answered many at a time.

use super::args::{ModelArgs, of_engine};
use super::figures::{self, Stats};
use super::{Failure, output};
use crate::batch::{self, BatchError, Figures, Files, Job};
use crate::engine::{EMBEDDED_NAME, EngineOptions, embedded_bytes, plan_batch};
use crate::gguf::Gguf;
use clap::Args;
use serde::Serialize;
use std::io::{ErrorKind, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Flags of `batch`.
#[derive(Args)]
#[command(
    after_help = "A line of the input: {\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\", \
\"body\": {\"messages\": [...], \"max_tokens\": 100}}; /v1/completions takes a prompt. Each result is written when it's \
done. What a request gets depends on nothing but itself and the model (unless a lossy flag is given): after a crash the same command with --resume writes \
what is missing, and the file is what it would have been. docs/batch.md lists the fields.\n\n\
Exit codes: 0 all answered, 1 a request or the job failed, 2 wrong usage, 130 after Ctrl-C."
)]
pub(super) struct BatchArgs {
    /// The requests, one a line; - for the standard input
    #[arg(short, long, value_name = "FILE")]
    input: PathBuf,
    /// The results, one a line; - for the standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Keep the results that are in the output already, and only do the rest
    #[arg(long)]
    resume: bool,
    /// Sequences that are written together [default: auto, from the memory that there is]
    #[arg(long, value_name = "N|auto", value_parser = parse_sequences)]
    sequences: Option<Sequences>,
    /// Say in the end where the time went and what was reached of the machine's limits, as `run --stats` does
    #[arg(long)]
    stats: bool,
    /// Print the figures as one JSON object in the end: on the standard output, or the standard error if that's where the
    /// results go
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// How many.
#[derive(Clone, Copy)]
enum Sequences {
    Auto,
    Given(usize),
}

fn parse_sequences(s: &str) -> Result<Sequences, String> {
    match s.parse() {
        _ if s == "auto" => Ok(Sequences::Auto),
        Ok(n @ 1..=4096) => Ok(Sequences::Given(n)),
        _ => Err("it is a number from 1 to 4096, or auto".into()),
    }
}

pub(super) fn run(a: BatchArgs) -> Result<(), Failure> {
    let file =
        |path: &Path, stream: &str| (path != Path::new("-") && path != Path::new(stream)).then(|| path.to_owned());
    let files = Files { input: file(&a.input, "/dev/stdin"), output: file(&a.output, "/dev/stdout"), resume: a.resume };
    if a.resume && files.output.is_none() {
        return Err(Failure::usage("--resume needs results in a file to go on with: -o FILE"));
    }
    refuse_same_files(&a)?;
    let job = Job::open(&files)?;
    let report = match job.finished() {
        Some(figures) => {
            output::note(&format!("nothing is left to do: {} done", output::counted(figures.done as usize, "request")));
            Report { figures, stats: None }
        }
        None => {
            let report = work(&a, &files, job)?;
            output::note(&line(&report.figures));
            report
        }
    };
    if let Some(stats) = report.stats.as_ref().filter(|_| a.stats) {
        output::note(stats.table().trim_end());
    }
    if a.json && files.output.is_some() {
        output::json(&report)?;
    } else if a.json {
        output::tell(&serde_json::to_string(&report)?);
    }
    match &report.figures {
        f if f.interrupted => {
            if files.output.is_some() {
                output::note("stopped; the same command with --resume does the rest");
            }
            Err(Failure::interrupted())
        }
        f if f.failed > 0 => {
            let are = if f.failed == 1 { "is an error" } else { "are errors" };
            Err(Failure::new(format!("{} of {} results {are}", f.failed, f.done)))
        }
        _ => Ok(()),
    }
}

/// What is told in the end.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    figures: Figures,
    /// `None` if there was nothing to do.
    #[serde(flatten)]
    stats: Option<Stats>,
}

/// Loads the model and does the job.
fn work(a: &BatchArgs, files: &Files, job: Job) -> Result<Report, Failure> {
    let engine = a.model.load_with(&options(a, &job)?)?;
    let mut progress = Progress::new(files.output.is_none());
    let result = batch::run(&engine, job, &mut |f| progress.show(f), &output::stopped);
    progress.clear();
    let figures = match result {
        Err(BatchError::Io { name, source }) if source.kind() == ErrorKind::BrokenPipe => {
            return Err(Failure::new(format!("{name}: nobody reads the results any more; not all were written")));
        }
        other => other?,
    };
    // Prompts and answers go on beside each other: neither has a time of its own besides its passes.
    let mut stats = Stats::new(&engine, engine.account(), [None, None]);
    if a.stats && !figures.interrupted {
        stats.measure(&engine, true);
    }
    Ok(Report { figures, stats: Some(stats) })
}

/// A job that writes over what it reads, or writes two things to one file, loses one of them.
fn refuse_same_files(a: &BatchArgs) -> Result<(), Failure> {
    let stream = |path: &Path, of: &str| if path == Path::new("-") { of.into() } else { path.to_owned() };
    let files = [
        ("--input", Some(stream(&a.input, "/dev/stdin"))),
        ("--output", Some(stream(&a.output, "/dev/stdout"))),
        ("--record", a.model.record.clone()),
        ("--model", a.model.model.clone()),
    ];
    let files: Vec<(&str, PathBuf)> = files.into_iter().filter_map(|(flag, path)| Some((flag, path?))).collect();
    for (i, (flag, path)) in files.iter().enumerate() {
        for (other, with) in &files[i + 1..] {
            if same_file(path, with) {
                let path = path.display();
                return Err(Failure::usage(format!(
                    "{flag} and {other} are the same file, {path}: give {other} another name"
                )));
            }
        }
    }
    Ok(())
}

/// Whether two paths lead to one file, which needn't be there yet.
fn same_file(a: &Path, b: &Path) -> bool {
    let place = |path: &Path| {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(folder.canonicalize().ok()?.join(path.file_name()?))
    };
    match (a.metadata(), b.metadata()) {
        (Ok(x), Ok(y)) if x.is_file() && y.is_file() => {
            #[cfg(unix)]
            let same = {
                use std::os::unix::fs::MetadataExt;
                (x.dev(), x.ino()) == (y.dev(), y.ino())
            };
            #[cfg(not(unix))]
            let same = a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
            same
        }
        (Err(_), Err(_)) => place(a).is_some_and(|a| place(b).is_some_and(|b| a == b)),
        _ => false,
    }
}

/// The engine's options for this job: how many sequences, and their KV cache.
fn options(a: &BatchArgs, job: &Job) -> Result<EngineOptions, Failure> {
    let options = a.model.options();
    let gguf = match &a.model.model {
        Some(path) => Gguf::open(path)?,
        None => Gguf::from_static(EMBEDDED_NAME, embedded_bytes())?,
    };
    let given = match a.sequences {
        Some(Sequences::Given(n)) => Some(n),
        Some(Sequences::Auto) | None => None,
    };
    let plan = plan_batch(&gguf, &options, &job.shape(), given).map_err(of_engine)?;
    if given.is_none() {
        output::note(&plan.why);
    }
    Ok(EngineOptions { n_sessions: plan.n_sequences, kv_positions: Some(plan.kv_positions), ..options })
}

/// How a job stands, in a line that fits a terminal.
fn line(f: &Figures) -> String {
    let total = f.total.map_or(String::new(), |t| format!("/{t}"));
    let mut line = format!("{}{total} done", f.done);
    if f.failed > 0 {
        line += &format!(", {}", output::counted(f.failed as usize, "error"));
    }
    line += &format!(", {:.0} tokens/s in, {:.0} out", f.tokens_in_per_s, f.tokens_out_per_s);
    if let Some(rate) = f.hit_rate {
        line += &format!(", hits {:.1} %", 100.0 * rate);
    }
    if let Some(bytes) = f.bytes_per_token {
        line += &format!(", {} a token", output::size(bytes as u64));
    }
    if let Some(losses) = figures::losses(f.losses) {
        line += &format!(", {losses}");
    }
    if let Some(left) = f.seconds_left.filter(|_| f.total != Some(f.done) && !f.interrupted) {
        line += &format!(", {:#} left", indicatif::HumanDuration(Duration::from_secs_f64(left)));
    }
    line
}

/// A line that is written over and over in a terminal, and now and then elsewhere.
struct Progress {
    bar: Option<indicatif::ProgressBar>,
    shown: Instant,
}

impl Progress {
    /// `shown`: results go to the standard output, and in a terminal a bar would be drawn over them.
    fn new(shown: bool) -> Self {
        let over = shown && std::io::stdout().is_terminal();
        let bar = (std::io::stderr().is_terminal() && !over).then(indicatif::ProgressBar::new_spinner);
        Progress { bar, shown: Instant::now() }
    }

    fn show(&mut self, f: &Figures) {
        let every = if self.bar.is_some() { Duration::from_millis(250) } else { Duration::from_secs(10) };
        if self.shown.elapsed() < every {
            return;
        }
        self.shown = Instant::now();
        match &self.bar {
            Some(bar) => bar.set_message(line(f)),
            None => output::note(&line(f)),
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
