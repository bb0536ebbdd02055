//! What a kernel is asked to do.

use std::marker::PhantomData;

use super::vector::Vector;

/// The most tokens of one job: the accumulators of a group for that many stay in the cache.
pub(crate) const MAX_TOKENS: usize = 128;

/// A token's activations: where the parts that the format needs begin; the others are null.
#[derive(Clone, Copy)]
pub(crate) struct Act {
    /// F32: the activations.
    pub x: *const f32,
    /// The integers.
    pub q: *const i8,
    /// The scales of blocks (32) or superblocks (256).
    pub d: *const f32,
    /// The integers' sums over each block of 32, negated.
    pub negated_sum: *const i32,
    /// The integers' sums over each sub-block of a superblock, negated.
    pub negated_sub_sum: *const i16,
    /// The activations' sums over each block of 32.
    pub offset: *const f32,
}

impl Act {
    /// Nothing.
    pub const NONE: Self = Self {
        x: std::ptr::null(),
        q: std::ptr::null(),
        d: std::ptr::null(),
        negated_sum: std::ptr::null(),
        negated_sub_sum: std::ptr::null(),
        offset: std::ptr::null(),
    };
}

/// Which weights `gemv` prefetches.
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    /// Bytes from where it reads.
    pub ahead: usize,
    /// Cache line `line` of each `n_lines`; other passes over the same weights prefetch the others.
    pub line: usize,
    pub n_lines: usize,
}

/// Some groups of a matrix times some tokens.
///
/// Whoever makes one promises: `n_groups` packed groups of `n_blocks` blocks a row can be read at `w`; each token of `x`
/// has as many blocks; `out(token, row)` can be written for all of them, and nobody else touches it meanwhile.
pub(crate) struct Job<'a> {
    pub w: *const u8,
    pub n_groups: usize,
    pub n_blocks: usize,
    pub x: &'a [Act],
    pub out: *mut f32,
    /// From one token's row of `out` to the next, in f32.
    pub stride: usize,
    pub ask: Ask,
    pub lives: PhantomData<&'a mut f32>,
}

impl Job<'_> {
    /// What `gemv` prefetches: nothing if this is the only pass over the weights and has too few tokens, see
    /// [`ASKS_FROM`](Vector::ASKS_FROM).
    #[inline(always)]
    pub fn ask<V: Vector>(&self) -> Option<Ask> {
        (self.x.len() >= V::ASKS_FROM? || self.ask.n_lines > 1).then_some(self.ask)
    }

    /// Stores the dot products of `R` groups from group `g` on, those of each token in an element of `acc`.
    ///
    /// # Safety
    /// The job's promise, and these groups are within it.
    #[inline(always)]
    pub unsafe fn store<V: Vector, const R: usize>(&self, v: V, g: usize, acc: &[[V::F; R]]) {
        for (t, acc) in acc.iter().enumerate() {
            for r in 0..R {
                // SAFETY: the caller's promise.
                unsafe { v.store_f32(self.out(t, (g + r) * V::LANES), acc[r]) };
            }
        }
    }

    /// The place of a token's and a row's element; rows count from the first group's first.
    ///
    /// # Safety
    /// Both are within the job.
    #[inline(always)]
    pub unsafe fn out(&self, token: usize, row: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.out.add(token * self.stride + row) }
    }
}
