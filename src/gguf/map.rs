//! The one place where a file is looked at through a mapping.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapOptions};

/// Maps the first `len` bytes of a file that is at least that long.
///
/// A file that another process cuts while the mapping is in use would kill this one with SIGBUS:
/// keep it only while a header is being measured and copied.
pub(super) fn map_prefix(file: &File, len: usize) -> io::Result<Mmap> {
    // SAFETY: read-only and short-lived. The bytes may change under us; the caller copies them and
    // checks only the copy, so that no reference to checked bytes is ever a reference to shared ones.
    unsafe { MmapOptions::new().len(len).map(file) }
}
