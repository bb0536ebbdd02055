//! A disk that fills up under whatever writes a file: an error that names the file and says what to do, nothing under the file's
//! name that isn't whole, no temporary file left, and what was there before is still there.
#![cfg(target_os = "linux")] // whose file systems they are

mod common;

use common::disk::Mount;
use oncall::engine::{Engine, EngineOptions};
use oncall::gguf::mixture;
use oncall::gguf::requantize::Plan;
use std::path::Path;
use std::process::{Command, Output};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tinymoe-stories-Q8_0.gguf");

/// A small disk; `None`, with a note, where mounting isn't allowed.
fn disk(bytes: u64) -> Option<Mount> {
    Mount::tmpfs(bytes).inspect_err(|e| eprintln!("note: no full disk was tried, mounting one isn't allowed: {e}")).ok()
}

fn command(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    c.args(args).env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG");
    c
}

fn oncall(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// What a command says that failed because of a full disk; it must name the file and say what to do.
fn refused(o: &Output, file: &str) -> String {
    let text = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(1), "{text}");
    assert!(text.contains(file) && text.contains("free some"), "{text}");
    text
}

fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn quantising_onto_a_disk_that_is_too_small_says_so_at_once() {
    let Some(disk) = disk(4 << 20) else { return };
    let to = disk.file("small.gguf");
    let text = refused(&oncall(&["quantize", MODEL, arg(&to), "q4_0"]), "small.gguf");
    assert!(text.contains("bytes are free") || text.contains("are free on its disk"), "{text}");
    assert!(disk.names().is_empty(), "{:?}", disk.names());
}

/// Something else takes the space while it's written.
#[test]
fn a_disk_that_fills_up_while_quantising_leaves_nothing() {
    let Some(disk) = disk(64 << 20) else { return };
    let (to, source) = (disk.file("small.gguf"), oncall::gguf::Gguf::open(Path::new(MODEL)).unwrap());
    let plan = Plan::new(&source, mixture::by_name("q4_0").unwrap()).unwrap();
    let mut filled = false;
    let error = plan.write(&to, false, &mut |done, total| {
        if !std::mem::replace(&mut filled, true) {
            assert!(done < total / 2, "most is still to come");
            disk.fill_but(64 << 10);
        }
        true
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("small.gguf") && error.contains("free some"), "{error}");
    assert_eq!(disk.names(), ["filler"]);
    disk.make_room();
    plan.write(&to, false, &mut |_, _| true).unwrap();
    assert_eq!(disk.names(), ["small.gguf"]);
    oncall::gguf::Gguf::open(&to).unwrap();
}

/// Each command that writes a file, with the file as its last argument.
#[test]
fn whatever_writes_a_file_leaves_the_old_one_or_nothing() {
    let Some(disk) = disk(8 << 20) else { return };
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    std::fs::write(&text, "Once upon a time there was a little girl. ".repeat(60)).unwrap();
    let tokens = (0..200).map(|i| (3 + i * 7 % 2000).to_string()).collect::<Vec<_>>().join(",");
    let run = ["run", "--raw", "Once upon a time there was", "-n", "60", "--ignore-eos", "--no-heat", "--record"];
    // With the bytes that are free: all but the last end in the middle of the file.
    let cases: [(&[&str], u64); 4] = [
        (&["logits", "--tokens", &tokens, "-o"], 64 << 10),
        (&["perplexity", "-f", arg(&text), "-c", "128", "--save-logits"], 64 << 10),
        (&run, 8 << 10),
        (&["experts", "-n", "8", "--svg"], 0),
    ];
    for (args, free) in cases {
        let file = disk.file("out.file");
        for before in [None, Some("precious")] {
            before.inspect(|text| std::fs::write(&file, text).unwrap());
            disk.fill_but(free);
            refused(&oncall(&[args, &[arg(&file)]].concat()), "out.file");
            let names: &[&str] = if before.is_some() { &["filler", "out.file"] } else { &["filler"] };
            assert_eq!(disk.names(), names, "{args:?}");
            before.inspect(|text| assert_eq!(std::fs::read_to_string(&file).unwrap(), *text, "{args:?}"));
            disk.make_room();
        }
        let o = oncall(&[args, &[arg(&file)]].concat());
        assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
        assert_eq!(disk.names(), ["out.file"], "{args:?}");
        assert_ne!(std::fs::read(&file).unwrap(), b"precious", "{args:?}");
        std::fs::remove_file(&file).unwrap();
    }
}

#[test]
fn a_session_that_cannot_be_saved_goes_on_and_keeps_what_was_saved_before() {
    let Some(disk) = disk(32 << 20) else { return };
    let engine = Engine::embedded(&EngineOptions { n_ctx: Some(256), ..EngineOptions::default() }).unwrap();
    let path = disk.file("session");
    let mut session = engine.session();
    session.feed(&[5, 6, 7], &mut |_| true).unwrap();
    session.save(&path).unwrap();
    session.feed(&(10..110).collect::<Vec<_>>(), &mut |_| true).unwrap();
    disk.fill_but(32 << 10);
    let error = session.save(&path).unwrap_err().to_string();
    assert!(error.contains("session") && error.contains("free some"), "{error}");
    assert_eq!(disk.names(), ["filler", "session"]);
    assert_eq!(engine.restore(&path).unwrap().tokens(), [5, 6, 7]);
    disk.make_room();
    session.feed(&[8], &mut |_| true).unwrap();
    session.save(&path).unwrap();
    assert_eq!(engine.restore(&path).unwrap().tokens(), session.tokens());
}

/// A job that fills its disk keeps whole lines only, and goes on from there.
#[test]
fn a_batch_keeps_whole_results_and_resumes() {
    let Some(disk) = disk(8 << 20) else { return };
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let body = |i| serde_json::json!({ "prompt": format!("Once {i}"), "max_tokens": 120, "temperature": 0, "seed": 1, "logprobs": 1 });
    let line = |i| serde_json::json!({ "custom_id": format!("r{i}"), "method": "POST", "url": "/v1/completions", "body": body(i) });
    std::fs::write(&input, (0..24).map(|i| format!("{}\n", line(i))).collect::<String>()).unwrap();
    let out = disk.file("out.jsonl");
    let job = |more: &[&str]| {
        oncall(&[&["batch", "--no-heat", "--sequences", "4", "-i", arg(&input), "-o", arg(&out)], more].concat())
    };
    disk.fill_but(12 << 10);
    let text = refused(&job(&[]), "out.jsonl");
    assert!(text.contains("--resume"), "{text}");
    let kept = std::fs::read_to_string(&out).unwrap();
    assert!(kept.is_empty() || kept.ends_with('\n'));
    assert!(kept.lines().count() < 24 && kept.lines().all(|l| serde_json::from_str::<serde_json::Value>(l).is_ok()));
    disk.make_room();
    let o = job(&["--resume"]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let whole = std::fs::read_to_string(&out).unwrap();
    assert!(whole.starts_with(&kept) && whole.lines().count() == 24);
    assert_eq!(disk.names(), ["out.jsonl"]);
}

/// The experts' heat can't be kept: a note, and the answer is there all the same.
#[test]
fn a_full_cache_folder_costs_a_note() {
    let Some(disk) = disk(1 << 20) else { return };
    let run = || {
        let mut c = command(&["run", "-m", MODEL, "--raw", "--temp", "0", "Once upon a time", "-n", "5"]);
        c.env("XDG_CACHE_HOME", disk.path()).output().unwrap()
    };
    assert!(run().status.success());
    let folder = disk.file("oncall");
    let heat = || {
        let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        std::fs::read(&files[0]).unwrap()
    };
    let before = heat();
    disk.fill_but(0);
    let o = run();
    let text = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.success() && text.contains("heat isn't kept") && text.contains("free some"), "{text}");
    assert_eq!(heat(), before);
    disk.make_room();
    assert!(run().status.success());
    assert_ne!(heat(), before);
}

/// A device or a pipe isn't replaced by a file, and its refusal is heard. The device is one of the test's own: where the program is
/// broken, the machine's shouldn't suffer.
#[test]
fn devices_and_pipes_are_written_to_as_they_stand() {
    use std::os::unix::fs::FileTypeExt;
    let kind = |path: &Path| std::fs::metadata(path).unwrap().file_type();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (pipe, full) = (dir.path().join("pipe"), dir.path().join("full"));
    common::disk::sh("mkfifo", &[arg(&pipe)]).unwrap();
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read(pipe).unwrap()
    });
    assert!(oncall(&["logits", "--tokens", "1,2,3", "-o", arg(&pipe)]).status.success());
    assert!(kind(&pipe).is_fifo());
    let bytes = reader.join().unwrap();
    assert!(bytes.len().is_multiple_of(12) && bytes.len() > 12);
    // The device that is always full.
    let made = common::disk::sh("mknod", &[arg(&full), "c", "1", "7"]);
    if let Err(e) = made.and_then(|_| std::fs::OpenOptions::new().write(true).open(&full).map(drop)) {
        return eprintln!("note: no full device was tried, none can be made here: {e}");
    }
    refused(&oncall(&["logits", "--tokens", "1,2,3", "-o", arg(&full)]), "full");
    assert!(kind(&full).is_char_device());
}
