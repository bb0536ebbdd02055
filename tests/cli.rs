//! The real program, as a user or a script meets it.

use oncall::gguf::{Gguf, GgufWriter};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

fn oncall(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    c.args(args).stdin(Stdio::null()).env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG");
    c
}

fn run(args: &[&str]) -> Output {
    oncall(args).output().unwrap()
}

fn run_with_input(args: &[&str], input: &str) -> Output {
    let mut child = oncall(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn out(o: &Output) -> String {
    assert!(o.status.success(), "{}", err(o));
    String::from_utf8(o.stdout.clone()).unwrap()
}

fn err(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

#[test]
fn writes_a_story() {
    let o = run(&["run", "--raw", "Once upon a time", "-n", "40", "-s", "1"]);
    let story = out(&o);
    assert!(story.starts_with("Once upon a time") && story.len() > 60, "{story}");
    assert!(err(&o).contains("wrote 40 at"), "{}", err(&o));
    assert!(!story.contains('\u{1b}') && !err(&o).contains('\u{1b}'), "no colours without a terminal");
    assert_eq!(story, out(&run(&["run", "--raw", "Once upon a time", "-n", "40", "-s", "1"])), "the same seed");
}

#[test]
fn stdin_is_the_prompt_and_only_the_answer_is_printed() {
    let o = run_with_input(&["run", "-n", "20", "-s", "3"], "Tell me a story about a dragon.\n");
    assert!(!out(&o).is_empty());
    let o = run_with_input(&["chat", "-n", "20", "-s", "3"], "Tell me a story about a dragon.\n");
    assert!(!out(&o).contains(">>>"));
    assert_eq!(err(&o), "");
}

#[test]
fn a_prompt_s_last_newline_is_the_file_s() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "Once upon a time\n").unwrap();
    let more = ["--raw", "-n", "5", "--temp", "0", "-s", "1"];
    let given = out(&run(&[&["run", "Once upon a time"], &more[..]].concat()));
    assert_eq!(out(&run(&[&["run", "-f", file.to_str().unwrap()], &more[..]].concat())), given);
    assert_eq!(out(&run_with_input(&[&["run"], &more[..]].concat(), "Once upon a time\n")), given);
}

#[test]
fn json_is_one_object() {
    let v: serde_json::Value =
        serde_json::from_str(&out(&run(&["run", "--json", "Hi", "-n", "5", "-s", "1"]))).unwrap();
    assert_eq!(v["n_written"], 5);
    assert_eq!(v["finish"], "length");
    let v: serde_json::Value = serde_json::from_str(&out(&run(&["show", "--json"]))).unwrap();
    assert_eq!((v["n_expert"].as_u64(), v["n_expert_used"].as_u64()), (Some(8), Some(2)));
    assert_eq!(v["parameters"], 11_418_880);
    let v: serde_json::Value = serde_json::from_str(&out(&run(&["show", "--kernels", "--json"]))).unwrap();
    let kind = |name: &str| v["kernels"].as_array().unwrap().iter().find(|k| k["tensor"] == name).unwrap();
    assert!(kind("ffn_gate_exps.weight")["gemm"].as_str().unwrap().starts_with("gemm block32 "));
    assert!(kind("attn_norm.weight").get("gemm").is_none(), "a norm isn't multiplied");
    let v: serde_json::Value = serde_json::from_str(&out(&run(&["tokenize", "--json", "Once"]))).unwrap();
    assert_eq!(v[0]["id"], 1, "a text begins with BOS");
}

#[test]
fn the_seed_that_is_reported_can_be_given() {
    let run_json = |seed: Option<&str>| {
        let mut args = vec!["run", "--json", "Once", "-n", "12"];
        args.extend(seed.iter().flat_map(|s| ["-s", s]));
        serde_json::from_str::<serde_json::Value>(&out(&run(&args))).unwrap()
    };
    let first = run_json(None);
    let again = run_json(Some(&first["seed"].to_string()));
    assert_eq!(first["text"], again["text"]);
}

#[test]
fn stop_strings_end_the_text() {
    let story = out(&run(&["run", "--raw", "Once upon a time", "-n", "80", "-s", "1", "-r", "was"]));
    assert!(!story["Once upon a time".len()..].contains("was"), "{story}");
}

#[test]
fn logits_are_a_file_of_floats() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("l.f32");
    let args = ["logits", "--tokens", "1,500,700", "-o", path.to_str().unwrap()];
    out(&run(&args));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3 * 3072 * 4);
    assert!(!path.with_added_extension("part").exists());
    let o = run(&["logits", "--tokens", "99999", "-o", path.to_str().unwrap()]);
    assert_eq!(o.status.code(), Some(1));
    assert!(err(&o).contains("token 99999 isn't in the vocabulary of 3072"), "{}", err(&o));
}

#[test]
fn perplexity_of_a_held_out_story() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    // One story: the model has never seen two in a row.
    let text = dir.path().join("story.txt");
    let all = std::fs::read_to_string("models/heldout_sample.txt").unwrap();
    std::fs::write(&text, all.lines().next().unwrap()).unwrap();
    let args = ["perplexity", "-f", text.to_str().unwrap(), "-c", "128"];
    let json = |more: &[&str]| -> serde_json::Value {
        serde_json::from_str(&out(&run(&[&args[..], &["--json"], more].concat()))).unwrap()
    };
    let saved = json(&["--save-logits", base.to_str().unwrap()]);
    let nats = saved["nats_per_token"].as_f64().unwrap();
    assert!((0.2..0.8).contains(&nats), "the card says 0.38 nats a token, this is {nats}");
    let same = json(&["--kl-base", base.to_str().unwrap()]);
    assert!(same["kl_divergence"].as_f64().unwrap().abs() < 1e-9);
    assert_eq!(same["same_best_token"], 1.0);
    let rough = json(&["--kl-base", base.to_str().unwrap(), "-ctk", "q8_0", "-ctv", "q8_0"]);
    let kl = rough["kl_divergence"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 0.05, "{kl}");
}

#[test]
fn quantises_and_runs_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("small.gguf");
    let to = to.to_str().unwrap();
    out(&run(&["quantize", "models/tinymoe-stories-Q8_0.gguf", to, "q4_0"]));
    let o = run(&["quantize", "models/tinymoe-stories-Q8_0.gguf", to, "q4_0"]);
    assert_eq!(o.status.code(), Some(1), "it doesn't overwrite");
    assert!(err(&o).contains("small.gguf"), "{}", err(&o));
    assert!(out(&run(&["run", "--raw", "-m", to, "Once upon a time", "-n", "10"])).len() > 20);
    let o = run(&["quantize", "models/tinymoe-stories-Q8_0.gguf", to, "q9_9"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(err(&o).contains("q4_k_m"), "{}", err(&o));
}

#[test]
fn what_is_wrong_is_said_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let junk = dir.path().join("junk.gguf");
    std::fs::write(&junk, b"not a model at all").unwrap();
    let missing = dir.path().join("missing.gguf");
    for (path, words) in [(&junk, "GGUF"), (&missing, "missing.gguf"), (&dir.path().to_path_buf(), "directory")] {
        let o = run(&["run", "-m", path.to_str().unwrap(), "hello"]);
        assert_eq!(o.status.code(), Some(1));
        assert!(err(&o).starts_with("error:") && err(&o).contains(words), "{}", err(&o));
        assert!(o.stdout.is_empty());
    }
    let long = "once upon a time ".repeat(400);
    let o = run(&["run", &long]);
    assert_eq!(o.status.code(), Some(1));
    assert!(err(&o).contains("don't fit into a context of 512"), "{}", err(&o));
    for args in [&["run", "x", "--temp", "warm"][..], &["nonsense"], &["run", "x", "--no-such-flag"]] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
    assert!(err(&o).contains("answers get worse"), "{}", err(&o));
    let o = run(&["run", "x", "--raw", "--top-p", "7"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(err(&o).contains("--top-p") && err(&o).contains("0 to 1"), "{}", err(&o));
    assert!(o.stdout.is_empty(), "it is known before the model is read");
    let o = run(&["run", "x", "--raw", "--json-schema", r#"{"if": {}}"#]);
    assert!(o.status.code() == Some(1) && err(&o).contains("if") && o.stdout.is_empty(), "{o:?}");
    let o = run(&["run", "x", "--raw", "--system", "y"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(err(&o).contains("--system") && err(&o).contains("--raw"), "{}", err(&o));
    let o = oncall(&["run", "x"]).env("ONCALL_ISA", "sse9").output().unwrap();
    assert!(err(&o).contains("sse9") && err(&o).contains("scalar"), "{}", err(&o));
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let mut child = oncall(&["run", "--raw", "Once upon a time", "-n", "200", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let o = child.wait_with_output().unwrap();
    assert!(o.status.success(), "{:?} {}", o.status, err(&o));
    assert!(!err(&o).contains("panicked"), "{}", err(&o));
}

#[test]
#[cfg(target_os = "linux")] // its full device
fn a_standard_error_that_can_t_be_written_changes_nothing() {
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (requests, results) = (dir.path().join("in"), dir.path().join("out"));
    let body = r#"{"prompt": "Once", "max_tokens": 2}"#;
    std::fs::write(
        &requests,
        format!(r#"{{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {body}}}"#),
    )
    .unwrap();
    let args = ["batch", "-i", requests.to_str().unwrap(), "-o", results.to_str().unwrap()];
    assert_eq!(oncall(&args).stderr(full()).status().unwrap().code(), Some(0));
    assert_eq!(std::fs::read_to_string(&results).unwrap().lines().count(), 1);
    let json = [&args[..], &["--resume", "--json"]].concat();
    assert_eq!(oncall(&json).stderr(full()).stdout(Stdio::null()).status().unwrap().code(), Some(0));
    assert_eq!(oncall(&["show", "missing.gguf"]).stderr(full()).status().unwrap().code(), Some(1));
    // Warnings go another way.
    let heated = |args: &[&str]| {
        let mut c = oncall(args);
        c.env("XDG_CACHE_HOME", dir.path()).stdout(Stdio::null());
        c
    };
    let args = ["run", "-m", "models/tinymoe-stories-Q8_0.gguf", "Once", "-n", "2"];
    out(&heated(&args).output().unwrap());
    let damage = || {
        for file in std::fs::read_dir(dir.path().join("oncall")).unwrap() {
            std::fs::write(file.unwrap().path(), "damaged").unwrap();
        }
    };
    damage();
    assert_eq!(heated(&args).stderr(full()).status().unwrap().code(), Some(0));
    damage();
    let warned = err(&heated(&args).output().unwrap());
    assert!(warned.contains("WARN") && !warned.contains('\u{1b}'), "no colours without a terminal: {warned:?}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_stops_the_answer() {
    let mut child = oncall(&["run", "--raw", "Once upon a time", "--ignore-eos", "-c", "100000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // In the middle of its answer, however long the start takes.
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let o = child.wait_with_output().unwrap();
    assert_eq!(o.status.code(), Some(130), "{}", err(&o));
}

/// As llama.cpp's flags: the grammar itself, or a file with it.
#[test]
fn a_grammar_and_a_file_with_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("yes.lark");
    std::fs::write(&file, "\u{feff}start: \"yes\" | \"no\"\n").unwrap();
    let file = file.to_str().unwrap();
    for flags in [["--grammar", "start: \"yes\" | \"no\""], ["--grammar-file", file]] {
        let said = out(&run(&["run", "Is it?", flags[0], flags[1]]));
        assert!(["yes", "no"].contains(&said.trim()), "{said}");
    }
    let o = run(&["run", "Is it?", "--grammar", file]);
    assert!(o.status.code() == Some(2) && err(&o).contains("--grammar-file"), "{}", err(&o));
}

/// The model that is built in, changed, in a file.
fn changed_model(path: &Path, change: impl FnOnce(&mut GgufWriter)) {
    let source = Gguf::open(Path::new("models/tinymoe-stories-Q8_0.gguf")).unwrap();
    let mut writer = GgufWriter::new();
    writer.set_all(source.metadata());
    for t in source.tensors() {
        writer.tensor(&t.name, t.shape(), t.format);
    }
    change(&mut writer);
    let mut file = writer.create(path, false).unwrap();
    for t in source.tensors() {
        let mut data = vec![0; t.n_bytes as usize];
        source.read_at(t, 0, &mut data).unwrap();
        file.write(&data).unwrap();
    }
    // Of a tensor that was added.
    if file.pending().is_some() {
        file.write(&[0; 4]).unwrap();
    }
    file.finish().unwrap();
}

#[test]
fn what_a_file_says_does_nothing_to_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("red\u{1b}[31m.gguf");
    changed_model(&path, |w| {
        w.set("tokenizer.chat_template", "{{ raise_exception('\u{1b}[31;42mRED\nline') }}");
        w.set("key\u{1b}[31m", "value");
        w.set("llama.block_count", 5u32);
        w.tensor("name\u{1b}[31m", &[1], oncall::quant::by_name("f32").unwrap());
    });
    let path = path.to_str().unwrap();
    let o = run(&["run", "--no-heat", "-m", path, "hi"]);
    let said = err(&o);
    assert_eq!(o.status.code(), Some(1));
    assert!(said.contains("red\\u{1b}[31m.gguf: ") && said.contains("\\u{1b}[31;42mRED\\nline"), "{said:?}");
    assert!(said.contains("block_count is 5") && !said.contains('\u{1b}'), "{said:?}");
    let shown = out(&run(&["show", "-m", path, "--metadata", "--tensors", "--kernels"]));
    assert!(shown.contains("key\\u{1b}[31m = ") && shown.contains("name\\u{1b}[31m ") && !shown.contains('\u{1b}'));
    let v: serde_json::Value =
        serde_json::from_str(&out(&run(&["show", path, "--json", "--metadata", "--tensors"]))).unwrap();
    assert_eq!((&v["metadata"]["key\u{1b}[31m"], &v["metadata"]["llama.block_count"]), (&"value".into(), &5.into()));
    assert_eq!(v["tensors"].as_array().unwrap().last().unwrap()["name"], "name\u{1b}[31m");
    let broken = dir.path().join("broken.gguf");
    changed_model(&broken, |w| {
        w.remove("llama.embedding_length").remove("tokenizer.ggml.model");
    });
    for command in ["show", "plan", "run", "tokenize"] {
        let o = run(&[command, "-m", broken.to_str().unwrap()]);
        assert!(err(&o).contains("broken.gguf"), "{command}: {}", err(&o));
    }
}

#[test]
fn no_output_takes_the_model_s_place() {
    let dir = tempfile::tempdir().unwrap();
    let (model, text) = (dir.path().join("m.gguf"), dir.path().join("text"));
    std::fs::copy("models/tinymoe-stories-Q8_0.gguf", &model).unwrap();
    std::fs::write(&text, "Once upon a time there was a little girl and a dog.").unwrap();
    let before = std::fs::read(&model).unwrap();
    let (m, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    for args in [
        &["logits", "-m", m, "--no-heat", "--tokens", "1", "-o", m][..],
        &["perplexity", "-m", m, "--no-heat", "-c", "8", "-f", text, "--save-logits", m],
        &["experts", "-m", m, "--no-heat", "-n", "1", "--svg", m],
        &["run", "-m", m, "--no-heat", "hi", "-n", "1", "--record", m],
        &["quantize", m, m, "q4_0", "--overwrite"],
    ] {
        let o = run(args);
        assert!(o.status.code() == Some(1) && err(&o).contains("is the model itself"), "{args:?}: {}", err(&o));
        assert!(std::fs::read(&model).unwrap() == before, "{args:?}");
    }
    #[cfg(target_os = "linux")]
    {
        let o = run(&["logits", "--tokens", "1", "-o", "/dev/full"]);
        assert!(err(&o).contains("\"/dev/full\"") && !err(&o).contains("removed"), "{}", err(&o));
        let o = run(&["quantize", m, dir.path().join("no/folder").to_str().unwrap(), "q4_0"]);
        assert!(o.status.code() == Some(1) && !err(&o).contains("rounded"), "{}", err(&o));
    }
}

#[test]
#[cfg(unix)]
fn ctrl_c_leaves_no_file_and_ends_with_its_code() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let names = || std::fs::read_dir(dir.path()).unwrap().count();
    let interrupt = |child: &std::process::Child| {
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        std::thread::sleep(Duration::from_millis(30));
    };
    let start = |args: &[&str]| oncall(args).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut children = [
        start(&["doctor", "--dir", dir.path().to_str().unwrap()]),
        start(&["experts", "--json", "-n", "90000", "-c", "100000"]),
        // It waits for its input.
        start(&["tokenize"]),
    ];
    std::thread::sleep(Duration::from_millis(700));
    for child in &mut children {
        interrupt(child);
        assert_eq!(child.wait().unwrap().code(), Some(130));
    }
    assert_eq!(names(), 0);
    // The second one doesn't wait for the end of a long chunk.
    let (text, logits) = (dir.path().join("text"), dir.path().join("logits"));
    std::fs::write(&text, "once upon a time ".repeat(12_000)).unwrap();
    let (text, logits) = (text.to_str().unwrap(), logits.to_str().unwrap());
    let mut child = start(&["perplexity", "-f", text, "-c", "40000", "--save-logits", logits]);
    while !Path::new(&format!("{logits}.part")).exists() {
        assert!(child.try_wait().unwrap().is_none());
    }
    interrupt(&child);
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(names(), 1);
}

#[test]
fn an_environment_s_model_gives_way() {
    let with = |model: &str, args: &[&str]| oncall(args).env("ONCALL_MODEL", model).output().unwrap();
    assert!(out(&with("models/tinymoe-stories-Q8_0.gguf", &["show"])).contains("tinymoe"));
    let missing = with("missing.gguf", &["show"]);
    assert!(missing.status.code() == Some(1) && err(&missing).contains("missing.gguf"), "{}", err(&missing));
    out(&with("missing.gguf", &["show", "models/tinymoe-stories-Q8_0.gguf"]));
    out(&with("", &["run", "Once", "-n", "1"]));
    let o = with("missing.gguf", &["doctor", "--dir", "/no/such/folder"]);
    assert!(o.status.code() == Some(1) && err(&o).contains("/no/such/folder"), "{}", err(&o));
    assert_eq!(run(&["doctor", "-m", "x", "--dir", "y"]).status.code(), Some(2));
}

#[test]
fn numbers_below_nothing_and_above_everything() {
    let o = run(&["run", "--raw", "Once upon a time", "-n", "-1", "-s", "-1"]);
    assert!(out(&o).len() > 20);
    for (args, code, words) in [
        (&["run", "x", "--top-p", "-0.1"][..], 2, "0 to 1"),
        (&["run", "x", "--min-p", "-1"], 2, "0 to 1"),
        (&["chat", "--typical", "1.5"], 2, "0 to 1"),
        (&["run", "x", "--temp", "inf"], 2, "a finite number"),
        (&["run", "x", "--temp", "NaN"], 2, "a finite number"),
        (&["run", "x", "--repeat-penalty", "0"], 2, "above 0 and up to 100"),
        (&["run", "x", "--repeat-last-n", "-2"], 2, "-1 (everything)"),
        (&["run", "x", "--repeat-last-n", "9.5"], 2, "takes a number"),
        (&["run", "x", "--presence-penalty", "101"], 2, "-100 to 100"),
        (&["run", "x", "--frequency-penalty", "-101"], 2, "-100 to 100"),
        (&["run", "x", "--logit-bias", "7+inf"], 2, "-inf to ban"),
        (&["run", "x", "--experts", "0"], 2, "1 or more"),
        (&["run", "x", "--experts", "-1"], 2, "1 or more"),
        (&["run", "x", "--experts", "99"], 2, "this model's tokens use 2"),
        (&["run", "x", "--drop-cold", "-0.1"], 2, "0 to 1"),
        (&["run", "x", "--threads", "many"], 2, "from 1 to"),
        (&["run", "x", "--memory", "99999999999999999999G"], 2, "no machine"),
        (&["bench", "-p", "1", "-n", "18446744073709551615", "-d", "1", "-r", "1"], 2, "--predict"),
        (&["bench", "-c", "10", "-p", "20", "-n", "0", "-r", "1"], 2, "pp20 needs a context of 20"),
        (&["perplexity", "-f", "models/heldout_sample.txt", "--chunks", "0"], 2, "--chunks"),
        (&["perplexity", "-f", "models/heldout_sample.txt", "-c", "3"], 2, "-c 3 is too short"),
        (&["perplexity", "-f", "models/heldout_sample.txt", "--kl-base", "/dev/null"], 1, "/dev/null: it is too short"),
    ] {
        let o = run(args);
        assert!(o.status.code() == Some(code) && err(&o).contains(words), "{args:?}: {}", err(&o));
    }
    let request = r#"{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 1}}"#;
    let o = run_with_input(&["batch", "-i", "-", "-o", "-", "--experts", "99"], request);
    assert!(o.status.code() == Some(2) && err(&o).contains("this model's tokens use 2"), "{}", err(&o));
}

/// Where a terminal is as wide as most. Help is clap's, which wraps by itself.
#[test]
fn what_is_printed_fits_into_80_columns() {
    for args in [
        &["show", "--tensors", "--kernels"][..],
        &["doctor", "--dir", "."],
        &["experts", "-n", "4", "--experts", "1"],
        &["plan"],
    ] {
        let text = out(&run(args));
        let wide = text.lines().find(|l| l.chars().count() > 80);
        assert!(wide.is_none() && text.lines().count() > 5, "{args:?}: {wide:?}");
    }
    // A script may look for a line as it is.
    let o = run(&["run", "x", "--prefer-resident", "0.1", "--memory", "2MiB"]);
    assert!(err(&o).lines().count() == 1 && err(&o).len() > 80, "{}", err(&o));
}

#[test]
fn a_prompt_may_come_from_a_file_or_from_stdin_by_its_name() {
    let more = ["--raw", "-n", "5", "--temp", "0", "-s", "1"];
    let given = out(&run(&[&["run", "Once upon a time"], &more[..]].concat()));
    assert_eq!(out(&run_with_input(&[&["run", "-f", "-"], &more[..]].concat(), "Once upon a time\n")), given);
    let dir = tempfile::tempdir().unwrap();
    let latin1 = dir.path().join("latin1.txt");
    std::fs::write(&latin1, b"caf\xe9").unwrap();
    let missing = dir.path().join("missing.txt");
    for (path, words) in [(&missing, "check its name"), (&latin1, "UTF-8"), (&dir.path().to_path_buf(), "directory")] {
        let path = path.to_str().unwrap();
        for args in [&["run", "-f", path][..], &["perplexity", "-f", path], &["run", "x", "--grammar-file", path]] {
            let o = run(args);
            assert!(!o.status.success() && err(&o).contains(path) && err(&o).contains(words), "{args:?}: {}", err(&o));
        }
    }
    let o = run(&["replay", "--trace", missing.to_str().unwrap()]);
    assert!(err(&o).contains("missing.txt: there is no such file"), "{}", err(&o));
}

#[test]
fn one_is_told_as_one() {
    assert_eq!(err(&run(&["tokenize", "--no-special", "Once"])), "1 token\n");
    let o = run(&["run", "--raw", "Once", "-n", "1"]);
    assert!(err(&o).contains(", wrote 1, "), "one token takes no pass, so it has no rate: {}", err(&o));
    let text = out(&run(&["bench", "-p", "2", "-n", "0", "-r", "1", "-t", "1"]));
    assert!(text.contains(", 1 thread, "), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    changed_model(&path, |w| {
        w.set("general.tags", vec!["stories".to_string()]);
    });
    let text = out(&run(&["show", path.to_str().unwrap(), "--metadata"]));
    assert!(text.contains("[\"stories\"] (1 value)\n") && text.contains(" values)"), "{text}");
}

#[test]
fn bench_measures_prompts_and_answers_at_several_depths() {
    let o = out(&run(&["bench", "-p", "8", "-n", "4", "-d", "16,0", "-r", "2", "--json"]));
    let rows: Vec<serde_json::Value> = o.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(rows.iter().map(|r| r["test"].as_str().unwrap()).collect::<Vec<_>>(), ["pp8", "tg4", "tg4 @ d16"]);
    assert!(rows.iter().all(|r| r["tokens_per_s"].as_f64().unwrap() > 0.0), "{o}");
    // What a token reads is known where each reads it for itself.
    assert_eq!(rows.iter().map(|r| r["gb_per_s"].is_number()).collect::<Vec<_>>(), [false, true, true]);
}

#[test]
fn help_teaches_and_the_manual_is_there() {
    let help = out(&run(&["--help"]));
    for word in ["run", "chat", "show", "quantize", "Examples:", "Exit codes", "ONCALL_MODEL"] {
        assert!(help.contains(word), "{word}");
    }
    let says = |command: &str| out(&run(&[command, "--help"]));
    assert!(
        says("perplexity").contains("[default: 512]")
            && says("bench").contains("[default: what the longest test needs]")
    );
    assert!(says("bench").contains("tg128 @ d8192"));
    assert!(out(&run(&["man"])).starts_with(".ie"));
    assert!(out(&run(&["completions", "bash"])).contains("oncall"));
    assert!(Path::new("models/tinymoe-stories-Q8_0.gguf").exists());
}
