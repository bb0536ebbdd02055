//! `gemm` of the formats with superblocks of 256 weights on AMX.
//!
//! A superblock's sum is one integer: weights times the scales of their sub-blocks times activations. So weights are multiplied by
//! their scales when they are unpacked, and cut into two bytes. Then whole tiles of 64 bytes add up a superblock, and vectors see two sums of
//! it, however long its sub-blocks are.
//!
//! Where codes are unsigned, the scale is cut, not the product: codes times a few bits of a scale still are bytes, so that one multiplication of
//! 16 bits makes two of them. Signed products are cut into their lower and upper byte.

use super::NO_SCALE;
use super::amx::{self, Sums, TOKENS, Tiles};
use super::avx512::Avx512;
use super::job::{Job, MAX_TOKENS};
use super::layout::Block;
use super::superblock::{Reading, Scales, Superblock, Superblocks};
use super::vector::Vector;
use core::arch::x86_64::*;
use std::ops::Range;

/// Rows of a group.
const LANES: usize = Avx512::LANES;
/// Groups of rows whose sums are in tiles at the same time.
const GROUPS: usize = 2;

/// What bytes of weights times scales are, and how their sums are put together.
impl<L: Superblock> Superblocks<L> {
    /// The sum of the upper bytes counts so many bits more.
    const SHIFT: u32 = match (L::MIN, L::BITS) {
        (false, _) => 8,
        // The most bits of a scale with which the largest code stays below 256.
        (true, 2) => 6,
        (true, 4) => 4,
        (true, 5) => 3,
        _ => panic!("no such format"),
    };
}

/// A superblock of a group, unpacked: weights times scales, and the rest.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Panel {
    /// In four times 64: lower bytes, then upper ones.
    codes: amx::Codes,
    factors: Factors,
}

/// What a superblock's sums are multiplied by.
#[derive(Clone, Copy)]
struct Factors {
    /// The offsets of two sub-blocks each.
    pairs: [__m512i; 8],
    d: __m512,
    dmin: __m512,
}

impl Factors {
    #[inline(always)]
    fn nothing(v: Avx512) -> Self {
        let none = v.splat_f32(NO_SCALE);
        Self { pairs: [v.splat(0); 8], d: none, dmin: none }
    }
}

/// The dot products of a group of rows with the tokens of each tile, so far, and a place for what is none.
type Accumulators = [[__m512; TOKENS]; NO_TILE + 1];
const NO_TILE: usize = MAX_TOKENS / TOKENS;

/// A superblock of some tokens, gathered.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tokens {
    q: amx::Tokens,
    d: [f32; TOKENS],
    /// Two sums over sub-blocks each, negated.
    pairs: [[i32; 8]; TOKENS],
}

/// The buffers of a job.
#[repr(C, align(64))]
struct Buffers {
    panels: [Panel; GROUPS],
    acc: [Accumulators; GROUPS],
}

/// What a thread keeps of scratch, for matrices of so many columns.
pub(super) const fn scratch_bytes(n_cols: usize) -> usize {
    size_of::<Buffers>() + MAX_TOKENS / TOKENS * n_cols.div_ceil(256) * size_of::<Tokens>()
}

/// Tokens of a job, gathered: an expert's lie anywhere, while a tile's rows are at one distance.
#[derive(Clone, Copy)]
struct Gathered<'a> {
    /// `(n_blocks, n_tiles)`
    tokens: &'a [Tokens],
    n_tiles: usize,
    /// Tokens of each tile; the last may have fewer, and others' are left there, for sums that nobody reads.
    n: usize,
}

/// Up to [`MAX_TOKENS`] tokens.
///
/// # Safety
/// The job's promise; the processor has [`Isa::Avx512Amx`](crate::cpu::Isa), and the thread has no tiles.
#[inline(always)]
pub(super) unsafe fn gemm<L: Superblock>(v: Avx512, job: &Job<'_>) {
    let (n_tiles, n) = amx::shares(job.x.len());
    // SAFETY: the caller's promise; nothing below asks for more scratch.
    unsafe {
        let (Buffers { panels, acc }, tokens) = amx::scratch::<Buffers, Tokens>(n_tiles * job.n_blocks);
        gather::<L>(job, n_tiles, n, tokens);
        let (x, tiles) = (Gathered { tokens, n_tiles, n }, Tiles::<64>::new(n));
        let together = job.n_groups / GROUPS * GROUPS;
        for g in (0..together).step_by(GROUPS) {
            groups::<L, GROUPS>(v, &tiles, job, g, x, panels, acc);
        }
        let ([panel, ..], [acc, ..]) = (panels, acc);
        for g in together..job.n_groups {
            groups::<L, 1>(v, &tiles, job, g, x, std::array::from_mut(panel), std::array::from_mut(acc));
        }
    }
}

/// # Safety
/// The job's promise.
#[inline(always)]
unsafe fn gather<L: Superblock>(job: &Job<'_>, n_tiles: usize, n: usize, tokens: &mut [Tokens]) {
    for (k, x) in job.x.chunks(n).enumerate() {
        for (t, x) in x.iter().enumerate() {
            for i in 0..job.n_blocks {
                let to = &mut tokens[i * n_tiles + k];
                // SAFETY: the token has this superblock, by the caller's promise.
                unsafe {
                    to.q.0[t] = x.q.add(256 * i).cast::<[i8; 256]>().read();
                    to.d[t] = *x.d.add(i);
                    if L::MIN {
                        for j in 0..4 * Superblocks::<L>::SUBS {
                            to.pairs[t][j] = Superblocks::<L>::sums_at(x, i, j).cast::<i32>().read_unaligned();
                        }
                    }
                }
            }
        }
    }
}

/// `R` groups from group `g` on.
///
/// # Safety
/// The job's promise, and these groups are within it.
#[inline(always)]
unsafe fn groups<L: Superblock, const R: usize>(
    v: Avx512,
    tiles: &Tiles<64>,
    job: &Job<'_>,
    g: usize,
    x: Gathered<'_>,
    panels: &mut [Panel; R],
    acc: &mut [Accumulators; R],
) {
    let (bytes, reading) = (L::BYTES * LANES, Reading::new::<Avx512>(None));
    acc.iter_mut().for_each(|acc| acc[..x.n_tiles].fill([v.splat_f32(0.0); TOKENS]));
    // A tile's sums are used while the next one's are multiplied: here they are with what they are multiplied by, and which tile it is.
    let mut sums = [[[Sums::ZERO; 2]; R]; 2];
    let mut factors = [Factors::nothing(v); R];
    let (mut before, mut x_before) = (NO_TILE, &x.tokens[0]);
    let n_lines = bytes.div_ceil(64 * 4 * x.n_tiles);
    for (i, tokens) in x.tokens.chunks_exact(x.n_tiles).enumerate() {
        let at = |r: usize, i: usize| job.w.wrapping_add(((g + r) * job.n_blocks + i) * bytes);
        for (r, panel) in panels.iter_mut().enumerate() {
            // SAFETY: the job's promise.
            open(v, unsafe { Block::<_, L>::new(v, at(r, i)) }, reading, panel);
        }
        let codes: [&amx::Codes; R] = panels.each_ref().map(|p| &p.codes);
        let mut line = 0;
        for (k, tile) in tokens.iter().enumerate() {
            let [now, then] = &mut sums;
            let (now, then) = if (i * x.n_tiles + k).is_multiple_of(2) { (now, then) } else { (then, now) };
            tiles.begin();
            macro_rules! step {
                ($step:literal) => {
                    tiles.step(&tile.q, codes, $step, !L::MIN);
                    add::<L, R>(v, &factors, x_before, of_step($step, x.n), then, acc, before);
                    for _ in 0..n_lines {
                        (0..R).for_each(|r| v.prefetch(at(r, i + 1).wrapping_add(line)));
                        line += 64;
                    }
                };
            }
            step!(0);
            step!(1);
            step!(2);
            step!(3);
            tiles.end(now);
            (before, x_before) = (k, tile);
            if k == 0 {
                factors = panels.each_ref().map(|p| p.factors);
            }
        }
    }
    let last = &sums[(job.n_blocks * x.n_tiles + 1) % 2];
    add::<L, R>(v, &factors, x_before, 0..x.n, last, acc, before);
    for (r, acc) in acc.iter().enumerate() {
        // SAFETY: the job's promise.
        unsafe { amx::store(v, job, g + r, x.n, acc) };
    }
}

/// The tokens of a tile of `n` whose sums are added up at a step, of which there are four.
#[inline(always)]
fn of_step(step: usize, n: usize) -> Range<usize> {
    const STEP: usize = TOKENS / 4;
    (STEP * step).min(n)..(STEP * (step + 1)).min(n)
}

/// Adds a superblock's part to the dot products of `R` groups with some tokens of a tile.
#[inline(always)]
fn add<L: Superblock, const R: usize>(
    v: Avx512,
    w: &[Factors; R],
    x: &Tokens,
    tokens: Range<usize>,
    sums: &[[Sums; 2]; R],
    acc: &mut [Accumulators; R],
    tile: usize,
) {
    for t in tokens {
        let da = v.splat_f32(x.d[t]);
        let pairs: [_; 8] = std::array::from_fn(|j| v.splat(x.pairs[t][j].cast_unsigned()));
        for r in 0..R {
            let (part, acc) = (&sums[r], &mut acc[r][tile][t]);
            // SAFETY: a row of the sums is a vector.
            let (low, high) = unsafe { (v.load(part[0].0[t].as_ptr().cast()), v.load(part[1].0[t].as_ptr().cast())) };
            let sum = v.add_i32(v.shl(high, Superblocks::<L>::SHIFT), low);
            *acc = v.fma(v.to_f32(sum), v.mul(w[r].d, da), *acc);
            if L::MIN {
                let mut offset = v.splat(0);
                for j in 0..4 * Superblocks::<L>::SUBS {
                    offset = v.add_pair(offset, w[r].pairs[j], pairs[j]);
                }
                *acc = v.fma(v.to_f32(offset), v.mul(w[r].dmin, da), *acc);
            }
        }
    }
}

#[inline(always)]
fn open<L: Superblock>(v: Avx512, b: Block<Avx512, L>, reading: Reading, panel: &mut Panel) {
    let Panel { codes, factors: to } = panel;
    let subs = Superblocks::<L>::SUBS;
    let zero = Superblocks::<L>::zero::<Avx512>() as i16;
    let head = L::head(v, b);
    // Each scale, or its lower bits and the others, twice in 16 bits.
    let mut scales = [[v.splat(0); 2]; 16];
    for j in 0..8 * subs {
        let (scale, n) = (head.scale(v, j), Superblocks::<L>::SHIFT);
        scales[j] = if L::MIN {
            let (low, high) = (v.and(scale, v.splat((1 << n) - 1)), v.shr(scale, n));
            [v.pair(low, low), v.pair(high, high)]
        } else {
            [v.pair(scale, scale); 2]
        };
    }
    for half in 0..2 {
        for j in 0..reading.n_columns {
            let row = 4 * half + j % 4;
            let column = L::column(v, b, half, j % 4);
            for s in 0..8 {
                let scale = scales[subs * s + half % subs];
                let [low, high] = if L::MIN {
                    [v.mul_i16(column[s], scale[0]), v.mul_i16(column[s], scale[1])]
                } else {
                    v.scaled_bytes(column[s], zero, scale[0])
                };
                codes[s / 2][0][8 * (s % 2) + row] = low;
                codes[s / 2][1][8 * (s % 2) + row] = high;
            }
        }
    }
    if L::MIN {
        for j in 0..4 * subs {
            to.pairs[j] = Superblocks::<L>::pair(v, &head, 2 * j);
        }
    }
    (to.d, to.dmin) = (head.d(), head.dmin(v));
}
