//! The room's own tests: opening, shards, reads, typed keys, writing.

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

mod keys {
    use super::*;

    #[test]
    fn any_integer_type_that_fits_is_taken() {
        let m = metadata(|w| {
            w.set("u8", 200u8).set("i8", -3i8).set("u16", 60000u16).set("i16", -300i16);
            w.set("u32", u32::MAX).set("i32", i32::MIN).set("u64", u64::MAX).set("i64", -1i64);
        });
        assert_eq!(m.u32("u8"), Ok(Some(200)));
        assert_eq!(m.u32("u16"), Ok(Some(60000)));
        assert_eq!(m.u32("u32"), Ok(Some(u32::MAX)));
        assert_eq!(m.i32("i8"), Ok(Some(-3)));
        assert_eq!(m.i32("i16"), Ok(Some(-300)));
        assert_eq!(m.i32("i32"), Ok(Some(i32::MIN)));
        assert_eq!(m.u64("u64"), Ok(Some(u64::MAX)));
        assert_eq!(m.i32("i64"), Ok(Some(-1)));
        for (key, value) in [("i8", "-3"), ("i64", "-1"), ("u64", "18446744073709551615")] {
            let error = m.u32(key).unwrap_err();
            assert!(matches!(&error, KeyError::Range { key: k, value: v, .. } if k == key && v == value));
        }
        assert!(matches!(m.i32("u32"), Err(KeyError::Range { .. })));
        assert!(matches!(m.u64("i64"), Err(KeyError::Range { .. })));
    }

    #[test]
    fn a_wrong_type_is_named() {
        let m = metadata(|w| {
            w.set("text", "x").set("number", 1u32).set("float", 1f32).set("flag", true).set("list", vec![1u32]);
        });
        let cases = [
            (m.u32("text").map(drop), "key \"text\" is a string, a number from 0 to 2^32-1 was expected"),
            (m.u32("float").map(drop), "key \"float\" is an f32, a number from 0 to 2^32-1 was expected"),
            (m.u64("flag").map(drop), "key \"flag\" is a bool, a number from 0 to 2^64-1 was expected"),
            (m.i32("list").map(drop), "key \"list\" is an array, a number from -2^31 to 2^31-1 was expected"),
            (m.f32("number").map(drop), "key \"number\" is a u32, a finite 32-bit float was expected"),
            (m.bool("number").map(drop), "key \"number\" is a u32, a bool was expected"),
            (m.str("number").map(drop), "key \"number\" is a u32, a string was expected"),
            (m.strings("text").map(drop), "key \"text\" is a string, an array was expected"),
            (
                m.strings("list").map(drop),
                "key \"list\" is an array of which each element is a u32, a string was expected",
            ),
            (
                m.f32s("list").map(drop),
                "key \"list\" is an array of which each element is a u32, a finite 32-bit float was expected",
            ),
        ];
        for (result, message) in cases {
            assert_eq!(result.unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn an_absent_key_is_none_or_an_error_that_names_it() {
        let m = metadata(|_| ());
        assert!(m.is_empty() && !m.contains("k") && m.get("k").is_none());
        assert_eq!(m.u32("k"), Ok(None));
        assert_eq!(m.f32("k"), Ok(None));
        assert_eq!(m.bool("k"), Ok(None));
        assert_eq!(m.str("k"), Ok(None));
        assert_eq!(m.u32s("k"), Ok(None));
        assert_eq!(m.u32_per_layer("k", 2), Ok(None));
        assert!(m.strings("k").unwrap().is_none());
        let missing = KeyError::Missing { key: "k".into() };
        assert_eq!(m.required_u32("k"), Err(missing.clone()));
        assert_eq!(m.required_str("k"), Err(missing.clone()));
        assert_eq!(m.required_u32_per_layer("k", 2), Err(missing.clone()));
        assert_eq!(m.required_strings("k").map(drop), Err(missing.clone()));
        assert!(missing.to_string().starts_with("key \"k\" is missing"));
    }

    #[test]
    fn floats_are_finite() {
        let m = metadata(|w| {
            w.set("f32", 1.5f32).set("f64", 0.25f64).set("nan", f32::NAN).set("huge", 1e300f64);
            w.set("list", vec![1f32, f32::INFINITY]);
        });
        assert_eq!(m.required_f32("f32"), Ok(1.5));
        assert_eq!(m.required_f32("f64"), Ok(0.25));
        assert!(matches!(m.f32("nan"), Err(KeyError::Range { .. })));
        assert!(matches!(m.f32("huge"), Err(KeyError::Range { .. })));
        assert!(matches!(m.f32s("list"), Err(KeyError::Range { .. })));
    }

    #[test]
    fn arrays_are_read() {
        let m = metadata(|w| {
            w.set("strings", ["a", "", "ça"]).set("i32s", vec![-1i32, 5]).set("u8s", vec![7u8, 8]);
            w.set("f32s", vec![0.5f32]).set("none", Vec::<String>::new());
            w.set("nested", vec![vec![1u16, 2], vec![3]]);
        });
        let strings = m.required_strings("strings").unwrap();
        assert_eq!(strings.len(), 3);
        assert_eq!(strings.collect::<Vec<_>>(), ["a", "", "ça"]);
        assert_eq!(m.i32s("i32s"), Ok(Some(vec![-1, 5])));
        assert!(matches!(m.u32s("i32s"), Err(KeyError::Range { .. })));
        assert_eq!(m.u32s("u8s"), Ok(Some(vec![7, 8])));
        assert_eq!(m.f32s("f32s"), Ok(Some(vec![0.5])));
        assert_eq!(m.required_strings("none").unwrap().len(), 0);
        let nested = m.array("nested").unwrap().unwrap();
        let inner: Vec<_> = nested.iter().map(|v| v.as_array().unwrap()).collect();
        assert_eq!(inner[0].iter().collect::<Vec<_>>(), [Value::U16(1), Value::U16(2)]);
        assert_eq!(inner[1].iter().collect::<Vec<_>>(), [Value::U16(3)]);
        assert_eq!(format!("{nested:?}"), "[Array([U16(1), U16(2)]), Array([U16(3)])]");
    }

    #[test]
    fn one_number_or_one_for_each_layer() {
        let m = metadata(|w| {
            w.set("one", 8u32).set("each", vec![1u32, 2, 3]).set("text", "x");
        });
        assert_eq!(m.u32_per_layer("one", 3), Ok(Some(vec![8, 8, 8])));
        assert_eq!(m.u32_per_layer("each", 3), Ok(Some(vec![1, 2, 3])));
        let length = |found, wanted| KeyError::Length { key: "each".into(), found, wanted };
        assert_eq!(m.u32_per_layer("each", 4), Err(length(3, 4)));
        assert_eq!(m.u32_per_layer("each", 2), Err(length(3, 2)));
        assert!(matches!(m.u32_per_layer("text", 3), Err(KeyError::Type { .. })));
        // A lying layer count doesn't decide how much is allocated.
        assert!(matches!(m.u32_per_layer("one", usize::MAX), Err(KeyError::Length { .. })));
    }

    #[test]
    fn keys_come_in_the_files_order() {
        let m = metadata(|w| {
            w.set("b", 1u8).set("a", "x").set("c", 2u8).set("b", 3u8);
        });
        let all: Vec<_> = m.iter().collect();
        assert_eq!(all, [("b", Value::U8(3)), ("a", Value::Str("x")), ("c", Value::U8(2))]);
        assert_eq!(m.len(), 3);
    }
}

mod shards {
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
        assert!(matches!(&error, GgufError::MissingShard { path, no: 2, count: 3 } if *path == gone));
        assert!(error.to_string().contains("m-00002-of-00003.gguf"), "{error}");
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
}

mod reads {
    use std::io;

    use super::super::read::{ReadError, read_full_at};
    use super::*;

    #[test]
    fn a_range_outside_the_tensor_is_refused() {
        let (_dir, path) = scratch();
        write(&small(), &path, &small_data());
        let gguf = Gguf::open(&path).unwrap();
        let a = gguf.tensor("a").unwrap();
        let mut buf = [0; 8];
        gguf.read_at(a, 16, &mut buf).unwrap();
        assert_eq!(buf, [4f32.to_le_bytes(), 5f32.to_le_bytes()].concat()[..]);
        gguf.read_at(a, 24, &mut []).unwrap();
        for offset in [17, 24, u64::MAX - 3] {
            let error = gguf.read_at(a, offset, &mut buf).unwrap_err();
            assert!(matches!(error, GgufError::OutsideTensor { .. }), "{error}");
        }
    }

    #[test]
    fn a_file_that_shrinks_later_is_an_error() {
        let (_dir, path) = scratch();
        write(&small(), &path, &small_data());
        let gguf = Gguf::open(&path).unwrap();
        let b = gguf.tensor("b").unwrap();
        let cut = b.offset + 8;
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
        let mut buf = [0; 8];
        let error = gguf.read_at(b, 0, &mut buf).unwrap_err();
        assert!(matches!(&error, GgufError::Changed { tensor, .. } if tensor == "b"), "what is still there: {error}");
        let error = gguf.read_at(b, 4, &mut buf).unwrap_err();
        assert!(matches!(&error, GgufError::Shrunk { tensor, end, .. } if tensor == "b" && *end == cut), "{error}");
    }

    #[test]
    fn a_file_that_is_written_over_is_an_error() {
        let (_dir, path) = scratch();
        write(&small(), &path, &small_data());
        let gguf = Gguf::open(&path).unwrap();
        let (b, mut buf) = (gguf.tensor("b").unwrap(), [0; 8]);
        gguf.read_at(b, 0, &mut buf).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, b"!", b.offset).unwrap();
        // As if a moment had passed: file systems keep time in steps.
        file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(1)).unwrap();
        assert!(matches!(gguf.read_at(b, 0, &mut buf), Err(GgufError::Changed { .. })));
        // Another file under the same name is nothing to us: what was opened is still there.
        let (gguf, other) = (Gguf::open(&path).unwrap(), path.with_extension("new"));
        fs::copy(&path, &other).unwrap();
        fs::rename(&other, &path).unwrap();
        gguf.read_at(gguf.tensor("b").unwrap(), 0, &mut buf).unwrap();
    }

    #[test]
    fn direct_reads_give_the_same_bytes_from_any_place() {
        let (_dir, path) = scratch();
        let mut w = GgufWriter::new();
        w.set("general.architecture", "test");
        let data: Vec<u8> = (0..4 * 5000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        w.tensor("x", &[5000], f32_format());
        write(&w, &path, &data);
        let gguf = Gguf::open(&path).unwrap();
        let t = gguf.tensor("x").unwrap();
        let Some(file) = gguf.open_direct(0) else { return eprintln!("this file system has no direct reads") };
        let mut pages = crate::cpu::Pages::new(8 * 4096).unwrap();
        for (offset, n) in [(0, 4), (0, data.len()), (4096, 4096), (100, 9000), (data.len() - 1, 1), (4000, 200)] {
            pages.fill(0xff);
            let at = gguf.read_direct(&file, t, offset as u64, n, &mut pages).unwrap();
            assert_eq!(pages[at..at + n], data[offset..offset + n], "{n} from {offset}");
        }
        assert!(gguf.read_direct(&file, t, 1, data.len(), &mut pages).is_err());
    }

    #[test]
    fn short_and_interrupted_reads_go_on() {
        let file: Vec<u8> = (0..100).collect();
        let mut calls = 0;
        let mut buf = [0; 20];
        read_full_at(
            |buf, at| {
                calls += 1;
                if calls % 2 == 0 {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let n = buf.len().min(3);
                buf[..n].copy_from_slice(&file[at as usize..][..n]);
                Ok(n)
            },
            &mut buf,
            50,
        )
        .unwrap();
        assert_eq!(buf[..], file[50..70]);
        assert_eq!(calls, 13);
    }

    #[test]
    fn a_failing_disk_is_an_error_with_its_cause() {
        let mut left = 2;
        let fail = |buf: &mut [u8], _| {
            left -= 1;
            if left == 0 { Err(io::Error::other("EIO")) } else { Ok(buf.len() / 2) }
        };
        match read_full_at(fail, &mut [0; 8], 0).unwrap_err() {
            ReadError::Io(e) => assert_eq!(e.to_string(), "EIO"),
            e => panic!("{e:?}"),
        }
        match read_full_at(|_, at| Ok(usize::from(at < 12)), &mut [0; 8], 10).unwrap_err() {
            ReadError::Eof(end) => assert_eq!(end, 12),
            e => panic!("{e:?}"),
        }
    }
}

mod opening {
    use super::*;

    #[test]
    fn what_is_not_a_file_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = Gguf::open(dir.path()).unwrap_err();
        assert!(error.to_string().ends_with("is a directory, not a file: name the .gguf file itself"));

        let pipe = dir.path().join("pipe.gguf");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        // Would wait for a writer if it were opened.
        assert!(matches!(Gguf::open(&pipe), Err(GgufError::NotAFile { what: "a pipe or a device", .. })));
    }

    #[test]
    fn what_the_system_refuses_is_named() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, path) = scratch();
        let error = Gguf::open(&path).unwrap_err();
        assert!(matches!(error, GgufError::Open { .. }) && error.to_string().contains("model.gguf"), "{error}");

        // A link to itself can't be opened by anybody, root included.
        let link = dir.path().join("loop.gguf");
        std::os::unix::fs::symlink(&link, &link).unwrap();
        assert!(matches!(Gguf::open(&link), Err(GgufError::Open { .. })));

        write(&small(), &path, &small_data());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        match Gguf::open(&path) {
            Ok(_) => assert!(rustix::process::geteuid().is_root(), "opened without permission"),
            Err(e) => assert!(
                matches!(&e, GgufError::Open { error, .. }
                if error.kind() == std::io::ErrorKind::PermissionDenied),
                "{e}"
            ),
        }
    }

    #[test]
    fn other_files_get_a_hint() {
        let (_dir, path) = scratch();
        let cases: [(&[u8], &str); 9] = [
            (b"", "the file is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"tjgg\x03\0\0\0", "old ggml file"),
            (b"PK\x03\x04\0\0\0\0", "convert_hf_to_gguf.py"),
            (b"\x40\0\0\0\0\0\0\0{\"a\":{}}", "safetensors"),
            (b"hello\x1b[31m", "begins with \"hello\\x1b[31m\""),
            (b"GGUF\0\0\0\x03", "big-endian"),
            (b"GGUF\x01\0\0\0", "version 1"),
        ];
        for (bytes, message) in cases {
            fs::write(&path, bytes).unwrap();
            let error = Gguf::open(&path).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("model.gguf"), "{error}");
        }
    }
}

mod writing {
    use super::*;

    #[test]
    fn a_file_is_replaced_only_if_told_so() {
        let (_dir, path) = scratch();
        fs::write(&path, b"precious").unwrap();
        assert!(matches!(small().create(&path, false), Err(WriteError::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let mut out = small().create(&path, true).unwrap();
        out.write(&small_data()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"precious", "replaced before it was whole");
        out.finish().unwrap();
        assert_eq!(read_f32s(&Gguf::open(&path).unwrap(), "a"), [0., 1., 2., 3., 4., 5.]);
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_kept() {
        let (_dir, path) = scratch();
        let mut out = small().create(&path, false).unwrap();
        out.write(&small_data()).unwrap();
        fs::write(&path, b"precious").unwrap();
        assert!(matches!(out.finish(), Err(WriteError::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn an_unfinished_file_leaves_nothing() {
        let (dir, path) = scratch();
        let mut out = small().create(&path, false).unwrap();
        out.write(&small_data()[..50]).unwrap();
        assert_eq!(out.pending(), Some(("b", 6)));
        match out.finish().unwrap_err() {
            WriteError::TooLittleData { tensor, missing } => assert_eq!((&*tensor, missing), ("b", 6)),
            e => panic!("{e}"),
        }
        let mut out = small().create(&path, false).unwrap();
        out.write(&small_data()).unwrap();
        assert_eq!(out.pending(), None);
        assert!(matches!(out.write(&[0; 3]), Err(WriteError::TooMuchData { extra: 3 })));
        drop(out);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn two_writers_do_not_share_a_file() {
        let (_dir, path) = scratch();
        let mut first = small().create(&path, false).unwrap();
        assert!(matches!(small().create(&path, false), Err(WriteError::Busy { .. })));
        first.write(&small_data()).unwrap();
        first.finish().unwrap();
        assert!(Gguf::open(&path).is_ok());
    }

    #[test]
    fn what_a_killed_writer_left_is_used_again() {
        let (dir, path) = scratch();
        fs::write(path.with_file_name("model.gguf.part"), vec![7; 9999]).unwrap();
        write(&small(), &path, &small_data());
        assert!(Gguf::open(&path).is_ok());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_is_not_written_through() {
        let (dir, path) = scratch();
        let victim = dir.path().join("victim");
        fs::write(&victim, b"precious").unwrap();
        std::os::unix::fs::symlink(&victim, path.with_file_name("model.gguf.part")).unwrap();
        assert!(matches!(small().create(&path, true), Err(WriteError::File { .. })));
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
    }

    #[test]
    fn a_directory_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(small().create(dir.path(), true), Err(WriteError::File { .. })));
        assert!(matches!(small().create(Path::new("/"), true), Err(WriteError::File { .. })));
        let absent = dir.path().join("no/such/model.gguf");
        assert!(matches!(small().create(&absent, true), Err(WriteError::File { .. })));
    }

    #[test]
    fn a_file_larger_than_the_disk_is_refused_at_once() {
        let (dir, path) = scratch();
        let mut w = GgufWriter::new();
        w.tensor("huge", &[1 << 20, 1 << 30], f32_format());
        let error = w.create(&path, false).unwrap_err();
        assert!(
            matches!(&error, WriteError::NoSpace { needed, free, .. } if needed > free && *needed > 1 << 52),
            "{error}"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_disk_that_fills_up_is_said() {
        let (_dir, path) = scratch();
        let part = PartFile::create(&path, false, 1000).unwrap();
        let full = part.error(std::io::ErrorKind::StorageFull.into());
        assert!(matches!(full, WriteError::NoSpace { needed: 1000, .. }));
        let other = part.error(std::io::Error::other("EIO"));
        assert!(matches!(other, WriteError::File { .. }));
    }

    #[test]
    fn impossible_declarations_are_refused() {
        type Declare = fn(&mut GgufWriter) -> &mut GgufWriter;
        type Check = fn(&HeaderError) -> bool;
        let cases: [(Declare, Check); 9] = [
            (|w| w.tensor("t", &[], f32_format()), |e| matches!(e, HeaderError::Dimensions { .. })),
            (|w| w.tensor("t", &[1; 5], f32_format()), |e| matches!(e, HeaderError::Dimensions { .. })),
            (|w| w.tensor("t", &[0], f32_format()), |e| matches!(e, HeaderError::ZeroDimension { .. })),
            (|w| w.tensor("t", &[1 << 62], f32_format()), |e| matches!(e, HeaderError::Overflow { .. })),
            (|w| w.tensor("", &[1], f32_format()), |e| matches!(e, HeaderError::NameLength { .. })),
            (
                |w| w.tensor("t", &[1], f32_format()).tensor("t", &[1], f32_format()),
                |e| matches!(e, HeaderError::DuplicateTensor { .. }),
            ),
            (|w| w.set("general.alignment", 48u32), |e| matches!(e, HeaderError::Alignment { .. })),
            (|w| w.set("general.alignment", "x"), |e| matches!(e, HeaderError::Alignment { .. })),
            (|w| w.set(&"k".repeat(70_000), 1u8), |e| matches!(e, HeaderError::NameLength { .. })),
        ];
        for (i, (declare, expected)) in cases.into_iter().enumerate() {
            let mut w = GgufWriter::new();
            declare(&mut w);
            match w.in_memory().unwrap_err() {
                WriteError::Header(e) => assert!(expected(&e), "case {i}: {e}"),
                e => panic!("case {i}: {e}"),
            }
        }
    }

    #[test]
    fn sums_of_sizes_do_not_overflow() {
        let mut w = GgufWriter::new();
        for name in ["a", "b", "c", "d", "e"] {
            w.tensor(name, &[1 << 60], f32_format());
        }
        assert!(matches!(w.n_bytes(), Err(WriteError::Header(_))));
    }

    #[test]
    fn data_may_come_in_any_chunks() {
        let whole = |chunk: usize| {
            let mut out = small().set("general.alignment", 4096u32).in_memory().unwrap();
            small_data().chunks(chunk).for_each(|c| out.write(c).unwrap());
            out.finish().unwrap()
        };
        let expected = whole(1000);
        assert_eq!(expected.len() as u64, small().set("general.alignment", 4096u32).n_bytes().unwrap());
        for chunk in [1, 5, 24, 25, 55] {
            assert_eq!(whole(chunk), expected);
        }
        let gguf = Gguf::from_static("m", expected.leak()).unwrap();
        assert_eq!(gguf.tensor("b").unwrap().offset, 8192);
        assert_eq!(read_f32s(&gguf, "b")[7], 107.);
    }

    #[test]
    fn another_files_keys_are_taken_over() {
        let m = metadata(|w| {
            w.set("a", vec![vec!["x", "y"], vec![]]).set("split.count", 1u16).set("b", -4i64);
        });
        let mut w = GgufWriter::new();
        w.set("b", "old").set_all(&m);
        let copy = parse(w.in_memory().unwrap().finish().unwrap()).unwrap().metadata;
        assert_eq!(copy.get("a"), m.get("a"));
        assert_eq!(copy.get("b"), Some(Value::I64(-4)));
        assert!(!copy.contains("split.count"));
    }
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
