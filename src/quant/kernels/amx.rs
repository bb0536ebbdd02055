//! AMX's tiles: a product of bytes of 16 tokens and 16 rows in one instruction.
//!
//! A tile is up to 16 rows of 64 bytes. `A` holds a token's bytes a row, `B` four bytes of each of 16 matrix rows a row, which is how
//! unpacked codes lie; `C` holds the sums, a token a row. There are no intrinsics for them on stable Rust, hence the assembler.

use core::arch::asm;

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

/// Which tiles a product goes through. Two sets for 16 tokens, so that a product needn't wait for the one before; one set for
/// the fewer tokens that are left.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Set {
    Even,
    Odd,
    Rest,
}

/// Tiles set up for products of `K` bytes, a multiple of 4 up to 64. When it goes they are released: a thread that sleeps has none for
/// the kernel to save.
pub(super) struct Tiles<const K: usize>(());

impl<const K: usize> Tiles<K> {
    /// `rest` is the number of tokens that [`Set::Rest`] takes, 1 to 16.
    ///
    /// # Safety
    /// The processor has [`Isa::Avx512Amx`](crate::cpu::Isa), and the thread has no other `Tiles`.
    pub(super) unsafe fn new(rest: usize) -> Self {
        assert!(K.is_multiple_of(4) && K <= 64 && (1..=TOKENS).contains(&rest));
        // Tiles 0, 3: A; 1, 4: B; 2, 5: C; 6, 7: A and C of the rest, whose B is tile 1.
        let (a, b, c) = ((TOKENS, K), (K / 4, 64), (TOKENS, 64));
        let shapes = [a, b, c, a, b, c, (rest, K), (rest, 64)];
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, row_bytes)) in shapes.into_iter().enumerate() {
            (config.rows[i], config.row_bytes[i]) = (rows as u8, row_bytes as u16);
        }
        // SAFETY: the processor has AMX, by the caller's promise, and the configuration is one of palette 1. The assembler reads memory (the
        // default), so the configuration is written before.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags)) };
        Self(())
    }

    /// `c` becomes the products' sums: of the bytes at `a`, `K` a token, from one token to the next `a_stride`, with the rows of `b`,
    /// `K / 4` times 64 bytes. Both are signed. `Set::Rest` leaves the rows of `c` after its tokens as they are.
    ///
    /// # Safety
    /// `a` can be read for as many tokens as the set has, and `b`.
    #[inline(always)]
    pub(super) unsafe fn multiply(&self, set: Set, a: *const i8, a_stride: usize, b: *const u8, c: &mut Sums) {
        macro_rules! product {
            ($a:literal, $b:literal, $c:literal) => {
                asm!(
                    concat!("tileloadd ", $b, ", [{b} + {line}]"),
                    concat!("tileloadd ", $a, ", [{a} + {stride}]"),
                    concat!("tilezero ", $c),
                    concat!("tdpbssd ", $c, ", ", $a, ", ", $b),
                    concat!("tilestored [{c} + {line}], ", $c),
                    a = in(reg) a,
                    stride = in(reg) a_stride,
                    b = in(reg) b,
                    c = in(reg) c,
                    line = in(reg) 64usize,
                    options(nostack, preserves_flags),
                )
            };
        }
        // SAFETY: `self` proves that the tiles are set up; that the operands can be read is the caller's promise, and `c` is 16 rows of 64 bytes.
        unsafe {
            match set {
                Set::Even => product!("tmm0", "tmm1", "tmm2"),
                Set::Odd => product!("tmm3", "tmm4", "tmm5"),
                Set::Rest => product!("tmm6", "tmm1", "tmm7"),
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
    // SAFETY: the caller's promise. Tiles 0, 2, 3 and 5 are 16 x 64, and so are 1 and 4 with 64 bytes.
    unsafe {
        let tiles = Tiles::<64>::new(TOKENS);
        asm!("tilezero tmm1", "tilezero tmm4", options(nomem, nostack, preserves_flags));
        for _ in 0..n {
            asm!(
                "tdpbssd tmm0, tmm1, tmm4",
                "tdpbssd tmm2, tmm1, tmm4",
                "tdpbssd tmm3, tmm1, tmm4",
                "tdpbssd tmm5, tmm1, tmm4",
                options(nomem, nostack, preserves_flags),
            );
        }
        drop(tiles);
    }
    (n * 4 * TOKENS * 16 * 64 * 2) as u64
}
