//! A file that gets its name only when it is whole.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::error::WriteError;

/// A file being written as `NAME.part`. `commit` renames it; dropped before that, it is removed.
#[derive(Debug)]
pub struct PartFile {
    out: BufWriter<File>,
    part: PathBuf,
    path: PathBuf,
    overwrite: bool,
    /// Bytes of the whole file.
    needed: u64,
    committed: bool,
}

impl PartFile {
    /// Begins a file of `needed` bytes, if there is room for it.
    pub(super) fn create(path: &Path, overwrite: bool, needed: u64) -> Result<Self, WriteError> {
        let fail = |error| WriteError::File { path: path.into(), error };
        reject_existing(path, overwrite)?;
        let Some(name) = path.file_name() else {
            return Err(fail(io::ErrorKind::InvalidFilename.into()));
        };
        let mut name = name.to_os_string();
        name.push(".part");
        let part = path.with_file_name(name);
        let file = open_locked(&part)?;
        let this = Self {
            out: BufWriter::with_capacity(1 << 20, file),
            part,
            path: path.into(),
            overwrite,
            needed,
            committed: false,
        };
        // Said now and not after an hour of quantising.
        let free = free_bytes(&this.part).map_err(fail)?;
        if needed > free {
            return Err(WriteError::NoSpace { path: path.into(), needed, free });
        }
        Ok(this)
    }

    /// The error for a write that failed.
    pub(super) fn error(&self, _at: u64, error: io::Error) -> WriteError {
        let path = self.path.clone();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                WriteError::NoSpace { path, needed: self.needed, free: free_bytes(&self.part).unwrap_or(0) }
            }
            _ => WriteError::File { path, error },
        }
    }

    /// Brings it to the disk, then gives it its name.
    pub(super) fn commit(mut self) -> Result<(), WriteError> {
        self.finish().map_err(|e| self.error(self.needed, e))?;
        reject_existing(&self.path, self.overwrite)?;
        fs::rename(&self.part, &self.path).map_err(|e| self.error(self.needed, e))?;
        self.committed = true;
        // Without this the name may be lost with the power; some file systems can't, and that's no failure.
        if let Ok(dir) = File::open(parent(&self.path)) {
            let _ = dir.sync_all();
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.out.flush()?;
        self.out.get_ref().sync_all()
    }
}

impl Write for PartFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.out.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if !self.committed {
            // There is nobody left to tell; the next writer of this name clears it.
            let _ = fs::remove_file(&self.part);
        }
    }
}

fn reject_existing(path: &Path, overwrite: bool) -> Result<(), WriteError> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            Err(WriteError::File { path: path.into(), error: io::ErrorKind::IsADirectory.into() })
        }
        Ok(_) if !overwrite => Err(WriteError::Exists { path: path.into() }),
        _ => Ok(()),
    }
}

/// Opens the unfinished file empty and locked, so that two processes don't write into one.
/// One that an interrupted process left behind is used again.
fn open_locked(part: &Path) -> Result<File, WriteError> {
    let fail = |error| WriteError::File { path: part.into(), error };
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            // Never into a file that somebody's link points to.
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(part)
            .map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(WriteError::Busy { path: part.into() }),
            // A file system without locks: the name alone must do.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(fail(e)),
        }
        // Its last owner may have renamed or removed it between the two calls.
        let mine = file.metadata().map_err(fail)?;
        let named = fs::symlink_metadata(part);
        if named.is_ok_and(|named| (named.dev(), named.ino()) == (mine.dev(), mine.ino())) {
            file.set_len(0).map_err(fail)?;
            return Ok(file);
        }
    }
}

/// Bytes that this user can still write on the disk of `path`.
fn free_bytes(path: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(path)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
