//! What the benches share: models by name, medians, children in control groups.
#![allow(dead_code)] // each bench uses its part

use crate::common::cgroup::MemoryGroup;
use oncall::gguf::Gguf;
use oncall::gguf::mixture::{self, Mixture};
use oncall::gguf::requantize::Plan;
use oncall::synth::{self, Preset, upcycle};
use rustix::fs::Advice;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

/// The file of a model that is named: found in `models/cache`, or fetched and made.
pub fn model(name: &str, format: &str) -> PathBuf {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let cache = models.join("cache");
    let path = cache.join(format!("{name}-{format}.gguf"));
    let mixture = || -> &'static Mixture { mixture::by_name(format).unwrap_or_else(|| panic!("no mixture {format}")) };
    match (name, Preset::by_name(name)) {
        ("smollm2", _) if format == "q4_1" => smollm2(&models),
        ("smollm2" | "smolmoe", _) => {
            if !path.exists() {
                let dense = Gguf::open(&smollm2(&models)).expect("the fetched model is whole");
                if name == "smolmoe" {
                    let options = upcycle::Options { mixture: mixture(), ..upcycle::Options::default() };
                    upcycle::upcycle(&dense, &options, &path, false, &mut |_, _| ()).expect("upcycling");
                } else {
                    let plan = Plan::new(&dense, mixture()).expect("formats that can be written");
                    plan.write(&path, false, &mut |_, _| true).expect("quantising");
                }
            }
            path
        }
        (_, Some(preset)) => {
            if !path.exists() {
                std::fs::create_dir_all(&cache).expect("models/cache");
                // As unequal experts as trained models have.
                let options = synth::Options { mixture: mixture(), router_skew: 1.0, ..synth::Options::default() };
                synth::write(preset, &options, &path).expect("writing the model");
            }
            path
        }
        (_, None) => PathBuf::from(name),
    }
}

/// The dense model that others are made from.
fn smollm2(models: &Path) -> PathBuf {
    let path = models.join("cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        let status = std::process::Command::new("sh").arg(models.join("fetch-smollm2.sh")).status();
        assert!(status.is_ok_and(|s| s.success()), "models/fetch-smollm2.sh failed");
    }
    path
}

/// The middle one.
pub fn median(x: impl Iterator<Item = f64>) -> f64 {
    let mut x: Vec<f64> = x.collect();
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

/// What a command printed in a control group, the most bytes that the group held, and the command's seconds.
pub struct Ran {
    pub stdout: Vec<u8>,
    pub peak: u64,
    pub seconds: f64,
}

/// Runs a command in a control group of `limit` bytes, with nothing of the model in the page cache.
pub fn run_in_group(limit: u64, model: &Path, command: &Command) -> Ran {
    let file = File::open(model).expect("the model");
    // Direct reads don't care, buffered ones and mappings do.
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("a file that can leave the page cache");
    fill_free_memory();
    let group = MemoryGroup::new("bench", limit).expect("a memory control group (root is needed)");
    let began = Instant::now();
    let out = group.run(command).expect("the command runs");
    let seconds = began.elapsed().as_secs_f64();
    assert!(out.status.success(), "{command:?}: {:?} {}", out.status, String::from_utf8_lossy(&out.stderr));
    Ran { stdout: out.stdout, peak: group.peak().unwrap_or(0), seconds }
}

/// Reads holes of a file until its page cache fills the memory that was free, as files do on a machine that has been up for a while.
///
/// A virtual machine may hand free memory back to its host (free page reporting) and get it again by a fault for each page, at 0.3 GB/s
/// on one machine, where memory that was freed just before came at 2.5: whoever fills memory first pays that, on the processors that should compute. There a run in half of
/// the model's memory computed 30 % faster once no memory was free.
fn fill_free_memory() {
    /// The file, and how much of it has been read.
    static HOLES: Mutex<Option<(File, u64)>> = Mutex::new(None);
    const STEP: u64 = 64 << 20;
    let mut holes = HOLES.lock().expect("one thread");
    let (file, read) = holes.get_or_insert_with(|| {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).expect("a file");
        file.set_len(1 << 42).expect("a file of holes");
        (file, 0)
    });
    let mut buffer = vec![0; 1 << 20];
    loop {
        let before = free_memory();
        let end = *read + STEP;
        while *read < end {
            file.read_exact_at(&mut buffer, *read).expect("zeros");
            *read += buffer.len() as u64;
        }
        // What is read now pushes out what was read before.
        if free_memory() + STEP / 2 > before {
            return;
        }
    }
}

/// Bytes of memory that hold nothing.
fn free_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemFree:"));
    line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// Runs this program with other arguments in a control group of `limit` bytes, with nothing of the model in the page cache: the line
/// of figures that it prints, and the group's peak.
pub fn in_group<T: DeserializeOwned>(limit: u64, model: &Path, arguments: impl FnOnce(&mut Command)) -> (T, u64) {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    arguments(&mut child);
    let ran = run_in_group(limit, model, &child);
    (serde_json::from_slice(&ran.stdout).expect("a line of figures"), ran.peak)
}
