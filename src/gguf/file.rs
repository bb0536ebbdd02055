//! A model's files, opened: one header, all tensors, positioned reads.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::error::{GgufError, HeaderError, KeyError};
use super::header::{self, Header, MAX_HEADER_BYTES};
use super::metadata::Metadata;
use super::read::{ReadError, read_full_at};
use super::split::ShardName;
use super::tensor::Tensor;

/// An opened model: its metadata, where its tensors are, and reads of their bytes.
///
/// It can be shared between threads; reads don't move any position and don't wait for each other.
#[derive(Debug)]
pub struct Gguf {
    name: String,
    version: u32,
    metadata: Metadata,
    tensors: Vec<Tensor>,
    by_name: HashMap<Arc<str>, usize>,
    files: Vec<ModelFile>,
}

/// One of the files that a model consists of.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    len: u64,
    identity: Option<Identity>,
    data: Data,
    /// Held as long as it's open.
    _in_use: Option<InUse>,
}

/// The device and the inode of each file that a model of this process reads.
static IN_USE: Mutex<Vec<(u64, u64)>> = Mutex::new(Vec::new());

/// That a file is in use: no output may take its place.
#[derive(Debug)]
struct InUse(u64, u64);

impl InUse {
    fn new(m: &fs::Metadata) -> Self {
        IN_USE.lock().unwrap_or_else(|e| e.into_inner()).push((m.dev(), m.ino()));
        InUse(m.dev(), m.ino())
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut all = IN_USE.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(i) = all.iter().position(|f| *f == (self.0, self.1)) {
            all.swap_remove(i);
        }
    }
}

/// Whether this is a file of a model that this process reads.
pub(super) fn in_use(path: &Path) -> bool {
    let Ok(m) = fs::metadata(path) else { return false };
    IN_USE.lock().unwrap_or_else(|e| e.into_inner()).contains(&(m.dev(), m.ino()))
}

/// What changes when a file's bytes do, or when another file takes its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    dev: u64,
    ino: u64,
    len: u64,
    /// Seconds and nanoseconds.
    mtime: (i64, i64),
}

/// The identity of an open file, if the system tells.
pub(super) fn identity(file: &File) -> Option<Identity> {
    let m = file.metadata().ok()?;
    Some(Identity { dev: m.dev(), ino: m.ino(), len: m.len(), mtime: (m.mtime(), m.mtime_nsec()) })
}

#[derive(Debug)]
enum Data {
    File(File),
    Static(&'static [u8]),
}

impl ModelFile {
    /// Where it is; for a model inside the program its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes when it was opened.
    pub fn n_bytes(&self) -> u64 {
        self.len
    }

    pub(super) fn identity(&self) -> Option<Identity> {
        self.identity
    }

    /// Its bytes, if it is inside the program and not on a disk.
    pub fn in_memory(&self) -> Option<&'static [u8]> {
        match self.data {
            Data::Static(bytes) => Some(bytes),
            Data::File(_) => None,
        }
    }

    fn read_full_at(&self, buf: &mut [u8], offset: u64) -> Result<(), ReadError> {
        match &self.data {
            Data::File(file) => read_full_at(|buf, at| file.read_at(buf, at), buf, offset),
            Data::Static(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = bytes.get(from..).unwrap_or_default();
                let rest = rest.get(..buf.len()).ok_or(ReadError::Eof(self.len))?;
                buf.copy_from_slice(rest);
                Ok(())
            }
        }
    }
}

impl Gguf {
    /// Opens a model file; of a model in several shards any of them, and the others with it.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        Self::open_as(path, Extent::Whole)
    }

    /// Opens what is there of a model whose download isn't finished: the header says what tensors will be where.
    /// Reading one that isn't there yet is an error.
    pub fn open_header(path: &Path) -> Result<Self, GgufError> {
        Self::open_as(path, Extent::Header)
    }

    fn open_as(path: &Path, extent: Extent) -> Result<Self, GgufError> {
        let (file, header) = open_one(path, extent)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        match split_key(path, &header, "split.count")? {
            None | Some(0 | 1) => Self::assemble(name, vec![(file, header)]),
            Some(count) => Self::assemble(name, open_shards(path, (file, header), count, extent)?),
        }
    }

    /// A model that is part of the program. Nothing of it is copied.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self, GgufError> {
        let len = bytes.len() as u64;
        let header =
            Header::parse(Cow::Borrowed(bytes), len).map_err(|error| GgufError::Header { path: name.into(), error })?;
        let file = ModelFile { path: name.into(), len, identity: None, data: Data::Static(bytes), _in_use: None };
        Self::assemble(name.into(), vec![(file, header)])
    }

    /// Joins the shards: the metadata is the first one's.
    fn assemble(name: String, shards: Vec<(ModelFile, Header)>) -> Result<Self, GgufError> {
        let mut files = Vec::with_capacity(shards.len());
        let mut tensors = Vec::new();
        let mut first = None;
        for (i, (file, header)) in shards.into_iter().enumerate() {
            tensors.extend(header.tensors.into_iter().map(|t| Tensor { file: i, ..t }));
            first.get_or_insert((header.version, header.metadata));
            files.push(file);
        }
        let (version, metadata) = first.expect("a model has at least one file");
        let mut by_name = HashMap::with_capacity(tensors.len());
        for (i, tensor) in tensors.iter().enumerate() {
            if let Some(other) = by_name.insert(tensor.name.clone(), i) {
                let file_of = |i: usize| files[tensors[i].file].path.clone();
                return Err(GgufError::TensorInTwoShards {
                    tensor: tensor.name.to_string(),
                    first: file_of(other),
                    second: file_of(i),
                });
            }
        }
        Ok(Self { name, version, metadata, tensors, by_name, files })
    }

    /// The name of the file that was opened, or of the model inside the program.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Keys and values.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensor_index(name).map(|i| &self.tensors[i])
    }

    /// Where a tensor is in [`Gguf::tensors`].
    pub fn tensor_index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The files that [`Tensor::file`] counts.
    pub fn files(&self) -> &[ModelFile] {
        &self.files
    }

    /// Bytes of all files together.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(ModelFile::n_bytes).sum()
    }

    /// Reads bytes of one of this model's tensors, from `offset` in it on, as many as `buf` holds.
    pub fn read_at(&self, tensor: &Tensor, offset: u64, buf: &mut [u8]) -> Result<(), GgufError> {
        let from = self.place_of(tensor, offset, buf.len())?;
        let file = &self.files[tensor.file];
        file.read_full_at(buf, from).map_err(|e| match e {
            ReadError::Eof(end) => GgufError::Shrunk { path: file.path.clone(), tensor: tensor.name.to_string(), end },
            ReadError::Io(error) => self.read_error(tensor, from, buf.len(), error),
        })?;
        self.check_unchanged(tensor)
    }

    /// Where bytes of a tensor lie in its file.
    pub(super) fn place_of(&self, tensor: &Tensor, offset: u64, len: usize) -> Result<u64, GgufError> {
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= tensor.n_bytes);
        if inside {
            return Ok(tensor.offset + offset);
        }
        Err(GgufError::OutsideTensor { tensor: tensor.name.to_string(), offset, len, n_bytes: tensor.n_bytes })
    }

    pub(super) fn read_error(&self, tensor: &Tensor, offset: u64, len: usize, error: io::Error) -> GgufError {
        let path = self.files[tensor.file].path.clone();
        GgufError::Read { path, tensor: tensor.name.to_string(), offset, len, error }
    }

    /// Whether the file of a tensor is still what was opened: one that is written over gives bytes of two models.
    pub(super) fn check_unchanged(&self, tensor: &Tensor) -> Result<(), GgufError> {
        let f = &self.files[tensor.file];
        match &f.data {
            Data::File(file) if identity(file) != f.identity => {
                Err(GgufError::Changed { path: f.path.clone(), tensor: tensor.name.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// A file of [`Gguf::files`].
    pub(super) fn file(&self, i: usize) -> Option<&ModelFile> {
        self.files.get(i)
    }
}

/// Experts and rows of the embedding are read here and there: what comes after them isn't wanted. Where the device reads 8 MiB
/// ahead, a mapping-like read of 1 MiB costs nine.
fn read_no_more_than_asked(file: &File) {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random);
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let _ = file;
}

/// How much of a file must be there.
#[derive(Clone, Copy, PartialEq)]
enum Extent {
    /// All of it.
    Whole,
    /// Its header.
    Header,
}

/// Opens one file and parses its header.
fn open_one(path: &Path, extent: Extent) -> Result<(ModelFile, Header), GgufError> {
    let io = |error| GgufError::Open { path: path.into(), error };
    let bad = |error| GgufError::Header { path: path.into(), error };
    // Asked before it is opened: opening a pipe would wait for its other end.
    reject_other_kinds(path, &fs::metadata(path).map_err(io)?)?;
    let file = File::open(path).map_err(io)?;
    read_no_more_than_asked(&file);
    let metadata = file.metadata().map_err(io)?;
    let len = metadata.len();
    let data_len = if extent == Extent::Whole { len } else { i64::MAX as u64 };
    let header = read_header(|buf, at| file.read_at(buf, at), len, data_len).map_err(|e| match e {
        HeaderReadError::Header(e) => bad(e),
        HeaderReadError::Read(ReadError::Io(e)) => io(e),
        // Another process has cut it meanwhile.
        HeaderReadError::Read(ReadError::Eof(end)) => bad(HeaderError::Truncated { len: end, what: "the header" }),
    })?;
    let identity = identity(&file);
    let in_use = Some(InUse::new(&metadata));
    Ok((ModelFile { path: path.into(), len, identity, data: Data::File(file), _in_use: in_use }, header))
}

/// The first read of a header: more than most have.
const FIRST_READ: usize = 1 << 20;

/// Why a header wasn't had.
#[derive(Debug)]
pub(super) enum HeaderReadError {
    /// Its bytes.
    Header(HeaderError),
    /// The disk, or the file's end where more was promised.
    Read(ReadError),
}

/// A header through `read`, a positioned read, of a file of `len` bytes; its tensors must lie within `data_len`. As much is read as
/// it turns out to be long, twice that at most: never through a mapping, where a failing disk or a cut file would be a signal.
pub(super) fn read_header(
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
    len: u64,
    data_len: u64,
) -> Result<Header, HeaderReadError> {
    let most = len.min(MAX_HEADER_BYTES as u64) as usize;
    let mut bytes = Vec::new();
    loop {
        let have = bytes.len();
        bytes.resize((have * 2).clamp(FIRST_READ.min(most), most), 0);
        read_full_at(&mut read, &mut bytes[have..], have as u64).map_err(HeaderReadError::Read)?;
        match header::scan(&bytes, len, data_len) {
            Ok(found) => {
                bytes.truncate(found.n_bytes);
                bytes.shrink_to_fit();
                return Ok(Header::new(Cow::Owned(bytes), found));
            }
            // It's longer than what is here.
            Err(HeaderError::TooLarge { .. }) if bytes.len() < most => {}
            Err(e) => return Err(HeaderReadError::Header(e)),
        }
    }
}

fn reject_other_kinds(path: &Path, metadata: &fs::Metadata) -> Result<(), GgufError> {
    if metadata.is_file() {
        return Ok(());
    }
    let what = if metadata.is_dir() { "a directory" } else { "a pipe or a device" };
    Err(GgufError::NotAFile { path: path.into(), what })
}

fn split_key(path: &Path, header: &Header, key: &str) -> Result<Option<u64>, GgufError> {
    header.metadata.u64(key).map_err(|error: KeyError| GgufError::Key { path: path.into(), error })
}

/// Opens the shards beside one that is open, in order.
fn open_shards(
    path: &Path,
    opened: (ModelFile, Header),
    count: u64,
    extent: Extent,
) -> Result<Vec<(ModelFile, Header)>, GgufError> {
    let name = ShardName::of(path)
        .filter(|name| u64::from(name.count) == count)
        .ok_or_else(|| GgufError::SplitName { path: path.into(), count })?;
    let missing = name.missing(path);
    if let Some(&no) = missing.first() {
        return Err(GgufError::MissingShard { path: name.sibling(path, no), missing, count: name.count });
    }
    let mut opened = Some(opened);
    let mut shards = Vec::new();
    for no in 1..=name.count {
        let shard = match opened.take_if(|_| no == name.no) {
            Some(shard) => shard,
            None => open_one(&name.sibling(path, no), extent)?,
        };
        expect_key(&shard, "split.no", u64::from(no - 1))?;
        expect_key(&shard, "split.count", count)?;
        shards.push(shard);
    }
    let n_tensors = shards.iter().map(|(_, header)| header.tensors.len() as u64).sum();
    if split_key(path, &shards[0].1, "split.tensors.count")?.is_some() {
        expect_key(&shards[0], "split.tensors.count", n_tensors)?;
    }
    Ok(shards)
}

fn expect_key((file, header): &(ModelFile, Header), key: &'static str, expected: u64) -> Result<(), GgufError> {
    let path = &file.path;
    match split_key(path, header, key)? {
        Some(found) if found == expected => Ok(()),
        Some(found) => Err(GgufError::SplitMismatch { path: path.clone(), key, found, expected }),
        None => Err(GgufError::Key { path: path.clone(), error: KeyError::Missing { key: key.into() } }),
    }
}
