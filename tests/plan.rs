//! `oncall plan`, `doctor`, `experts` and `--record`, as the real program runs them.

use oncall::gguf::mixture;
use oncall::synth::{self, PRESETS};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

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
    assert!(table.lines().last().unwrap().starts_with("100000.00 GiB ") && table.ends_with("<\n"), "{table}");
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
    let data = oncall::gguf::Gguf::open(&whole).unwrap().tensors().iter().map(|t| t.offset).min().unwrap();
    let part = dir.path().join("part.gguf");
    std::fs::write(&part, &bytes[..data as usize + 100]).unwrap();
    let (a, b) = (json(&["plan", "-m", whole.to_str().unwrap()]), json(&["plan", "-m", part.to_str().unwrap()]));
    for key in ["smallest_bytes", "no_reads_bytes", "dense_bytes", "kv_bytes", "expert_bytes"] {
        assert_eq!(a[key], b[key], "{key}");
    }
    assert_eq!((&a["incomplete"], &b["incomplete"]), (&Value::from(false), &Value::from(true)));
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
