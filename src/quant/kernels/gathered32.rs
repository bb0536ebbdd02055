//! `gemm` of the formats with blocks of 32 weights on NEON with dotprod or i8mm: tokens' activations are first brought side by side.
//!
//! The inner loop of a tile then reads one stream of weights and one of activations, not eight at places of their own, and with i8mm
//! two tokens are joined once for all rows of a job. By count that is 94 instructions instead of 108 (i8mm), see docs/performance.md.
//!
//! Blocks are the outer loop, so that what was gathered serves all groups of rows; meanwhile the sums lie where the results go.

use std::mem::MaybeUninit;

use super::Kernel;
use super::block32::{Block32, Blocks, DEPTH, Open, even_depth};
use super::job::{Act, Job, MAX_TOKENS};
use super::neon::{I8MM, Neon};
use super::vector::Vector;

/// Tokens of a tile.
pub(super) const TOKENS: usize = 4;
/// Groups of rows of a tile.
pub(super) const GROUPS: usize = 2;
/// Groups of rows from which on what gathering saves is more than what it takes, by count.
const fn worth_gathering(level: u32) -> usize {
    if level >= I8MM { 6 } else { 12 }
}

/// A block of a tile's tokens.
#[repr(C, align(16))]
struct Gathered {
    d: [f32; TOKENS],
    /// Only if the format has offsets.
    offset: [f32; TOKENS],
    /// As [`Neon::gather`] leaves them.
    q: [[i8; 32]; TOKENS],
}

/// The blocks of a tile's tokens that are at hand.
type Tile = [MaybeUninit<Gathered>; DEPTH];

/// Up to [`MAX_TOKENS`] tokens.
///
/// # Safety
/// The job's promise.
#[inline(always)]
pub(super) unsafe fn gemm<L: Block32, const LEVEL: u32>(v: Neon<LEVEL>, job: &Job<'_>) {
    if job.n_groups < worth_gathering(LEVEL) {
        // SAFETY: the caller's promise.
        return unsafe { Blocks::<L>::gemm::<_, TOKENS, GROUPS>(v, job) };
    }
    let (x, _) = job.x.as_chunks::<TOKENS>();
    let mut tiles: [Tile; MAX_TOKENS / TOKENS] = [const { [const { MaybeUninit::uninit() }; DEPTH] }; _];
    let tiles = &mut tiles[..x.len()];
    let nothing = Open::nothing(v);
    let (mut pair, mut single) = ([[nothing; GROUPS]; DEPTH], [[nothing]; DEPTH]);
    let together = job.n_groups / GROUPS * GROUPS;
    let depth = even_depth(job.n_blocks);
    // Without blocks once all the same: the sums are nothing.
    for first in (0..job.n_blocks.max(1)).step_by(depth) {
        let depth = depth.min(job.n_blocks - first);
        // SAFETY: the job's promise: tokens and groups have these blocks.
        unsafe {
            for (x, tile) in x.iter().zip(tiles.iter_mut()) {
                gather::<L, LEVEL>(v, x, first, &mut tile[..depth]);
            }
            for g in (0..together).step_by(GROUPS) {
                groups::<L, _, LEVEL>(v, job, g, first, &mut pair[..depth], tiles);
            }
            for g in together..job.n_groups {
                groups::<L, _, LEVEL>(v, job, g, first, &mut single[..depth], tiles);
            }
        }
    }
}

/// Brings the tokens' blocks from `first` on side by side.
///
/// # Safety
/// The tokens have these blocks.
#[inline(always)]
unsafe fn gather<L: Block32, const LEVEL: u32>(
    v: Neon<LEVEL>,
    x: &[Act; TOKENS],
    first: usize,
    tile: &mut [MaybeUninit<Gathered>],
) {
    for (i, gathered) in tile.iter_mut().enumerate() {
        let i = first + i;
        // SAFETY: the caller's promise.
        let number = |p: *const f32| unsafe { *p.add(i) };
        // SAFETY: as above.
        let q = v.gather(unsafe { x.each_ref().map(|x| &*x.q.add(32 * i).cast()) });
        let d = x.each_ref().map(|x| number(x.d));
        let offset = x.each_ref().map(|x| if L::MIN { number(x.offset) } else { 0.0 });
        gathered.write(Gathered { d, offset, q });
    }
}

/// What a panel of blocks from `first` on adds to the results of `R` groups from group `g` on; the first blocks begin them.
///
/// # Safety
/// The job's promise, these groups and blocks are within it, and the whole tiles' have been gathered.
#[inline(always)]
unsafe fn groups<L: Block32, const R: usize, const LEVEL: u32>(
    v: Neon<LEVEL>,
    job: &Job<'_>,
    g: usize,
    first: usize,
    panel: &mut [[Open<Neon<LEVEL>>; R]],
    tiles: &[Tile],
) {
    let (x, rest) = job.x.as_chunks::<TOKENS>();
    let (pairs, single) = rest.as_chunks::<2>();
    // SAFETY: the caller's promise: tokens, rows and blocks are the job's, tiles have been gathered.
    unsafe {
        Blocks::<L>::unpack(v, job, g, first, panel);
        for (t, tile) in (0..).step_by(TOKENS).zip(tiles) {
            more::<TOKENS, R, LEVEL>(v, job, t, g, first, |sums| {
                for (w, x) in panel.iter().zip(tile) {
                    step::<L, R, LEVEL>(v, w, x.assume_init_ref(), sums);
                }
            });
        }
        // The tokens that make no whole tile, where they lie.
        let t = TOKENS * x.len();
        for x in pairs {
            more::<2, R, LEVEL>(v, job, t, g, first, |sums| Blocks::<L>::tile(v, panel, first, x, sums));
        }
        for x in single {
            let t = t + 2 * pairs.len();
            more::<1, R, LEVEL>(v, job, t, g, first, |sums| Blocks::<L>::tile(v, panel, first, &[*x], sums));
        }
    }
}

/// Takes `N` tokens' results of `R` groups up, those that there are before block `first`, lets `add` add to them and puts them back.
///
/// # Safety
/// The job's promise; from token `t` and group `g` on they are within it, and those of the blocks before `first` are there.
#[inline(always)]
unsafe fn more<const N: usize, const R: usize, const LEVEL: u32>(
    v: Neon<LEVEL>,
    job: &Job<'_>,
    t: usize,
    g: usize,
    first: usize,
    add: impl FnOnce(&mut [[<Neon<LEVEL> as Vector>::F; R]; N]),
) {
    // SAFETY: the job has these tokens and rows.
    let at = |i: usize, r: usize| unsafe { job.out(t + i, (g + r) * Neon::<LEVEL>::LANES) };
    let mut sums = [[v.splat_f32(0.0); R]; N];
    if first > 0 {
        for i in 0..N {
            for r in 0..R {
                // SAFETY: the blocks before these have written it.
                sums[i][r] = v.as_f32(unsafe { v.load(at(i, r).cast()) });
            }
        }
    }
    add(&mut sums);
    for i in 0..N {
        for r in 0..R {
            // SAFETY: the job's promise.
            unsafe { v.store_f32(at(i, r), sums[i][r]) };
        }
    }
}

/// Adds a block's part.
#[inline(always)]
fn step<L: Block32, const R: usize, const LEVEL: u32>(
    v: Neon<LEVEL>,
    w: &[Open<Neon<LEVEL>>; R],
    x: &Gathered,
    sums: &mut [[<Neon<LEVEL> as Vector>::F; R]; TOKENS],
) {
    // Sums begin with nothing, since the codes of a panel are less zero.
    const { assert!(Neon::<LEVEL>::PANEL_SIGNED && Neon::<LEVEL>::SIGNED_ZERO == 0) };
    let isums: [[_; R]; TOKENS] = v.gathered_dots(std::array::from_fn(|r| &w[r].codes), &x.q);
    for t in 0..TOKENS {
        let (d, offset) = (v.splat_f32(x.d[t]), v.splat_f32(x.offset[t]));
        for r in 0..R {
            sums[t][r] = Blocks::<L>::add(v, isums[t][r], &w[r], d, offset, sums[t][r]);
        }
    }
}
