//! `gemm` of the formats with superblocks of 256 weights on AMX.
//!
//! A superblock's sum is one integer: weights times the scales of their sub-blocks times activations. So weights are multiplied by
//! their scales when they are unpacked, and cut into two bytes, seven bits below and the rest above. Then whole tiles of 64 bytes add up a
//! superblock, and vectors see two sums of it, however long its sub-blocks are.
//!
//! The count for 16 tokens, 16 rows and a superblock: 8 products of 16 cycles, beside which all else fits (10 tiles loaded at 8 cycles, 2
//! stored at 16, 6 vector operations a token, with offsets 13 or 17). So 130 to 150 cycles, where VNNI's 1,408 operations take 700 or
//! more. Unpacking takes some 450 cycles more than VNNI's: with 16 tokens half of the gain, with 128 a tenth.

use super::NO_SCALE;
use super::amx::{self, Sums, TOKENS, Tiles};
use super::avx512::Avx512;
use super::job::{Act, Job, MAX_TOKENS};
use super::layout::{Ahead, Block};
use super::superblock::{Reading, Scales, Superblock, Superblocks};
use super::vector::Vector;
use core::arch::x86_64::*;

/// Rows of a group.
const LANES: usize = Avx512::LANES;
/// Groups of rows that share what is gathered of the tokens: with two of them 24 KiB, of an L1 cache of 48.
const GROUPS: usize = 2;

/// A superblock of a group, unpacked.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Panel {
    /// Weights times scales, in four times 64: what is below 128, then the rest.
    codes: amx::Codes,
    /// The offsets of two sub-blocks each.
    pairs: [__m512i; 8],
    d: __m512,
    dmin: __m512,
}

/// Up to [`MAX_TOKENS`] tokens.
///
/// # Safety
/// The job's promise; the processor has [`Isa::Avx512Amx`](crate::cpu::Isa), and the thread has no tiles.
#[inline(always)]
pub(super) unsafe fn gemm<L: Superblock>(v: Avx512, job: &Job<'_>) {
    let (zero, none) = (v.splat(0), v.splat_f32(NO_SCALE));
    let mut panels = [Panel { codes: [[[zero; 16]; 2]; 4], pairs: [zero; 8], d: none, dmin: none }; GROUPS];
    let mut acc = [[none; MAX_TOKENS]; GROUPS];
    // SAFETY: the caller's promise.
    let tiles = unsafe { Tiles::<64>::new(job.x.len().min(TOKENS)) };
    let reading = Reading::new::<Avx512>(None);
    let together = job.n_groups / GROUPS * GROUPS;
    for g in (0..together).step_by(GROUPS) {
        // SAFETY: the job's promise.
        unsafe { groups::<L, GROUPS>(v, &tiles, job, g, reading, &mut panels, &mut acc) };
    }
    let ([panel, ..], [acc, ..]) = (&mut panels, &mut acc);
    for g in together..job.n_groups {
        let (panel, acc) = (std::array::from_mut(panel), std::array::from_mut(acc));
        // SAFETY: the job's promise.
        unsafe { groups::<L, 1>(v, &tiles, job, g, reading, panel, acc) };
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
    reading: Reading,
    panels: &mut [Panel; R],
    acc: &mut [[__m512; MAX_TOKENS]; R],
) {
    let bytes = L::BYTES * LANES;
    let mut tokens = amx::Tokens([[0; 256]; TOKENS]);
    // A tile's sums are used while the next one's are multiplied.
    let mut sums = [[[Sums::ZERO; 2]; R]; 2];
    acc.iter_mut().for_each(|acc| acc.fill(v.splat_f32(0.0)));
    for i in 0..job.n_blocks {
        let at = |r: usize, i: usize| job.w.wrapping_add(((g + r) * job.n_blocks + i) * bytes);
        for (r, panel) in panels.iter_mut().enumerate() {
            // SAFETY: the job's promise.
            open(v, unsafe { Block::<_, L>::new(v, at(r, i)) }, reading, panel);
        }
        let mut ahead = Ahead::new(std::array::from_fn::<_, R, _>(|r| at(r, i + 1)), bytes, job.x.len());
        let n_tiles = job.x.len().div_ceil(TOKENS);
        for k in 0..=n_tiles {
            if k < n_tiles {
                let x = &job.x[TOKENS * k..job.x.len().min(TOKENS * (k + 1))];
                ahead.ask(v, x.len());
                for (to, x) in tokens.0.iter_mut().zip(x) {
                    // SAFETY: the job's promise: the token has this superblock.
                    *to = unsafe { x.q.add(256 * i).cast::<[i8; 256]>().read() };
                }
                tiles.multiply(&tokens, std::array::from_fn(|r| &panels[r].codes), &mut sums[k % 2]);
            }
            if k > 0 {
                let first = TOKENS * (k - 1);
                let x = &job.x[first..job.x.len().min(TOKENS * k)];
                for (r, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: the job's promise: the tokens have this superblock.
                    unsafe { add::<L>(v, &panels[r], x, i, &sums[(k - 1) % 2][r], &mut acc[first..][..x.len()]) };
                }
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        for t in 0..job.x.len() {
            // SAFETY: the job's promise.
            unsafe { v.store_f32(job.out(t, (g + r) * LANES), acc[t]) };
        }
    }
}

/// Adds superblock `i`'s part to the dot products of a group with some tokens.
///
/// # Safety
/// The tokens have a superblock `i`.
#[inline(always)]
unsafe fn add<L: Superblock>(v: Avx512, w: &Panel, x: &[Act], i: usize, sums: &[Sums; 2], acc: &mut [__m512]) {
    for (t, (x, acc)) in x.iter().zip(acc).enumerate() {
        // SAFETY: a row of the sums is a vector; the token has the superblock, by the caller's promise.
        unsafe {
            let [low, high] = [0, 1].map(|part| v.load(sums[part].0[t].as_ptr().cast()));
            let sum = v.add_i32(v.shl(high, 7), low);
            let da = v.splat_f32(*x.d.add(i));
            *acc = v.fma(v.to_f32(sum), v.mul(w.d, da), *acc);
            if L::MIN {
                let mut offset = v.splat(0);
                for j in 0..4 * Superblocks::<L>::SUBS {
                    offset = v.dot_pairs(offset, w.pairs[j], Superblocks::<L>::sums_at(x, i, j));
                }
                *acc = v.fma(v.to_f32(offset), v.mul(w.dmin, da), *acc);
            }
        }
    }
}

#[inline(always)]
fn open<L: Superblock>(v: Avx512, b: Block<Avx512, L>, reading: Reading, panel: &mut Panel) {
    let subs = Superblocks::<L>::SUBS;
    let zero = Superblocks::<L>::zero::<Avx512>() as u8;
    let head = L::head(v, b);
    let mut scales = [v.splat(0); 16];
    for j in 0..8 * subs {
        scales[j] = head.scale(v, j);
    }
    for half in 0..2 {
        for j in 0..reading.n_columns {
            let row = 4 * half + j % 4;
            let column = L::column(v, b, half, j % 4);
            for s in 0..8 {
                let scale = scales[subs * s + half % subs];
                let [low, high] = v.scaled_bytes(v.sub_u8(column[s], zero), scale);
                panel.codes[s / 2][0][8 * (s % 2) + row] = low;
                panel.codes[s / 2][1][8 * (s % 2) + row] = high;
            }
        }
    }
    if L::MIN {
        for j in 0..4 * subs {
            panel.pairs[j] = Superblocks::<L>::pair(v, &head, 2 * j);
        }
    }
    (panel.d, panel.dmin) = (head.d(), head.dmin(v));
}
