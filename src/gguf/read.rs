//! Positioned reads that deliver all bytes or say why not.

use std::io;

/// How a read ended that didn't deliver all.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The file ends here, absolute.
    Eof(u64),
    /// The system's error.
    Io(io::Error),
}

/// Fills `buf` from `offset` on through `read`, a positioned read that may be short or interrupted.
pub(super) fn read_full_at(
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
    mut buf: &mut [u8],
    mut offset: u64,
) -> Result<(), ReadError> {
    while !buf.is_empty() {
        match read(buf, offset) {
            Ok(0) => return Err(ReadError::Eof(offset)),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ReadError::Io(e)),
        }
    }
    Ok(())
}
