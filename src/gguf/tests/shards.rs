//! Models in several files.

use super::*;

fn shard(no: u16, count: u16, n_tensors: i32, tensors: &[&str]) -> GgufWriter {
    let mut w = GgufWriter::new();
    if no == 0 {
        w.set("general.architecture", "llama");
    }
    w.set("split.no", no).set("split.count", count).set("split.tensors.count", n_tensors);
    for name in tensors {
        w.tensor(name, &[4], f32_format());
    }
    w
}

fn name(dir: &Path, no: u16, count: u16) -> PathBuf {
    dir.join(format!("m-{no:05}-of-{count:05}.gguf"))
}

fn put(path: &Path, writer: &GgufWriter, first: f32, n_tensors: usize) {
    let data: Vec<u8> = (0..4 * n_tensors).flat_map(|i| (first + i as f32).to_le_bytes()).collect();
    write(writer, path, &data);
}

fn three(dir: &Path) {
    put(&name(dir, 1, 3), &shard(0, 3, 4, &["a"]), 0., 1);
    put(&name(dir, 2, 3), &shard(1, 3, 4, &["b", "c"]), 10., 2);
    put(&name(dir, 3, 3), &shard(2, 3, 4, &["d"]), 20., 1);
}

#[test]
fn any_shard_opens_all() {
    let dir = tempfile::tempdir().unwrap();
    three(dir.path());
    for no in 1..=3 {
        let gguf = Gguf::open(&name(dir.path(), no, 3)).unwrap();
        let names: Vec<_> = gguf.tensors().iter().map(|t| (&*t.name, t.file)).collect();
        assert_eq!(names, [("a", 0), ("b", 1), ("c", 1), ("d", 2)]);
        assert_eq!(read_f32s(&gguf, "a"), [0., 1., 2., 3.]);
        assert_eq!(read_f32s(&gguf, "c"), [14., 15., 16., 17.]);
        assert_eq!(read_f32s(&gguf, "d"), [20., 21., 22., 23.]);
        // The metadata is the first shard's, whichever was named.
        assert_eq!(gguf.metadata().required_str("general.architecture"), Ok("llama"));
        assert_eq!(gguf.files()[2].path(), name(dir.path(), 3, 3));
        let sum: u64 = gguf.files().iter().map(|f| f.n_bytes()).sum();
        assert_eq!(gguf.total_bytes(), sum);
    }
}

#[test]
fn a_missing_shard_is_named() {
    let dir = tempfile::tempdir().unwrap();
    three(dir.path());
    let gone = name(dir.path(), 2, 3);
    fs::remove_file(&gone).unwrap();
    let error = Gguf::open(&name(dir.path(), 3, 3)).unwrap_err();
    assert!(matches!(&error, GgufError::MissingShard { path, missing, count: 3 } if *path == gone && missing == &[2]));
    let text = error.to_string();
    assert!(text.contains("m-00002-of-00003.gguf\" is missing: ") && text.contains("get the rest"), "{text}");
    fs::remove_file(name(dir.path(), 3, 3)).unwrap();
    let text = Gguf::open_header(&name(dir.path(), 1, 3)).unwrap_err().to_string();
    assert!(text.contains("m-00002-of-00003.gguf\" is missing (and number 3): "), "{text}");
    // A name may claim as many as there are digits for.
    let many = dir.path().join("m-00001-of-99999.gguf");
    let mut w = GgufWriter::new();
    w.set("split.no", 0u16).set("split.count", 99_999u32);
    w.create(&many, false).unwrap().finish().unwrap();
    let text = Gguf::open(&many).unwrap_err().to_string();
    assert!(text.contains("(and number 3, 4, 5, 6, 7, 8, 9, 10 and 99989 more)"), "{text}");
}

#[test]
fn a_shard_with_another_name_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    three(dir.path());
    for new in ["model.gguf", "m-00001-of-00004.gguf", "m-00000-of-00003.gguf", "m-1-of-3.gguf"] {
        let new = dir.path().join(new);
        fs::copy(name(dir.path(), 1, 3), &new).unwrap();
        assert!(matches!(Gguf::open(&new), Err(GgufError::SplitName { count: 3, .. })), "{new:?}");
    }
}

#[test]
fn shards_that_contradict_each_other_are_refused() {
    type Damage = fn(&Path);
    let damages: [(Damage, &str); 5] = [
        (|p| put(p, &shard(2, 3, 4, &["b", "c"]), 0., 2), "split.no is 2, 1 was expected"),
        (|p| put(p, &shard(1, 2, 4, &["b", "c"]), 0., 2), "split.count is 2, 3 was expected"),
        (|p| put(p, &shard(1, 3, 4, &["b"]), 0., 1), "split.tensors.count is 4, 3 was expected"),
        (|p| put(p, &shard(1, 3, 4, &["b", "a"]), 0., 2), "tensor \"a\" is in"),
        (|p| put(p, shard(1, 3, 4, &["b", "c"]).remove("split.no"), 0., 2), "\"split.no\" is missing"),
    ];
    for (damage, message) in damages {
        let dir = tempfile::tempdir().unwrap();
        three(dir.path());
        fs::remove_file(name(dir.path(), 2, 3)).unwrap();
        damage(&name(dir.path(), 2, 3));
        for no in [1, 3] {
            let error = Gguf::open(&name(dir.path(), no, 3)).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}

#[test]
fn a_damaged_shard_is_named() {
    let dir = tempfile::tempdir().unwrap();
    three(dir.path());
    let bad = name(dir.path(), 2, 3);
    fs::write(&bad, b"GG").unwrap();
    let error = Gguf::open(&name(dir.path(), 1, 3)).unwrap_err();
    assert!(matches!(&error, GgufError::Header { path, error: HeaderError::Truncated { .. } } if *path == bad));
}

#[test]
fn a_count_that_is_no_number_is_named() {
    let (_dir, path) = scratch();
    write(GgufWriter::new().set("split.count", "three"), &path, &[]);
    assert!(matches!(Gguf::open(&path), Err(GgufError::Key { error: KeyError::Type { .. }, .. })));
}

#[test]
fn one_shard_of_one_is_a_model() {
    let (_dir, path) = scratch();
    put(&path, &shard(0, 1, 1, &["a"]), 0., 1);
    assert_eq!(Gguf::open(&path).unwrap().tensors().len(), 1);
}
