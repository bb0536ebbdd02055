//! The room's own tests: here what they share and what goes through the whole room.

mod keys;
mod opening;
mod reads;
mod shards;
mod writing;

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::quant;

fn f32_format() -> &'static quant::Format {
    quant::by_name("f32").unwrap()
}

/// A file with two tensors: `a` of 3 x 2 counting from 0, `b` of 8 counting from 100.
fn small() -> GgufWriter {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama").set("llama.block_count", 2u32);
    w.tensor("a", &[3, 2], f32_format()).tensor("b", &[8], f32_format());
    w
}

fn small_data() -> Vec<u8> {
    let a = (0..6).map(|i| i as f32);
    let b = (100..108).map(|i| i as f32);
    a.chain(b).flat_map(f32::to_le_bytes).collect()
}

fn write(writer: &GgufWriter, path: &Path, data: &[u8]) {
    let mut out = writer.create(path, false).unwrap();
    out.write(data).unwrap();
    out.finish().unwrap();
}

fn parse(bytes: Vec<u8>) -> Result<Header, HeaderError> {
    let len = bytes.len() as u64;
    Header::parse(Cow::Owned(bytes), len)
}

fn metadata(set: impl FnOnce(&mut GgufWriter)) -> Metadata {
    let mut w = GgufWriter::new();
    set(&mut w);
    parse(w.in_memory().unwrap().finish().unwrap()).unwrap().metadata
}

fn read_f32s(gguf: &Gguf, name: &str) -> Vec<f32> {
    let t = gguf.tensor(name).unwrap();
    let mut bytes = vec![0; t.n_bytes as usize];
    gguf.read_at(t, 0, &mut bytes).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    (dir, path)
}

#[test]
fn what_was_written_is_read() {
    let (_dir, path) = scratch();
    write(&small(), &path, &small_data());
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.name(), "model.gguf");
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.metadata().required_str("general.architecture"), Ok("llama"));
    assert_eq!(gguf.total_bytes(), fs::metadata(&path).unwrap().len());
    let a = gguf.tensor("a").unwrap();
    assert_eq!((a.shape(), a.n_cols(), a.n_rows(), a.dim(3)), (&[3, 2][..], 3, 2, 1));
    assert_eq!((a.n_bytes, a.row_bytes(), a.n_elements()), (24, 12, 6));
    assert_eq!(gguf.tensor("b").unwrap().offset - a.offset, 32);
    assert_eq!(read_f32s(&gguf, "a"), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(read_f32s(&gguf, "b"), [100., 101., 102., 103., 104., 105., 106., 107.]);
    assert!(gguf.tensor("c").is_none());
    assert!(!path.with_file_name("model.gguf.part").exists());
}

#[test]
fn a_model_is_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Gguf>();
}

#[test]
fn a_static_model_is_not_copied() {
    let mut writer = small().in_memory().unwrap();
    writer.write(&small_data()).unwrap();
    let bytes: &'static [u8] = writer.finish().unwrap().leak();
    let gguf = Gguf::from_static("embedded", bytes).unwrap();
    assert_eq!(gguf.name(), "embedded");
    assert_eq!(read_f32s(&gguf, "a"), [0., 1., 2., 3., 4., 5.]);
    let text = gguf.metadata().required_str("general.architecture").unwrap();
    assert!(bytes.as_ptr_range().contains(&text.as_ptr()));
    assert_eq!(gguf.files()[0].in_memory().unwrap().as_ptr(), bytes.as_ptr());

    let error = Gguf::from_static("embedded", &bytes[..40]).unwrap_err();
    assert!(error.to_string().starts_with("\"embedded\": "), "{error}");
}

#[test]
fn the_embedded_model_is_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinymoe-stories-Q8_0.gguf");
    let gguf = Gguf::open(&path).unwrap();
    let m = gguf.metadata();
    assert_eq!(m.required_str("general.architecture"), Ok("llama"));
    assert_eq!(m.required_u32("llama.expert_count"), Ok(8));
    assert_eq!(m.required_u32("llama.expert_used_count"), Ok(2));
    assert_eq!(m.required_u32_per_layer("llama.attention.head_count_kv", 6).unwrap().len(), 6);
    assert_eq!(m.required_strings("tokenizer.ggml.tokens").unwrap().nth(3), Some("<0x00>"));
    assert_eq!(m.f32s("tokenizer.ggml.scores").unwrap().unwrap().len(), 3072);
    assert_eq!(gguf.tensors().len(), 62);

    let gate = gguf.tensor("blk.0.ffn_gate_exps.weight").unwrap();
    assert_eq!(gate.shape(), [256, 256, 8]);
    assert_eq!((gate.format.name, gate.offset, gate.n_bytes), ("q8_0", 1_128_768, 8 * 256 * 8 * 34));
    // The tensors tile the rest of the file, and their bytes are the file's.
    let bytes = fs::read(&path).unwrap();
    let mut at = gguf.tensors()[0].offset;
    for t in gguf.tensors() {
        assert_eq!(t.offset, at, "{}", t.name);
        at += t.n_bytes;
        let mut half = vec![0; (t.n_bytes / 2) as usize];
        gguf.read_at(t, t.n_bytes / 2, &mut half).unwrap();
        assert_eq!(half, bytes[(at - t.n_bytes / 2) as usize..at as usize], "{}", t.name);
    }
    assert_eq!(at, bytes.len() as u64);
}
