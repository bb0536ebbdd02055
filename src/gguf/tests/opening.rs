//! What isn't opened, and why.

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
