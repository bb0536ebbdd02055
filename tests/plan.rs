//! `oncall plan`, `doctor`, `experts` and `--record`, as the real program runs them.

use oncall::engine::{Engine, EngineOptions};
use oncall::gguf::{Gguf, GgufWriter, Tensor, mixture};
use oncall::moe::Lossy;
use oncall::synth::{self, PRESETS};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn oncall(args: &[&str]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    // No test touches the user's own cache folder.
    c.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    c.args(args).stdin(Stdio::null()).env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG").output().unwrap()
}

fn text(o: &Output) -> String {
    assert!(o.status.success(), "{}", err(o));
    String::from_utf8(o.stdout.clone()).unwrap()
}

fn err(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&text(&oncall(&[args, &["--json"]].concat()))).unwrap()
}

/// A folder on a real disk with a small model of each size of expert.
fn model(dir: &Path, quant: &str) -> PathBuf {
    let preset = PRESETS.iter().find(|p| p.name == "tiny-qwen3moe").unwrap();
    let options = synth::Options { mixture: mixture::by_name(quant).unwrap(), ..synth::Options::parity(preset) };
    let path = dir.join("tiny.gguf");
    std::fs::write(&path, synth::to_bytes(preset, &options).unwrap()).unwrap();
    path
}

/// What `plan` calls the smallest works; a little less is refused, with the same number, by `plan` and by `run`.
#[test]
fn the_smallest_budget_is_the_one_that_works() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let path = model(dir.path(), "q4_k_m");
    let path = path.to_str().unwrap();
    let plan = json(&["plan", "-m", path, "-c", "128"]);
    let smallest = plan["smallest_bytes"].as_u64().unwrap();
    let run = |bytes: u64| {
        oncall(&["run", "--raw", "-m", path, "-c", "128", "-n", "2", "hi", "--memory", &bytes.to_string()])
    };
    text(&run(smallest));
    let refused = run(smallest - 1);
    assert!(refused.status.code() == Some(1) && err(&refused).contains("memory"), "{}", err(&refused));
    let refused = oncall(&["plan", "-m", path, "-c", "128", "--memory", &(smallest - 1).to_string()]);
    assert!(refused.status.code() == Some(1) && err(&refused).contains("too little"), "{}", err(&refused));
    // A longer context needs more, a smaller cache less.
    let with =
        |more: &[&str]| json(&[&["plan", "-m", path, "-c", "1024"], more].concat())["smallest_bytes"].as_u64().unwrap();
    assert!(with(&[]) > smallest && with(&["-ctk", "q8_0", "-ctv", "q8_0"]) < with(&[]));
}

#[test]
fn the_table_goes_from_the_smallest_budget_to_no_reads() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let path = model(dir.path(), "q8_0");
    for routing in ["typical", "uniform"] {
        let plan = json(&["plan", "-m", path.to_str().unwrap(), "--routing", routing]);
        let rows = plan["budgets"].as_array().unwrap();
        assert_eq!(rows[0]["bytes"], plan["smallest_bytes"]);
        let last = rows.last().unwrap();
        assert_eq!(last["bytes"], plan["no_reads_bytes"]);
        // Nothing is read twice, but with typical routing the answer has yet to read some experts for the first time.
        let at_hand = last["hit_rate"].as_f64().unwrap();
        assert!(if routing == "uniform" { at_hand == 1.0 } else { (0.9..1.0).contains(&at_hand) }, "{last}");
        let number = |name: &str| plan[name].as_f64().unwrap();
        let (beside, rate, rate_beside) = (number("beside_s"), number("disk_rate"), number("disk_rate_beside"));
        assert!(beside >= number("compute_s") && rate_beside <= rate);
        let token_bytes = number("used_expert_bytes");
        assert_eq!(token_bytes, number("expert_bytes") * number("n_moe_layer") * number("n_expert_used"));
        for row in rows {
            let of_row = |name: &str| row[name].as_f64().unwrap();
            let (compute, bytes) = (of_row("compute_s"), of_row("bytes_per_token"));
            assert!((of_row("disk_s") - bytes / rate).abs() < 1e-9, "{row}");
            // In each layer both go on together, slowed, until one is done; the other goes on alone. Misses are binomial.
            let (layers, used) = (number("n_moe_layer"), number("n_expert_used") as i32);
            let (compute, beside) = (compute / layers, beside / layers);
            let layer_s = |misses: i32| {
                let bytes = token_bytes / layers / f64::from(used) * f64::from(misses);
                let read = bytes / rate_beside;
                let rest =
                    if read < beside { compute * (1.0 - read / beside) } else { (read - beside) * rate_beside / rate };
                read.min(beside) + rest
            };
            let ways = |k: i32| (0..k).fold(1.0, |n, i| n * f64::from(used - i) / f64::from(i + 1));
            let hits = of_row("hit_rate");
            let of = |k| ways(k) * (1.0 - hits).powi(k) * hits.powi(used - k) * layer_s(k);
            let token_s = layers * (0..=used).map(of).sum::<f64>();
            assert!((of_row("tokens_per_s") * token_s - 1.0).abs() < 1e-3, "{row}");
            assert!(of_row("first_tokens_per_s") <= of_row("tokens_per_s") * (1.0 + 1e-9), "{row}");
        }
        assert!(rows[0]["tokens_per_s"].as_f64() <= last["tokens_per_s"].as_f64(), "{plan}");
    }
}

/// A budget that is asked for has a row, however large, beside what the machine has; others that change nothing have none.
#[test]
fn the_budget_that_was_asked_for_is_told() {
    let plan = json(&["plan", "--memory", "100000GiB"]);
    assert_eq!(plan["budgets"].as_array().unwrap().last().unwrap()["bytes"], 100_000u64 << 30);
    let table = text(&oncall(&["plan", "--memory", "100000GiB"]));
    assert!(table.contains("budget asked for 100000.00 GiB, more than this machine can spare"), "{table}");
    let row = table.lines().find(|l| l.starts_with("100000.00 GiB "));
    assert!(row.is_some_and(|row| row.ends_with(" <")), "{table}");
    let table = text(&oncall(&["plan"]));
    assert!(table.contains("memory to spare") && !table.contains("budget asked for"), "{table}");
    let rows: Vec<&str> = table
        .lines()
        .skip_while(|l| !l.contains("tokens/s"))
        .skip(1)
        .filter_map(|l| l.split_once("iB "))
        .map(|r| r.1)
        .collect();
    assert!(rows.len() > 2 && rows.windows(2).all(|w| w[0] != w[1]), "{table}");
}

/// A download that has just begun: all sizes are in its header. What needs the weights says that they're missing.
#[test]
fn the_header_alone_is_enough() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let whole = model(dir.path(), "q4_0");
    let bytes = std::fs::read(&whole).unwrap();
    let data = Gguf::open(&whole).unwrap().tensors().iter().map(|t| t.offset).min().unwrap();
    let part = dir.path().join("part.gguf");
    std::fs::write(&part, &bytes[..data as usize + 100]).unwrap();
    let (a, b) = (json(&["plan", "-m", whole.to_str().unwrap()]), json(&["plan", "-m", part.to_str().unwrap()]));
    for key in ["smallest_bytes", "no_reads_bytes", "dense_bytes", "kv_bytes", "expert_bytes"] {
        assert_eq!(a[key], b[key], "{key}");
    }
    assert_eq!((&a["incomplete"], &b["incomplete"]), (&Value::from(false), &Value::from(true)));
    let why = b["no_disk_rate"].as_str().unwrap();
    assert!(why.contains("part.gguf") && why.contains("too short") && !why.contains("refused"), "{why}");
    let o = oncall(&["run", "-m", part.to_str().unwrap(), "hi"]);
    assert_eq!(o.status.code(), Some(1));
    std::fs::write(&part, &bytes[..data as usize / 2]).unwrap();
    let o = oncall(&["plan", "-m", part.to_str().unwrap()]);
    assert!(o.status.code() == Some(1) && err(&o).contains("part.gguf"), "{}", err(&o));
}

/// What `--record` writes can be replayed, and planned with; it is the same whatever the chunk.
#[test]
fn a_recorded_run_can_be_replayed_and_planned_with() {
    let dir = tempfile::tempdir().unwrap();
    let record = |name: &str, chunk: &str| {
        let path = dir.path().join(name);
        let args = [
            "run",
            "--raw",
            "Once upon a time there was",
            "-n",
            "20",
            "-s",
            "1",
            "--ignore-eos",
            "--ubatch-size",
            chunk,
        ];
        text(&oncall(&[&args[..], &["--record", path.to_str().unwrap()]].concat()));
        let trace = std::fs::read_to_string(&path).unwrap();
        assert!(trace.ends_with('\n'));
        (path, trace)
    };
    let ((path, a), (_, b)) = (record("a.csv", "512"), record("b.csv", "2"));
    let routes = |t: &str| -> Vec<String> {
        // All but residency and bytes, which depend on what came before within a chunk; and phase: a chunk of one is a token.
        t.lines()
            .filter(|l| !l.starts_with('#'))
            .map(|l| {
                let f: Vec<&str> = l.split(',').collect();
                [f[0], f[2], f[3], f[4], f[5], f[6]].join(",")
            })
            .collect()
    };
    assert_eq!(routes(&a), routes(&b));
    let steps = |phase: &str| {
        let mut steps: Vec<&str> =
            a.lines().filter(|l| l.split(',').nth(1) == Some(phase)).filter_map(|l| l.split(',').nth(2)).collect();
        steps.dedup();
        steps.len()
    };
    assert!(steps("0") >= 5 && (19..=20).contains(&steps("1")), "{} {}", steps("0"), steps("1"));
    let path = path.to_str().unwrap();
    let row = json(&["replay", "--trace", path, "--slots", "8", "--policy", "stay", "--sharing", "global"]);
    assert!(row["hit_rate"].as_f64().unwrap() > 0.9, "{row}");
    let rows = text(&oncall(&["replay", "--trace", path, "--policy", "stay", "--sharing", "global", "--json"]));
    let slots = |row: &str| serde_json::from_str::<Value>(row).unwrap()["slots"].as_u64().unwrap();
    assert_eq!(rows.lines().map(slots).collect::<Vec<_>>(), [3, 4, 6], "numbers that matter for 2 of 8 experts");
    let plan = json(&["plan", "--trace", path]);
    assert_eq!(plan["routing"], "trace");
    let o = oncall(&["plan", "--trace", "tests/traces/gpt-oss-120b.route.csv"]);
    assert!(o.status.code() == Some(1) && err(&o).contains("2 of 128"), "{}", err(&o));
    let o = oncall(&["run", "hi", "--record", dir.path().to_str().unwrap()]);
    assert!(o.status.code() == Some(1) && err(&o).contains("routing trace"), "{}", err(&o));
    assert!(!err(&o).contains("nothing more"), "it hadn't begun: {}", err(&o));
}

/// Hits of another model's run would be presented as this one's.
#[test]
fn a_trace_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.csv");
    let path = path.to_str().unwrap();
    let own = |sizes: &str, rows: &str| {
        let columns = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes";
        std::fs::write(path, format!("# route_trace v1\n{sizes}{columns}\n{rows}")).unwrap();
        oncall(&["plan", "--trace", path])
    };
    let row = "0,1,0,0,0,1,0.5,0,0\n";
    let o = own("# model=m n_layer=7 n_expert=8 n_expert_used=2\n", row);
    assert!(o.status.code() == Some(1) && err(&o).contains("7 layers, but this model has 6"), "{}", err(&o));
    let named = format!("# model={} n_layer=6 n_expert=8 n_expert_used=2\n", oncall::engine::EMBEDDED_NAME);
    assert_eq!(err(&own(&named, row)), "");
    let o = own("# model=m.gguf n_layer=6 n_expert=8 n_expert_used=2\n", row);
    assert!(o.status.success() && err(&o).contains("the trace is of m.gguf: "), "{}", err(&o));
    let layers = (0..6).map(|i| format!("# layer={i} expert_bytes=1 dense_bytes=1\n")).collect::<String>();
    let o = own(&format!("{named}{layers}"), row);
    assert!(o.status.success() && err(&o).contains("whose experts have other sizes"), "{}", err(&o));
    for o in [own(&named, ""), oncall(&["replay", "--trace", path])] {
        assert!(o.status.code() == Some(1) && err(&o).contains("t.csv: there are no tokens"), "{}", err(&o));
    }
}

/// What was asked for wasn't delivered.
#[test]
fn a_trace_that_cannot_be_kept_is_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("gone");
    std::fs::create_dir(&folder).unwrap();
    let trace = folder.join("t.csv");
    let mut run = Command::new(env!("CARGO_BIN_EXE_oncall"));
    run.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).env_remove("ONCALL_MODEL");
    run.args(["run", "--raw", "-n", "2000", "--ignore-eos", "Once", "--record", trace.to_str().unwrap()]);
    let child = run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    while !folder.join("t.csv.part").exists() && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::fs::remove_dir_all(&folder).unwrap();
    let o = child.wait_with_output().unwrap();
    assert!(o.status.code() == Some(1) && err(&o).contains("error: the routing trace: "), "{}", err(&o));
}

#[test]
fn made_up_tokens_teach_no_heat() {
    let dir = tempfile::tempdir().unwrap();
    let model = "models/tinymoe-stories-Q8_0.gguf";
    let kept = |args: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
        let o =
            c.env("XDG_CACHE_HOME", dir.path()).args(args).args(["-m", model]).stdin(Stdio::null()).output().unwrap();
        assert!(o.status.success(), "{}", err(&o));
        dir.path().join("oncall").exists()
    };
    let logits = dir.path().join("logits");
    assert!(!kept(&["logits", "--tokens", "1,2,3", "-o", logits.to_str().unwrap()]));
    assert!(!kept(&["bench", "-p", "4", "-n", "0", "-r", "1"]));
    assert!(kept(&["run", "-n", "1", "Once"]));
}

#[test]
fn what_is_lossy_is_refused_where_it_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let preset = PRESETS.iter().find(|p| p.name == "tiny-llama").unwrap();
    let path = dir.path().join("dense.gguf");
    std::fs::write(&path, synth::to_bytes(preset, &synth::Options::parity(preset)).unwrap()).unwrap();
    for flag in ["--drop-cold", "--prefer-resident"] {
        let o = oncall(&["run", "-n", "1", "hi", "-m", path.to_str().unwrap(), flag, "0.1"]);
        let words = format!("{flag} 0.1: this model has no experts");
        assert!(o.status.code() == Some(1) && err(&o).contains(&words), "{}", err(&o));
    }
    let o = oncall(&["run", "-n", "1", "Once", "--prefer-resident", "0.1"]);
    assert!(o.status.success() && err(&o).contains("--prefer-resident changes nothing"), "{}", err(&o));
    for (drop_cold, prefer_resident) in [(f32::NAN, 0.0), (0.0, 5.0), (-0.1, 0.0)] {
        let options = EngineOptions { lossy: Lossy { drop_cold, prefer_resident }, ..EngineOptions::default() };
        let e = Engine::embedded(&options).map(drop).unwrap_err().to_string();
        assert!(e.contains("a number from 0 to 1"), "{e}");
    }
}

/// Writes a model in files of their own, each with some of its tensors, the first with the metadata besides. Where a number's file is `name` says.
fn split(whole: &Gguf, parts: &[&[Tensor]], name: &dyn Fn(usize) -> PathBuf) {
    for (i, tensors) in parts.iter().enumerate() {
        let mut w = GgufWriter::new();
        if i == 0 {
            w.set_all(whole.metadata());
        }
        w.set("split.no", i as u16).set("split.count", parts.len() as u16);
        for t in *tensors {
            w.tensor(&t.name, t.shape(), t.format);
        }
        let mut out = w.create(&name(i + 1), false).unwrap();
        for t in *tensors {
            let mut bytes = vec![0; t.n_bytes as usize];
            whole.read_at(t, 0, &mut bytes).unwrap();
            out.write(&bytes).unwrap();
        }
        out.finish().unwrap();
    }
}

/// The first of a split model's files may hold metadata alone: experts are read from another.
#[test]
fn a_split_model_s_disk_is_measured_where_its_experts_are() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let whole = Gguf::open(&model(dir.path(), "q8_0")).unwrap();
    let name = |no: usize| dir.path().join(format!("split-{no:05}-of-00002.gguf"));
    split(&whole, &[&[], whole.tensors()], &name);
    let first = name(1);
    assert!(std::fs::metadata(&first).unwrap().len() < std::fs::metadata(name(2)).unwrap().len());
    let plan = json(&["plan", "-m", first.to_str().unwrap()]);
    assert!(plan["disk_rate"].as_f64().unwrap() > 0.0, "{plan}");
    let report = text(&oncall(&["doctor", "-m", first.to_str().unwrap()]));
    assert!(report.contains("split-00002-of-00002.gguf"), "{report}");
}

/// Half of a model's files: which tensors the others have stands in them alone.
#[test]
fn a_plan_of_a_split_model_says_what_is_missing_and_what_would_do() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let whole = Gguf::open(&model(dir.path(), "q8_0")).unwrap();
    let name = |no: usize| dir.path().join(format!("split-{no:05}-of-00003.gguf"));
    split(&whole, &[&[], &whole.tensors()[..5], &whole.tensors()[5..]], &name);
    let first = name(1);
    let args = ["plan", "-m", first.to_str().unwrap()];
    let all = json(&args);
    // Of a download that has only begun the first half of a megabyte is there.
    let begun = |no: usize| {
        let bytes = std::fs::read(name(no)).unwrap();
        std::fs::write(name(no), &bytes[..bytes.len().min(500_000)]).unwrap();
    };
    begun(2);
    begun(3);
    let plan = json(&args);
    assert!(plan["incomplete"] == true && plan["smallest_bytes"] == all["smallest_bytes"], "{plan}");
    std::fs::remove_file(name(3)).unwrap();
    let o = oncall(&args);
    let says = |o: &Output, words: &[&str]| {
        assert!(o.status.code() == Some(1) && words.iter().all(|w| err(o).contains(w)), "{}", err(o));
    };
    says(&o, &["split-00003-of-00003.gguf\" is missing: ", "get the rest", "a download that has only begun"]);
    std::fs::remove_file(name(2)).unwrap();
    says(&oncall(&args), &["split-00002-of-00003.gguf\" is missing (and number 3): "]);
}

#[test]
fn a_plan_says_below_which_budget_a_token_s_experts_don_t_all_fit() {
    let plan = json(&["plan"]);
    let cycle = plan["cycle_bytes"].as_u64().unwrap();
    let number = |name: &str| plan[name].as_u64().unwrap();
    assert!(number("smallest_bytes") < cycle && cycle < number("no_reads_bytes"), "{plan}");
    for row in plan["budgets"].as_array().unwrap() {
        let fits = row["slot_share"].as_f64().unwrap() >= 2.0 / 8.0;
        assert_eq!(fits, row["bytes"].as_u64().unwrap() >= cycle, "{row}");
    }
    let table = text(&oncall(&["plan"]));
    assert!(table.lines().last().unwrap().starts_with("Below "), "{table}");
}

#[test]
fn the_table_fits_into_80_columns() {
    // The model that is built in has the line below the table, the other one a disk.
    let dir = tempfile::tempdir_in(".").unwrap();
    let path = model(dir.path(), "q8_0");
    for args in [&["plan"][..], &["plan", "-m", path.to_str().unwrap(), "--memory", "99GiB"]] {
        let table = text(&oncall(args));
        let too_wide = table.lines().find(|l| l.chars().count() > 80 && !l.contains("no disk rate"));
        assert!(table.lines().count() > 12 && too_wide.is_none(), "{too_wide:?} in {table}");
    }
}

/// A table would have one row nine times.
#[test]
fn a_dense_model_s_plan_says_that_it_is_dense() {
    let dir = tempfile::tempdir().unwrap();
    let preset = PRESETS.iter().find(|p| p.name == "tiny-llama").unwrap();
    let path = dir.path().join("dense.gguf");
    std::fs::write(&path, synth::to_bytes(preset, &synth::Options::parity(preset)).unwrap()).unwrap();
    let path = path.to_str().unwrap();
    let plan = text(&oncall(&["plan", "-m", path]));
    assert!(plan.contains("the model is dense") && plan.contains("smallest budget"), "{plan}");
    assert!(!plan.contains("from the disk") && !plan.contains("hits"), "{plan}");
    assert_eq!(json(&["plan", "-m", path])["budgets"].as_array().unwrap().len(), 2);
    let o = oncall(&["run", "-m", path, "--experts", "1", "hi"]);
    assert!(o.status.code() == Some(1) && err(&o).contains("this model has no experts"), "{}", err(&o));
}

#[test]
fn contexts_and_threads_that_cannot_be_are_refused() {
    for command in ["plan", "run"] {
        let o = oncall(&[command, "-c", "18446744073709551615"]);
        assert!(o.status.code() == Some(1) && err(&o).contains("-c"), "{}", err(&o));
    }
    let o = oncall(&["plan", "-t", "60000"]);
    assert!(o.status.code() == Some(2) && err(&o).contains("processor"), "{}", err(&o));
}

/// Everything that is lossy is counted by whoever measures it.
#[test]
fn losses_are_in_every_figure() {
    let dir = tempfile::tempdir().unwrap();
    let story = dir.path().join("story.txt");
    std::fs::write(&story, "Once upon a time there was a dog. ".repeat(9)).unwrap();
    let story = story.to_str().unwrap();
    for args in [
        vec!["run", "--raw", "-n", "2", "Once"],
        vec!["perplexity", "-c", "32", "-f", story],
        vec!["experts", "-n", "2"],
        vec!["bench", "-p", "4", "-n", "0", "-r", "1"],
    ] {
        let lossy = json(&[&args[..], &["--experts", "1"]].concat());
        let of = if args[0] == "run" { &lossy["decode"] } else { &lossy };
        assert!(of["left_out"].as_u64().unwrap() > 0 && of["dropped"] == 0, "{lossy}");
        assert!(lossy["budget"]["slots"].is_number(), "{lossy}");
        let o = oncall(&[&args[..], &["--experts", "1"]].concat());
        assert!((text(&o) + &err(&o)).contains("lossy: uses of experts"), "{}", err(&o));
    }
    let o = oncall(&["perplexity", "-c", "32", "-f", story, "--drop-cold", "0.3"]);
    assert!(err(&o).contains("-ub 1"), "{}", err(&o));
    // What it records isn't what the model would use.
    let trace = dir.path().join("one.csv");
    text(&oncall(&["run", "--raw", "-n", "2", "Once", "--experts", "1", "--record", trace.to_str().unwrap()]));
    let o = oncall(&["plan", "--trace", trace.to_str().unwrap()]);
    assert!(o.status.code() == Some(1) && err(&o).contains("without --experts"), "{}", err(&o));
    let o = oncall(&["replay", "--trace", trace.to_str().unwrap(), "--slots", "8"]);
    assert!(text(&o).contains("One token's cycle is 1 slot a layer"), "{}", text(&o));
}

/// The same account of every command that runs a model, for scripts and for people.
#[test]
fn the_account_is_in_every_figure() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let path = model(dir.path(), "q8_0");
    let (story, input) = (dir.path().join("story.txt"), dir.path().join("in.jsonl"));
    std::fs::write(&story, "Once upon a time there was a dog. ".repeat(9)).unwrap();
    let body = serde_json::json!({ "prompt": "Once", "max_tokens": 4, "ignore_eos": true });
    let request = serde_json::json!({ "custom_id": "a", "url": "/v1/completions", "body": body });
    std::fs::write(&input, format!("{request}\n")).unwrap();
    let plan = json(&["plan", "-m", path.to_str().unwrap(), "-c", "64"]);
    let memory = (plan["smallest_bytes"].as_u64().unwrap() + (256 << 20)).to_string();
    let [story, input] = [&story, &input].map(|p| p.to_str().unwrap());
    for (i, args) in [
        vec!["run", "--raw", "-n", "4", "--ignore-eos", "Once upon"],
        vec!["perplexity", "-f", story],
        vec!["bench", "-p", "0", "-n", "4", "-r", "1"],
        vec!["batch", "-i", input],
    ]
    .into_iter()
    .enumerate()
    {
        let out = |n: usize| dir.path().join(format!("out-{i}-{n}")).to_str().unwrap().to_string();
        let with = |n: usize, more: &[&str]| {
            let out = if args[0] == "batch" { vec!["-o".to_string(), out(n)] } else { Vec::new() };
            let model = ["-m", path.to_str().unwrap(), "-c", "64", "--memory", &memory, "--no-heat"];
            let out: Vec<&str> = out.iter().map(String::as_str).collect();
            let o = oncall(&[&args[..], &model[..], &out[..], more].concat());
            (text(&o), err(&o))
        };
        let v: Value = serde_json::from_str(&with(0, &["--json", "--stats"]).0).unwrap();
        let number = |of: &Value, name: &str| of[name].as_f64().unwrap_or_else(|| panic!("{name}: {v}"));
        let loading = &v["loading"];
        assert!(number(loading, "total_s") >= number(loading, "read_s") && number(loading, "bytes") > 1e5, "{v}");
        assert!(number(&v, "peak_memory") > 1e6 && number(&v["budget"], "bytes") > 1e6, "{v}");
        let phase = if args[0] == "perplexity" { &v["prefill"] } else { &v["decode"] };
        assert!(number(phase, "tokens") > 2.0 && number(phase, "compute_s") > 0.0 && number(phase, "uses") > 0.0);
        let Reached { memory, disk } = Reached::of(&v);
        assert_eq!(memory.is_some(), args[0] != "perplexity", "{v}");
        memory.inspect(|r| assert!(r.limit.is_some_and(|l| l > 1e8), "{v}"));
        // The experts were read once, whatever the disk allows to measure.
        let disk = disk.unwrap_or_else(|| panic!("{v}"));
        assert!(disk.limit.is_some_and(|l| l > 1e5) || v["reached"]["disk"]["not_measured"].is_string(), "{v}");
        // Nothing is measured unless it's asked for; bench always says what memory gives.
        let v: Value = serde_json::from_str(&with(1, &["--json"]).0).unwrap();
        assert!(v["reached"]["disk"]["limit_bytes_per_s"].is_null() && v["loading"]["bytes"].is_u64(), "{v}");
        assert_eq!(v["reached"]["memory"]["limit_bytes_per_s"].is_number(), args[0] == "bench", "{v}");
        let (out, table) = with(2, &["--stats"]);
        for words in ["weights from memory", "  of the memory's", "while reading", "  of the disk's", "ready after"] {
            assert!(table.contains(words), "{words}: {table}");
        }
        assert!(args[0] != "bench" || out.contains(" % of memory's rate") && out.contains("memory reads"), "{out}");
    }
}

/// A rate that was reached, and its limit.
struct Reach {
    limit: Option<f64>,
}

/// What a command's JSON says of memory and of the disk; `None` where nothing was read.
struct Reached {
    memory: Option<Reach>,
    disk: Option<Reach>,
}

impl Reached {
    fn of(v: &Value) -> Self {
        let of = |name: &str| {
            let r = &v["reached"][name];
            let (rate, limit) = (r["bytes_per_s"].as_f64()?, r["limit_bytes_per_s"].as_f64());
            let share = limit.map(|l| rate / l);
            assert!(share.is_none_or(|s| (r["share"].as_f64().unwrap() / s - 1.0).abs() < 1e-6), "{r}");
            Some(Reach { limit })
        };
        Reached { memory: of("memory"), disk: of("disk") }
    }
}

#[test]
fn a_least_budget_that_is_quoted_works() {
    let smallest = json(&["plan"])["smallest_bytes"].as_u64().unwrap();
    let table = text(&oncall(&["plan"]));
    let line = table.lines().find_map(|l| l.strip_prefix("smallest budget")).unwrap().trim().replace(' ', "");
    text(&oncall(&["plan", "--memory", &line]));
    text(&oncall(&["run", "-n", "1", "Once", "--memory", &line]));
    let o = oncall(&["plan", "--memory", &(smallest - 1).to_string()]);
    let mib = err(&o).split("context is ").nth(1).unwrap().split(' ').next().unwrap().to_string();
    text(&oncall(&["plan", "--memory", &format!("{mib}MiB")]));
}

#[test]
fn doctor_measures_and_cleans_up() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let report = json(&["doctor", "--dir", dir.path().to_str().unwrap()]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the temporary file is gone");
    let disk = report["disk"].as_array().unwrap();
    let modes = if report.get("no_direct").is_some() { 1 } else { 2 };
    assert_eq!(disk.len(), modes * 3 * 4);
    assert!(disk.iter().all(|r| ["bytes_per_s", "first_bytes_per_s"].iter().all(|n| r[n].as_f64().unwrap() > 0.0)));
    assert!(report["memory_rate"][0].as_f64().unwrap() > 1e8);
    assert!(report["memory_first_use_rate"].as_f64().unwrap() > 1e6);
    assert!(!report["limits"].as_array().unwrap().is_empty());
    // Four megabytes at a time can't be read at random places of twelve.
    let short = ["doctor", "-m", "models/tinymoe-stories-Q8_0.gguf"];
    let report = json(&short);
    let sizes: Vec<u64> =
        report["disk"].as_array().unwrap().iter().map(|r| r["read_bytes"].as_u64().unwrap()).collect();
    assert!(sizes.contains(&(1 << 20)) && !sizes.contains(&(4 << 20)) && report["too_short"] == true, "{report}");
    let report = text(&oncall(&short));
    assert!(report.contains("4096 KiB") && report.contains("?") && report.contains("--dir"), "{report}");
    let o = oncall(&["doctor", "--dir", "/no/such/folder"]);
    assert!(o.status.code() == Some(1) && err(&o).contains("--dir"), "{}", err(&o));
    let o = oncall(&["doctor", "-m", "/no/such/model.gguf"]);
    assert!(o.status.code() == Some(1) && err(&o).contains("model.gguf"), "{}", err(&o));
}

#[test]
fn the_map_of_experts() {
    let dir = tempfile::tempdir().unwrap();
    let svg = dir.path().join("map.svg");
    let map = text(&oncall(&["experts", "-n", "20", "--svg", svg.to_str().unwrap(), "Once upon a time"]));
    assert!(map.contains("8 experts a layer, 2 used") && !map.contains('\u{1b}'), "{map}");
    assert_eq!(map.lines().filter(|l| l.contains(" used, ")).count(), 6, "{map}");
    assert!(std::fs::read_to_string(&svg).unwrap().starts_with("<svg"));
    // What can't be written is known before anything is loaded; what fails later costs no map.
    let o = oncall(&["experts", "-m", "/no/such/model.gguf", "--svg", "/no/such/map.svg"]);
    assert!(o.status.code() == Some(1) && err(&o).contains("map.svg"), "{}", err(&o));
    if Path::new("/dev/full").exists() {
        let o = oncall(&["experts", "-n", "2", "--svg", "/dev/full"]);
        assert!(o.status.code() == Some(1) && err(&o).contains("/dev/full"), "{}", err(&o));
        assert!(String::from_utf8_lossy(&o.stdout).contains("8 experts a layer"));
    }
    let map = json(&["experts", "-n", "20", "Once upon a time"]);
    let tokens = map["tokens"].as_u64().unwrap();
    for layer in map["layers"].as_array().unwrap() {
        let uses: u64 = layer["uses"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(uses, 2 * tokens, "every token uses two");
    }
}

#[test]
fn help_teaches_with_examples() {
    for command in ["plan", "doctor", "experts", "replay"] {
        let help = text(&oncall(&[command, "--help"]));
        assert!(help.contains("Examples:") && help.contains(&format!("oncall {command}")), "{help}");
    }
}
