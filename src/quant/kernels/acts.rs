//! The activations of a token block, quantised once for all the matrices that read them.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU8, Ordering};

use super::job::Act;
use super::quantize;
use crate::cpu::Isa;
use crate::quant::{ActKind, ActRow, Format};

/// A vector whose disjoint parts several threads write through a shared reference.
struct Cells<T>(Vec<UnsafeCell<T>>);

// SAFETY: `Acts` writes a token's part only after claiming that token, and reads it only once it is `READY`.
unsafe impl<T: Send + Sync> Sync for Cells<T> {}

impl<T: Copy + Default> Cells<T> {
    const fn new() -> Self {
        Self(Vec::new())
    }

    /// Makes room for `len`; what is there is anything.
    fn reserve(&mut self, len: usize) {
        if self.0.len() < len {
            self.0.resize_with(len, Default::default);
        }
    }

    /// Where part `i` of `len` begins, bounds checked.
    fn at(&self, i: usize, len: usize) -> *mut T {
        let part = &self.0[i * len..(i + 1) * len];
        UnsafeCell::raw_get(part.as_ptr())
    }

    /// Part `i` of `len`.
    ///
    /// # Safety
    /// Nobody writes it while the slice lives.
    unsafe fn part(&self, i: usize, len: usize) -> &[T] {
        // SAFETY: `at` has checked the bounds; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.at(i, len), len) }
    }

    /// Part `i` of `len`, to be written.
    ///
    /// # Safety
    /// Nobody else reads or writes it while the slice lives.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part_mut(&self, i: usize, len: usize) -> &mut [T] {
        // SAFETY: `at` has checked the bounds; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at(i, len), len) }
    }
}

/// Rows of quantised activations.
struct Quantised {
    /// Integers `(n_tokens, width)`.
    q: Cells<i8>,
    /// Scales `(n_tokens, width / 32)` or `(n_tokens, width / 256)`.
    d: Cells<f32>,
    /// The integers' sums, negated, and the activations' sums `(n_tokens, width / 32)`. Only with Q8_0.
    sum: (Cells<i32>, Cells<f32>),
    /// The integers' sums, negated, `(n_tokens, width / 16)` and `(n_tokens, width / 32)`. Only with Q8K.
    sub_sum: [Cells<i16>; 2],
}

impl Quantised {
    const fn new() -> Self {
        Self {
            q: Cells::new(),
            d: Cells::new(),
            sum: (Cells::new(), Cells::new()),
            sub_sum: [Cells::new(), Cells::new()],
        }
    }

    fn reserve(&mut self, n: usize, block_len: usize) {
        self.q.reserve(n);
        self.d.reserve(n / block_len);
        if block_len == 256 {
            self.sub_sum[0].reserve(n / 16);
            self.sub_sum[1].reserve(n / 32);
        } else {
            self.sum.0.reserve(n / 32);
            self.sum.1.reserve(n / 32);
        }
    }
}

const EMPTY: u8 = 0;
const CLAIMED: u8 = 1;
const READY: u8 = 2;

/// The activations of a token block: `(n_tokens, width)`, in each of the forms that the matrices want.
///
/// [`reset`](Self::reset) says how many, how wide and in which forms; then each token's row is put in once, by any thread;
/// then any number of threads read them. The memory is kept for the next block.
pub struct Acts {
    n_tokens: usize,
    width: usize,
    f32: Cells<f32>,
    q8_0: Quantised,
    q8k: Quantised,
    kinds: [bool; 3],
    /// What they are quantised with; the result doesn't depend on it.
    isa: Isa,
    state: Vec<AtomicU8>,
}

impl Default for Acts {
    fn default() -> Self {
        Self::new()
    }
}

impl Acts {
    /// An empty block.
    pub const fn new() -> Self {
        Self {
            n_tokens: 0,
            width: 0,
            f32: Cells::new(),
            q8_0: Quantised::new(),
            q8k: Quantised::new(),
            kinds: [false; 3],
            isa: Isa::Scalar,
            state: Vec::new(),
        }
    }

    /// Begins a block of `n_tokens` rows of `width` activations, to be kept in the given forms.
    ///
    /// # Panics
    /// If `width` isn't a multiple of the block length of each form: 32 for Q8_0, 256 for Q8K.
    pub fn reset(&mut self, n_tokens: usize, width: usize, kinds: &[ActKind]) {
        (self.n_tokens, self.width) = (n_tokens, width);
        // A wrong `ONCALL_ISA` has been refused when the engine started.
        self.isa = Isa::get().unwrap_or(Isa::Scalar);
        let n = n_tokens.checked_mul(width).expect("the caller bounds its token blocks");
        self.kinds = [false; 3];
        for kind in kinds {
            assert!(width.is_multiple_of(kind.block_len()), "{width} activations aren't whole blocks of {kind:?}");
            self.kinds[*kind as usize] = true;
            match kind {
                ActKind::F32 => self.f32.reserve(n),
                ActKind::Q8_0 => self.q8_0.reserve(n, 32),
                ActKind::Q8K => self.q8k.reserve(n, 256),
            }
        }
        self.state.clear();
        self.state.resize_with(n_tokens, || AtomicU8::new(EMPTY));
    }

    /// Rows in the block.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Activations in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Puts a token's row in, in every form of the block. Several threads may do so for different tokens.
    ///
    /// # Panics
    /// If the row isn't `width` long, or the token is outside of the block or has its row already.
    pub fn put(&self, token: usize, row: &[f32]) {
        assert_eq!(row.len(), self.width);
        let claimed = self.state[token].compare_exchange(EMPTY, CLAIMED, Ordering::Relaxed, Ordering::Relaxed);
        assert!(claimed.is_ok(), "token {token} has its activations already");
        // SAFETY: the token is claimed: nobody else writes its parts, and nobody reads them before `READY`.
        unsafe {
            if self.kinds[ActKind::F32 as usize] {
                self.f32.part_mut(token, self.width).copy_from_slice(row);
            }
            if self.kinds[ActKind::Q8_0 as usize] {
                self.put_q8_0(token, row);
            }
            if self.kinds[ActKind::Q8K as usize] {
                self.put_q8k(token, row);
            }
        }
        self.state[token].store(READY, Ordering::Release);
    }

    /// # Safety
    /// The token is claimed.
    unsafe fn put_q8_0(&self, token: usize, row: &[f32]) {
        let (x, n) = (&self.q8_0, row.len());
        // SAFETY: the token is claimed.
        let to = unsafe {
            quantize::Q8_0 {
                q: x.q.part_mut(token, n),
                d: x.d.part_mut(token, n / 32),
                negated_sum: x.sum.0.part_mut(token, n / 32),
                offset: x.sum.1.part_mut(token, n / 32),
            }
        };
        quantize::q8_0(self.isa, row, to);
    }

    /// # Safety
    /// The token is claimed.
    unsafe fn put_q8k(&self, token: usize, row: &[f32]) {
        let (x, n) = (&self.q8k, row.len());
        // SAFETY: the token is claimed.
        let to = unsafe {
            quantize::Q8K {
                q: x.q.part_mut(token, n),
                d: x.d.part_mut(token, n / 256),
                negated_sum: (x.sub_sum[0].part_mut(token, n / 16), x.sub_sum[1].part_mut(token, n / 32)),
            }
        };
        quantize::q8_k(self.isa, row, to);
    }

    /// That a token's row is in, in this form.
    fn check(&self, kind: ActKind, token: usize) {
        assert!(self.kinds[kind as usize], "the block isn't kept as {kind:?}");
        assert!(self.state[token].load(Ordering::Acquire) == READY, "token {token} has no activations yet");
    }

    /// A token's row as a format's scalar dot product reads it.
    ///
    /// # Panics
    /// If the row isn't in, or not in the form that the format wants.
    pub fn row(&self, format: &Format, token: usize) -> ActRow<'_> {
        self.check(format.act, token);
        let n = self.width;
        // SAFETY: the token is `READY`, and nobody writes it until `reset`, which needs the only reference.
        unsafe {
            match format.act {
                ActKind::F32 => ActRow { f32: self.f32.part(token, n), ..ActRow::default() },
                ActKind::Q8_0 => {
                    let x = &self.q8_0;
                    let (d, s) = (x.d.part(token, n / 32), x.sum.1.part(token, n / 32));
                    ActRow { q: x.q.part(token, n), d, s, ..ActRow::default() }
                }
                ActKind::Q8K => {
                    let x = &self.q8k;
                    ActRow { q: x.q.part(token, n), d: x.d.part(token, n / 256), ..ActRow::default() }
                }
            }
        }
    }

    /// A token's row as a format's kernels read it: all of it can be read until `reset`.
    pub(super) fn act(&self, kind: ActKind, sub: usize, token: usize) -> Act {
        self.check(kind, token);
        let n = self.width;
        let mut act = Act::NONE;
        match kind {
            ActKind::F32 => act.x = self.f32.at(token, n),
            ActKind::Q8_0 => {
                let x = &self.q8_0;
                act.q = x.q.at(token, n);
                act.d = x.d.at(token, n / 32);
                act.negated_sum = x.sum.0.at(token, n / 32);
                act.offset = x.sum.1.at(token, n / 32);
            }
            ActKind::Q8K => {
                let x = &self.q8k;
                act.q = x.q.at(token, n);
                act.d = x.d.at(token, n / 256);
                act.negated_sub_sum = x.sub_sum[usize::from(sub != 16)].at(token, n / sub);
            }
        }
        act
    }
}
