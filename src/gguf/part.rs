//! A file that gets its name only when it is whole.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use rustix::fs::OFlags;

use super::error::WriteError;
use super::file;

/// A file being written as `NAME.part`. [`PartFile::commit`] renames it; dropped before that, it is removed.
#[derive(Debug)]
pub struct PartFile {
    out: BufWriter<File>,
    /// `None` for a pipe or a device, which is written to as it stands.
    part: Option<PathBuf>,
    path: PathBuf,
    overwrite: bool,
    /// Bytes of the whole file, where they are known before it's written.
    needed: Option<u64>,
}

/// The unfinished files of this process, for an end that drops nothing.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(|e| e.into_inner())
}

/// Removes every unfinished file, for a process that ends at once.
pub fn remove_unfinished() {
    // There is nobody left to tell; the next writer of such a name clears it.
    unfinished().drain(..).for_each(|part| drop(fs::remove_file(part)));
}

impl PartFile {
    /// Begins a file that replaces what has its name. A pipe or a device is written to as it stands.
    ///
    /// # Errors
    /// When the system refuses, another process is writing the same file, or it's a model that is in use.
    pub fn replace(path: &Path) -> Result<Self, WriteError> {
        if fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
            let file = OpenOptions::new().write(true).open(path).map_err(|e| WriteError::of(path, e))?;
            let out = BufWriter::new(file);
            return Ok(Self { out, part: None, path: path.into(), overwrite: true, needed: None });
        }
        Self::begin(path, true, None)
    }

    /// Begins a file of `needed` bytes, if there is room for it.
    pub(super) fn create(path: &Path, overwrite: bool, needed: u64) -> Result<Self, WriteError> {
        let this = Self::begin(path, overwrite, Some(needed))?;
        // Said now and not after an hour of quantising.
        let free = free_bytes(parent(&this.path)).map_err(|e| WriteError::of(path, e))?;
        if needed > free {
            return Err(WriteError::NoSpace { path: path.into(), needed, free });
        }
        Ok(this)
    }

    fn begin(path: &Path, overwrite: bool, needed: Option<u64>) -> Result<Self, WriteError> {
        // A link stays one: what it points to is replaced.
        let is_link = overwrite && fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink());
        let path = if is_link { path.canonicalize().map_err(|e| WriteError::of(path, e))? } else { path.into() };
        check_target(&path, overwrite)?;
        let Some(name) = path.file_name() else {
            return Err(WriteError::of(&path, io::ErrorKind::InvalidFilename.into()));
        };
        let mut name = name.to_os_string();
        name.push(".part");
        let part = path.with_file_name(name);
        let capacity = if needed.is_some() { 1 << 20 } else { 1 << 16 };
        let out = BufWriter::with_capacity(capacity, open_locked(&part)?);
        unfinished().push(part.clone());
        Ok(Self { out, part: Some(part), path, overwrite, needed })
    }

    /// The error for a write that failed.
    pub fn error(&self, error: io::Error) -> WriteError {
        match (WriteError::of(&self.path, error), self.needed) {
            (WriteError::DiskFull { path }, Some(needed)) => {
                let free = free_bytes(parent(&path)).unwrap_or(0);
                WriteError::NoSpace { path, needed, free }
            }
            (error, _) => error,
        }
    }

    /// Brings it to the disk, then gives it its name.
    ///
    /// # Errors
    /// The system's; what had the name still has it then.
    pub fn commit(mut self) -> Result<(), WriteError> {
        self.out.flush().map_err(|e| self.error(e))?;
        let Some(part) = &self.part else { return Ok(()) };
        self.out.get_ref().sync_all().map_err(|e| self.error(e))?;
        check_target(&self.path, self.overwrite)?;
        fs::rename(part, &self.path).map_err(|e| self.error(e))?;
        self.forget_part();
        // Without this the name may be lost with the power; some file systems can't, and that's no failure.
        if let Ok(dir) = File::open(parent(&self.path)) {
            let _ = dir.sync_all();
        }
        Ok(())
    }

    /// Its temporary name is no longer its own.
    fn forget_part(&mut self) {
        if let Some(part) = self.part.take() {
            unfinished().retain(|p| *p != part);
        }
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
        if let Some(part) = &self.part {
            // There is nobody left to tell; the next writer of this name clears it.
            let _ = fs::remove_file(part);
        }
        self.forget_part();
    }
}

/// Whether a file may get this name.
fn check_target(path: &Path, overwrite: bool) -> Result<(), WriteError> {
    match fs::symlink_metadata(path) {
        Ok(_) if file::in_use(path) => Err(WriteError::Model { path: path.into() }),
        Ok(found) if found.is_dir() => {
            Err(WriteError::File { path: path.into(), error: io::ErrorKind::IsADirectory.into() })
        }
        Ok(_) if !overwrite => Err(WriteError::Exists { path: path.into() }),
        Ok(found) if !found.is_file() => Err(WriteError::NotAFile { path: path.into() }),
        _ => Ok(()),
    }
}

/// Opens the unfinished file empty and locked, so that two processes don't write into one.
/// One that an interrupted process left behind is used again.
fn open_locked(part: &Path) -> Result<File, WriteError> {
    let fail = |error| WriteError::of(part, error);
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
