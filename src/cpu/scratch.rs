//! Buffers whose memory goes back to the system as soon as they are dropped.

use super::Pages;
use std::alloc::{Layout, handle_alloc_error};

/// A buffer of floats in pages of its own.
///
/// A `Vec` of some megabytes that is dropped may stay with the allocator, and a budget would have to count it twice: glibc keeps
/// up to 64 MiB of freed memory once it has seen large blocks come and go.
pub struct Scratch {
    pages: Pages,
    len: usize,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch { pages: Pages::empty(), len: 0 }
    }
}

impl Scratch {
    /// Makes it hold `n` floats; what they are is anything. Without memory for them the program ends, as with a `Vec`.
    pub fn resize(&mut self, n: usize) {
        let bytes = n.saturating_mul(size_of::<f32>());
        if self.pages.len() < bytes {
            // First the old pages go: never both at the same time.
            self.pages = Pages::empty();
            self.pages = Pages::new(bytes).unwrap_or_else(|_| {
                handle_alloc_error(Layout::array::<f32>(n).unwrap_or(Layout::new::<f32>()));
            });
        }
        self.len = n;
    }

    /// Makes it hold `n` zeros.
    pub fn zero(&mut self, n: usize) {
        self.resize(n);
        self.fill(0.0);
    }
}

impl std::ops::Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.pages[..self.len * size_of::<f32>()])
    }
}

impl std::ops::DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.pages[..self.len * size_of::<f32>()])
    }
}

#[cfg(test)]
mod tests {
    use super::Scratch;

    #[test]
    fn it_holds_what_is_asked_for() {
        let mut s = Scratch::default();
        assert!(s.is_empty());
        for n in [3, 0, 5000, 17, 2 << 20] {
            s.zero(n);
            assert!(s.len() == n && s.iter().all(|&x| x == 0.0));
            s.fill(7.0);
            s.resize(n / 2);
            assert!(s.len() == n / 2 && s.iter().all(|&x| x == 7.0));
        }
    }
}
