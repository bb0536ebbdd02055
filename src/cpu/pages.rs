//! Page-aligned memory from the system: zero-filled when first touched, huge pages where offered.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::num::NonZero;
use std::ptr::NonNull;

/// An anonymous mapping that this value owns. Pages that were never written cost nothing.
pub struct Pages {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone. What is done with the bytes behind `as_ptr` while others have `&self` is the
// business of those who do it.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// No pages.
    pub const fn empty() -> Self {
        // Aligned as pages are, for those who see the bytes as something else.
        Pages { ptr: NonNull::without_provenance(NonZero::new(4096).unwrap()), len: 0 }
    }

    /// A mapping of `len` zero bytes. Huge pages are asked for when it's worth it: a 4 GB arena has a million
    /// small pages, and faulting each in costs a quarter of a second for every GB.
    ///
    /// # Errors
    /// The system's, when it has no address space or memory for it.
    pub fn new(len: usize) -> std::io::Result<Self> {
        Self::map(len, rustix::mm::MapFlags::PRIVATE)
    }

    /// As [`Pages::new`], for more than the system may have memory for: only what is written counts.
    ///
    /// # Errors
    /// The system's, when it has no addresses for it.
    pub fn reserve(len: usize) -> std::io::Result<Self> {
        Self::map(len, rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::NORESERVE)
    }

    /// Bytes of one of the system's pages.
    pub fn page_bytes() -> usize {
        rustix::param::page_size()
    }

    /// The whole pages inside a range. The system refuses advice that begins in the middle of a page, and rounds its end up.
    fn whole(&self, range: std::ops::Range<usize>) -> Option<(*mut c_void, usize)> {
        assert!(range.start <= range.end && range.end <= self.len);
        let page = Self::page_bytes();
        let (start, end) = (range.start.next_multiple_of(page), range.end / page * page);
        (start < end).then(|| (self.as_ptr().wrapping_add(start).cast(), end - start))
    }

    /// Gives the memory of the whole pages inside a range back to the system. What the range holds then is unspecified: zeros or what
    /// it was, by system and place.
    ///
    /// # Safety
    /// Nobody uses the range while this runs, or relies on what was in it.
    pub unsafe fn discard(&self, range: std::ops::Range<usize>) {
        let Some((at, len)) = self.whole(range) else { return };
        #[cfg(any(target_os = "linux", target_os = "android"))]
        // SAFETY: the pages are inside the range, which is inside the mapping; the rest is the caller's promise. Without the
        // second advice the kernel might join what was given back with its neighbours to a huge page again.
        unsafe {
            let _ = rustix::mm::madvise(at, len, rustix::mm::Advice::LinuxDontNeed);
            let _ = rustix::mm::madvise(at, len, rustix::mm::Advice::LinuxNoHugepage);
        }
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        // SAFETY: as above.
        unsafe {
            let _ = rustix::mm::madvise(at, len, rustix::mm::Advice::DontNeed);
        }
    }

    /// Asks for huge pages in a range again that was discarded.
    pub fn prefer_huge(&self, range: std::ops::Range<usize>) {
        let pages = self.whole(range);
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if let Some((at, len)) = pages {
            // SAFETY: the pages are inside the mapping; the advice changes no contents.
            let _ = unsafe { rustix::mm::madvise(at, len, rustix::mm::Advice::LinuxHugepage) };
        }
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        let _ = pages;
    }

    fn map(len: usize, flags: rustix::mm::MapFlags) -> std::io::Result<Self> {
        use rustix::mm::{ProtFlags, mmap_anonymous};
        if len == 0 {
            return Ok(Pages::empty());
        }
        // SAFETY: a new private mapping at an address of the system's choice touches no memory of ours.
        let ptr = unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)? };
        let ptr = NonNull::new(ptr.cast::<u8>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if len >= 4 << 20 {
            // SAFETY: the range is the mapping just made; the advice changes no contents. Refusal is harmless.
            let _ =
                unsafe { rustix::mm::madvise(ptr.as_ptr().cast::<c_void>(), len, rustix::mm::Advice::LinuxHugepage) };
        }
        Ok(Pages { ptr, len })
    }

    /// Bytes of the mapping. Not the slice's: others may be writing parts of it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
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

    #[test]
    fn what_is_discarded_takes_nothing_of_its_neighbours() {
        let page = Pages::page_bytes();
        let given_back = |range: std::ops::Range<usize>| {
            let mut p = Pages::new(4 * page).unwrap();
            p.fill(1);
            // SAFETY: nobody else has the pages, and what they hold is looked at, not relied on.
            unsafe { p.discard(range.clone()) };
            let outside = p[..range.start].iter().chain(&p[range.end..]);
            assert!(outside.into_iter().all(|&b| b == 1), "{range:?} took more");
            p.prefer_huge(range);
            (0..4).filter(|i| p[i * page] == 0).collect::<Vec<_>>()
        };
        let cases = [0..4 * page, 0..page + 1, 1..3 * page, page - 1..3 * page + 1, 1..page, 2 * page..2 * page];
        let got = cases.map(given_back);
        if cfg!(target_os = "linux") {
            assert_eq!(got, [vec![0, 1, 2, 3], vec![0], vec![1, 2], vec![1, 2], vec![], vec![]]);
        }
    }
}
