//! The file of results: whole lines only, one for each request, whatever happened to the program that wrote it.

use super::BatchError;
use serde::Deserialize;
use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// How often the results are made safe from a loss of power. A crash of the program alone loses nothing.
const SYNC: Duration = Duration::from_secs(5);

/// Where results go.
pub(super) struct Output {
    to: To,
    name: String,
    synced: Instant,
}

enum To {
    /// The file, and its length in whole lines.
    File(File, u64),
    Stdout,
}

/// What a file of results holds already.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// Whose results there are: `custom_id`s, and ids of results that have none.
    pub keys: HashSet<String>,
    /// Those among them that are errors.
    pub n_failed: u64,
}

/// What is read back of a result.
#[derive(Deserialize)]
struct Known {
    id: String,
    custom_id: Option<String>,
    error: Option<serde::de::IgnoredAny>,
}

impl Output {
    /// The standard output.
    pub fn stdout() -> Self {
        Output { to: To::Stdout, name: "the standard output".into(), synced: Instant::now() }
    }

    /// A file. If it holds results already they are kept when `resume` is set, and it's an error otherwise. A last line that was only
    /// half written is taken off.
    pub fn file(path: &Path, resume: bool) -> Result<(Self, Done), BatchError> {
        let name = path.display().to_string();
        let io = |source| BatchError::Io { name: name.clone(), source };
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(BatchError::Busy { name }),
            // Not every file system has locks.
            Err(TryLockError::Error(_)) => {}
        }
        let is_file = file.metadata().map_err(io)?.is_file();
        if is_file && !resume && file.metadata().map_err(io)?.len() > 0 {
            return Err(BatchError::Exists { name });
        }
        let (mut done, mut len) = (Done::default(), 0);
        if is_file {
            (done, len) = read_back(&file, &name)?;
            file.set_len(len).and_then(|()| file.seek(SeekFrom::Start(len))).map_err(io)?;
        }
        Ok((Output { to: To::File(file, len), name, synced: Instant::now() }, done))
    }

    /// Writes a line, with its end, at once.
    pub fn write(&mut self, line: &str) -> Result<(), BatchError> {
        let result = match &mut self.to {
            To::Stdout => {
                let mut out = std::io::stdout().lock();
                out.write_all(line.as_bytes()).and_then(|()| out.flush())
            }
            To::File(file, len) => {
                file.write_all(line.as_bytes()).map(|()| *len += line.len() as u64).inspect_err(|_| {
                    // A full disk: only whole lines stay, if they can be cut.
                    drop(file.set_len(*len));
                })
            }
        };
        result.map_err(|e| self.error(e))?;
        if self.synced.elapsed() > SYNC { self.sync() } else { Ok(()) }
    }

    /// Makes what was written safe from a loss of power.
    pub fn sync(&mut self) -> Result<(), BatchError> {
        self.synced = Instant::now();
        match &self.to {
            To::File(file, _) => match file.sync_data() {
                // Pipes and devices can't.
                Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(()),
                result => result.map_err(|e| self.error(e)),
            },
            To::Stdout => Ok(()),
        }
    }

    fn error(&self, source: std::io::Error) -> BatchError {
        let name = self.name.clone();
        match (source.kind(), &self.to) {
            (ErrorKind::StorageFull | ErrorKind::QuotaExceeded, To::File(..)) => BatchError::Full { name },
            _ => BatchError::Io { name, source },
        }
    }
}

/// Reads results back: which there are, and the length of the whole lines.
fn read_back(file: &File, name: &str) -> Result<(Done, u64), BatchError> {
    let io = |source| BatchError::Io { name: name.into(), source };
    let (mut done, mut len, mut line) = (Done::default(), 0, Vec::new());
    let mut input = BufReader::with_capacity(1 << 18, file);
    for number in 1.. {
        line.clear();
        let n = input.read_until(b'\n', &mut line).map_err(io)?;
        let whole = line.last() == Some(&b'\n');
        if n == 0 || !whole {
            break;
        }
        match serde_json::from_slice::<Known>(&line) {
            Ok(known) => {
                done.n_failed += u64::from(known.error.is_some());
                done.keys.insert(known.custom_id.unwrap_or(known.id));
            }
            // After a loss of power the end of a file may hold what was never written. In the middle that's something else.
            Err(_) if input.fill_buf().map_err(io)?.is_empty() => break,
            Err(e) => return Err(BatchError::NotResults { name: name.into(), number, why: e.to_string() }),
        }
        len += n as u64;
    }
    Ok((done, len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(n: usize) -> String {
        let error = |i| if i % 3 == 0 { r#"{"code":"x"}"# } else { "null" };
        (0..n).map(|i| format!("{{\"id\":\"r{i}\",\"custom_id\":\"é\\n{i}\",\"error\":{}}}\n", error(i))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Cut anywhere, the whole lines are kept and known, and writing goes on after them.
        #[test]
        fn a_cut_file_is_repaired(n in 0usize..6, cut in 0usize..300, junk in prop::option::of("[a-z]{1,9}")) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out.jsonl");
            let text = lines(n);
            let mut bytes = text.as_bytes()[..cut.min(text.len())].to_vec();
            let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
            let n_whole = bytes.iter().filter(|&&b| b == b'\n').count();
            if let Some(junk) = junk {
                bytes.truncate(whole);
                bytes.extend(junk.bytes().chain(*b"\n"));
            }
            std::fs::write(&path, &bytes).unwrap();
            let (mut out, done) = Output::file(&path, true).unwrap();
            prop_assert_eq!(done.keys.len(), n_whole);
            prop_assert_eq!(done.n_failed as usize, n_whole.div_ceil(3));
            out.write("{\"id\":\"new\"}\n").unwrap();
            let want = format!("{}{{\"id\":\"new\"}}\n", &text[..whole]);
            prop_assert_eq!(std::fs::read_to_string(&path).unwrap(), want);
        }
    }

    #[test]
    fn other_peoples_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        std::fs::write(&path, "dear diary\nsecond line\n").unwrap();
        let error = |resume| Output::file(&path, resume).err().unwrap().to_string();
        assert!(error(false).contains("--resume"), "{}", error(false));
        assert!(error(true).contains("line 1"), "{}", error(true));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "dear diary\nsecond line\n");
        std::fs::write(&path, "").unwrap();
        let _open = Output::file(&path, false).unwrap();
        assert!(error(true).contains("another"), "{}", error(true));
    }
}
