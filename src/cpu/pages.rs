//! Page-aligned memory from the system: zero-filled when first touched, huge pages where offered.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr::NonNull;

/// An anonymous mapping that this value owns. Pages that were never written cost nothing.
pub struct Pages {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone; shared access is read-only through `&self`.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// A mapping of `len` zero bytes. Huge pages are asked for when it's worth it: a 4 GB arena has a million
    /// small pages, and faulting each in costs a quarter of a second for every GB.
    ///
    /// # Errors
    /// The system's, when it has no address space or memory for it.
    pub fn new(len: usize) -> std::io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        if len == 0 {
            return Ok(Pages { ptr: NonNull::dangling(), len });
        }
        // SAFETY: a new private mapping at an address of the system's choice touches no memory of ours.
        let ptr = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        let ptr = NonNull::new(ptr.cast::<u8>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if len >= 4 << 20 {
            // SAFETY: the range is the mapping just made; the advice changes no contents. Refusal is harmless.
            let _ =
                unsafe { rustix::mm::madvise(ptr.as_ptr().cast::<c_void>(), len, rustix::mm::Advice::LinuxHugepage) };
        }
        Ok(Pages { ptr, len })
    }

    /// The start of the mapping, for those who hand out disjoint parts of it.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl std::ops::Deref for Pages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has `len` initialised (zeroed) bytes and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping was made by `new` with this length and nobody else unmaps it.
            let _ = unsafe { rustix::mm::munmap(self.ptr.as_ptr().cast::<c_void>(), self.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pages;

    #[test]
    fn zeroed_writable_and_aligned() {
        for len in [0, 1, 4096, 5 << 20] {
            let mut p = Pages::new(len).unwrap();
            assert!(p.iter().all(|&b| b == 0));
            if len > 0 {
                assert_eq!(p.as_ptr() as usize % 4096, 0);
                p[len - 1] = 7;
                assert_eq!(p[len - 1], 7);
            }
        }
    }
}
