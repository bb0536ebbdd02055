//! Models larger than their memory: budgets inside real limits, the same text at each, files that change under the engine.

mod common;

use common::cgroup::MemoryGroup;
use oncall::arch::ModelError;
use oncall::engine::outline::Outline;
use oncall::engine::{Engine, EngineError, EngineOptions, Memory};
use oncall::gguf::{Gguf, mixture};
use oncall::moe::{IoMode, Lossy};
use oncall::synth::{self, PRESETS, Preset};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

const MIB: u64 = 1 << 20;

/// Two layers of a shape, experts as unequal as trained ones. Made once.
fn two_layers(of: &str, mix: &str, path: &'static OnceLock<PathBuf>) -> &'static Path {
    path.get_or_init(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("paging-{of}.gguf"));
        let options = synth::Options {
            mixture: mixture::by_name(mix).unwrap(),
            router_skew: 1.0,
            n_layer: Some(2),
            n_vocab: Some(2000),
            ..synth::Options::default()
        };
        synth::write_with(Preset::by_name(of).unwrap(), &options, &path, true, &mut |_, _| ()).unwrap();
        path
    })
}

/// OLMoE's shape: two layers of 64 experts, about 0.5 GB.
fn model() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    two_layers("olmoe-1b-7b", "q4_k_m", &PATH)
}

/// DeepSeek-V2-Lite's: a dense layer and one of 64 experts and two shared ones, a latent KV cache, another format.
fn latent() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    two_layers("deepseek-v2-lite", "q4_0", &PATH)
}

fn json(o: &std::process::Output) -> serde_json::Value {
    assert!(o.status.success(), "{:?}: {}", o.status, String::from_utf8_lossy(&o.stderr));
    serde_json::from_slice(&o.stdout).unwrap()
}

fn run(memory: &str, n_ctx: u32, n_predict: u32) -> Command {
    run_of(model(), memory, n_ctx, n_predict)
}

fn run_of(model: &Path, memory: &str, n_ctx: u32, n_predict: u32) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    let (n_ctx, n_predict) = (n_ctx.to_string(), n_predict.to_string());
    let prompt = "the quick brown fox jumps over the lazy dog ".repeat(4);
    c.args(["run", "--json", "--raw", "--temp", "0", "--ignore-eos", "--no-heat", "-c", &n_ctx, "-n", &n_predict]);
    c.args(["--memory", memory, "-m", model.to_str().unwrap(), &prompt]);
    c.env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG");
    c
}

/// The least budget, and the one from which on nothing is read twice.
fn bounds(model: &Path, n_ctx: u32) -> (u64, u64) {
    let o = EngineOptions { n_ctx: Some(n_ctx as usize), ..EngineOptions::default() };
    let needs = Outline::new(&Gguf::open_header(model).unwrap(), &o).unwrap().needs;
    (needs.smallest(), needs.no_reads())
}

/// Numbers from a seed (splitmix64).
struct Draw(u64);

impl Draw {
    /// Below `n`.
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(z ^ z >> 31) * u128::from(n)) >> 64) as u64
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    /// A model of any architecture with experts, in formats and of a depth that are drawn: some tens of megabytes at most.
    fn model(&mut self, dir: &Path, no: u64) -> PathBuf {
        let moe: Vec<_> = PRESETS.iter().filter(|p| p.is_tiny() && p.moe.is_some()).collect();
        let preset = self.one(&moe);
        let mixture = mixture::by_name(self.one::<&str>(&["q4_0", "q4_k_m", "q8_0", "f16"])).unwrap();
        // How some architectures know a file of theirs is the number of layers.
        let n_layer = if preset.n_layer > 4 { preset.n_layer } else { 2 + self.below(5) as u32 };
        let options = synth::Options {
            mixture,
            seed: self.below(1 << 32),
            router_skew: self.below(3) as f32 / 2.0,
            n_layer: Some(n_layer),
            ..synth::Options::default()
        };
        let path = dir.join(format!("{no}-{}-{}.gguf", preset.name, mixture.name));
        synth::write_with(preset, &options, &path, false, &mut |_, _| ()).unwrap();
        path
    }
}

fn of_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|n| n.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// Budgets from the smallest to more than enough, contexts and models, all drawn from a seed, each inside a control group of that size
/// and 32 MiB: nothing is killed, the process holds no more than it was given, and the text is the same as with all the memory that there
/// is. ONCALL_TEST_BUDGETS says how many, ONCALL_TEST_SEED which.
#[test]
fn budgets_hold_inside_control_groups_and_change_no_byte() {
    let n = of_env("ONCALL_TEST_BUDGETS").unwrap_or(8);
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 % 1_000_000_007;
    let seed = of_env("ONCALL_TEST_SEED").unwrap_or_else(clock);
    println!("budgets are drawn with ONCALL_TEST_SEED={seed} ONCALL_TEST_BUDGETS={n}");
    let mut draw = Draw(seed);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // The two large ones are where most is paged.
    let mut models = vec![model().to_path_buf(), latent().to_path_buf()];
    models.extend((0..n / 8 + 2).map(|no| draw.model(dir.path(), no)));
    let mut wants: HashMap<PathBuf, serde_json::Value> = HashMap::new();
    for i in 0..n {
        let model = draw.one(&models).clone();
        // The prompt and the answer are of 142 tokens.
        let n_ctx = 160 + draw.below(865) as u32;
        let (least, enough) = bounds(&model, n_ctx);
        // Squares: most budgets are tight ones.
        let x = draw.below(1001) as f64 / 1000.0;
        let budget = least + (x * x * 1.1 * (enough - least) as f64) as u64;
        let want = wants
            .entry(model.clone())
            .or_insert_with(|| json(&run_of(&model, "4GiB", 512, 12).output().unwrap())["text"].clone());
        let model = model.as_path();
        let group = match MemoryGroup::new(&format!("paging-{i}"), budget + 32 * MIB) {
            Ok(group) => group,
            Err(e) => {
                return eprintln!("note: no memory control group to be had here ({e}): budgets weren't held to one");
            }
        };
        let o = group.run(&run_of(model, &budget.to_string(), n_ctx, 12)).unwrap();
        let what = format!("seed {seed}, {i}: {model:?}, budget {budget}, context {n_ctx}");
        assert!(o.status.success(), "{what}: {:?}: {}", o.status, String::from_utf8_lossy(&o.stderr));
        let v = json(&o);
        assert_eq!(v["text"], *want, "{what}");
        let peak = v["peak_memory"].as_u64().unwrap();
        assert!(peak <= budget + 32 * MIB, "{what}: {} MiB held, {} MiB given", peak / MIB, budget / MIB);
    }
}

/// A job of many sequences, inside a control group of its budget and 32 MiB: it isn't killed, and its lines are those of a job that
/// has all the memory it can use.
#[test]
fn a_batch_holds_its_budget_and_writes_the_same_lines() {
    let o = EngineOptions { n_ctx: Some(256), n_sessions: 8, memory: Memory::Bytes(1), ..EngineOptions::default() };
    let Err(EngineError::Budget { smallest, .. }) = Engine::load(model(), &o, &|_, _| ()) else {
        panic!("a byte is too little");
    };
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let request = |i: usize| {
        let prompt = "the quick brown fox ".repeat(1 + i * 7 % 11);
        let body = serde_json::json!({ "prompt": prompt, "max_tokens": 1 + i % 9, "ignore_eos": true });
        format!("{}\n", serde_json::json!({ "custom_id": format!("r{i}"), "url": "/v1/completions", "body": body }))
    };
    let input = dir.path().join("in.jsonl");
    std::fs::write(&input, (0..24).map(request).collect::<String>()).unwrap();
    let job = |memory: u64, name: &str| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
        c.args(["batch", "--no-heat", "-c", "256", "--sequences", "8", "--memory", &memory.to_string(), "-m"]);
        c.arg(model()).arg("-i").arg(&input).arg("-o").arg(dir.path().join(name));
        c.env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG");
        c
    };
    let lines = |name: &str| {
        let text = std::fs::read_to_string(dir.path().join(name)).unwrap();
        let mut lines: Vec<String> = text.lines().map(String::from).collect();
        lines.sort_unstable();
        lines
    };
    let wide = job(4 << 30, "wide").output().unwrap();
    assert!(wide.status.success(), "{}", String::from_utf8_lossy(&wide.stderr));
    let budget = smallest + 20 * MIB;
    let group = match MemoryGroup::new("batch", budget + 32 * MIB) {
        Ok(group) => group,
        Err(e) => return eprintln!("note: no memory control group to be had here ({e}): a batch wasn't held to one"),
    };
    let tight = group.run(&job(budget, "tight")).unwrap();
    assert!(tight.status.success(), "{:?}: {}", tight.status, String::from_utf8_lossy(&tight.stderr));
    assert_eq!(lines("tight").len(), 24);
    assert!(lines("tight") == lines("wide"));
}

#[test]
fn a_budget_that_cannot_work_names_the_smallest_that_does() {
    let o = run("50MiB", 512, 1).output().unwrap();
    let text = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(1));
    assert!(text.contains("the least that works") && text.contains("-ctk q8_0"), "{text}");
}

/// Where one asks what fits, little may. The table is arithmetic; what can't be measured is unknown.
#[test]
fn plan_and_doctor_work_in_small_control_groups() {
    let oncall = |args: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
        c.args(args).env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG");
        c
    };
    let m = model().to_str().unwrap();
    for (mib, args) in [
        (96, vec!["plan", "--json", "-m", m]),
        (150, vec!["plan", "--json", "-m", m]),
        (256, vec!["plan", "--json", "-m", m]),
        (128, vec!["plan", "--json"]),
        (60, vec!["doctor", "--json", "-m", m]),
        (128, vec!["doctor", "--json", "-m", m]),
    ] {
        let group = match MemoryGroup::new("small", mib * MIB) {
            Ok(group) => group,
            Err(e) => return eprintln!("note: no memory control group to be had here ({e}): nothing was held to one"),
        };
        let v = json(&group.run(&oncall(&args)).unwrap());
        let what = if args[0] == "plan" { &v["compute_s"] } else { &v["memory_rate"][1] };
        assert!(what.is_null() == (mib < 200), "{args:?} in {mib} MiB: {v}");
        let row = &v["budgets"][8];
        assert!(
            args[0] == "doctor" || row["slot_share"] == 1.0 && row["tokens_per_s"].is_null() == (mib < 200),
            "{row}"
        );
        if mib == 150 {
            let text = group.run(&oncall(&args[..1].iter().chain(&args[2..]).copied().collect::<Vec<_>>())).unwrap();
            let text = String::from_utf8(text.stdout).unwrap();
            assert!(text.contains("can't run here") && text.contains('?'), "{text}");
        }
    }
}

/// Without --memory the engine says what it took and why, in errors, figures and notes.
#[test]
fn what_was_taken_is_told() {
    let group = |mib: u64| MemoryGroup::new("taken", mib * MIB);
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    c.args(["run", "--raw", "--json", "--no-heat", "-c", "256", "-n", "2", "hi", "-m", model().to_str().unwrap()]);
    c.env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG");
    let little = match group(100) {
        Ok(group) => group.run(&c).unwrap(),
        Err(e) => return eprintln!("note: no memory control group to be had here ({e}): nothing was held to one"),
    };
    let text = String::from_utf8_lossy(&little.stderr).into_owned();
    assert!(little.status.code() == Some(1) && text.contains("nine tenths of what a control group leaves"), "{text}");
    let enough = group(400).unwrap().run(&c).unwrap();
    let v = json(&enough);
    assert_eq!(v["budget"]["share_of"], "group");
    let (slots, experts) = (v["slots"].as_u64().unwrap(), v["experts"].as_u64().unwrap());
    assert!(0 < slots && slots < experts && v["budget"]["bytes"].as_u64().unwrap() < 400 * MIB, "{v}");
    let note = String::from_utf8_lossy(&enough.stderr).into_owned();
    assert!(note.contains(&format!("of {experts} experts have a slot")), "{note}");
    for phase in ["prefill", "decode"] {
        let phase = &v[phase];
        assert_eq!(
            phase["misses"].as_u64().unwrap() + phase["hits"].as_u64().unwrap(),
            phase["uses"].as_u64().unwrap()
        );
        assert!(phase["other_s"].is_number() && phase["stall_p95_s"].is_number(), "{phase}");
    }
    let all = run("4GiB", 256, 1).output().unwrap();
    assert!(all.status.success() && all.stderr.is_empty(), "{}", String::from_utf8_lossy(&all.stderr));
}

/// What fills slots before the first message is in the figures too. In a process of its own, for a cache folder of its own.
#[test]
fn warming_up_is_in_the_figures() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut c = Command::new(std::env::current_exe().unwrap());
    c.args(["--exact", "two_runs_with_heat", "--ignored", "--nocapture"]).env("XDG_CACHE_HOME", cache.path());
    let o = c.output().unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stdout));
    assert!(String::from_utf8_lossy(&o.stdout).contains("1 passed"));
}

#[test]
#[ignore = "it is run by another test, with a cache folder of its own"]
fn two_runs_with_heat() {
    let o = EngineOptions { n_ctx: Some(64), heat: true, ..EngineOptions::default() };
    let load = || Engine::load(model(), &o, &|_, _| ()).unwrap();
    let engine = load();
    engine.session().feed(&[5, 6, 7], &mut |_| true).unwrap();
    assert_eq!(engine.account().between.bytes_read(), 0, "nothing was known");
    drop(engine);
    let engine = load();
    let began = std::time::Instant::now();
    while engine.account().store().ahead_bytes == 0 {
        assert!(began.elapsed().as_secs() < 60, "it knows which experts are hot");
        std::thread::yield_now();
    }
    engine.session().feed(&[5, 6, 7], &mut |_| true).unwrap();
    assert!(engine.account().between.bytes_read() > 0);
}

/// Texts larger than the memory: a prompt that fits no context isn't looked at, and of a long text no more is read than is scored.
#[test]
fn long_texts_stay_within_the_budget() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("long.txt");
    let v = json(&run("4GiB", 256, 1).output().unwrap());
    let budget = v["budget"]["least"].as_u64().unwrap() + 8 * MIB;
    let with = |command: &str, more: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
        c.args([command, "--json", "--no-heat", "-c", "256", "--memory", &budget.to_string(), "-m"]).arg(model());
        c.arg("-f").arg(&path).args(more).env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG");
        let group = MemoryGroup::new("long", budget + 32 * MIB);
        group.and_then(|g| g.run(&c))
    };
    for (n_bytes, why) in [(72 << 20, "fits no context"), (10 << 20, "can't fit into a context of 256")] {
        std::fs::write(&path, "the quick brown fox jumps over the lazy dog.\n".repeat(n_bytes / 45)).unwrap();
        let o = match with("run", &["-n", "1"]) {
            Ok(o) => o,
            Err(e) => return eprintln!("note: no memory control group to be had here ({e}): nothing was held to one"),
        };
        let text = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(o.status.code() == Some(1) && text.contains(why), "{:?}: {text}", o.status);
        assert_eq!(json(&with("perplexity", &["--chunks", "1"]).unwrap())["chunks"], 1);
    }
}

/// Ctrl-C needn't wait for the end of loading, of a long block, of a token.
#[test]
fn loading_and_every_pass_can_be_stopped() {
    let stop = Arc::new(AtomicBool::new(false));
    let o = EngineOptions { n_ctx: Some(64), stop: Some(stop.clone()), ..EngineOptions::default() };
    let error = Engine::load(model(), &o, &|_, _| stop.store(true, SeqCst)).err().unwrap();
    assert!(matches!(error, EngineError::Model { source: ModelError::Stopped, .. }), "{error}");
    stop.store(false, SeqCst);
    let engine = Engine::load(model(), &o, &|_, _| ()).unwrap();
    stop.store(true, SeqCst);
    let mut session = engine.session();
    assert_eq!(session.feed(&[5, 6, 7], &mut |_| panic!("no block was done")).unwrap(), 0);
    assert_eq!(session.feed(&[5], &mut |_| panic!("it is read, not written")).unwrap(), 0);
    assert_eq!(session.tokens().len(), 0);
    stop.store(false, SeqCst);
    assert_eq!(session.feed(&[5, 6], &mut |_| true).unwrap(), 2);
    assert_eq!(session.feed(&[7], &mut |_| true).unwrap(), 1);
    assert_eq!(session.tokens(), [5, 6, 7]);
}

/// From everything to the least in the middle of an answer, and back.
#[test]
fn shrinking_in_the_middle_of_an_answer_changes_no_byte_and_gives_the_memory_back() {
    let o = EngineOptions { n_ctx: Some(128), heat: false, ..EngineOptions::default() };
    let text: Vec<u32> = (0..40).map(|i| 3 + i * 37 % 1900).collect();
    let engine = Engine::load(model(), &o, &|_, _| ()).unwrap();
    let mut want = Vec::new();
    engine.session().feed_all(&text, &mut |_, l| want.extend(l.iter().map(|v| v.to_bits()))).unwrap();
    let (all, budget) = (engine.n_slots().unwrap(), engine.budget());
    assert_eq!(all.0, all.1, "everything fits at first");
    let mut session = engine.session();
    let mut got = Vec::new();
    let mut held = Vec::new();
    for (i, part) in text.chunks(10).enumerate() {
        let memory =
            [Memory::Auto, Memory::Bytes(budget.least), Memory::Bytes(budget.least + 100 * MIB), Memory::Auto][i];
        engine.set_memory_budget(memory).unwrap();
        held.push(oncall::cpu::memory::resident().unwrap());
        session.feed_all(part, &mut |_, l| got.extend(l.iter().map(|v| v.to_bits()))).unwrap();
    }
    assert!(got == want);
    assert!(held[1] + 200 * MIB < held[0], "{} then {} MiB", held[0] / MIB, held[1] / MIB);
}

/// A file that is cut while it's in use: an error that says so, and the engine goes on with what it has.
#[test]
fn a_file_cut_under_the_engine_is_an_error_and_the_engine_lives() {
    for io in [IoMode::Direct, IoMode::Buffered] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("cut.gguf");
        std::fs::copy(model(), &path).unwrap();
        let o = EngineOptions { n_ctx: Some(64), io, lookahead: false, ..EngineOptions::default() };
        let engine = Engine::load(&path, &o, &|_, _| ()).unwrap();
        let mut session = engine.session();
        let len = std::fs::metadata(&path).unwrap().len();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len / 10).unwrap();
        let error = session.feed(&[5, 6, 7], &mut |_| true).unwrap_err().to_string();
        assert!(error.contains("cut.gguf") && error.contains("changed"), "{io:?}: {error}");
        assert_eq!(session.tokens().len(), 0, "a failed pass leaves nothing behind");
        let again = session.feed(&[5], &mut |_| true).unwrap_err().to_string();
        assert!(again.contains("cut.gguf"), "{again}");
    }
}

/// Lossy ways are counted, and off unless they're asked for.
#[test]
fn what_is_given_up_is_counted() {
    let base = EngineOptions { n_ctx: Some(64), expert_bytes: Some(60 * MIB), ..EngineOptions::default() };
    let text: Vec<u32> = (0..30).map(|i| 3 + i * 37 % 1900).collect();
    let run = |o: &EngineOptions| {
        let engine = Engine::load(model(), o, &|_, _| ()).unwrap();
        let mut session = engine.session();
        text.iter().for_each(|&t| assert_eq!(session.feed(&[t], &mut |_| true).unwrap(), 1));
        engine.account().prefill.store
    };
    let exact = run(&base);
    assert_eq!((exact.dropped, exact.replaced), (0, 0));
    let drop = run(&EngineOptions { lossy: Lossy { drop_cold: 0.2, prefer_resident: 0.0 }, ..base.clone() });
    assert!(drop.dropped > 0 && drop.uses + drop.dropped == exact.uses, "{drop:?}");
    let prefer = run(&EngineOptions { lossy: Lossy { drop_cold: 0.0, prefer_resident: 0.5 }, ..base.clone() });
    assert!(prefer.replaced > 0 && prefer.uses == exact.uses, "{prefer:?}");
    assert!(prefer.bytes_read() < exact.bytes_read(), "{prefer:?} {exact:?}");
    let fewer = run(&EngineOptions { n_expert_used: Some(4), ..base.clone() });
    assert_eq!((fewer.uses * 2, fewer.left_out), (exact.uses, 4 * 2 * 30), "4 of 8 in 2 layers for 30 tokens");
    assert_eq!(exact.left_out, 0);
}

/// No addresses for the arena: an error that says what was refused, and what bounds it.
#[test]
#[cfg(target_os = "linux")]
fn a_process_without_addresses_for_the_experts_says_so() {
    let experts = Engine::load(model(), &EngineOptions { n_ctx: Some(128), ..EngineOptions::default() }, &|_, _| ());
    let all_slots = experts.unwrap().budget().slots;
    let run = run("300MiB", 128, 1);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -v \"$0\" && exec \"$@\"", &(all_slots >> 10).to_string()]);
    let o = limited.arg(run.get_program()).args(run.get_args()).env_remove("ONCALL_MODEL").output().unwrap();
    let text = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(1), "{:?}: {text}", o.status);
    assert!(text.contains("slots") && text.contains("ulimit -v") && text.contains("Cannot allocate memory"), "{text}");
}

/// Measuring what memory and the disk give comes after the answer, and takes no more than the budget leaves: where that's too little it
/// says so.
#[test]
fn limits_are_measured_inside_the_budget() {
    let (least, enough) = bounds(model(), 256);
    for (budget, is_enough) in [(least, false), (least + (enough - least) / 2, true)] {
        let group = match MemoryGroup::new("limits", budget + 32 * MIB) {
            Ok(group) => group,
            Err(e) => return eprintln!("note: no memory control group to be had here ({e}): nothing was held to one"),
        };
        let mut c = run(&budget.to_string(), 256, 12);
        c.arg("--stats");
        let v = json(&group.run(&c).unwrap());
        for reach in [&v["reached"]["memory"], &v["reached"]["disk"]] {
            let is_measured = reach["limit_bytes_per_s"].is_number();
            assert!(reach["bytes_per_s"].as_f64().unwrap() > 1e6, "{v}");
            assert!(is_measured != reach["not_measured"].is_string() && (is_measured || !is_enough), "{v}");
        }
        let peak = v["peak_memory"].as_u64().unwrap();
        assert!(peak <= budget + 32 * MIB, "{} MiB held, {} MiB given", peak / MIB, budget / MIB);
    }
}
