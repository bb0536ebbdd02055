//! Reads past the page cache, where the system has them.

use super::error::GgufError;
use super::file::Gguf;
use super::tensor::Tensor;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Direct reads begin and end at multiples of this, in the file and in memory.
const ALIGN: u64 = 4096;

/// One of a model's files, opened for direct reads.
#[derive(Debug)]
pub struct DirectFile(File);

impl Gguf {
    /// Opens a file of [`Gguf::files`] once more for direct reads; `None` where the file system or the system has none, or
    /// another file has its name by now.
    pub fn open_direct(&self, file: usize) -> Option<DirectFile> {
        let file = self.file(file)?;
        let direct = open(file.path())?;
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
        let at = (from % ALIGN) as usize;
        let buf = &mut buf[..(at + n_bytes).next_multiple_of(ALIGN as usize)];
        // The last block may be cut by the file's end; what is needed must be there.
        let mut done = 0;
        while done < at + n_bytes {
            // A short read of a regular file ends at a block, or at the file's end.
            match file.0.read_at(&mut buf[done..], from - at as u64 + done as u64) {
                Ok(n) if n > 0 && (n.is_multiple_of(ALIGN as usize) || done + n >= at + n_bytes) => done += n,
                // In the middle of a block: go on from there through the page cache, and hear why if that's an end.
                Ok(n) => {
                    let have = (done + n).max(at);
                    self.read_at(tensor, offset + (have - at) as u64, &mut buf[have..at + n_bytes])?;
                    break;
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // Some file systems say only now that they can't.
                Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => {
                    self.read_at(tensor, offset, &mut buf[at..at + n_bytes])?;
                    break;
                }
                Err(error) => return Err(self.read_error(tensor, from, n_bytes, error)),
            }
        }
        self.check_unchanged(tensor)?;
        Ok(at)
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn open(path: &std::path::Path) -> Option<File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).ok().map(File::from)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn open(_: &std::path::Path) -> Option<File> {
    None
}
