//! The file of results: whole lines only, one for each request, whatever happened to the program that wrote it.

use super::{BatchError, json_error, text_of};
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
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
    /// A file that isn't there yet.
    New(PathBuf),
    /// The file, and its length in whole lines.
    File(File, u64),
    Stdout,
}

/// What a file of results holds already.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// By the `custom_id` of its request.
    pub custom_ids: HashMap<String, Known>,
    /// The ids of results that have no `custom_id`; they are errors.
    pub ids: HashSet<String>,
}

/// A result that is there.
#[derive(Debug)]
pub(super) struct Known {
    /// Made from the request that it answers.
    pub id: String,
    /// Whether it's an error.
    pub failed: bool,
}

/// What is read back of a line.
#[derive(Deserialize)]
struct ResultLine {
    id: String,
    custom_id: Option<String>,
    #[serde(rename = "response")]
    _response: serde::de::IgnoredAny,
    error: Option<serde::de::IgnoredAny>,
}

/// What every line of ours begins with.
const BEGINNING: &[u8] = br#"{"id":"batch_"#;

impl Output {
    /// The standard output.
    pub fn stdout() -> Self {
        Output { to: To::Stdout, name: "the standard output".into(), synced: Instant::now() }
    }

    /// A file, in which nothing is changed yet. If it holds results already they are kept when `resume` is set, and it's an error
    /// otherwise.
    pub fn file(path: &Path, resume: bool) -> Result<(Self, Done), BatchError> {
        let name = path.display().to_string();
        let io = |source| BatchError::Io { name: name.clone(), source };
        // Nothing is read back from a pipe: whoever held its reading end wouldn't notice that its reader has gone.
        let regular = path.metadata().map_or(true, |about| about.is_file());
        let file = match OpenOptions::new().read(regular).write(true).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                if !folder.is_dir() {
                    return Err(BatchError::NoFolder { name, folder: folder.display().to_string() });
                }
                let to = To::New(path.into());
                return Ok((Output { to, name, synced: Instant::now() }, Done::default()));
            }
            Err(e) => return Err(io(e)),
        };
        lock(&file, &name)?;
        let about = file.metadata().map_err(io)?;
        if about.is_file() && !resume && about.len() > 0 {
            return Err(BatchError::Exists { name });
        }
        let (done, len) = if about.is_file() { read_back(&file, &name)? } else { Default::default() };
        Ok((Output { to: To::File(file, len), name, synced: Instant::now() }, done))
    }

    /// Makes the file, or takes off a last line that was only half written. From here on it may be written to.
    pub fn begin(&mut self) -> Result<(), BatchError> {
        match &mut self.to {
            To::Stdout => Ok(()),
            To::New(path) => match OpenOptions::new().write(true).create_new(true).open(path) {
                Ok(file) => {
                    lock(&file, &self.name)?;
                    self.to = To::File(file, 0);
                    Ok(())
                }
                // It wasn't there when the job was opened.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(BatchError::Busy { name: self.name.clone() }),
                Err(e) => Err(self.error(e)),
            },
            To::File(file, len) => {
                let mut cut = || -> std::io::Result<()> {
                    if file.metadata()?.is_file() {
                        file.set_len(*len)?;
                        file.seek(SeekFrom::Start(*len))?;
                    }
                    Ok(())
                };
                cut().map_err(|e| self.error(e))
            }
        }
    }

    /// Writes a line, with its end, at once.
    pub fn write(&mut self, line: &str) -> Result<(), BatchError> {
        let result = match &mut self.to {
            To::Stdout => {
                let mut out = std::io::stdout().lock();
                out.write_all(line.as_bytes()).and_then(|()| out.flush())
            }
            To::New(_) => Err(ErrorKind::NotFound.into()),
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
            To::Stdout | To::New(_) => Ok(()),
        }
    }

    fn error(&self, source: std::io::Error) -> BatchError {
        let name = self.name.clone();
        match (source.kind(), &self.to) {
            (ErrorKind::StorageFull | ErrorKind::QuotaExceeded, To::File(..) | To::New(_)) => BatchError::Full { name },
            _ => BatchError::Io { name, source },
        }
    }
}

/// Sees to it that no other run writes to the file.
fn lock(file: &File, name: &str) -> Result<(), BatchError> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(BatchError::Busy { name: name.into() }),
        // Not every file system has locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// Reads results back: which there are, and the length up to the last. What comes after it can be taken off if it's the beginning of a
/// result; anything else is somebody's and an error.
fn read_back(file: &File, name: &str) -> Result<(Done, u64), BatchError> {
    let io = |source| BatchError::Io { name: name.into(), source };
    let (mut done, mut len, mut at, mut line) = (Done::default(), 0, 0, Vec::new());
    let mut input = BufReader::with_capacity(1 << 18, file);
    for number in 1.. {
        line.clear();
        let n = input.read_until(b'\n', &mut line).map_err(io)?;
        if n == 0 {
            break;
        }
        at += n as u64;
        let text = text_of(&line);
        // After a loss of power the end of a file may hold what was never written.
        if text.is_empty() || text.iter().all(|&b| b == 0) {
            continue;
        }
        let whole = line.last() == Some(&b'\n');
        match serde_json::from_slice::<ResultLine>(text) {
            Ok(ResultLine { id, custom_id, error, .. }) if whole => {
                match custom_id {
                    Some(custom_id) => {
                        drop(done.custom_ids.insert(custom_id, Known { id, failed: error.is_some() }));
                    }
                    None => drop(done.ids.insert(id)),
                }
                len = at;
            }
            result => {
                let last = input.fill_buf().map_err(io)?.is_empty();
                if last && (text.starts_with(BEGINNING) || BEGINNING.starts_with(text)) {
                    break;
                }
                let why = result.err().map_or("its end is missing".into(), |e| json_error(&e));
                return Err(BatchError::NotResults { name: name.into(), number, why });
            }
        }
    }
    Ok((done, len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(n: usize) -> String {
        let line = |i| {
            let error = if i % 3 == 0 { r#"{"code":"x"}"# } else { "null" };
            format!("{{\"id\":\"batch_req_{i}\",\"custom_id\":\"é\\n{i}\",\"response\":{{}},\"error\":{error}}}\n")
        };
        (0..n).map(line).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        /// Cut anywhere, the whole lines are kept and known, and writing goes on after them. What nobody of us wrote stays.
        #[test]
        fn a_cut_file_is_repaired(
            n in 0usize..6,
            cut in 0usize..500,
            junk in prop::option::of(prop::sample::select(vec!["x", "dear diary\n", "\n \n", "{\"id\":\"batch_req_\0\0\n", "\0\0", "{\"a\":1}\n", "{\"id\":\"1\"}\n"]))
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out.jsonl");
            let text = lines(n);
            let mut bytes = text.as_bytes()[..cut.min(text.len())].to_vec();
            let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
            let n_whole = bytes.iter().filter(|&&b| b == b'\n').count();
            if let Some(junk) = junk {
                bytes.truncate(whole);
                bytes.extend(junk.bytes());
            }
            std::fs::write(&path, &bytes).unwrap();
            let result = Output::file(&path, true);
            prop_assert_eq!(&std::fs::read(&path).unwrap(), &bytes, "nothing is changed by looking");
            if ["x", "dear diary\n", "{\"a\":1}\n", "{\"id\":\"1\"}\n"].contains(&junk.unwrap_or_default()) {
                let refused = matches!(result, Err(BatchError::NotResults { .. }));
                prop_assert!(refused);
                return Ok(());
            }
            let (mut out, done) = result.unwrap();
            prop_assert_eq!(done.custom_ids.len(), n_whole);
            prop_assert_eq!(done.custom_ids.values().filter(|known| known.failed).count(), n_whole.div_ceil(3));
            out.begin().unwrap();
            out.write("{\"id\":\"new\"}\n").unwrap();
            let want = format!("{}{{\"id\":\"new\"}}\n", &text[..whole]);
            prop_assert_eq!(std::fs::read_to_string(&path).unwrap(), want);
        }
    }

    #[test]
    fn a_new_file_is_made_when_the_job_begins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        let (mut out, _) = Output::file(&path, false).unwrap();
        assert!(!path.exists());
        let (mut other, _) = Output::file(&path, false).unwrap();
        out.begin().unwrap();
        out.write("a\n").unwrap();
        assert!(matches!(other.begin(), Err(BatchError::Busy { .. })));
        let e = Output::file(&dir.path().join("no/out"), false).err().unwrap().to_string();
        assert!(e.contains("no doesn't exist: make it first"), "{e}");
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_result() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        std::fs::write(&path, format!("\u{feff}{}", lines(2))).unwrap();
        assert_eq!(Output::file(&path, true).unwrap().1.custom_ids.len(), 2);
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
