//! `oncall doctor`: what this machine has, what it can do, and what limits it.

use super::args::model_of_env;
use super::{Failure, output};
use crate::cpu::probe::{self, DiskProbe, Mode, Rate};
use crate::cpu::{Cores, Isa, Pages, memory};
use crate::engine::outline::experts_file;
use crate::gguf::{Gguf, printable};
use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Flags of `doctor`.
#[derive(Args)]
#[command(
    after_help = "It takes a few seconds. Disk figures are random reads, as experts are read: on the model's file if one is given (of a \
split model's on the one with most experts), otherwise on a temporary file of 256 MiB in --dir, which is removed. They are as good as the \
moment: what else the machine does meanwhile counts.

Examples:
  oncall doctor -m model.gguf        the disk that the model lies on
  oncall doctor --dir /mnt/nvme      another disk, before a model is moved there"
)]
pub(super) struct DoctorArgs {
    /// Measure the disk on this model's file [default: $ONCALL_MODEL, if no --dir is given]
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Measure the disk of this folder [default: the current one]
    #[arg(long, value_name = "DIR", conflicts_with = "model")]
    dir: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const SIZES: [usize; 3] = [512 << 10, 1 << 20, 4 << 20];
const IN_FLIGHT: [usize; 4] = [1, 2, 4, 8];
const DISK_TIME: Duration = Duration::from_millis(100);
const MEMORY_TIME: Duration = Duration::from_millis(200);
/// What is taken to see how fast memory is used for the first time; at most a quarter of what there is.
const FIRST_USE_BYTES: u64 = 512 << 20;
/// Systems clear pages at several GB/s.
const SLOW_FIRST_USE: f64 = 1e9;
/// Large enough that a disk's own cache doesn't hold it.
const FILE_BYTES: usize = 256 << 20;

/// What was found.
#[derive(Serialize)]
struct Report {
    isa: String,
    isas: Vec<String>,
    cores: Cores,
    memory_available: Option<u64>,
    memory_group_limit: Option<u64>,
    page_bytes: usize,
    huge_pages: Option<String>,
    /// Bytes a second of memory that is used for the first time.
    memory_first_use_rate: f64,
    /// Bytes a second, by one thread and by all; `None` where there's too little memory to measure.
    memory_rate: [Option<f64>; 2],
    disk: Vec<DiskRow>,
    /// Why there are no direct reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    no_direct: Option<String>,
    /// Whether the file is too short for some sizes of reads.
    too_short: bool,
    read_ahead: Option<u64>,
    limits: Vec<String>,
}

#[derive(Serialize)]
struct DiskRow {
    mode: Mode,
    read_bytes: usize,
    in_flight: usize,
    /// Of what was read shortly before, and of what wasn't.
    bytes_per_s: f64,
    first_bytes_per_s: f64,
}

pub(super) fn run(a: DoctorArgs) -> Result<(), Failure> {
    output::catch_ctrl_c();
    let from_env = || model_of_env().map(PathBuf::from).filter(|_| a.dir.is_none());
    let model = a.model.or_else(from_env);
    let temporary = match &model {
        Some(_) => None,
        None => Some(Temporary::new(a.dir.as_deref().unwrap_or(Path::new(".")))?),
    };
    // Any file can be read from, whether it's a model or not.
    let of_model = |path: &PathBuf| Some(experts_file(&Gguf::open_header(path).ok()?)?.path().to_owned());
    let model = model.map(|path| of_model(&path).unwrap_or(path));
    let path = model.as_deref().or(temporary.as_ref().map(|t| &*t.path)).unwrap_or(Path::new("."));
    let bar = output::bar("measuring", "figures");
    bar.set_length(3 + 2 * (SIZES.len() * IN_FLIGHT.len()) as u64);
    let report = measure(path, &bar)?;
    bar.finish_and_clear();
    if a.json {
        return output::json(&report);
    }
    output::text(&print(&report, model.as_deref(), output::width())?)
}

/// A file of random bytes without a name: however this process ends, it's gone.
struct Temporary {
    /// By which it can be opened as long as it's open.
    path: PathBuf,
    _file: File,
}

impl Temporary {
    fn new(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join(format!(".oncall-doctor-{}", std::process::id()));
        let fail = |e: std::io::Error| {
            Failure::new(format!("{}: {e}; --dir names another folder, -m a model to read instead", path.display()))
        };
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).map_err(fail)?;
        std::fs::remove_file(&path).map_err(fail)?;
        // Different blocks, so that no disk stores them as one.
        let mut block = vec![0u8; 1 << 20];
        for i in 0..(FILE_BYTES >> 20) as u64 {
            for (j, word) in block.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                *word = ((i << 32 | j as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
            }
            file.write_all(&block).map_err(fail)?;
            go_on()?;
        }
        file.sync_all().map_err(fail)?;
        Ok(Temporary { path: format!("/dev/fd/{}", file.as_raw_fd()).into(), _file: file })
    }
}

/// Whether Ctrl-C came.
fn go_on() -> Result<(), Failure> {
    if output::stopped() { Err(Failure::interrupted()) } else { Ok(()) }
}

fn measure(path: &Path, bar: &ProgressBar) -> Result<Report, Failure> {
    let cores = Cores::count();
    let n_threads = cores.threads();
    // Before anything else: memory that was freed a moment ago isn't new to this machine.
    let new = memory::available().map_or(FIRST_USE_BYTES, |n| FIRST_USE_BYTES.min(n / 4));
    let memory_first_use_rate = probe::first_use_rate(new as usize, MEMORY_TIME)?;
    bar.inc(1);
    let mut memory_rate = [None; 2];
    for (rate, n) in memory_rate.iter_mut().zip([1, n_threads]) {
        *rate = probe::memory_rate(n, MEMORY_TIME)?;
        bar.inc(1);
        go_on()?;
    }
    let (mut disk, mut no_direct, mut too_short) = (Vec::new(), None, false);
    for mode in [Mode::Direct, Mode::Buffered] {
        let probe = match DiskProbe::open(path, mode) {
            Ok(probe) => probe,
            Err(e) if mode == Mode::Direct => {
                no_direct = Some(e.to_string());
                continue;
            }
            Err(e) => return Err(Failure::new(format!("{}: {e}", path.display()))),
        };
        for read_bytes in SIZES {
            too_short |= !probe.is_long_enough(read_bytes);
            for in_flight in IN_FLIGHT {
                bar.inc(1);
                let room = DiskProbe::room_for(read_bytes, in_flight) as u64;
                if !probe.is_long_enough(read_bytes) || memory::for_measuring(room, u64::MAX).is_none() {
                    continue;
                }
                let rate = probe.rate(read_bytes, in_flight, DISK_TIME, &|_, _| ());
                let Rate { first, again } = rate.map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
                disk.push(DiskRow { mode, read_bytes, in_flight, bytes_per_s: again, first_bytes_per_s: first });
                go_on()?;
            }
        }
    }
    let mut report = Report {
        isa: Isa::get()?.to_string(),
        isas: Isa::available().iter().map(Isa::to_string).collect(),
        cores,
        memory_available: memory::available(),
        memory_group_limit: memory::group_limit(),
        page_bytes: Pages::page_bytes(),
        huge_pages: probe::huge_pages(),
        memory_first_use_rate,
        memory_rate,
        disk,
        no_direct,
        too_short,
        read_ahead: probe::read_ahead(path),
        limits: Vec::new(),
    };
    report.limits = limits(&report);
    Ok(report)
}

/// `1.25 GB/s`.
fn rate(bytes_per_s: f64) -> String {
    format!("{}/s", output::size(bytes_per_s as u64))
}

fn best(disk: &[DiskRow], mode: Mode) -> Option<&DiskRow> {
    disk.iter().filter(|r| r.mode == mode).max_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s))
}

/// What holds this machine back, in words.
fn limits(r: &Report) -> Vec<String> {
    let mut out = Vec::new();
    let (direct, buffered) = (best(&r.disk, Mode::Direct), best(&r.disk, Mode::Buffered));
    let best = [direct, buffered].into_iter().flatten().max_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s));
    if let (Some(b), Some(of_memory)) = (best, r.memory_rate[1]) {
        let times = of_memory / b.bytes_per_s;
        let slower = if times < 1.5 {
            "The disk, or a cache of it, is about as fast as memory here: a model that doesn't fit loses little.".into()
        } else {
            format!(
                "The disk is {times:.*} times slower than memory: a model that fits writes that much faster than one of which every \
                 expert is read.",
                usize::from(times < 10.0)
            )
        };
        out.push(format!("{slower} 100 MB read a token allow {:.1} tokens/s.", b.bytes_per_s / 100e6));
    }
    match (direct, buffered) {
        (Some(d), Some(b)) if b.bytes_per_s > 1.1 * d.bytes_per_s => out.push(format!(
            "Direct reads are slower here ({}) than reads through the page cache ({}).",
            rate(d.bytes_per_s),
            rate(b.bytes_per_s)
        )),
        (Some(d), Some(b)) => out.push(format!(
            "Direct reads are best with {} in flight ({}); through the page cache it's {}.",
            d.in_flight,
            rate(d.bytes_per_s),
            rate(b.bytes_per_s)
        )),
        _ => {}
    }
    if let Some(b) = direct.or(buffered).filter(|b| b.bytes_per_s > 1.5 * b.first_bytes_per_s) {
        out.push(format!(
            "What was read shortly before comes {:.1} times faster than what wasn't ({}), past the page cache: something below the \
             file caches it, as a virtual machine's host does. A model's start is as slow as the latter.",
            b.bytes_per_s / b.first_bytes_per_s,
            rate(b.first_bytes_per_s)
        ));
    }
    if let Some(why) = &r.no_direct {
        out.push(format!(
            "There are no direct reads on this disk ({why}): every read is copied and fills the page cache."
        ));
    }
    if r.read_ahead.is_some_and(|n| n > 128 << 10) {
        out.push(
            "The disk's read-ahead is above Linux's default of 128 kB: programs that map a model larger than memory \
                  read much more than they need. oncall isn't concerned."
                .into(),
        );
    }
    let c = &r.cores;
    if let Some(quota) = c.quota.filter(|&q| q < c.allowed as f64) {
        out.push(format!("A control group limits this process to {quota:.1} of {} processors.", c.allowed));
    }
    if c.allowed < c.online {
        out.push(format!("This process may run on {} of the machine's {} processors.", c.allowed, c.online));
    }
    if let [Some(one), Some(all)] = r.memory_rate
        && all < 1.3 * one
        && c.threads() > 1
    {
        out.push("One thread reads memory about as fast as all: more threads won't make writing faster.".into());
    }
    if r.memory_first_use_rate < SLOW_FIRST_USE {
        out.push(format!(
            "Memory is used for the first time at {}, as in a virtual machine that has given it back to its host: until its memory is in \
             use, a model starts slowly, and experts are read slowly.",
            rate(r.memory_first_use_rate)
        ));
    }
    if let Some(limit) = r.memory_group_limit {
        out.push(format!(
            "A control group limits memory to {}: a process that takes more is killed, or slowed down until it hardly moves.",
            output::memory(limit)
        ));
    }
    if r.huge_pages.as_deref() == Some("never") {
        out.push("Huge pages are off: large models pay for it with a few percent of their speed.".into());
    }
    if Isa::best() == Isa::Scalar {
        out.push("There is no instruction set with fast kernels: expect a tenth of other machines' speed.".into());
    }
    out
}

fn print(r: &Report, model: Option<&Path>, width: usize) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let mut line =
        |name: &str, value: String| writeln!(out, "{}", output::wrap_at(&format!("{name:<16} {value}"), 17, width));
    line("instructions", format!("{} (there are {})", r.isa, r.isas.join(", ")))?;
    let quota = r.cores.quota.map_or(String::new(), |q| format!(", limited to {q:.1}"));
    let Cores { online, allowed, physical, .. } = r.cores;
    line("cores", format!("{physical}, with {allowed} of {online} processors usable{quota}"))?;
    let unknown = || "unknown".to_string();
    let limit =
        r.memory_group_limit.map_or(String::new(), |n| format!("; a control group allows {}", output::memory(n)));
    line("memory", format!("{} could be taken now{limit}", r.memory_available.map_or_else(unknown, output::memory)))?;
    let [one, all] = r.memory_rate.map(|r| r.map_or("? (too little memory to measure)".into(), rate));
    line("memory speed", format!("{one} by one thread, {all} by all"))?;
    let huge = r.huge_pages.clone().unwrap_or_else(unknown);
    line("new memory", format!("{}, for what is used for the first time", rate(r.memory_first_use_rate)))?;
    line("pages", format!("{} bytes; huge ones: {huge}", r.page_bytes))?;
    line("read-ahead", r.read_ahead.map_or_else(unknown, output::size))?;
    let on = model.map_or("a temporary file".into(), |m| printable(&m.display().to_string()));
    let heading = format!("\nRandom reads on {on}, of what was read shortly before, in MB/s\n");
    writeln!(out, "{}", output::wrap(&heading, width))?;
    writeln!(out, "{:<10} {:>9}{:>9} in flight:{}", "", "size", "", IN_FLIGHT.map(|n| format!("{n:>8}")).concat())?;
    for (mode, name) in [(Mode::Direct, "direct"), (Mode::Buffered, "buffered")] {
        for read_bytes in SIZES.into_iter().filter(|_| mode == Mode::Buffered || r.no_direct.is_none()) {
            let of = |n| r.disk.iter().find(|r| (r.mode, r.read_bytes, r.in_flight) == (mode, read_bytes, n));
            let rate = |n| of(n).map_or("?".into(), |r| format!("{:.0}", r.bytes_per_s / 1e6));
            let rates = IN_FLIGHT.map(|n| format!("{:>8}", rate(n))).concat();
            writeln!(out, "{name:<10} {:>5} KiB{:>20}{rates}", read_bytes >> 10, "")?;
        }
    }
    if r.too_short {
        writeln!(out, "\nThe file is too short for some of these: --dir measures the disk of a folder.")?;
    }
    writeln!(out, "\nWhat limits")?;
    for l in &r.limits {
        writeln!(out, "{}", output::wrap(&format!("  - {l}"), width))?;
    }
    Ok(out)
}
