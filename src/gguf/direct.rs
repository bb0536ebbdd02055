//! Reads past the page cache, where the system has them.

use super::error::GgufError;
use super::file::Gguf;
use super::tensor::Tensor;
use crate::cpu::direct::{self, BLOCK};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// One of a model's files, opened for direct reads.
#[derive(Debug)]
pub struct DirectFile(File);

impl Gguf {
    /// Opens a file of [`Gguf::files`] once more for direct reads; `None` where the file system or the system has none, or
    /// another file has its name by now.
    pub fn open_direct(&self, file: usize) -> Option<DirectFile> {
        let file = self.file(file)?;
        let direct = direct::open(file.path()).ok()?;
        let same = file.identity().is_some() && file.identity() == super::file::identity(&direct);
        same.then_some(DirectFile(direct))
    }

    /// Reads `n_bytes` from `offset` of a tensor with the blocks of the file that they lie in, into `buf`, which begins at a multiple
    /// of 4096 bytes and has room for these blocks. They begin where the result says.
    ///
    /// # Errors
    /// As [`Gguf::read_at`].
    pub fn read_direct(
        &self,
        file: &DirectFile,
        tensor: &Tensor,
        offset: u64,
        n_bytes: usize,
        buf: &mut [u8],
    ) -> Result<usize, GgufError> {
        let from = self.place_of(tensor, offset, n_bytes)?;
        let at = (from % BLOCK as u64) as usize;
        let buf = &mut buf[..(at + n_bytes).next_multiple_of(BLOCK)];
        let read = |buf: &mut [u8], from| file.0.read_at(buf, from);
        let have = read_blocks(read, buf, from - at as u64, at + n_bytes)
            .map_err(|error| self.read_error(tensor, from, n_bytes, error))?;
        if have < at + n_bytes {
            // Through the page cache from there, which also says why if that's an end.
            let have = have.max(at);
            self.read_at(tensor, offset + (have - at) as u64, &mut buf[have..at + n_bytes])?;
        }
        self.check_unchanged(tensor)?;
        Ok(at)
    }
}

/// Reads whole blocks through `read`, a positioned read that may be short or interrupted, until `needed` bytes from `from` on are
/// there. Fewer if direct reads can't go on: in the middle of a block, at the file's end, or because the file system says only now
/// that it has none.
pub(super) fn read_blocks(
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
    buf: &mut [u8],
    from: u64,
    needed: usize,
) -> io::Result<usize> {
    let mut done = 0;
    while done < needed {
        match read(&mut buf[done..], from + done as u64) {
            Ok(n) if n > 0 && n.is_multiple_of(BLOCK) => done += n,
            // The last block may be cut by the file's end; what is needed may be there all the same.
            Ok(n) => return Ok(done + n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => return Ok(done),
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
