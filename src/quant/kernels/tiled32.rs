//! `gemm` of the formats with blocks of 32 weights on AMX.
//!
//! A tile holds the integer sums of a block for 16 tokens and 16 rows. It goes through the cache into vectors, where the operations
//! of [`block32`](super::block32) follow in their order, with the sums of 16 tokens in registers.
//!
//! The count for 16 tokens, 16 rows and 32 weights: 40 loads of rows (A, B and C) and 16 of scales, two a cycle; 16 stores, one a
//! cycle; 16 cycles of the tiles' unit; 48 vector operations, two a cycle. So 28 cycles at best, where VNNI's 176 operations take 88. By the
//! clock (Emerald Rapids, Q4_0, 64 tokens) it's 33 ns, some 80 cycles; VNNI's 50 ns. Loads and stores get in each other's way.

use super::amx::{self, Sums, TOKENS, Tiles};
use super::avx512::Avx512;
use super::block32::Block32;
use super::job::{Job, MAX_TOKENS};
use super::layout::{Ahead, Block};
use super::vector::Vector;
use core::arch::x86_64::*;
use std::ops::Range;

/// Rows of a group.
const LANES: usize = Avx512::LANES;
/// Blocks that are unpacked at once.
const DEPTH: usize = 16;
/// Groups of rows that are multiplied with a tile of tokens while it is in the L1 cache.
const GROUPS: usize = 2;
/// Tiles have more than half of 16 tokens; those with up to so many are added up by a loop of as many.
const FEWER: usize = 12;
/// A block's sums are used so many products later, when they have left the tile and reached the cache.
const LATER: usize = 2;

/// Blocks of a group, unpacked: codes are signed bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Open {
    codes: [__m512i; 8],
    scale: __m512,
    min: __m512,
}

type Panel = [Open; DEPTH];

/// A block of some tokens, gathered: rows at one distance, as a tile wants them.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tokens {
    q: [[i8; 32]; TOKENS],
    d: [f32; TOKENS],
    offset: [f32; TOKENS],
}

/// The buffers of a job.
#[repr(C, align(64))]
struct Buffers {
    panels: [Panel; GROUPS],
    sums: [Sums; 2 * LATER],
    /// The dot products of each group's rows with the tokens of each tile, so far.
    acc: [[[__m512; TOKENS]; MAX_TOKENS / TOKENS]; GROUPS],
}

/// What a thread keeps of scratch, for matrices of so many columns.
pub(super) const fn scratch_bytes(n_cols: usize) -> usize {
    size_of::<Buffers>() + MAX_TOKENS / TOKENS * n_cols.div_ceil(32) * size_of::<Tokens>()
}

/// Tokens of a job, gathered: an expert's lie anywhere.
#[derive(Clone, Copy)]
struct Gathered<'a> {
    /// `(n_tiles, n_blocks)`
    tokens: &'a [Tokens],
    /// Tokens of each tile; the last may have fewer, and others' are left there, for sums that nobody reads.
    n: usize,
}

/// Up to [`MAX_TOKENS`] tokens.
///
/// # Safety
/// The job's promise; the processor has [`Isa::Avx512Amx`](crate::cpu::Isa), and the thread has no tiles.
#[inline(always)]
pub(super) unsafe fn gemm<L: Block32>(v: Avx512, job: &Job<'_>) {
    let (n_tiles, n) = amx::shares(job.x.len());
    // SAFETY: the caller's promise; nothing below asks for more scratch.
    unsafe {
        let (buffers, tokens) = amx::scratch::<Buffers, Tokens>(n_tiles * job.n_blocks);
        gather::<L>(job, n, tokens);
        let (x, tiles) = (Gathered { tokens, n }, Tiles::<32>::new(n));
        for g in (0..job.n_groups).step_by(GROUPS) {
            groups::<L>(v, &tiles, job, g..job.n_groups.min(g + GROUPS), x, buffers);
        }
    }
}

/// # Safety
/// The job's promise.
#[inline(always)]
unsafe fn gather<L: Block32>(job: &Job<'_>, n: usize, tokens: &mut [Tokens]) {
    for (x, to) in job.x.chunks(n).zip(tokens.chunks_exact_mut(job.n_blocks)) {
        for (t, x) in x.iter().enumerate() {
            for (i, to) in to.iter_mut().enumerate() {
                // SAFETY: the token has this block, by the caller's promise.
                unsafe {
                    to.q[t] = x.q.add(32 * i).cast::<[i8; 32]>().read();
                    to.d[t] = *x.d.add(i);
                    if L::MIN {
                        to.offset[t] = *x.offset.add(i);
                    }
                }
            }
        }
    }
}

/// Some groups, at most [`GROUPS`].
///
/// # Safety
/// The job's promise, and these groups are within it.
#[inline(always)]
unsafe fn groups<L: Block32>(
    v: Avx512,
    tiles: &Tiles<32>,
    job: &Job<'_>,
    groups: Range<usize>,
    x: Gathered<'_>,
    buffers: &mut Buffers,
) {
    let (bytes, n_groups) = (L::BYTES * LANES, groups.len());
    let Buffers { panels, sums, acc } = buffers;
    acc.iter_mut().for_each(|acc| acc[..job.x.len().div_ceil(x.n)].fill([v.splat_f32(0.0); TOKENS]));
    for first in (0..job.n_blocks).step_by(DEPTH) {
        let depth = DEPTH.min(job.n_blocks - first);
        let at = |r: usize, i: usize| job.w.wrapping_add(((groups.start + r) * job.n_blocks + first + i) * bytes);
        for (r, panel) in panels[..n_groups].iter_mut().enumerate() {
            for (i, w) in panel[..depth].iter_mut().enumerate() {
                // SAFETY: the job's promise.
                open(v, unsafe { Block::<_, L>::new(v, at(r, i)) }, w);
            }
        }
        // The last group's again, if there is one only: it costs nothing to ask twice.
        let mut ahead = Ahead::new([at(0, depth), at(n_groups - 1, depth)], depth * bytes, job.x.len());
        for (k, tokens) in x.tokens.chunks_exact(job.n_blocks).enumerate() {
            ahead.ask(v, x.n);
            let tokens = &tokens[first..first + depth];
            for (panel, acc) in panels[..n_groups].iter().zip(acc.iter_mut()) {
                if x.n > FEWER {
                    tile::<L, TOKENS>(v, tiles, &panel[..depth], tokens, sums, &mut acc[k]);
                } else {
                    tile::<L, FEWER>(v, tiles, &panel[..depth], tokens, sums, &mut acc[k]);
                }
            }
        }
    }
    for (r, acc) in acc[..n_groups].iter().enumerate() {
        // SAFETY: the job's promise.
        unsafe { amx::store(v, job, groups.start + r, x.n, acc) };
    }
}

#[inline(always)]
fn open<L: Block32>(v: Avx512, b: Block<Avx512, L>, to: &mut Open) {
    let zero = if L::BITS == 8 { Avx512::SIGNED_ZERO } else { L::ZERO };
    let codes = L::codes(v, b);
    for j in 0..8 {
        to.codes[j] = v.sub_u8(codes[j], zero as u8);
    }
    to.scale = L::scale(v, b);
    if L::MIN {
        to.min = L::min(v, b);
    }
}

/// Adds a panel's part to the dot products of a group of rows with the first `N` tokens of a tile, or as many as it has.
#[inline(always)]
fn tile<L: Block32, const N: usize>(
    v: Avx512,
    tiles: &Tiles<32>,
    panel: &[Open],
    x: &[Tokens],
    isums: &mut [Sums; 2 * LATER],
    acc: &mut [__m512; TOKENS],
) {
    let acc: &mut [__m512; N] = acc.first_chunk_mut().expect("at most a tile's");
    let mut sums = *acc;
    for i in 0..panel.len() + LATER {
        if let (Some(w), Some(x)) = (panel.get(i), x.get(i)) {
            tiles.multiply(i % 2 == 1, &x.q, &w.codes, &mut isums[i % (2 * LATER)]);
        }
        if i >= LATER {
            let i = i - LATER;
            let (w, x, isums) = (&panel[i], &x[i], isums[i % (2 * LATER)].0.as_ptr());
            for t in 0..N {
                // SAFETY: the sums have a row `t`, a vector.
                let isum = unsafe { v.load(isums.add(t).cast()) };
                sums[t] = v.fma(v.to_f32(isum), v.mul(w.scale, v.splat_f32(x.d[t])), sums[t]);
                if L::MIN {
                    sums[t] = v.fma(v.splat_f32(x.offset[t]), w.min, sums[t]);
                }
            }
        }
    }
    *acc = sums;
}
