//! From bytes to a checked header.

use std::borrow::Cow;
use std::sync::Arc;

use super::cursor::Cursor;
use super::error::HeaderError;
use super::metadata::{Entry, Metadata};
use super::tensor::Tensor;
use super::value::{ValueType, decode};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT};
use crate::quant;

/// The longest header that is read: 25 times that of a vocabulary of 256k tokens.
pub const MAX_HEADER_BYTES: usize = 256 << 20;
/// The most keys in a file; real files have less than a hundred.
pub const MAX_KEYS: u64 = 1 << 16;
/// The most tensors in a file; 58 layers of 256 separate experts are 45k.
pub const MAX_TENSORS: u64 = 1 << 17;
/// The longest key, from the format's description.
pub(super) const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
/// The longest name of a tensor; ggml stops at 63.
pub(super) const MAX_NAME_BYTES: u64 = 255;
/// Arrays in arrays: no known key has any.
const MAX_DEPTH: u32 = 4;
/// The largest alignment of tensors.
pub(super) const MAX_ALIGNMENT: u64 = 1 << 20;
/// A key's length, a value's type, a byte.
const MIN_KEY_BYTES: u64 = 8 + 4 + 1;
/// A name's length, a count of dimensions, a format, an offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;

/// A checked header.
#[derive(Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Keys and values.
    pub metadata: Metadata,
    /// Tensors in the file's order, with absolute offsets.
    pub tensors: Vec<Tensor>,
    /// Bytes of the header itself.
    pub n_bytes: usize,
}

impl Header {
    /// Parses and checks the beginning of a file that is `file_len` bytes long.
    ///
    /// `bytes` is the whole file or its first bytes; what follows the header isn't looked at.
    /// Everything that it returns refers to bytes that are there: tensors lie inside `file_len`.
    pub fn parse(bytes: Cow<'static, [u8]>, file_len: u64) -> Result<Self, HeaderError> {
        let found = scan(&bytes, file_len, file_len)?;
        Ok(Self::new(bytes, found))
    }

    /// Of what was found in `bytes`, or in more that begin with them.
    pub(super) fn new(bytes: Cow<'static, [u8]>, found: Found) -> Self {
        Self {
            version: found.version,
            metadata: Metadata::new(bytes, found.entries, found.by_key),
            tensors: found.tensors,
            n_bytes: found.n_bytes,
        }
    }
}

/// What a header says, without its bytes.
pub(super) struct Found {
    version: u32,
    entries: Vec<Entry>,
    by_key: Vec<u32>,
    tensors: Vec<Tensor>,
    /// Of the header.
    pub n_bytes: usize,
}

/// Checks the header that `bytes` begin with, of a file of `file_len` bytes whose end may be missing: tensors lie inside `data_len`.
pub(super) fn scan(bytes: &[u8], file_len: u64, data_len: u64) -> Result<Found, HeaderError> {
    if bytes.is_empty() {
        return Err(HeaderError::Empty);
    }
    let mut cur = Cursor::new(bytes, file_len);
    let version = read_version(&mut cur, bytes)?;
    let n_tensors = cur.u64("the number of tensors")?;
    let n_keys = cur.u64("the number of keys")?;
    limit("tensors", n_tensors, MAX_TENSORS)?;
    limit("keys", n_keys, MAX_KEYS)?;
    cur.check_count("keys", n_keys, MIN_KEY_BYTES, 16)?;

    let mut entries = Vec::with_capacity(n_keys as usize);
    for _ in 0..n_keys {
        entries.push(read_entry(&mut cur)?);
    }
    let by_key = sort_keys(bytes, &entries)?;
    let alignment = read_alignment(bytes, &entries)?;

    cur.check_count("tensors", n_tensors, MIN_TENSOR_BYTES, 8)?;
    let mut tensors = Vec::with_capacity(n_tensors as usize);
    for _ in 0..n_tensors {
        tensors.push(read_tensor(&mut cur, alignment)?);
    }
    let n_bytes = cur.at();
    // Before the places: the same tensor twice lies where it lies twice.
    reject_duplicates(&tensors)?;
    place(&mut tensors, (n_bytes as u64).next_multiple_of(alignment), data_len)?;
    Ok(Found { version, entries, by_key, tensors, n_bytes })
}

fn limit(what: &'static str, count: u64, max: u64) -> Result<(), HeaderError> {
    if count > max {
        return Err(HeaderError::TooMany { what, count, max });
    }
    Ok(())
}

fn read_version(cur: &mut Cursor<'_>, bytes: &[u8]) -> Result<u32, HeaderError> {
    const MAGIC: &[u8] = b"GGUF";
    let begin = &bytes[..bytes.len().min(16)];
    if !begin.starts_with(&MAGIC[..begin.len().min(4)]) {
        return Err(HeaderError::NotGguf { begins: begin.escape_ascii().to_string(), hint: hint(begin) });
    }
    cur.take(4, "the magic number")?;
    match cur.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        v if (1..=3).contains(&v.swap_bytes()) => Err(HeaderError::BigEndian),
        version => Err(HeaderError::Version { version }),
    }
}

/// What a file that isn't GGUF most often is.
fn hint(begin: &[u8]) -> &'static str {
    let is = |magic: &[u8]| begin.starts_with(magic);
    if is(b"version https://") {
        ": a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    } else if is(b"<") {
        ": a web page; check the address that it was downloaded from"
    } else if is(b"lmgg") || is(b"tjgg") || is(b"fmgg") || is(b"algg") {
        ": an old ggml file; convert the model again with a current llama.cpp"
    } else if is(b"PK\x03\x04") || is(b"\x80\x02") {
        ": a PyTorch checkpoint or a zip archive; convert the model with llama.cpp's convert_hf_to_gguf.py"
    } else if begin.get(8) == Some(&b'{') {
        ": a safetensors file; convert the model with llama.cpp's convert_hf_to_gguf.py"
    } else {
        "; a model for oncall is a .gguf file"
    }
}

fn read_entry(cur: &mut Cursor<'_>) -> Result<Entry, HeaderError> {
    let key = cur.name("key", MAX_KEY_BYTES)?;
    let key_range = cur.at() - key.len()..cur.at();
    let ty = read_type(cur, key)?;
    let from = cur.at();
    check_values(cur, key, ty, 1, 0)?;
    Ok(Entry { key: key_range, ty, value: from..cur.at() })
}

fn read_type(cur: &mut Cursor<'_>, key: &str) -> Result<ValueType, HeaderError> {
    let id = cur.u32("a value's type")?;
    ValueType::by_id(id).ok_or_else(|| HeaderError::ValueType { key: shown(key), id })
}

/// A key for a message: one that fills the screen helps nobody.
fn shown(key: &str) -> String {
    const MAX_CHARS: usize = 80;
    match key.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &key[..end]),
        None => key.into(),
    }
}

/// Steps over `n` values of a type and checks them, arrays to a limited depth.
fn check_values(cur: &mut Cursor<'_>, key: &str, ty: ValueType, n: u64, depth: u32) -> Result<(), HeaderError> {
    match ty {
        ValueType::Str => {
            for _ in 0..n {
                cur.str("string")?;
            }
        }
        ValueType::Array => {
            if depth == MAX_DEPTH {
                return Err(HeaderError::Depth { key: shown(key), max: MAX_DEPTH });
            }
            for _ in 0..n {
                let element = read_type(cur, key)?;
                let len = cur.count("elements of an array", element.min_bytes())?;
                check_values(cur, key, element, len, depth + 1)?;
            }
        }
        // The count was compared with the bytes that are left, so the product doesn't overflow.
        scalar => {
            let values = cur.take(n * scalar.min_bytes(), "a value")?;
            if scalar == ValueType::Bool
                && let Some(&value) = values.iter().find(|&&b| b > 1)
            {
                return Err(HeaderError::Bool { key: shown(key), value });
            }
        }
    }
    Ok(())
}

/// Indexes of the entries in the order of their keys.
fn sort_keys(bytes: &[u8], entries: &[Entry]) -> Result<Vec<u32>, HeaderError> {
    let key = |i: u32| &bytes[entries[i as usize].key.clone()];
    let mut order: Vec<u32> = (0..entries.len() as u32).collect();
    order.sort_unstable_by_key(|&i| key(i));
    match order.windows(2).find(|w| key(w[0]) == key(w[1])) {
        Some(w) => Err(HeaderError::DuplicateKey { key: shown(&String::from_utf8_lossy(key(w[0]))) }),
        None => Ok(order),
    }
}

fn read_alignment(bytes: &[u8], entries: &[Entry]) -> Result<u64, HeaderError> {
    let Some(entry) = entries.iter().find(|e| &bytes[e.key.clone()] == ALIGNMENT_KEY.as_bytes()) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let value = decode(entry.ty, &mut &bytes[entry.value.clone()]);
    let number = value.and_then(|v| u64::try_from(v.as_integer()?).ok());
    match number {
        Some(a) if a.is_power_of_two() && a <= MAX_ALIGNMENT => Ok(a),
        _ => Err(HeaderError::Alignment {
            value: match number {
                Some(a) => a.to_string(),
                None => entry.ty.to_string(),
            },
            max: MAX_ALIGNMENT,
        }),
    }
}

/// Reads a tensor's description; its offset is still the one in the data section.
fn read_tensor(cur: &mut Cursor<'_>, alignment: u64) -> Result<Tensor, HeaderError> {
    let name = cur.name("tensor name", MAX_NAME_BYTES)?;
    let tensor = || name.to_string();
    let n_dims = cur.u32("a tensor's dimensions")?;
    if !(1..=4).contains(&n_dims) {
        return Err(HeaderError::Dimensions { tensor: tensor(), n_dims });
    }
    let n_dims = n_dims as usize;
    let mut dims = [1; 4];
    for dim in &mut dims[..n_dims] {
        *dim = cur.u64("a tensor's dimensions")?;
    }
    let shape = || dims[..n_dims].to_vec();
    if dims.contains(&0) {
        return Err(HeaderError::ZeroDimension { tensor: tensor(), shape: shape() });
    }
    let id = cur.u32("a tensor's format")?;
    let offset = cur.u64("a tensor's offset")?;
    let format = quant::by_id(id).ok_or_else(|| HeaderError::Format { tensor: tensor(), id })?;
    if !dims[0].is_multiple_of(format.block_len as u64) {
        return Err(HeaderError::Row {
            tensor: tensor(),
            n_cols: dims[0],
            format: format.name,
            block_len: format.block_len,
        });
    }
    let n_bytes =
        tensor_bytes(&dims, format).ok_or_else(|| HeaderError::Overflow { tensor: tensor(), shape: shape() })?;
    if !offset.is_multiple_of(alignment) {
        return Err(HeaderError::Misaligned { tensor: tensor(), offset, alignment });
    }
    Ok(Tensor { name: Arc::from(name), dims, n_dims, format, file: 0, offset, n_bytes })
}

/// Bytes of a tensor, if its elements can be counted in 64 bits and they in the 63 of a file's offset.
pub(super) fn tensor_bytes(dims: &[u64; 4], format: &quant::Format) -> Option<u64> {
    let n_rows = dims[1..].iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
    n_rows.checked_mul(dims[0])?;
    let n_bytes = format.row_bytes(dims[0])?.checked_mul(n_rows)?;
    (n_bytes <= i64::MAX as u64).then_some(n_bytes)
}

/// Makes the offsets absolute: inside the file, and no two tensors on the same bytes.
fn place(tensors: &mut [Tensor], data_start: u64, file_len: u64) -> Result<(), HeaderError> {
    for t in tensors.iter_mut() {
        let from = t.offset.checked_add(data_start);
        let end = from.and_then(|from| from.checked_add(t.n_bytes));
        match (from, end) {
            (Some(from), Some(end)) if end <= file_len => t.offset = from,
            _ => {
                return Err(HeaderError::PastEnd {
                    tensor: t.name.to_string(),
                    offset: t.offset,
                    n_bytes: t.n_bytes,
                    len: file_len,
                });
            }
        }
    }
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_unstable_by_key(|t| t.offset);
    match order.windows(2).find(|w| w[0].offset + w[0].n_bytes > w[1].offset) {
        Some(w) => Err(HeaderError::Overlap { first: w[0].name.to_string(), second: w[1].name.to_string() }),
        None => Ok(()),
    }
}

fn reject_duplicates(tensors: &[Tensor]) -> Result<(), HeaderError> {
    let mut names: Vec<&str> = tensors.iter().map(|t| &*t.name).collect();
    names.sort_unstable();
    match names.windows(2).find(|w| w[0] == w[1]) {
        Some(w) => Err(HeaderError::DuplicateTensor { tensor: w[0].into() }),
        None => Ok(()),
    }
}
