//! Writing a GGUF file: declare everything, then stream the tensors' data.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::Path;

use super::encode::{Encode, encode_value};
use super::error::{HeaderError, WriteError};
use super::header::{Header, MAX_ALIGNMENT, MAX_HEADER_BYTES, tensor_bytes};
use super::metadata::Metadata;
use super::part::PartFile;
use super::value::{Value, ValueType, decode};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT};
use crate::quant::Format;

/// Declares the keys and the tensors of a file; [`GgufWriter::create`] then begins to write it.
///
/// What it accepts is what [`Header::parse`] accepts: the declared header is parsed before a byte is written.
#[derive(Clone, Debug, Default)]
pub struct GgufWriter {
    /// Keys with their values as they stand in the file, type first.
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<Declared>,
}

#[derive(Clone, Debug)]
struct Declared {
    name: String,
    shape: Vec<u64>,
    format: &'static Format,
}

impl GgufWriter {
    /// Neither keys nor tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a key; its value is replaced if it was set.
    pub fn set<T: Encode>(&mut self, key: &str, value: T) -> &mut Self {
        let mut bytes = Vec::new();
        value.encode(&mut bytes);
        self.insert(key, T::TYPE, bytes)
    }

    /// Sets a key to a value that was read from another file.
    pub fn set_value(&mut self, key: &str, value: &Value<'_>) -> &mut Self {
        let mut bytes = Vec::new();
        encode_value(value, &mut bytes);
        self.insert(key, value.value_type(), bytes)
    }

    /// Sets all keys of another file, but for those that describe its shards.
    pub fn set_all(&mut self, metadata: &Metadata) -> &mut Self {
        for (key, value) in metadata.iter().filter(|(key, _)| !key.starts_with("split.")) {
            self.set_value(key, &value);
        }
        self
    }

    fn insert(&mut self, key: &str, ty: ValueType, value: Vec<u8>) -> &mut Self {
        let mut bytes = Vec::with_capacity(4 + value.len());
        (ty as u32).encode(&mut bytes);
        bytes.extend_from_slice(&value);
        match self.keys.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = bytes,
            None => self.keys.push((key.into(), bytes)),
        }
        self
    }

    /// Removes a key, if it is there.
    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.keys.retain(|(k, _)| k != key);
        self
    }

    /// Declares the next tensor; `shape` has the fastest dimension first.
    pub fn tensor(&mut self, name: &str, shape: &[u64], format: &'static Format) -> &mut Self {
        self.tensors.push(Declared { name: name.into(), shape: shape.to_vec(), format });
        self
    }

    /// Bytes of the whole file.
    pub fn n_bytes(&self) -> Result<u64, WriteError> {
        Ok(self.layout()?.n_bytes)
    }

    /// Begins to write a file. Until [`DataWriter::finish`] it is called `NAME.part`; dropping the
    /// writer before removes that. `overwrite` says that an existing file may be replaced.
    pub fn create(&self, path: &Path, overwrite: bool) -> Result<DataWriter<PartFile>, WriteError> {
        let layout = self.layout()?;
        let out = PartFile::create(path, overwrite, layout.n_bytes)?;
        DataWriter::begin(out, layout, |file, _, error| file.error(error))
    }

    /// Begins to write into memory.
    pub fn in_memory(&self) -> Result<DataWriter<Vec<u8>>, WriteError> {
        DataWriter::begin(Vec::new(), self.layout()?, |_, at, error| WriteError::Io { at, error })
    }

    /// The header's bytes and where the data goes. Mistakes in what was declared are found by
    /// parsing it, so that no check is written twice.
    fn layout(&self) -> Result<Layout, WriteError> {
        let alignment = self.alignment();
        let mut header = b"GGUF".to_vec();
        3u32.encode(&mut header);
        (self.tensors.len() as u64).encode(&mut header);
        (self.keys.len() as u64).encode(&mut header);
        for (key, value) in &self.keys {
            key.encode(&mut header);
            header.extend_from_slice(value);
        }
        let mut offset = 0u64;
        let mut parts = VecDeque::with_capacity(self.tensors.len());
        for t in &self.tensors {
            t.name.encode(&mut header);
            (t.shape.len() as u32).encode(&mut header);
            t.shape.iter().for_each(|d| d.encode(&mut header));
            t.format.id.encode(&mut header);
            offset.encode(&mut header);
            let n_bytes = t.n_bytes();
            let end = offset.saturating_add(n_bytes);
            offset = end.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
            parts.push_back(Part { name: t.name.clone(), n_bytes, padding: offset - end });
        }
        if header.len() > MAX_HEADER_BYTES {
            return Err(HeaderError::TooLarge { max: MAX_HEADER_BYTES }.into());
        }
        let data_start = (header.len() as u64).next_multiple_of(alignment);
        let n_bytes = offset.saturating_add(data_start);
        let parsed = Header::parse(Cow::Owned(header.clone()), n_bytes)?;
        debug_assert_eq!(parsed.n_bytes, header.len());
        header.resize(data_start as usize, 0);
        Ok(Layout { header, parts, n_bytes })
    }

    fn alignment(&self) -> u64 {
        let declared = self.keys.iter().find(|(key, _)| key == ALIGNMENT_KEY).and_then(|(_, bytes)| {
            let (id, mut value) = bytes.split_first_chunk()?;
            let ty = ValueType::by_id(u32::from_le_bytes(*id))?;
            u64::try_from(decode(ty, &mut value)?.as_integer()?).ok()
        });
        // An impossible one is rejected when the header is parsed; until then it must not be divided by.
        declared.filter(|a| a.is_power_of_two() && *a <= MAX_ALIGNMENT).unwrap_or(DEFAULT_ALIGNMENT)
    }
}

impl Declared {
    /// Its size; 0 if its shape is impossible, which parsing the header then says.
    fn n_bytes(&self) -> u64 {
        let mut dims = [1; 4];
        match dims.get_mut(..self.shape.len()) {
            Some(d) => d.copy_from_slice(&self.shape),
            None => return 0,
        }
        tensor_bytes(&dims, self.format).unwrap_or(0)
    }
}

/// A file that is about to be written.
struct Layout {
    /// Padded to where the data begins.
    header: Vec<u8>,
    parts: VecDeque<Part>,
    n_bytes: u64,
}

/// A tensor's data that hasn't been written.
#[derive(Debug)]
struct Part {
    name: String,
    n_bytes: u64,
    padding: u64,
}

/// Takes the tensors' data in the order in which they were declared, in chunks of any size.
#[must_use = "a file that isn't finished is removed"]
#[derive(Debug)]
pub struct DataWriter<W: Write> {
    out: W,
    /// Bytes written.
    at: u64,
    /// The tensors that are left, the first with what is left of it.
    parts: VecDeque<Part>,
    error: fn(&W, u64, io::Error) -> WriteError,
}

impl<W: Write> DataWriter<W> {
    fn begin(out: W, layout: Layout, error: fn(&W, u64, io::Error) -> WriteError) -> Result<Self, WriteError> {
        let mut writer = Self { out, at: 0, parts: layout.parts, error };
        writer.put(&layout.header)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.out.write_all(bytes).map_err(|e| (self.error)(&self.out, self.at, e))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Appends data: the rest of a tensor, a part of it, or several tensors one after the other.
    pub fn write(&mut self, mut chunk: &[u8]) -> Result<(), WriteError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while !chunk.is_empty() {
            let Some(part) = self.parts.front_mut() else {
                return Err(WriteError::TooMuchData { extra: chunk.len() as u64 });
            };
            let n = part.n_bytes.min(chunk.len() as u64) as usize;
            part.n_bytes -= n as u64;
            let done = part.n_bytes == 0;
            let mut padding = part.padding as usize;
            let (now, rest) = chunk.split_at(n);
            self.put(now)?;
            chunk = rest;
            if done {
                while padding > 0 {
                    let n = padding.min(ZEROS.len());
                    self.put(&ZEROS[..n])?;
                    padding -= n;
                }
                self.parts.pop_front();
            }
        }
        Ok(())
    }

    /// The tensor that the next byte belongs to, and how many of its bytes are still to come.
    pub fn pending(&self) -> Option<(&str, u64)> {
        self.parts.front().map(|part| (part.name.as_str(), part.n_bytes))
    }

    fn complete(self) -> Result<W, WriteError> {
        match self.parts.front() {
            None => Ok(self.out),
            Some(part) => Err(WriteError::TooLittleData { tensor: part.name.clone(), missing: part.n_bytes }),
        }
    }
}

impl DataWriter<PartFile> {
    /// Brings the file to the disk and gives it its name. An error if data is missing.
    pub fn finish(self) -> Result<(), WriteError> {
        self.complete()?.commit()
    }
}

impl DataWriter<Vec<u8>> {
    /// The file's bytes. An error if data is missing.
    pub fn finish(self) -> Result<Vec<u8>, WriteError> {
        self.complete()
    }
}
