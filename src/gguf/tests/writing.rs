//! Writing files.

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
fn a_pipe_is_not_replaced_and_a_link_stays_one() {
    let (dir, path) = scratch();
    let (file, pipe) = (dir.path().join("file"), dir.path().join("pipe"));
    std::os::unix::fs::symlink(&file, &path).unwrap();
    fs::write(&file, b"old").unwrap();
    assert!(matches!(small().create(&path, false), Err(WriteError::Exists { .. })));
    let mut out = small().create(&path, true).unwrap();
    out.write(&small_data()).unwrap();
    out.finish().unwrap();
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink() && Gguf::open(&file).is_ok());
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(small().create(&pipe, true), Err(WriteError::NotAFile { .. })));
    std::os::unix::fs::symlink(&pipe, dir.path().join("to the pipe")).unwrap();
    assert!(matches!(small().create(&dir.path().join("to the pipe"), true), Err(WriteError::NotAFile { .. })));
    assert!(!fs::metadata(&pipe).unwrap().is_file());
}

#[test]
fn a_model_in_use_is_not_replaced() {
    let (dir, path) = scratch();
    write(&small(), &path, &small_data());
    let model = Gguf::open(&path).unwrap();
    let again = Gguf::open(&path).unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for target in [&path, &link, &dir.path().join("./model.gguf")] {
        assert!(matches!(PartFile::replace(target), Err(WriteError::Model { .. })), "{target:?}");
        assert!(matches!(small().create(target, true), Err(WriteError::Model { .. })), "{target:?}");
    }
    drop(again);
    assert!(PartFile::replace(&path).is_err(), "one of two still reads it");
    drop(model);
    assert!(PartFile::replace(&path).is_ok());
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
