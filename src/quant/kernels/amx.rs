//! AMX's tiles: a product of bytes of 16 tokens and 16 rows in one instruction.
//!
//! A tile is up to 16 rows of 64 bytes. `A` holds a token's bytes a row, `B` four bytes of each of 16 matrix rows a row, which is how
//! unpacked codes lie; `C` holds the sums, a token a row. There are no intrinsics for them on stable Rust, hence the assembler.

use super::avx512::Avx512;
use super::job::Job;
use super::vector::Vector;
use core::arch::asm;
use core::arch::x86_64::{__m512, __m512i};
use core::marker::PhantomData;
use std::cell::RefCell;

/// Tokens of a tile.
pub(super) const TOKENS: usize = 16;

/// The sums of a tile: `(token, row of the matrix)`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub [[i32; 16]; TOKENS]);

impl Sums {
    pub(super) const ZERO: Self = Self([[0; 16]; TOKENS]);
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of each tile's rows.
    row_bytes: [u16; 16],
    /// Rows of each tile.
    rows: [u8; 16],
}

/// Tokens' activations of a superblock.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tokens(pub [[i8; 256]; TOKENS]);

/// How many tiles so many tokens take, and how many tokens each of them has: all as many, since a product takes as long as a tile has tokens. The
/// last may have fewer.
#[inline(always)]
pub(super) fn shares(n_tokens: usize) -> (usize, usize) {
    let n_tiles = n_tokens.div_ceil(TOKENS);
    (n_tiles, n_tokens.div_ceil(n_tiles))
}

/// Stores the dot products of group `g` with all tokens: `n` from each tile's element of `acc`.
///
/// # Safety
/// The job's promise, and the group is within it.
#[inline(always)]
pub(super) unsafe fn store(v: Avx512, job: &Job<'_>, g: usize, n: usize, acc: &[[__m512; TOKENS]]) {
    for (first, acc) in (0..job.x.len()).step_by(n).zip(acc) {
        for (t, acc) in (first..job.x.len()).zip(&acc[..n]) {
            // SAFETY: the caller's promise.
            unsafe { v.store_f32(job.out(t, g * Avx512::LANES), *acc) };
        }
    }
}

/// A head and `n` values, of types for which any bytes are right, left of whatever this thread did before. Not a closure's arguments, since a
/// closure wouldn't have the instruction set of the function that it's in; and not on the stack, where they would be cleared for each job (3
/// to 4 % of a small model's prompts).
///
/// # Safety
/// Until they are no longer used, this thread doesn't ask for others.
pub(super) unsafe fn scratch<'a, H, T>(n: usize) -> (&'a mut H, &'a mut [T]) {
    #[derive(Clone)]
    #[repr(align(64))]
    struct Line(#[allow(dead_code)] [u8; 64]);
    thread_local! {
        static LINES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    const { assert!(align_of::<H>() == align_of::<Line>() && align_of::<T>() == align_of::<Line>()) };
    LINES.with_borrow_mut(|lines| {
        let n_lines = (size_of::<H>() + n * size_of::<T>()).div_ceil(64);
        if lines.len() < n_lines {
            // Not twice as many, as a vector would grow: they are counted.
            lines.clear();
            lines.reserve_exact(n_lines);
            lines.resize(n_lines, Line([0; 64]));
        }
        let head = lines.as_mut_ptr().cast::<H>();
        // SAFETY: the lines are initialised, long enough and aligned, and any bytes are right. They stay where they are until more are asked for,
        // which doesn't happen meanwhile, by the caller's promise, and the thread has no other reference to them.
        unsafe { (&mut *head, std::slice::from_raw_parts_mut(head.add(1).cast(), n)) }
    })
}

/// What a superblock of 16 rows is multiplied with: for each 64 weights two tiles.
pub(super) type Codes = [[[__m512i; 16]; 2]; 4];

/// Tiles of this thread, set up for products of `K` bytes. When it goes they are released: a thread that sleeps has none for the kernel
/// to save.
pub(super) struct Tiles<const K: usize>(PhantomData<*const ()>);

impl<const K: usize> Tiles<K> {
    /// Each tile's rows, and their bytes.
    ///
    /// # Safety
    /// The processor has [`Isa::Avx512Amx`](crate::cpu::Isa), and the thread has no other `Tiles`.
    unsafe fn configure(shapes: [(usize, usize); 8]) -> Self {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, row_bytes)) in shapes.into_iter().enumerate() {
            assert!((1..=16).contains(&rows) && (1..=64).contains(&row_bytes));
            (config.rows[i], config.row_bytes[i]) = (rows as u8, row_bytes as u16);
        }
        // SAFETY: the processor has AMX, by the caller's promise, and the configuration is one of palette 1. The assembler reads memory (the
        // default), so the configuration is written before.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags)) };
        Self(PhantomData)
    }
}

impl Tiles<32> {
    /// For `n_tokens` tokens, 1 to 16, at a time.
    ///
    /// # Safety
    /// As for [`configure`](Self::configure).
    pub(super) unsafe fn new(n_tokens: usize) -> Self {
        // Tiles 0, 3: A; 1, 4: B; 2, 5: C.
        let (a, b, c) = ((n_tokens, 32), (8, 64), (n_tokens, 64));
        // SAFETY: the caller's promise.
        unsafe { Self::configure([a, b, c, a, b, c, a, b]) }
    }

    /// `c` becomes the products' sums: of the bytes at `a`, 32 a token, with those at `b`, 8 times 64 bytes. Both are signed. The rows of `c` after the
    /// tokens stay as they are. There are two sets of tiles, so that a product needn't wait for the one before.
    #[inline(always)]
    pub(super) fn multiply(&self, is_odd: bool, a: &[[i8; 32]; TOKENS], b: &[__m512i; 8], c: &mut Sums) {
        macro_rules! product {
            ($a:literal, $b:literal, $c:literal) => {
                asm!(
                    concat!("tileloadd ", $b, ", [{b} + {line}]"),
                    concat!("tileloadd ", $a, ", [{a} + {row}]"),
                    concat!("tilezero ", $c),
                    concat!("tdpbssd ", $c, ", ", $a, ", ", $b),
                    concat!("tilestored [{c} + {line}], ", $c),
                    a = in(reg) a.as_ptr(),
                    row = in(reg) 32usize,
                    b = in(reg) b.as_ptr(),
                    c = in(reg) c,
                    line = in(reg) 64usize,
                    options(nostack, preserves_flags),
                )
            };
        }
        // SAFETY: `self` proves that the tiles are set up; what is read and written is in the references.
        unsafe {
            if is_odd {
                product!("tmm3", "tmm4", "tmm5");
            } else {
                product!("tmm0", "tmm1", "tmm2");
            }
        }
    }
}

impl Tiles<64> {
    /// For `n_tokens` tokens, 1 to 16, at a time.
    ///
    /// # Safety
    /// As for [`configure`](Self::configure).
    pub(super) unsafe fn new(n_tokens: usize) -> Self {
        // Tile 0: A; 1 to 3: B; 4 to 7: C.
        let (a, b, c) = ((n_tokens, 64), (16, 64), (n_tokens, 64));
        // SAFETY: the caller's promise.
        unsafe { Self::configure([a, b, b, b, c, c, c, c]) }
    }

    /// Begins sums of nothing.
    #[inline(always)]
    pub(super) fn begin(&self) {
        // SAFETY: `self` proves that the tiles are set up.
        unsafe {
            asm!(
                "tilezero tmm4",
                "tilezero tmm5",
                "tilezero tmm6",
                "tilezero tmm7",
                options(nomem, nostack, preserves_flags)
            );
        }
    }

    /// Adds the products of columns `64 * step` and on for each of `R` groups of rows, 1 or 2, and both bytes of their codes. The lower bytes are
    /// unsigned, the upper ones signed or not.
    #[inline(always)]
    pub(super) fn step<const R: usize>(&self, a: &Tokens, b: [&Codes; R], step: usize, signed: bool) {
        const { assert!(R == 1 || R == 2) };
        macro_rules! products {
            ($codes:expr, $b0:literal, $c0:literal, $b1:literal, $c1:literal, $upper:literal) => {
                asm!(
                    concat!("tileloadd ", $b0, ", [{b} + {line}]"),
                    concat!("tdpbsud ", $c0, ", tmm0, ", $b0),
                    concat!("tileloadd ", $b1, ", [{b} + {line} + 1024]"),
                    concat!($upper, " ", $c1, ", tmm0, ", $b1),
                    b = in(reg) $codes[step].as_ptr(),
                    line = in(reg) 64usize,
                    options(readonly, nostack, preserves_flags),
                )
            };
        }
        // SAFETY: `self` proves that the tiles are set up; what is read is in the references: 64 bytes from column `64 * step` on of tokens of
        // 256 bytes, and two tiles, 1,024 bytes each, of every group's codes.
        unsafe {
            asm!(
                "tileloadd tmm0, [{a} + {row}]",
                a = in(reg) a.0.as_ptr().cast::<i8>().add(64 * step),
                row = in(reg) 256usize,
                options(readonly, nostack, preserves_flags),
            );
            match (signed, R) {
                (true, 1) => products!(b[0], "tmm1", "tmm4", "tmm2", "tmm5", "tdpbssd"),
                (false, 1) => products!(b[0], "tmm1", "tmm4", "tmm2", "tmm5", "tdpbsud"),
                (true, _) => {
                    products!(b[0], "tmm1", "tmm4", "tmm2", "tmm5", "tdpbssd");
                    products!(b[R - 1], "tmm3", "tmm6", "tmm1", "tmm7", "tdpbssd");
                }
                (false, _) => {
                    products!(b[0], "tmm1", "tmm4", "tmm2", "tmm5", "tdpbsud");
                    products!(b[R - 1], "tmm3", "tmm6", "tmm1", "tmm7", "tdpbsud");
                }
            }
        }
    }

    /// Stores the sums for each group and both bytes of its codes. The rows of `c` after the tokens stay as they are.
    #[inline(always)]
    pub(super) fn end<const R: usize>(&self, c: &mut [[Sums; 2]; R]) {
        macro_rules! store {
            ($sums:expr, $c0:literal, $c1:literal) => {
                asm!(
                    concat!("tilestored [{c} + {line}], ", $c0),
                    concat!("tilestored [{c} + {line} + 1024], ", $c1),
                    c = in(reg) $sums.as_mut_ptr(),
                    line = in(reg) 64usize,
                    options(nostack, preserves_flags),
                )
            };
        }
        // SAFETY: `self` proves that the tiles are set up; two tiles are stored into two `Sums`.
        unsafe {
            store!(c[0], "tmm4", "tmm5");
            if R == 2 {
                store!(c[R - 1], "tmm6", "tmm7");
            }
        }
    }
}

impl<const K: usize> Drop for Tiles<K> {
    fn drop(&mut self) {
        // SAFETY: whoever made it promised that the processor has AMX.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// `n` products on each of four tiles; how many operations that were. See [`rate`](super::rate).
///
/// # Safety
/// The processor has [`Isa::Avx512Amx`](crate::cpu::Isa), and the thread has no `Tiles`.
pub(super) unsafe fn multiply_rate(n: usize) -> u64 {
    // SAFETY: the caller's promise. All tiles are 16 x 64 bytes.
    unsafe {
        let tiles = Tiles::<64>::new(TOKENS);
        asm!("tilezero tmm0", "tilezero tmm1", options(nomem, nostack, preserves_flags));
        for _ in 0..n {
            asm!(
                "tdpbssd tmm4, tmm0, tmm1",
                "tdpbssd tmm5, tmm0, tmm1",
                "tdpbssd tmm6, tmm0, tmm1",
                "tdpbssd tmm7, tmm0, tmm1",
                options(nomem, nostack, preserves_flags),
            );
        }
        drop(tiles);
    }
    (n * 4 * TOKENS * 16 * 64 * 2) as u64
}
