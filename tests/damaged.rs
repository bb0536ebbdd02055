//! Models whose numbers aren't numbers: every command says so, and none passes off what comes of it for an answer.

use oncall::gguf::{Gguf, GgufWriter};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const TINY: &str = "models/tinymoe-stories-Q8_0.gguf";

/// A model with some bytes of a tensor overwritten.
fn with_tensor(source: &Path, dir: &Path, tensor: &str, at: usize, with: &[u8]) -> PathBuf {
    let gguf = Gguf::open(source).unwrap();
    let t = gguf.tensor(tensor).unwrap();
    let mut bytes = std::fs::read(source).unwrap();
    bytes[t.offset as usize + at..][..with.len()].copy_from_slice(with);
    let path = dir.join("damaged.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The embedded model with a scale of its experts, and an output matrix of its own.
fn with_scale(dir: &Path, scale: f32) -> PathBuf {
    let gguf = Gguf::open(Path::new(TINY)).unwrap();
    let mut w = GgufWriter::new();
    w.set_all(gguf.metadata()).set("llama.expert_weights_scale", scale);
    let mut data = Vec::new();
    let output = gguf.tensor("token_embd.weight").unwrap();
    for (name, t) in gguf.tensors().iter().map(|t| (&*t.name, t)).chain([("output.weight", output)]) {
        w.tensor(name, t.shape(), t.format);
        data.resize(data.len() + t.n_bytes as usize, 0);
        let at = data.len() - t.n_bytes as usize;
        gguf.read_at(t, 0, &mut data[at..]).unwrap();
    }
    let path = dir.join("scaled.gguf");
    let mut out = w.create(&path, true).unwrap();
    out.write(&data).unwrap();
    out.finish().unwrap();
    path
}

fn oncall(model: &Path, args: &[&str]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    c.args(args).arg("-m").arg(model).args(["-t", "1"]);
    c.stdin(Stdio::null()).env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG").output().unwrap()
}

fn refused(o: &Output, what: &str) {
    let err = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.code() == Some(1) && err.contains("the model's weights are damaged"), "{what}: {o:?}");
}

#[test]
fn weights_that_are_no_numbers_end_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let (nan, inf, half_inf) = (f32::NAN.to_le_bytes(), f32::INFINITY.to_le_bytes(), [0x00, 0x7c]);
    // Norms and the router are in single precision; of the others it's the scale of a block.
    let cases: &[(&str, usize, &[u8])] = &[
        ("output_norm.weight", 40, &nan),
        ("blk.0.ffn_gate_inp.weight", 40, &nan),
        ("blk.0.ffn_norm.weight", 40, &inf),
        ("blk.5.attn_norm.weight", 40, &inf),
        ("blk.2.attn_k.weight", 0, &half_inf),
        ("blk.2.attn_v.weight", 0, &half_inf),
        ("blk.3.attn_output.weight", 0, &half_inf),
        ("token_embd.weight", 0, &half_inf),
    ];
    for (tensor, at, with) in cases {
        let model = with_tensor(Path::new(TINY), dir.path(), tensor, *at, with);
        let o = oncall(&model, &["run", "--raw", "Once upon a time", "-n", "8", "-s", "1"]);
        refused(&o, tensor);
        assert!(o.stdout.is_empty(), "{tensor}: nothing is written");
    }
    let model = with_scale(dir.path(), 1.0);
    assert!(oncall(&model, &["run", "--raw", "Once upon a time", "-n", "8", "-s", "1"]).status.success());
    let model = with_scale(dir.path(), 1e38);
    refused(&oncall(&model, &["run", "--raw", "Once upon a time", "-n", "8", "-s", "1"]), "the experts' scale");
}

#[test]
fn every_command_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let model = with_tensor(Path::new(TINY), dir.path(), "blk.1.ffn_norm.weight", 0, &f32::NAN.to_le_bytes());
    refused(&oncall(&model, &["chat", "-n", "4"]), "chat");
    let text = dir.path().join("text");
    std::fs::write(&text, std::fs::read_to_string("models/heldout_sample.txt").unwrap()).unwrap();
    refused(&oncall(&model, &["perplexity", "-c", "64", "--chunks", "1", "-f", text.to_str().unwrap()]), "perplexity");
    let logits = dir.path().join("logits");
    refused(&oncall(&model, &["logits", "--tokens", "1,500,700", "-o", logits.to_str().unwrap()]), "logits");
    assert!(!logits.exists());
}

/// Of a batch, the requests that meet it have an error, the others their results.
#[test]
fn a_batch_goes_on_with_the_others() {
    let dir = tempfile::tempdir().unwrap();
    // The embedding of one token.
    let untied = with_scale(dir.path(), 1.0);
    let row = Gguf::open(&untied).unwrap().tensor("token_embd.weight").unwrap().row_bytes() as usize;
    let model = with_tensor(&untied, dir.path(), "token_embd.weight", 700 * row, &[0x00, 0x7e]);
    let line = |id: &str, prompt: &str| {
        let body =
            format!(r#"{{"prompt": {prompt}, "max_tokens": 3, "temperature": 0, "logit_bias": {{"700": -100}}}}"#);
        format!(r#"{{"custom_id": "{id}", "method": "POST", "url": "/v1/completions", "body": {body}}}"#)
    };
    let lines = [line("a", "[1, 500]"), line("b", "[1, 700, 500]"), line("c", "[1, 501, 502]")];
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    std::fs::write(&input, lines.join("\n")).unwrap();
    let files = ["-i", input.to_str().unwrap(), "-o", output.to_str().unwrap(), "--sequences", "3"];
    let o = oncall(&model, &[&["batch"], &files[..]].concat());
    assert_eq!(o.status.code(), Some(1), "{o:?}");
    let out = std::fs::read_to_string(&output).unwrap();
    assert_eq!(out.lines().count(), 3, "{out}");
    for line in out.lines() {
        let v: serde_json::Value = serde_json::from_str(line).unwrap();
        let message = v["error"]["message"].as_str();
        match v["custom_id"].as_str().unwrap() {
            "b" => assert!(message.unwrap().contains("the model's weights are damaged"), "{line}"),
            _ => assert!(message.is_none() && v["response"]["status_code"] == 200, "{line}"),
        }
    }
}
