//! A position in untrusted bytes.

use super::error::HeaderError;

/// Reads little-endian fields one after the other and never past the end.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file_len: u64,
}

impl<'a> Cursor<'a> {
    /// Over the first bytes of a file that is `file_len` long.
    pub(super) fn new(bytes: &'a [u8], file_len: u64) -> Self {
        Self { bytes, at: 0, file_len }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Bytes that follow, here.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next `n` bytes; `what` they are goes into the error.
    pub(super) fn take(&mut self, n: u64, what: &'static str) -> Result<&'a [u8], HeaderError> {
        if n > self.left() {
            return Err(self.short(what));
        }
        let from = self.at;
        self.at += n as usize;
        Ok(&self.bytes[from..self.at])
    }

    /// The error for bytes that aren't here: the file ends, or the header is longer than is looked at.
    fn short(&self, what: &'static str) -> HeaderError {
        if self.bytes.len() as u64 == self.file_len {
            HeaderError::Truncated { len: self.file_len, what }
        } else {
            HeaderError::TooLarge { max: self.bytes.len() }
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], HeaderError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, HeaderError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, HeaderError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things of at least `min_bytes` each that follow at once, compared with what is left.
    pub(super) fn count(&mut self, what: &'static str, min_bytes: u64) -> Result<u64, HeaderError> {
        let offset = self.at as u64;
        let count = self.u64(what)?;
        self.check_count(what, count, min_bytes, offset)?;
        Ok(count)
    }

    /// Whether `count` things of at least `min_bytes` each can follow.
    pub(super) fn check_count(
        &self,
        what: &'static str,
        count: u64,
        min_bytes: u64,
        offset: u64,
    ) -> Result<(), HeaderError> {
        if count <= self.left() / min_bytes {
            return Ok(());
        }
        // What isn't here may be in the file, if this is only its beginning.
        let left = self.file_len.saturating_sub(self.at as u64);
        if count <= left / min_bytes {
            return Err(self.short(what));
        }
        Err(HeaderError::Count { what, count, offset, left })
    }

    /// A string with its length before it.
    pub(super) fn str(&mut self, what: &'static str) -> Result<&'a str, HeaderError> {
        let offset = self.at as u64;
        let len = self.count(what, 1)?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|_| HeaderError::NotUtf8 { what, offset })
    }

    /// A key or a tensor's name: a string of 1 to `max` bytes.
    pub(super) fn name(&mut self, what: &'static str, max: u64) -> Result<&'a str, HeaderError> {
        let offset = self.at as u64;
        let name = self.str(what)?;
        let len = name.len() as u64;
        if len == 0 || len > max {
            return Err(HeaderError::NameLength { what, offset, len, max });
        }
        Ok(name)
    }
}
