//! `oncall batch`, the real program: whatever happens to it, the output is one line for each request, as an undisturbed run writes them.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

struct Files {
    dir: tempfile::TempDir,
    input: PathBuf,
}

impl Files {
    fn new(lines: &[Value]) -> Files {
        let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
        Self::raw(text.as_bytes())
    }

    fn raw(bytes: &[u8]) -> Files {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in.jsonl");
        std::fs::write(&input, bytes).unwrap();
        Files { dir, input }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, output: &Path, more: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
        c.args(["batch", "-t", "1", "-i"]).arg(&self.input).arg("-o").arg(output).args(more);
        c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_remove("ONCALL_MODEL");
        c
    }

    fn run(&self, output: &Path, more: &[&str]) -> Output {
        self.command(output, more).output().unwrap()
    }
}

fn err(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

fn completion(id: usize, prompt: &str, more: Value) -> Value {
    let mut body = json!({ "model": "tiny", "prompt": prompt });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({ "custom_id": format!("r{id}"), "method": "POST", "url": "/v1/completions", "body": body })
}

fn chat(body: Value) -> Value {
    json!({ "custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": body })
}

/// The lines of an output by their `custom_id`, as they were written; each must be whole, and there once.
fn results(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    let mut all = BTreeMap::new();
    for line in text.lines() {
        let v: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let key = v["custom_id"].as_str().or(v["id"].as_str()).unwrap().to_string();
        assert!(all.insert(key, line.to_string()).is_none(), "twice: {line}");
    }
    all
}

fn parsed(path: &Path) -> BTreeMap<String, Value> {
    results(path).into_iter().map(|(k, l)| (k, serde_json::from_str(&l).unwrap())).collect()
}

const OPENINGS: &[&str] = &["Once upon a time", "Tom and Mia went to the park.", "The little dragon"];

/// Requests of mixed lengths.
fn mixed(n: usize) -> Vec<Value> {
    (0..n)
        .map(|i| {
            let text = format!("{} {}", OPENINGS[i % 3], "and then they played ".repeat(i * 7 % 11));
            completion(i, &text, json!({ "max_tokens": 1 + i * 13 % 40, "n": 1 + usize::from(i % 17 == 0) }))
        })
        .collect()
}

#[test]
fn answers_have_openais_form() {
    let files = Files::new(&[
        completion(0, "Once upon a time", json!({"max_tokens": 12, "logprobs": 2, "seed": 3})),
        completion(1, "Once upon a time", json!({"max_tokens": 12, "n": 2, "seed": 3})),
        completion(2, "Once upon a time", json!({"max_tokens": 40, "stop": ["was"]})),
        chat(json!({"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 9, "logprobs": true})),
        completion(4, "Once", json!({"max_tokens": 5, "frobnicate": true})),
        completion(5, &"once upon a time ".repeat(300), json!({"max_tokens": 5})),
        completion(6, "Once", json!({"max_tokens": 600})),
        completion(7, "Once", json!({"max_tokens": 500, "logprobs": 20, "n": 128})),
    ]);
    let out = files.out("out.jsonl");
    let o = files.run(&out, &["--json"]);
    assert_eq!(o.status.code(), Some(1), "some are errors: {}", err(&o));
    let figures: Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!((&figures["done"], &figures["failed"], &figures["total"]), (&json!(8), &json!(4), &json!(8)));
    assert!(figures["queue"]["n_shared"].is_number() && figures["hit_rate"].is_number());
    assert!(err(&o).contains("8/8 done, 4 errors") && err(&o).contains("tokens/s in"), "{}", err(&o));
    let r = parsed(&out);
    let body = |id: &str| &r[id]["response"]["body"];
    assert_eq!((&r["r0"]["error"], &r["r0"]["response"]["status_code"]), (&Value::Null, &json!(200)));
    assert_eq!((&body("r0")["object"], &body("r0")["model"]), (&json!("text_completion"), &json!("tiny")));
    let choice = &body("r0")["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], choice["logprobs"]["tokens"].as_array().unwrap().len()),
        (&json!("length"), 12)
    );
    for (top, chosen) in std::iter::zip(
        choice["logprobs"]["top_logprobs"].as_array().unwrap(),
        choice["logprobs"]["tokens"].as_array().unwrap(),
    ) {
        let top = top.as_object().unwrap();
        assert!(top.contains_key(chosen.as_str().unwrap()) && (2..=3).contains(&top.len()), "{top:?}");
    }
    assert_eq!(body("r0")["usage"]["completion_tokens"], 12);
    assert_eq!(body("r1")["choices"][0]["text"], choice["text"], "the same seed");
    assert_ne!(body("r1")["choices"][1]["text"], choice["text"]);
    assert_eq!(body("r1")["usage"]["completion_tokens"], 24);
    assert!(!body("r2")["choices"][0]["text"].as_str().unwrap().contains("was"));
    let said = &body("chat")["choices"][0];
    assert_eq!((&body("chat")["object"], &said["message"]["role"]), (&json!("chat.completion"), &json!("assistant")));
    assert!(!said["message"]["content"].as_str().unwrap().is_empty());
    assert_eq!(said["logprobs"]["content"].as_array().unwrap().len(), 9);
    for (id, word) in [("r4", "frobnicate"), ("r5", "context"), ("r6", "600 to write"), ("r7", "numbers")] {
        let message = r[id]["error"]["message"].as_str().unwrap();
        assert!(message.contains(word), "{id}: {message}");
        assert_eq!(
            (&r[id]["response"]["status_code"], body(id)["error"]["message"].as_str()),
            (&json!(400), Some(message))
        );
    }
}

#[test]
fn a_model_without_a_chat_template_can_not_chat() {
    let preset = oncall::synth::Preset::by_name("tiny-olmoe").unwrap();
    let bytes = oncall::synth::to_bytes(preset, &oncall::synth::Options::parity(preset)).unwrap();
    let files = Files::new(&[chat(json!({"messages": [{"role": "user", "content": "hi"}]}))]);
    let model = files.out("tiny.gguf");
    std::fs::write(&model, bytes).unwrap();
    let out = files.out("out");
    let o = files.run(&out, &["-m", model.to_str().unwrap()]);
    assert_eq!(o.status.code(), Some(1), "{}", err(&o));
    assert!(parsed(&out)["chat"]["error"]["message"].as_str().unwrap().contains("no chat template"));
}

/// A number from the environment: how large a test is.
fn size(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |n| n.parse().unwrap_or_else(|e| panic!("{variable}={n}: {e}")))
}

/// Killed at random moments and gone on with: exactly the results of a run that wasn't disturbed. ONCALL_TEST_REQUESTS says of
/// how many requests; there are about twenty kills, however many they are.
#[test]
fn killed_and_resumed_it_loses_and_repeats_nothing() {
    const KILLS: usize = 20;
    let n = size("ONCALL_TEST_REQUESTS", 150);
    let files = Files::new(&mixed(n));
    let whole = files.out("whole.jsonl");
    let began = Instant::now();
    let o = files.run(&whole, &["--sequences", "6"]);
    assert!(o.status.success(), "{}", err(&o));
    let undisturbed = began.elapsed();
    let want = results(&whole);
    assert_eq!(want.len(), n);
    let out = files.out("out.jsonl");
    let (mut kills, mut cuts) = (0, 0);
    for round in 0.. {
        assert!(round < 500, "it doesn't come to an end");
        let mut child = files.command(&out, &["--resume", "--sequences", "6"]).spawn().unwrap();
        let before = results_so_far(&out);
        // Somewhere between the start and some results more, and somewhere between two results.
        let more = (round * 5 % 23) * n / (11 * KILLS);
        let deadline = Instant::now() + Duration::from_secs(600);
        while results_so_far(&out) < before + more && Instant::now() < deadline {
            if child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_micros(round as u64 * 7919 % 30_000));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        if child.wait_with_output().unwrap().status.success() {
            break;
        }
        // A crash of the machine may also leave half a line.
        let mut bytes = std::fs::read(&out).unwrap_or_default();
        if round % 3 == 1 && bytes.len() > 50 {
            bytes.truncate(bytes.len() - 20);
            std::fs::write(&out, &bytes).unwrap();
            cuts += 1;
        }
    }
    assert!(kills >= KILLS / 2 && cuts > 1, "{kills} kills, {cuts} cuts");
    assert!(results(&out) == want, "the union isn't what one run writes");
    let o = files.run(&out, &["--resume"]);
    assert!(o.status.success() && results(&out) == want, "nothing is left to do: {}", err(&o));
    println!(
        "{n} requests, {kills} kills, {cuts} cuts: {:.1?} undisturbed, {:.1?} in all",
        undisturbed,
        began.elapsed()
    );
}

fn results_so_far(path: &Path) -> usize {
    std::fs::read(path).map_or(0, |b| b.iter().filter(|&&b| b == b'\n').count())
}

/// Neighbours, sequences and the order change no line.
#[test]
fn the_same_lines_whatever_runs_beside() {
    let lines = mixed(40);
    let files = Files::new(&lines);
    let (one, many) = (files.out("one"), files.out("many"));
    assert!(files.run(&one, &["--sequences", "1"]).status.success());
    assert!(files.run(&many, &["--sequences", "16", "-ub", "50"]).status.success());
    assert!(results(&one) == results(&many));
    let half = Files::new(&lines.iter().rev().step_by(2).cloned().collect::<Vec<_>>());
    let out = half.out("half");
    assert!(half.run(&out, &[]).status.success());
    assert!(results(&out).iter().all(|(id, line)| results(&one)[id] == *line));
}

#[test]
fn broken_lines_are_errors_of_their_own() {
    let good = completion(1, "Once", json!({"max_tokens": 2}));
    let no_id = json!({"url": "/v1/completions", "body": {"prompt": "a"}});
    let mut text = format!("{{\"custom_id\": \n\n{good}\r\n{no_id}\n").into_bytes();
    text.extend(b"\xff\xfe\n[1]\n{\"custom_id\": \"last\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": \"x\", \"max_tokens\": 1}}");
    let files = Files::raw(&text);
    let out = files.out("out");
    let o = files.run(&out, &[]);
    assert_eq!(o.status.code(), Some(1), "{}", err(&o));
    let r = parsed(&out);
    let keys: Vec<&str> = r.keys().map(|k| &**k).collect();
    // Such a line is known by its number and what it holds.
    let numbers: Vec<&str> = keys.iter().map(|k| k.rsplit_once('_').map_or(*k, |(number, _)| number)).collect();
    assert_eq!(numbers, ["batch_line_1", "batch_line_4", "batch_line_5", "batch_line_6", "last", "r1"]);
    assert!(r[keys[1]]["error"]["message"].as_str().unwrap().contains("line 4: the line has no custom_id"));
    assert!(r[keys[0]]["custom_id"].is_null() && r["r1"]["error"].is_null());
    let before = results(&out);
    let o = files.run(&out, &["--resume"]);
    assert_eq!((o.status.code(), results(&out) == before), (Some(1), true), "errors stay errors: {}", err(&o));
    assert!(err(&o).contains("4 of 6 results are errors"), "{}", err(&o));
    // Another line in its place is another request, even if its custom_id is what an id looks like.
    let text = String::from_utf8_lossy(&text)
        .replace("{\"custom_id\": \n", "{\"custom_id\": 1\n")
        .replace("\"last\"", "\"batch_line_1\"");
    std::fs::write(&files.input, text).unwrap();
    for _ in 0..2 {
        let o = files.run(&out, &["--resume", "--json"]);
        let figures: Value = serde_json::from_slice(&o.stdout).unwrap();
        assert_eq!(
            (&figures["done"], &figures["failed"], results(&out).len()),
            (&json!(6), &json!(4), 9),
            "{}",
            err(&o)
        );
    }
}

/// What is wrong with a request is in its line, and the job goes on.
#[test]
fn a_hostile_schema_is_an_error_of_its_line() {
    let chain = |n: usize, link: &dyn Fn(Value) -> Value| {
        let mut defs: serde_json::Map<String, Value> =
            (0..n).map(|i| (format!("a{i}"), link(json!({"$ref": format!("#/$defs/a{}", i + 1)})))).collect();
        defs.insert(format!("a{n}"), json!({"type": "null"}));
        json!({"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/a0", "$defs": defs}}})
    };
    let object = |r: Value| json!({"type": "object", "properties": {"x": r}, "additionalProperties": false});
    let formats = [
        chain(480, &object),
        chain(1500, &object),
        chain(12_000, &|r| r),
        json!({"type": "json_schema", "json_schema": {"schema": {"if": {}}}}),
        json!({"type": "json_schema", "json_schema": {"schema": {"enum": ["x".repeat(1 << 20)]}}}),
    ];
    let mut lines: Vec<Value> = formats
        .iter()
        .enumerate()
        .map(|(i, format)| completion(i, "Once", json!({"response_format": format, "max_tokens": 3, "temperature": 0})))
        .collect();
    lines.push(completion(9, "Once", json!({"max_tokens": 2, "logit_bias": {"99999": 1}})));
    lines.push(completion(10, "Once", json!({"max_tokens": 2, "model": null})));
    let files = Files::raw(
        format!("\u{feff}{}\n", lines.iter().map(Value::to_string).collect::<Vec<_>>().join("\n")).as_bytes(),
    );
    let out = files.out("out");
    let o = files.run(&out, &[]);
    assert_eq!(o.status.code(), Some(1), "{}", err(&o));
    let r = parsed(&out);
    assert!(r["r0"]["error"].is_null() && r["r10"]["error"].is_null(), "{} {}", r["r0"], r["r10"]);
    assert!(r["r10"]["response"]["body"]["model"].as_str().is_some_and(|m| !m.is_empty()), "{}", r["r10"]);
    for (id, param, word) in [
        ("r1", "response_format", "levels deep"),
        ("r2", "response_format", "levels deep"),
        ("r3", "response_format", "if"),
        ("r4", "response_format", "bytes"),
        ("r9", "logit_bias", "99999"),
    ] {
        let error = &r[id]["response"]["body"]["error"];
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!("invalid_value")), "{error}");
        assert!(error["message"].as_str().unwrap().contains(word), "{error}");
    }
}

/// Files that the job reads aren't written over, and an output isn't made for a job that can't begin.
#[test]
fn nothing_is_lost_by_a_wrong_name() {
    let one = format!("{}\n", completion(1, "Once", json!({"max_tokens": 1})));
    let files = Files::raw(one.as_bytes());
    let (link, out) = (files.out("link"), files.out("out"));
    std::fs::hard_link(&files.input, &link).unwrap();
    let input = files.input.to_str().unwrap().to_string();
    let refused: [(&Path, Vec<&str>); 4] = [
        (&files.input, vec!["--resume"]),
        (&link, vec!["--resume"]),
        (&out, vec!["--record", out.to_str().unwrap()]),
        (&out, vec!["--record", &input]),
    ];
    for (output, more) in refused {
        let o = files.run(output, &more);
        assert!(o.status.code() == Some(2) && err(&o).contains("the same file"), "{more:?}: {}", err(&o));
        assert!(std::fs::read_to_string(&files.input).unwrap() == one && !out.exists());
    }
    let o = files.run(&out, &["-m", "/nowhere.gguf"]);
    assert!(o.status.code() == Some(1) && !out.exists(), "{}", err(&o));
    let model = files.out("model");
    std::fs::write(&model, "GGUF\n".repeat(30)).unwrap();
    let o = Command::new(env!("CARGO_BIN_EXE_oncall")).arg("batch").arg("-i").arg(&model).arg("-o").arg(&out).output();
    let o = o.unwrap();
    assert!(o.status.code() == Some(1) && err(&o).contains("none of its 30 lines") && !out.exists(), "{}", err(&o));
    let o = files.run(&files.out("no/out"), &[]);
    assert!(o.status.code() == Some(1) && err(&o).contains("make it first"), "{}", err(&o));
    std::fs::write(&out, "dear diary").unwrap();
    let o = files.run(&out, &["--resume"]);
    assert!(o.status.code() == Some(1) && err(&o).contains("line 1 isn't a result"), "{}", err(&o));
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "dear diary");
}

/// A request with many completions takes places as they come free, and gets what it would get alone.
#[test]
fn a_large_request_waits_its_turn() {
    use oncall::batch::{self, Job};
    use oncall::engine::{Engine, EngineOptions};
    let prompts: Vec<String> = (0..12).map(|i| format!("Once upon a time {i}")).collect();
    let schema = json!({"type": "json_schema", "json_schema": {"schema": {"enum": ["a dragon", "a girl"]}}});
    let more = json!({"prompt": prompts, "n": 3, "max_tokens": 4, "seed": 5, "response_format": schema});
    let files = Files::new(&[completion(1, "", more), completion(2, "The", json!({"max_tokens": 2}))]);
    let engine = Engine::embedded(&EngineOptions { n_sessions: 2, ..EngineOptions::default() }).unwrap();
    let out = files.out("few");
    let job = batch::Files { input: Some(files.input.clone()), output: Some(out.clone()), resume: false };
    let mut most = 0;
    let mut look = |f: &batch::Figures| most = most.max(f.queue.n_running + f.queue.n_waiting);
    let figures = batch::run(&engine, Job::open(&job).unwrap(), &mut look, &|| false).unwrap();
    assert_eq!((figures.done, figures.queue.n_submitted), (2, 37));
    assert!(most <= 4, "{most} at the same time");
    let many = files.out("many");
    assert!(files.run(&many, &["--sequences", "40"]).status.success());
    assert!(results(&many) == results(&out));
    let choices = parsed(&out)["r1"]["response"]["body"]["choices"].clone();
    assert_eq!(choices.as_array().unwrap().len(), 36);
    assert_eq!(choices[35]["index"], 35);
}

/// Where a token stands in the text is counted in characters, of which several tokens may write one.
#[test]
fn offsets_are_those_of_the_text() {
    let schema = json!({"type": "json_schema", "json_schema": {"schema": {"enum": ["né ☃ 𝄞!"]}}});
    let files = Files::new(&[completion(1, "Once", json!({"logprobs": 1, "response_format": schema}))]);
    let out = files.out("out");
    assert!(files.run(&out, &[]).status.success());
    let choice = &parsed(&out)["r1"]["response"]["body"]["choices"][0];
    let text: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
    let (tokens, offsets) =
        (choice["logprobs"]["tokens"].as_array().unwrap(), choice["logprobs"]["text_offset"].as_array().unwrap());
    assert!(tokens.iter().any(|t| t == "bytes:\\xc3"), "no character is divided: {tokens:?}");
    for (token, offset) in tokens.iter().zip(offsets) {
        let (token, offset) = (token.as_str().unwrap(), offset.as_u64().unwrap() as usize);
        let here: String = text[offset..].iter().collect();
        assert!(token.starts_with("bytes:") || here.starts_with(token), "{token:?} at {offset}: {here:?}");
    }
}

/// The urgent are served first, wherever they stand in the file.
#[test]
fn priority_is_over_the_whole_file() {
    let mut lines: Vec<Value> = (0..20).map(|i| completion(i, "Once upon", json!({"max_tokens": 2}))).collect();
    lines.push(completion(99, "Once upon", json!({"max_tokens": 2, "priority": 1})));
    let files = Files::new(&lines);
    let out = files.out("out");
    let o = files.run(&out, &["--sequences", "1"]);
    assert!(o.status.success(), "{}", err(&o));
    let text = std::fs::read_to_string(&out).unwrap();
    assert!(text.lines().next().unwrap().contains("\"r99\""), "{text}");
}

/// Results of other requests in the output aren't this job's.
#[test]
fn the_figures_are_those_of_this_input() {
    let bad = |i| completion(i, "Once", json!({"frobnicate": 1}));
    let out_of = Files::new(&[bad(1), bad(2), bad(3)]);
    let out = out_of.out("out");
    assert!(err(&out_of.run(&out, &[])).contains("3 of 3 results are errors"));
    let files = Files::new(&[bad(3), completion(4, "Once", json!({"max_tokens": 1}))]);
    let o = files.run(&out, &["--resume"]);
    assert!(o.status.code() == Some(1) && err(&o).contains("1 of 2 results is an error"), "{}", err(&o));
    assert!(err(&o).contains("2/2 done, 1 error,"), "{}", err(&o));
    let o = files.run(&out, &["--resume", "-m", "/nowhere.gguf"]);
    assert!(err(&o).contains("nothing is left to do") && err(&o).contains("1 of 2 results is an error"), "{}", err(&o));
    std::fs::write(&files.input, format!("{}\n", completion(4, "Once", json!({"max_tokens": 1})))).unwrap();
    assert!(files.run(&out, &["--resume"]).status.success());
}

/// An answer to another question isn't taken for this one's.
#[test]
fn a_request_that_was_changed_is_not_resumed() {
    let ask = |i, prompt| completion(i, prompt, json!({"max_tokens": 2}));
    let write = |files: &Files, lines: &[Value]| {
        std::fs::write(&files.input, lines.iter().map(|l| format!("  {l}\r\n")).collect::<String>()).unwrap();
    };
    let files = Files::new(&[ask(1, "Once"), ask(2, "The"), ask(3, "A")]);
    let out = files.out("out");
    assert!(files.run(&out, &[]).status.success());
    let before = std::fs::read(&out).unwrap();
    write(&files, &[ask(3, "A"), ask(2, "THE"), ask(1, "ONCE")]);
    let o = files.run(&out, &["--resume"]);
    let why = "in.jsonl, line 2: this isn't the request that was answered as \"r2\" (nor is 1 more)";
    assert!(o.status.code() == Some(1) && err(&o).contains(why), "{}", err(&o));
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    c.args(["batch", "--resume", "-i", "-", "-o"]).arg(&out).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = c.spawn().unwrap();
    writeln!(child.stdin.take().unwrap(), "{}\n{}", ask(1, "Once"), ask(2, "THE")).unwrap();
    let o = child.wait_with_output().unwrap();
    assert!(o.status.code() == Some(1) && err(&o).contains("the standard input, line 2: this"), "{}", err(&o));
    assert_eq!(std::fs::read(&out).unwrap(), before, "nothing was written");
    // White space around a line isn't part of it.
    write(&files, &[ask(3, "A"), ask(2, "The"), ask(1, "Once")]);
    let o = files.run(&out, &["--resume"]);
    assert!(o.status.success() && std::fs::read(&out).unwrap() == before, "{}", err(&o));
}

#[test]
fn duplicates_are_refused_before_anything_runs() {
    let files =
        Files::new(&[completion(1, "a", json!({})), completion(2, "b", json!({})), completion(1, "c", json!({}))]);
    let out = files.out("out");
    let o = files.run(&out, &[]);
    assert_eq!(o.status.code(), Some(1));
    assert!(err(&o).contains("lines 1 and 3") && err(&o).contains("r1"), "{}", err(&o));
    assert!(!out.exists());
}

#[test]
fn pipes_in_and_out() {
    let lines = [
        completion(1, "Once upon", json!({"max_tokens": 3})),
        completion(1, "Once upon", json!({"max_tokens": 3})),
        completion(2, "The", json!({"max_tokens": 3})),
    ];
    let mut child = Command::new(env!("CARGO_BIN_EXE_oncall"))
        .args(["batch", "-i", "-", "-o", "-", "--json", "--sequences", "2"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    lines.iter().for_each(|l| writeln!(stdin, "{l}").unwrap());
    drop(stdin);
    let o = child.wait_with_output().unwrap();
    assert_eq!(o.status.code(), Some(1), "the second is a duplicate: {}", err(&o));
    let text = String::from_utf8(o.stdout).unwrap();
    let ids: Vec<Value> = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["id"].clone()).collect();
    assert_eq!(ids.len(), 3);
    assert!(
        ids.iter().any(|id| id.as_str().unwrap().starts_with("batch_line_2_")) && text.contains("earlier line"),
        "{text}"
    );
    let o =
        Command::new(env!("CARGO_BIN_EXE_oncall")).args(["batch", "-i", "-", "-o", "-", "--resume"]).output().unwrap();
    assert_eq!(o.status.code(), Some(2));
}

/// A pipe with a name is read as one.
#[test]
#[cfg(target_os = "linux")]
fn a_pipe_by_its_name() {
    let files = Files::new(&[]);
    let out = files.out("out");
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    c.args(["batch", "-i", "/dev/stdin", "-o"]).arg(&out).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = c.spawn().unwrap();
    writeln!(child.stdin.take().unwrap(), "{}", completion(1, "Once", json!({"max_tokens": 2}))).unwrap();
    let o = child.wait_with_output().unwrap();
    assert!(o.status.success() && results(&out).len() == 1, "{}", err(&o));
}

#[test]
fn files_that_are_not_ours_or_full() {
    let files = Files::new(&mixed(3));
    let out = files.out("out");
    std::fs::write(&out, "something\n").unwrap();
    let o = files.run(&out, &[]);
    assert!(o.status.code() == Some(1) && err(&o).contains("--resume"), "{}", err(&o));
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "something\n");
    if Path::new("/dev/full").exists() {
        let o = files.run(Path::new("/dev/full"), &[]);
        assert!(o.status.code() == Some(1) && err(&o).contains("the disk of /dev/full is full"), "{}", err(&o));
    }
}

/// Whoever reads the results may leave: that ends the job, and isn't success.
#[test]
#[cfg(target_os = "linux")]
fn nobody_reads_on() {
    let files = Files::new(&mixed(400));
    let pipe = files.out("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    for output in ["-", "/dev/stdout", pipe.to_str().unwrap()] {
        let mut child = files.command(Path::new(output), &[]).spawn().unwrap();
        let mut first = [0];
        if output == pipe.to_str().unwrap() {
            std::fs::File::open(&pipe).unwrap().read_exact(&mut first).unwrap();
        } else {
            child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        }
        let o = child.wait_with_output().unwrap();
        assert!(o.status.code() == Some(1) && err(&o).contains("nobody reads the results"), "{output}: {}", err(&o));
    }
}

/// Under `nohup` a job outlives its terminal.
#[test]
#[cfg(target_os = "linux")]
fn it_goes_on_when_its_terminal_is_closed() {
    let files = Files::new(&mixed(60));
    let out = files.out("out");
    let mut c = Command::new("sh");
    c.args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_oncall"), "batch", "-t", "1", "-i"]);
    let child = c.arg(&files.input).arg("-o").arg(&out).stderr(Stdio::piped()).spawn().unwrap();
    while results_so_far(&out) < 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    Command::new("kill").args(["-HUP", &child.id().to_string()]).status().unwrap();
    let o = child.wait_with_output().unwrap();
    assert!(o.status.success() && results(&out).len() == 60, "{}", err(&o));
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
}

#[test]
#[cfg(unix)]
fn ctrl_c_finishes_what_is_in_flight() {
    let files = Files::new(&mixed(400));
    let out = files.out("out");
    let child = files.command(&out, &["--sequences", "4"]).spawn().unwrap();
    while results_so_far(&out) < 5 {
        std::thread::sleep(Duration::from_millis(5));
    }
    interrupt(&child);
    let began = Instant::now();
    let o = child.wait_with_output().unwrap();
    assert_eq!(o.status.code(), Some(130), "{}", err(&o));
    assert!(began.elapsed() < Duration::from_secs(15));
    let n = results(&out).len();
    assert!((5..400).contains(&n), "{n} results");
}

/// Ctrl-C ends a job that does nothing but refuse lines.
#[test]
#[cfg(unix)]
fn ctrl_c_while_lines_are_refused() {
    let files = Files::raw("{}\n".repeat(1_000_000).as_bytes());
    let out = files.out("out");
    let child = files.command(&out, &[]).spawn().unwrap();
    while results_so_far(&out) < 5 {
        std::thread::sleep(Duration::from_millis(5));
    }
    interrupt(&child);
    let o = child.wait_with_output().unwrap();
    assert_eq!(o.status.code(), Some(130), "{}", err(&o));
    assert!(results_so_far(&out) < 1_000_000);
}

#[test]
fn outputs_follow_their_schema() {
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "kind", "tags"],
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["dragon", "girl", "cat"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}});
    let mut lines: Vec<Value> = (0..30)
        .map(|i| {
            completion(i, "A story about", json!({"response_format": format, "temperature": 1.5, "max_tokens": 200}))
        })
        .collect();
    lines.push(completion(
        99,
        "x",
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"if": {}}}}}),
    ));
    let files = Files::new(&lines);
    let out = files.out("out");
    files.run(&out, &[]);
    let r = parsed(&out);
    for i in 0..30 {
        let choice = &r[&format!("r{i}")]["response"]["body"]["choices"][0];
        let text = choice["text"].as_str().unwrap();
        let v: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert_eq!(choice["finish_reason"], "stop", "{text}");
        let tags = v["tags"].as_array().unwrap();
        assert!((1..=3).contains(&tags.len()) && tags.iter().all(Value::is_boolean), "{text}");
        assert!(["dragon", "girl", "cat"].contains(&v["kind"].as_str().unwrap()), "{text}");
        assert!((0..=99).contains(&v["age"].as_i64().unwrap()), "{text}");
        assert!(v["name"].as_str().unwrap().chars().count() <= 12 && v.as_object().unwrap().len() == 4, "{text}");
    }
    assert!(r["r99"]["error"]["message"].as_str().unwrap().contains("if"), "{}", r["r99"]);
}
