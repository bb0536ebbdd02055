//! Reads past the page cache, where the system has them.

use std::fs::File;
use std::io;
use std::path::Path;

/// Direct reads begin and end at multiples of this, in the file and in memory: no disk's blocks are larger.
pub const BLOCK: usize = 4096;

/// Opens a file for direct reads.
///
/// # Errors
/// The system's, which has none on some file systems.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub fn open(path: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// No other system has them in this way.
///
/// # Errors
/// Always.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub fn open(_: &Path) -> io::Result<File> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "this system has no O_DIRECT"))
}
