//! What fails under a running engine: disks, files, memory, the process itself. Each time: an error that says why or a retry, never
//! a wrong token, no wait without end, and the engine is usable afterwards.
#![cfg(target_os = "linux")] // whose block devices and signals they are

mod common;

use common::disk::FailingDisk;
use oncall::arch::PassError;
use oncall::engine::{Engine, EngineError, EngineOptions, Input, Session, Want};
use oncall::gguf::Gguf;
use oncall::moe::IoMode;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tinymoe-stories-Q8_0.gguf");
/// Just above the smallest that works for this model: most experts are read again and again.
const MEMORY: &str = "69MiB";
const PROMPT: [u32; 4] = [1, 300, 400, 500];

/// One slot: every expert is read each time that it's used.
fn paged(io: IoMode) -> EngineOptions {
    EngineOptions { n_ctx: Some(256), expert_bytes: Some(1), io, ..EngineOptions::default() }
}

/// Writes on until there are `n` tokens, always the most probable one.
fn go_on(session: &mut Session, n: usize) -> Result<(), EngineError> {
    if session.tokens().is_empty() {
        session.feed(&PROMPT, &mut |_| true)?;
    }
    while session.tokens().len() < n {
        let best = session.logits().iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |l| l.0);
        session.feed(&[best as u32], &mut |_| true)?;
    }
    Ok(())
}

/// What is written where nothing fails.
fn undisturbed(n: usize) -> Vec<u32> {
    let engine = Engine::embedded(&EngineOptions { n_ctx: Some(256), ..EngineOptions::default() }).unwrap();
    let mut session = engine.session();
    go_on(&mut session, n).unwrap();
    session.tokens().to_vec()
}

/// A disk with the model; `None`, with a note, where this process may not make one.
fn disk(dir: &Path) -> Option<FailingDisk> {
    FailingDisk::with(Path::new(MODEL), dir)
        .inspect_err(|e| eprintln!("note: no failing disk was tried, none can be made here: {e}"))
        .ok()
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn a_disk_that_fails_in_the_middle_of_an_answer_ends_it_with_an_error() {
    let dir = scratch();
    let Some(disk) = disk(dir.path()) else { return };
    let want = undisturbed(60);
    for io in [IoMode::Direct, IoMode::Buffered, IoMode::Auto] {
        disk.forget_all_but(0..0);
        disk.fail();
        let error = Engine::load(&disk.model(), &paged(io), &|_, _| ()).err().unwrap().to_string();
        assert!(error.contains("model.gguf") && error.contains("Input/output error"), "{error}");
        disk.heal();
        let engine = Engine::load(&disk.model(), &paged(io), &|_, _| ()).unwrap();
        let mut session = engine.session();
        for n in [20, 40, 60] {
            // A pass begins with the embedding's rows: they are to be had, so that it's the experts that fail.
            let rows = engine.gguf().tensor("token_embd.weight").unwrap();
            disk.forget_all_but(rows.offset..rows.offset + rows.n_bytes);
            disk.fail();
            for _ in 0..3 {
                let before = session.tokens().len();
                let error = go_on(&mut session, n).unwrap_err().to_string();
                assert!(error.contains("model.gguf") && error.contains("Input/output error"), "{io:?}: {error}");
                assert!(error.contains("reading expert"), "{io:?}: {error}");
                assert_eq!(session.tokens().len(), before, "a failed pass leaves nothing behind");
            }
            disk.heal();
            go_on(&mut session, n).unwrap();
        }
        assert_eq!(session.tokens(), want, "{io:?}");
    }
}

#[test]
fn a_disk_that_stalls_for_seconds_is_waited_for() {
    let dir = scratch();
    let Some(disk) = disk(dir.path()) else { return };
    let want = undisturbed(40);
    let engine = Engine::load(&disk.model(), &paged(IoMode::Direct), &|_, _| ()).unwrap();
    let mut session = engine.session();
    go_on(&mut session, 20).unwrap();
    if let Err(e) = disk.stall(true) {
        return eprintln!("note: no stalled disk was tried, reads can't be held up here: {e}");
    }
    let stall = Duration::from_secs(3);
    let began = Instant::now();
    std::thread::scope(|s| {
        s.spawn(|| {
            std::thread::sleep(stall);
            disk.stall(false).unwrap();
        });
        go_on(&mut session, 40).unwrap();
    });
    assert!(began.elapsed() >= stall, "it went on in {:?}", began.elapsed());
    assert_eq!(session.tokens(), want);
    assert!(engine.account().store().stall_ns > 2_000_000_000, "the account says what was waited for");
}

/// A disk that doesn't answer holds up nobody who wants to stop, in a prompt or at a token, and the account says what was waited for.
#[test]
fn a_pass_can_be_stopped_while_the_disk_stalls() {
    let dir = scratch();
    let Some(disk) = disk(dir.path()) else { return };
    let want = undisturbed(40);
    let stop = Arc::new(AtomicBool::new(false));
    let o = EngineOptions { stop: Some(stop.clone()), ..paged(IoMode::Direct) };
    let engine = Engine::load(&disk.model(), &o, &|_, _| ()).unwrap();
    let mut session = engine.session();
    for n in [0, 20] {
        if n > 0 {
            go_on(&mut session, n).unwrap();
        }
        let rows = engine.gguf().tensor("token_embd.weight").unwrap();
        disk.forget_all_but(rows.offset..rows.offset + rows.n_bytes);
        if let Err(e) = disk.stall(true) {
            return eprintln!("note: no stalled disk was tried, reads can't be held up here: {e}");
        }
        let (before, began) = (engine.account(), Instant::now());
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(Duration::from_millis(500));
                stop.store(true, Relaxed);
            });
            if n == 0 {
                assert_eq!(session.feed(&PROMPT, &mut |_| panic!("nothing was done")).unwrap(), 0);
            } else {
                let token = Input { session: &mut session, tokens: &[300], written: true, want: Want::Last };
                let error = engine.forward(&mut [token]).unwrap_err();
                assert!(matches!(error, EngineError::Pass(PassError::Stopped)), "{error}");
            }
        });
        let (took, spent) = (began.elapsed(), engine.account().since(&before));
        disk.stall(false).unwrap();
        stop.store(false, Relaxed);
        assert!(took < Duration::from_secs(3), "it ended after {took:?}");
        assert_eq!(session.tokens().len(), n, "a stopped pass leaves nothing behind");
        let phase = if n == 0 { &spent.prefill } else { &spent.decode };
        assert!(phase.stalled_s > 0.3 && phase.tokens == 0, "{phase:?}");
    }
    go_on(&mut session, 40).unwrap();
    assert_eq!(session.tokens(), want);
}

/// The program, its answer cut off by the disk: what it wrote is the beginning of the right answer.
#[test]
fn the_program_says_that_the_disk_failed() {
    let dir = scratch();
    let Some(disk) = disk(dir.path()) else { return };
    let want = run(MODEL, 300).output().unwrap().stdout;
    let mut child = start(run(disk.model().to_str().unwrap(), 300));
    // In the middle of its answer, however fast it is: stopped at its first byte until the disk has failed.
    let mut written = vec![0];
    child.stdout.as_mut().unwrap().read_exact(&mut written).unwrap();
    signal(&child, "-STOP");
    disk.forget_all_but(0..0);
    disk.fail();
    signal(&child, "-CONT");
    let o = finish(child);
    written.extend(&o.stdout);
    let text = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(1), "{text}");
    assert!(text.contains("model.gguf") && text.contains("Input/output error"), "{text}");
    assert!(want.starts_with(&written) && written.len() < want.len());
}

/// Another file takes the model's name, or its bytes are written over.
#[test]
fn a_file_that_is_replaced_is_read_on_and_one_that_is_written_over_is_refused() {
    let dir = scratch();
    let want = undisturbed(40);
    for io in [IoMode::Direct, IoMode::Buffered] {
        let (path, other) = (dir.path().join("model.gguf"), dir.path().join("other"));
        std::fs::copy(MODEL, &path).unwrap();
        let mut scrambled = std::fs::read(MODEL).unwrap();
        let half = scrambled.len() / 2;
        scrambled[half..].iter_mut().for_each(|b| *b ^= 0x55);
        std::fs::write(&other, &scrambled).unwrap();
        // Replaced between opening and loading, too: it's opened once more for direct reads then.
        let gguf = Gguf::open(&path).unwrap();
        std::fs::rename(&other, &path).unwrap();
        let engine = Engine::from_gguf(gguf, &paged(io), &|_, _| ()).unwrap();
        let mut session = engine.session();
        go_on(&mut session, 40).unwrap();
        assert_eq!(session.tokens(), want, "{io:?}");

        std::fs::copy(MODEL, &path).unwrap();
        let engine = Engine::load(&path, &paged(io), &|_, _| ()).unwrap();
        let mut session = engine.session();
        go_on(&mut session, 20).unwrap();
        std::fs::write(&path, &scrambled).unwrap();
        let error = go_on(&mut session, 40).unwrap_err().to_string();
        assert!(error.contains("model.gguf") && error.contains("changed"), "{io:?}: {error}");
        assert_eq!(session.tokens(), &want[..20], "{io:?}");
    }
}

/// `oncall run` with little memory, writing so many tokens.
fn run(model: &str, n: usize) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    c.args(["run", "-m", model, "--memory", MEMORY, "--raw", "--temp", "0", "--ignore-eos", "-n", &n.to_string()]);
    c.args(["--no-heat", "Once upon a time"]).env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG");
    c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    c
}

fn start(mut c: Command) -> Child {
    c.spawn().unwrap()
}

/// Waits for a process that must end soon.
fn finish(mut child: Child) -> Output {
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("it hangs: {:?}", child.wait_with_output().unwrap());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// A run that keeps heat and a trace in a folder.
struct Kept {
    dir: tempfile::TempDir,
}

impl Kept {
    fn command(&self) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
        c.args([
            "run",
            "-m",
            MODEL,
            "--memory",
            MEMORY,
            "--raw",
            "--temp",
            "0",
            "--ignore-eos",
            "-n",
            "30",
            "--record",
        ]);
        c.arg(self.dir.path().join("trace.csv")).arg("Once upon a time");
        c.env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG").env("XDG_CACHE_HOME", self.dir.path().join("cache"));
        c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        c
    }

    /// An undisturbed run, which must find whatever was left in order.
    fn whole_run(&self) -> Vec<u8> {
        let o = finish(start(self.command()));
        let text = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.success() && !text.contains("WARN"), "{text}");
        assert_eq!(self.names("cache/oncall").len(), 1, "{:?}", self.names("cache/oncall"));
        assert_eq!(self.names(""), ["cache", "trace.csv"]);
        o.stdout
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path().join(folder)).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    fn heat(&self) -> PathBuf {
        self.dir.path().join("cache/oncall").join(&self.names("cache/oncall")[0])
    }
}

/// A part of a run's time, from the start to a little after the end; every second one is near the end, where files get their names.
fn moments() -> impl Iterator<Item = f64> {
    let mut x = 12345u32;
    (0u32..).map(move |i| {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let random = f64::from(x >> 8) / f64::from(1 << 24);
        if i.is_multiple_of(2) { 1.1 * random } else { 0.9 + 0.2 * random }
    })
}

/// Disturbs so many runs with a signal at all sorts of moments, and checks that what they wrote is a beginning of the answer.
fn disturb(name: &str, n: u32, check: impl Fn(&Kept, &Output)) {
    let kept = Kept { dir: scratch() };
    kept.whole_run();
    let began = Instant::now();
    let want = kept.whole_run();
    let mut whole = began.elapsed();
    let mut n_left = n;
    for (i, moment) in moments().enumerate() {
        assert!(i < 50 * n as usize, "{n_left} of {n} runs are still to be disturbed");
        let child = start(kept.command());
        std::thread::sleep(whole.mul_f64(moment));
        // It may have ended, but its number stays its own until it's waited for.
        signal(&child, name);
        let o = finish(child);
        let text = String::from_utf8_lossy(&o.stderr);
        assert!(
            want.starts_with(o.stdout.trim_ascii_end()),
            "{:?} isn't a beginning",
            String::from_utf8_lossy(&o.stdout)
        );
        assert!(!text.contains("panicked") && !text.contains("WARN"), "{text}");
        check(&kept, &o);
        // A run's time changes with what else the machine does: followed, so that about half the signals come in time.
        let in_time = !o.status.success();
        whole = whole.mul_f64(if in_time { 1.02 } else { 0.98 });
        n_left -= u32::from(in_time);
        if n_left == 0 {
            break;
        }
    }
    assert_eq!(kept.whole_run(), want);
}

#[test]
fn ctrl_c_at_any_moment_ends_the_answer_in_order() {
    disturb("-INT", 20, |kept, o| {
        // Killed by it before the program listens, stopped by it, or done before it came.
        assert!(o.status.signal() == Some(2) || matches!(o.status.code(), Some(130 | 0)), "{:?}", o.status);
        if o.status.signal().is_none() {
            assert!(kept.names("cache/oncall").len() == 1 && kept.names("") == ["cache", "trace.csv"]);
        }
    });
}

#[test]
fn a_kill_at_any_moment_damages_nothing() {
    let n = std::env::var("ONCALL_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
    disturb("-KILL", n, |kept, o| {
        assert!(o.status.signal() == Some(9) || o.status.success(), "{:?}", o.status);
        // Whatever has its name is whole; the next run, which reads the heat, would warn.
        let trace = std::fs::read_to_string(kept.dir.path().join("trace.csv")).unwrap();
        assert!(trace.ends_with('\n') && trace.lines().last().unwrap().split(',').count() == 9);
    });
}

#[test]
fn a_damaged_heat_file_is_ignored_with_a_note_and_replaced() {
    let kept = Kept { dir: scratch() };
    let want = kept.whole_run();
    let good = std::fs::read(kept.heat()).unwrap();
    for damage in [&good[..good.len() / 2], &[7; 100], b""] {
        std::fs::write(kept.heat(), damage).unwrap();
        let o = finish(start(kept.command()));
        let text = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.success() && text.contains("ignoring the experts' heat"), "{text}");
        assert_eq!(o.stdout, want);
        assert_eq!(kept.whole_run(), want);
    }
}
