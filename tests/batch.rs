//! `oncall batch`, the real program: whatever happens to it, the output is one line for each request, as an undisturbed run writes them.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
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
    ]);
    let out = files.out("out.jsonl");
    let o = files.run(&out, &["--json"]);
    assert_eq!(o.status.code(), Some(1), "some are errors: {}", err(&o));
    let figures: Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!((&figures["done"], &figures["failed"], &figures["total"]), (&json!(7), &json!(3), &json!(7)));
    assert!(figures["queue"]["n_shared"].is_number() && figures["hit_rate"].is_number());
    assert!(err(&o).contains("7/7 done, 3 errors") && err(&o).contains("tokens/s in"), "{}", err(&o));
    let r = parsed(&out);
    let body = |id: &str| &r[id]["response"]["body"];
    assert_eq!((&r["r0"]["error"], &r["r0"]["response"]["status_code"]), (&Value::Null, &json!(200)));
    assert_eq!((&body("r0")["object"], &body("r0")["model"]), (&json!("text_completion"), &json!("tiny")));
    let choice = &body("r0")["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], choice["logprobs"]["tokens"].as_array().unwrap().len()),
        (&json!("length"), 12)
    );
    assert_eq!(choice["logprobs"]["top_logprobs"][0].as_object().unwrap().len(), 2);
    assert_eq!(body("r0")["usage"]["completion_tokens"], 12);
    assert_eq!(body("r1")["choices"][0]["text"], choice["text"], "the same seed");
    assert_ne!(body("r1")["choices"][1]["text"], choice["text"]);
    assert_eq!(body("r1")["usage"]["completion_tokens"], 24);
    assert!(!body("r2")["choices"][0]["text"].as_str().unwrap().contains("was"));
    let said = &body("chat")["choices"][0];
    assert_eq!((&body("chat")["object"], &said["message"]["role"]), (&json!("chat.completion"), &json!("assistant")));
    assert!(!said["message"]["content"].as_str().unwrap().is_empty());
    assert_eq!(said["logprobs"]["content"].as_array().unwrap().len(), 9);
    for (id, word) in [("r4", "frobnicate"), ("r5", "context"), ("r6", "600 to write")] {
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
    assert_eq!(keys, ["batch_line_1", "batch_line_4", "batch_line_5", "batch_line_6", "last", "r1"]);
    assert!(r["batch_line_4"]["error"]["message"].as_str().unwrap().contains("line 4: the line has no custom_id"));
    assert!(r["batch_line_1"]["custom_id"].is_null() && r["r1"]["error"].is_null());
    let before = results(&out);
    let o = files.run(&out, &["--resume"]);
    assert_eq!((o.status.code(), results(&out) == before), (Some(1), true), "errors stay errors: {}", err(&o));
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
    assert!(ids.contains(&json!("batch_line_2")) && text.contains("earlier line"), "{text}");
    let o =
        Command::new(env!("CARGO_BIN_EXE_oncall")).args(["batch", "-i", "-", "-o", "-", "--resume"]).output().unwrap();
    assert_eq!(o.status.code(), Some(2));
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
