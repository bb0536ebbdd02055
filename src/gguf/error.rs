//! What can be wrong with a GGUF file, one enum for each concern.

use std::io;
use std::path::{Path, PathBuf};

use super::split;
use super::value::ValueType;
use crate::quant;

/// A model file can't be opened or its data can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The operating system doesn't open it.
    #[error("can't open {path:?}: {error}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("{path:?} is {what}, not a file: name the .gguf file itself")]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// The contents are wrong.
    #[error("{path:?}: {error}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: HeaderError,
    },
    /// A key that is needed to open the file has a wrong value.
    #[error("{path:?}: {error}")]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: KeyError,
    },
    /// The metadata says that there are more shards, the name doesn't say where.
    #[error(
        "{path:?} is one of {count} shards, but its name doesn't end in -0000N-of-{count:05}.gguf: \
         give all shards the names that they were published with"
    )]
    SplitName {
        /// The file.
        path: PathBuf,
        /// Shards according to its metadata.
        count: u64,
    },
    /// A shard isn't beside the others.
    #[error(
        "{path:?} is missing{}: the model is in {count} files, each of which says itself which tensors it has; get the rest, and \
         put all into one folder",
        split::more(missing)
    )]
    MissingShard {
        /// Where the first of them was expected.
        path: PathBuf,
        /// Their numbers, from 1.
        missing: Vec<u32>,
        /// How many there are, with those that aren't missing.
        count: u32,
    },
    /// A shard's metadata contradicts its name or the other shards.
    #[error("{path:?} doesn't belong to its neighbours: {key} is {found}, {expected} was expected")]
    SplitMismatch {
        /// The shard.
        path: PathBuf,
        /// The key that differs.
        key: &'static str,
        /// Its value.
        found: u64,
        /// What the name or the other shards say.
        expected: u64,
    },
    /// A tensor is in two shards.
    #[error("tensor {tensor:?} is in {first:?} and again in {second:?}")]
    TensorInTwoShards {
        /// The tensor.
        tensor: String,
        /// The shard that had it first.
        first: PathBuf,
        /// The shard that repeats it.
        second: PathBuf,
    },
    /// A read of tensor data failed.
    #[error("reading {len} bytes of tensor {tensor:?} at offset {offset} of {path:?} failed: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where the read began in the file.
        offset: u64,
        /// Bytes wanted.
        len: usize,
        /// What the system said.
        error: io::Error,
    },
    /// The file ended before the tensor's data did: it was cut after it was opened.
    #[error(
        "{path:?} ends at byte {end}, inside tensor {tensor:?}: \
         the file was changed or cut while it was in use"
    )]
    Shrunk {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where the file ended now.
        end: u64,
    },
    /// The file was written to after it was opened.
    #[error(
        "{path:?} was changed while it was in use (noticed reading tensor {tensor:?}): load the model again once the file is \
         complete"
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// The tensor that was being read.
        tensor: String,
    },
    /// A range that isn't inside the tensor was asked for.
    #[error("tensor {tensor:?} has {n_bytes} bytes; {len} from offset {offset} aren't all inside it")]
    OutsideTensor {
        /// The tensor.
        tensor: String,
        /// Offset in the tensor.
        offset: u64,
        /// Bytes wanted.
        len: usize,
        /// Bytes that it has.
        n_bytes: u64,
    },
}

/// The bytes of a header aren't a GGUF header that can be trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Nothing in it.
    #[error("the file is empty: download or convert it again")]
    Empty,
    /// Another kind of file.
    #[error("not a GGUF file: it begins with \"{begins}\"{hint}")]
    NotGguf {
        /// Its first bytes, escaped.
        begins: String,
        /// What it probably is, with what to do.
        hint: &'static str,
    },
    /// GGUF, but for machines of the other byte order.
    #[error("a big-endian GGUF file: only little-endian ones are read; convert the model again without --bigendian")]
    BigEndian,
    /// Another version of the format.
    #[error("GGUF version {version}: versions 2 and 3 are read; convert the model again with a current llama.cpp")]
    Version {
        /// The version in the file.
        version: u32,
    },
    /// The header goes on past the file's end.
    #[error("the file ends at byte {len}, inside {what}: it is incomplete, download or convert it again")]
    Truncated {
        /// The file's length.
        len: u64,
        /// What was being read.
        what: &'static str,
    },
    /// The header is longer than any real one.
    #[error("the header is longer than {max} bytes")]
    TooLarge {
        /// The limit.
        max: usize,
    },
    /// More keys or tensors than any real file has.
    #[error("{count} {what} are declared, at most {max} are read")]
    TooMany {
        /// Keys or tensors.
        what: &'static str,
        /// The count in the file.
        count: u64,
        /// The limit.
        max: u64,
    },
    /// A count or a length that the rest of the file can't hold.
    #[error(
        "{count} {what} are declared at byte {offset}, more than the {left} bytes that follow can hold: the file is incomplete or damaged"
    )]
    Count {
        /// What is counted.
        what: &'static str,
        /// The count in the file.
        count: u64,
        /// Where it stands.
        offset: u64,
        /// Bytes after it.
        left: u64,
    },
    /// A name that is empty or too long.
    #[error("the {what} at byte {offset} has {len} bytes, 1 to {max} are possible")]
    NameLength {
        /// A key or a tensor's name.
        what: &'static str,
        /// Where it stands.
        offset: u64,
        /// Its length.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// Text that isn't UTF-8.
    #[error("the {what} at byte {offset} isn't UTF-8")]
    NotUtf8 {
        /// A key, a tensor's name or a string value.
        what: &'static str,
        /// Where it stands.
        offset: u64,
    },
    /// A key stands twice.
    #[error("key {key:?} is there twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A type of value that doesn't exist.
    #[error("key {key:?} has a value of type {id}, which doesn't exist")]
    ValueType {
        /// The key.
        key: String,
        /// The number in the file.
        id: u32,
    },
    /// Arrays in arrays in arrays.
    #[error("key {key:?} nests arrays more than {max} deep")]
    Depth {
        /// The key.
        key: String,
        /// The limit.
        max: u32,
    },
    /// A truth value that is neither 0 nor 1.
    #[error("key {key:?} has a bool that is {value}, neither 0 nor 1")]
    Bool {
        /// The key.
        key: String,
        /// The byte.
        value: u8,
    },
    /// An alignment that can't be.
    #[error("general.alignment is {value}: a power of two up to {max} was expected")]
    Alignment {
        /// What the file says.
        value: String,
        /// The limit.
        max: u64,
    },
    /// A tensor's name stands twice.
    #[error("tensor {tensor:?} is there twice")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// Not one to four dimensions.
    #[error("tensor {tensor:?} has {n_dims} dimensions, 1 to 4 are possible")]
    Dimensions {
        /// The tensor.
        tensor: String,
        /// The count in the file.
        n_dims: u32,
    },
    /// A dimension of zero.
    #[error("tensor {tensor:?} is {shape:?}, with a dimension of zero")]
    ZeroDimension {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// More elements or bytes than can be counted.
    #[error("tensor {tensor:?} is {shape:?}, which overflows")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// A number format that isn't in the registry.
    #[error(
        "tensor {tensor:?} has number format {id}, which oncall doesn't read: it reads {}; convert or quantise the model to one of them",
        known_formats()
    )]
    Format {
        /// The tensor.
        tensor: String,
        /// The format's number.
        id: u32,
    },
    /// Rows that aren't whole blocks.
    #[error("tensor {tensor:?} has rows of {n_cols}, which isn't a multiple of {format}'s block of {block_len}")]
    Row {
        /// The tensor.
        tensor: String,
        /// Its row length.
        n_cols: u64,
        /// Its format.
        format: &'static str,
        /// The format's block.
        block_len: usize,
    },
    /// An offset that isn't aligned.
    #[error("tensor {tensor:?} is at offset {offset} of the data, which isn't a multiple of the alignment {alignment}")]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Its offset in the data section.
        offset: u64,
        /// The file's alignment.
        alignment: u64,
    },
    /// Data past the end of the file.
    #[error(
        "tensor {tensor:?} has {n_bytes} bytes from offset {offset} of the data, \
         past the file's end at byte {len}: the file is incomplete, download or convert it again"
    )]
    PastEnd {
        /// The tensor.
        tensor: String,
        /// Its offset in the data section.
        offset: u64,
        /// Its size.
        n_bytes: u64,
        /// The file's length.
        len: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {first:?} and {second:?} overlap in the file")]
    Overlap {
        /// The one that begins first.
        first: String,
        /// The one that begins inside it.
        second: String,
    },
}

/// Text from a file, or a file's name, on one line and without what a terminal would obey.
pub fn printable(text: &str) -> String {
    let escaped = text.escape_debug().to_string();
    // Nothing here stands between quotes.
    escaped.replace("\\\"", "\"").replace("\\'", "'").replace("\\\\", "\\")
}

/// The formats that are read, for a message.
fn known_formats() -> String {
    let names: Vec<_> = quant::FORMATS.iter().map(|f| f.name).collect();
    names.join(", ")
}

/// A key of the metadata isn't what the model needs.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// It isn't there.
    #[error("key {key:?} is missing: the file is incomplete or of another kind; convert the model again")]
    Missing {
        /// The key.
        key: String,
    },
    /// It has another type.
    #[error("key {key:?} is {found}, {wanted} was expected")]
    Type {
        /// The key.
        key: String,
        /// The type that it has.
        found: ValueType,
        /// What was expected.
        wanted: &'static str,
    },
    /// It, or an element of it, is an array of another type.
    #[error("key {key:?} is an array of which each element is {found}, {wanted} was expected")]
    ElementType {
        /// The key.
        key: String,
        /// The type of its elements.
        found: ValueType,
        /// What was expected.
        wanted: &'static str,
    },
    /// It is a number outside the range of its use.
    #[error("key {key:?} is {value}, which isn't {wanted}")]
    Range {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What was expected.
        wanted: &'static str,
    },
    /// It is an array of another length.
    #[error("key {key:?} has {found} elements, {wanted} were expected")]
    Length {
        /// The key.
        key: String,
        /// The length that it has.
        found: usize,
        /// What was expected.
        wanted: usize,
    },
}

/// A GGUF file can't be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// There is such a file and nobody said to replace it.
    #[error("{path:?} is there already: name another file, or say that it shall be overwritten")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A pipe, a device, and so on.
    #[error("{path:?} is a pipe or a device, and only a file can be replaced: name another file")]
    NotAFile {
        /// What has the name.
        path: PathBuf,
    },
    /// A model's file that this process has open.
    #[error("{path:?} is the model itself, which is in use: name another file")]
    Model {
        /// The file.
        path: PathBuf,
    },
    /// Another process is writing the same file.
    #[error("{path:?} is being written by another process")]
    Busy {
        /// The unfinished file.
        path: PathBuf,
    },
    /// The disk is full, or would be.
    #[error(
        "no space for {path:?}: it needs {needed} bytes, {free} are free on its disk; free some or name another disk"
    )]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// The whole file's size.
        needed: u64,
        /// What is free.
        free: u64,
    },
    /// The disk filled up under a file whose size nobody knew before.
    #[error("the disk of {path:?} is full: free some space or name another disk")]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("writing {path:?} failed: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A writer that isn't a file refused.
    #[error("writing failed at byte {at}: {error}")]
    Io {
        /// Bytes written before.
        at: u64,
        /// What the system said.
        error: io::Error,
    },
    /// The declared header couldn't be read again.
    #[error("not a valid GGUF header: {0}")]
    Header(#[from] HeaderError),
    /// More data than was declared.
    #[error("{extra} bytes more than the declared tensors have")]
    TooMuchData {
        /// Bytes that have no place.
        extra: u64,
    },
    /// Less data than was declared.
    #[error("tensor {tensor:?} is {missing} bytes short of its declared size")]
    TooLittleData {
        /// The tensor.
        tensor: String,
        /// Bytes that weren't written.
        missing: u64,
    },
}

impl WriteError {
    /// Why a file couldn't be written, from the system's error.
    pub fn of(path: &Path, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => WriteError::DiskFull { path: path.into() },
            _ => WriteError::File { path: path.into(), error },
        }
    }
}
