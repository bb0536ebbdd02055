//! Reading tensors: through the page cache and past it, from files and disks that fail.

use std::io;

use super::*;
use crate::gguf::file::{HeaderReadError, read_header};
use crate::gguf::read::{ReadError, read_full_at};

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

/// Direct reads of 2 blocks and 100 bytes that answer one after the other as they are told to; how many bytes are there then.
fn blocks(answers: &[io::Result<usize>]) -> io::Result<usize> {
    let mut answers = answers.iter();
    let mut end = 4096;
    let mut buf = vec![0; 3 * 4096];
    let read = |buf: &mut [u8], at| {
        assert_eq!((at, buf.len()), (end, 4096 * 4 - end as usize), "it goes on where it was");
        match answers.next().expect("no read after the last one that was needed") {
            Ok(n) => {
                end += *n as u64;
                Ok(*n)
            }
            Err(e) => Err(e.kind().into()),
        }
    };
    let have = crate::gguf::direct::read_blocks(read, &mut buf, 4096, 2 * 4096 + 100);
    assert!(answers.next().is_none(), "it stopped too early");
    have
}

#[test]
fn direct_reads_go_on_after_short_and_interrupted_ones() {
    let interrupted = || Err(io::ErrorKind::Interrupted.into());
    assert_eq!(blocks(&[Ok(3 * 4096)]).unwrap(), 3 * 4096);
    assert_eq!(blocks(&[interrupted(), Ok(4096), interrupted(), Ok(4096), Ok(4096)]).unwrap(), 3 * 4096);
    // Cut by the file's end, behind what is needed or before.
    assert_eq!(blocks(&[Ok(2 * 4096 + 200)]).unwrap(), 2 * 4096 + 200);
    assert_eq!(blocks(&[Ok(4096), Ok(0)]).unwrap(), 4096);
    // In the middle of a block, and where direct reads turn out not to be had: the rest is read otherwise.
    assert_eq!(blocks(&[Ok(4096), Ok(77)]).unwrap(), 4096 + 77);
    assert_eq!(blocks(&[Err(io::ErrorKind::InvalidInput.into())]).unwrap(), 0);
    assert_eq!(blocks(&[Ok(4096), Err(io::ErrorKind::Other.into())]).unwrap_err().kind(), io::ErrorKind::Other);
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

/// A file whose header is longer than what is read of it at first.
fn long_header() -> Vec<u8> {
    let mut w = small();
    w.set("long", "x".repeat(3 << 20));
    let mut out = w.in_memory().unwrap();
    out.write(&small_data()).unwrap();
    let mut file = out.finish().unwrap();
    file.resize(file.len() + (9 << 20), 0);
    file
}

#[test]
fn a_header_is_read_as_far_as_it_goes() {
    let file = long_header();
    let len = file.len() as u64;
    let mut n_read = 0;
    // Short and interrupted reads, too.
    let mut calls = 0;
    let read = |buf: &mut [u8], at: u64| {
        calls += 1;
        if calls % 3 == 0 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let n = buf.len().min(700_000);
        buf[..n].copy_from_slice(&file[at as usize..][..n]);
        n_read += n;
        Ok(n)
    };
    let header = read_header(read, len, len).unwrap();
    assert_eq!(header.metadata.str("long").unwrap().map(str::len), Some(3 << 20));
    assert!(n_read < 2 * header.n_bytes, "{n_read} bytes read for a header of {}", header.n_bytes);
    assert!(matches!(read_header(|_, _| Ok(0), 0, 0), Err(HeaderReadError::Header(HeaderError::Empty))));
}

#[test]
fn a_disk_that_fails_within_the_header_is_an_error() {
    let file = long_header();
    let len = file.len() as u64;
    for good in [0, 5, 1 << 20, 2 << 20] {
        let end = |buf: &mut [u8], at: u64| {
            let n = buf.len().min(good - (at as usize).min(good));
            buf[..n].copy_from_slice(&file[at as usize..][..n]);
            Ok(n)
        };
        let cut = read_header(end, len, len).err();
        assert!(matches!(cut, Some(HeaderReadError::Read(ReadError::Eof(at))) if at == good as u64), "{cut:?}");
        let fail =
            |buf: &mut [u8], at| end(buf, at).and_then(|n| if n == 0 { Err(io::Error::other("EIO")) } else { Ok(n) });
        let failed = read_header(fail, len, len).err();
        assert!(matches!(failed, Some(HeaderReadError::Read(ReadError::Io(_)))), "{failed:?}");
    }
}
