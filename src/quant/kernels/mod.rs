//! Matrix kernels: every format on every instruction set, from one algorithm.
//!
//! A lane is a row: see [`layout`]. The integer sum of a block is complete in its lane; one fused multiply-add follows.
//! So one token or many, one instruction set or another: the operations on an output element are those of the
//! format's scalar `vec_dot`, in the same order, and give the same bits.
//!
//! An instruction set is an implementation of [`vector::Vector`]; a format says how its block comes apart in registers
//! ([`Block32`], [`Superblock`] or [`Number`]); the two kernels, `gemv` for 1 to 4 tokens and `gemm` for more, are written
//! once for each of these three kinds of format, and `gemm` once more where tokens are gathered first (`gathered32` on arm64, `tiled32`
//! and `tiled256` on AMX). They are compiled for each pair, in functions that have the instruction set's features, everything inlined.

#![allow(unsafe_code)]

mod acts;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod block32;
#[cfg(target_arch = "aarch64")]
mod gathered32;
mod job;
mod layout;
#[cfg(target_arch = "aarch64")]
mod neon;
mod number;
mod quantize;
mod rate;
mod run;
mod scalar;
mod superblock;
#[cfg(target_arch = "x86_64")]
mod tiled256;
#[cfg(target_arch = "x86_64")]
mod tiled32;
pub(crate) mod unpack;
mod vector;

#[cfg(test)]
mod tests;

use crate::cpu::Isa;

pub use acts::Acts;
pub(crate) use block32::Block32;
use job::{Act, Job};
pub(crate) use layout::{Block, Field, Layout};
pub(crate) use number::Number;
pub use rate::multiply_rate;
pub use run::{Chosen, OutRows, Packed, Product, matmul, matmul_here, pack, scratch_bytes};
pub(crate) use superblock::{Scales, Superblock};
pub(crate) use vector::Vector;

/// Stands where a kind of format has no scale or offset and the value is never used.
const NO_SCALE: f32 = 0.0;

/// Rows that are a multiple of this are whole groups on every instruction set.
pub const MAX_LANES: usize = 16;

/// The most tokens of `gemv`.
const MAX_GEMV: usize = 4;

/// The two kernels of a format, for any instruction set.
trait Kernel: 'static {
    type Layout: Layout;
    /// What `show --kernels` calls it.
    const KIND: &'static str;
    /// Activations whose sums it reads together; 0 if it reads none.
    const SUB: usize;
    /// Whether `gemm` takes several groups of rows together, where the instruction set has the registers.
    const GROUPED: bool = true;
    /// Up to so many tokens, a matrix that comes from memory is multiplied faster by `gemv` again and again than by `gemm`, which
    /// has too few tokens to compute with while it waits for weights (Q4_0 on AVX-512: 12 tokens 40% faster, 16 tokens 30%).
    /// An instruction set that multiplies more slowly never waits: it can have a lower bound for all formats.
    const FEW: usize = 16;

    /// `T` tokens, weights unpacked in registers.
    ///
    /// # Safety
    /// The job's promise, with `T` tokens.
    unsafe fn gemv<V: Vector, const T: usize>(v: V, job: &Job<'_>);

    /// Up to [`MAX_TOKENS`] tokens, `N` at a time, and `R` groups of rows; weights unpacked once into the cache.
    ///
    /// # Safety
    /// The job's promise.
    unsafe fn gemm<V: Vector, const N: usize, const R: usize>(v: V, job: &Job<'_>);
}

/// A format's kernels on one instruction set.
pub(crate) struct Kernels {
    /// [`Kernel::KIND`].
    pub kind: &'static str,
    /// Rows of a group.
    pub lanes: usize,
    /// Tokens, and groups of rows, whose sums `gemm` keeps in registers.
    pub tile: (usize, usize),
    /// [`Kernel::SUB`].
    pub sub: usize,
    /// [`Kernel::FEW`].
    pub few: usize,
    /// Interleaves a group: `(rows, group)`, of the same size.
    ///
    /// # Safety
    /// Of all three: the processor has the instruction set. Of the kernels besides: the job's promise.
    pub pack: unsafe fn(&[u8], &mut [u8]),
    /// For 1 to 4 tokens.
    pub gemv: [unsafe fn(&Job<'_>); MAX_GEMV],
    /// For up to [`MAX_TOKENS`].
    pub gemm: unsafe fn(&Job<'_>),
}

/// Where the integer sum of a (sub-)block begins: what codes less `zero` differ from codes by, `-zero` times the sum of the
/// activations.
///
/// A shift of a negated sum, not a product: the compiler gathered eight products for the scalar unit's vectors and
/// scattered them again, which halved Q6_K's speed.
///
/// # Safety
/// The token has a (sub-)block `i`.
#[inline(always)]
unsafe fn start<V: Vector>(v: V, x: &Act, i: usize, zero: i32) -> V::I {
    if zero == 0 {
        return v.splat(0);
    }
    assert!(zero.count_ones() == 1);
    // SAFETY: the caller's promise.
    unsafe { v.splat_sum(x.negated_sum.add(i), zero.trailing_zeros()) }
}

/// Intrinsics in a method of a [`Vector`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! op {
    ($e:expr) => {{
        // SAFETY: `self` proves that the processor has the instruction set; an address is the caller's promise.
        unsafe { $e }
    }};
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use op;

/// Takes a job's tokens in tiles, `$n` at a time, then two, then one: `$body` is expanded for an array `$x` of so many tokens, and one
/// `$acc` of what belongs to them.
macro_rules! for_each_tile {
    ($n:ident, ($tokens:expr, $accs:expr), |$x:ident, $acc:ident| $body:expr) => {{
        let (tiles, rest) = $tokens.as_chunks::<$n>();
        let (accs, acc_rest) = $accs.as_chunks_mut::<$n>();
        for ($x, $acc) in tiles.iter().zip(accs) {
            $body;
        }
        let (tiles, rest) = rest.as_chunks::<2>();
        let (accs, acc_rest) = acc_rest.as_chunks_mut::<2>();
        for ($x, $acc) in tiles.iter().zip(accs) {
            $body;
        }
        for ($x, $acc) in rest.iter().zip(acc_rest) {
            let ($x, $acc) = (&[*$x], std::array::from_mut($acc));
            $body;
        }
    }};
}
use for_each_tile;

/// Compiles the kernels for an instruction set: a module of functions with its features.
macro_rules! instruction_set {
    ($name:ident, $vector:ty, $features:literal, $tokens:literal x $groups:literal, $few:expr) => {
        mod $name {
            use super::*;

            const _: () = assert!(MAX_LANES.is_multiple_of(<$vector>::LANES));

            /// # Safety
            /// As for [`Kernel::gemv`].
            #[target_feature(enable = $features)]
            unsafe fn gemv<K: Kernel, const T: usize>(job: &Job<'_>) {
                // SAFETY: the function has the features that the vector stands for; the rest is the caller's promise.
                unsafe { K::gemv::<$vector, T>(<$vector>::new(), job) }
            }

            /// # Safety
            /// As for [`Kernel::gemm`].
            #[target_feature(enable = $features)]
            unsafe fn gemm<K: Kernel>(job: &Job<'_>) {
                // SAFETY: as above.
                unsafe { K::gemm::<$vector, $tokens, $groups>(<$vector>::new(), job) }
            }

            #[target_feature(enable = $features)]
            fn pack<K: Kernel>(rows: &[u8], group: &mut [u8]) {
                // SAFETY: the function has the features that the vector stands for.
                layout::pack::<_, K::Layout>(unsafe { <$vector>::new() }, rows, group);
            }

            #[target_feature(enable = $features)]
            fn multiply(n: usize) -> u64 {
                // SAFETY: as above.
                rate::multiply(unsafe { <$vector>::new() }, n)
            }

            pub(super) const MULTIPLY: unsafe fn(usize) -> u64 = multiply;

            pub(super) const fn kernels<K: Kernel>() -> Kernels {
                Kernels {
                    kind: K::KIND,
                    lanes: <$vector as Vector>::LANES,
                    tile: ($tokens, if K::GROUPED { $groups } else { 1 }),
                    sub: K::SUB,
                    few: if K::FEW < $few { K::FEW } else { $few },
                    pack: pack::<K>,
                    gemv: [gemv::<K, 1>, gemv::<K, 2>, gemv::<K, 3>, gemv::<K, 4>],
                    gemm: gemm::<K>,
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
instruction_set!(on_avx2, avx2::Avx2<false>, "avx2,fma,f16c", 4 x 2, MAX_GEMV);
#[cfg(target_arch = "x86_64")]
instruction_set!(on_avxvnni, avx2::Avx2<true>, "avx2,fma,f16c,avxvnni", 4 x 2, MAX_GEMV);
#[cfg(target_arch = "x86_64")]
instruction_set!(on_avx512, avx512::Avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni", 6 x 1, usize::MAX);

/// AVX-512 with `gemm` in AMX's tiles: the same packed weights, and the same kernels for few tokens.
#[cfg(target_arch = "x86_64")]
mod on_amx {
    use super::*;

    /// Few tokens use a part of a tile, and weights are unpacked for them all the same (Emerald Rapids, from memory, one core, GOP/s of `gemv` and
    /// `gemm`: Q4_K eight tokens 224 and 230, twelve 253 and 330; Q6_K 157 and 136, 171 and 206),
    const FEW_SUPERBLOCKS: usize = 2 * MAX_GEMV;
    /// which for blocks of 32 pays later (Q4_0 twelve tokens 263 and 203, sixteen 287 and 283; Q8_0 sixteen 247 and 221).
    const FEW_BLOCKS: usize = 4 * MAX_GEMV;

    /// # Safety
    /// As for [`tiled32::gemm`].
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn gemm32<L: Block32>(job: &Job<'_>) {
        // SAFETY: the function has the features, and the processor AMX besides; the rest is the caller's promise.
        unsafe { tiled32::gemm::<L>(avx512::Avx512::new(), job) }
    }

    /// # Safety
    /// As for [`tiled256::gemm`].
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn gemm256<L: Superblock>(job: &Job<'_>) {
        // SAFETY: as above.
        unsafe { tiled256::gemm::<L>(avx512::Avx512::new(), job) }
    }

    /// A thread has tiles only while a kernel runs.
    pub(super) const MULTIPLY: unsafe fn(usize) -> u64 = amx::multiply_rate;

    /// See [`run::scratch_bytes`].
    pub(super) fn scratch_bytes(n_cols: usize) -> usize {
        tiled32::scratch_bytes(n_cols).max(tiled256::scratch_bytes(n_cols))
    }

    pub(super) const fn block32<L: Block32>() -> Kernels {
        Kernels {
            tile: (amx::TOKENS, 1),
            few: FEW_BLOCKS,
            gemm: gemm32::<L>,
            ..on_avx512::kernels::<block32::Blocks<L>>()
        }
    }

    pub(super) const fn superblock<L: Superblock>() -> Kernels {
        let gemv = on_avx512::kernels::<superblock::Superblocks<L>>();
        Kernels { tile: (amx::TOKENS, 2), few: FEW_SUPERBLOCKS, gemm: gemm256::<L>, ..gemv }
    }
}

#[cfg(target_arch = "aarch64")]
instruction_set!(on_neon, neon::Neon<{ neon::BASE }>, "neon", 2 x 1, MAX_GEMV);
#[cfg(target_arch = "aarch64")]
instruction_set!(on_neondot, neon::Neon<{ neon::DOT }>, "neon,dotprod", 4 x 2, MAX_GEMV);
#[cfg(target_arch = "aarch64")]
instruction_set!(on_neoni8mm, neon::Neon<{ neon::I8MM }>, "neon,dotprod,i8mm", 4 x 2, MAX_GEMV);

/// Blocks of 32 on NEON with dotprod and with i8mm: the same but for `gemm`.
#[cfg(target_arch = "aarch64")]
mod on_gathered {
    use super::gathered32::{GROUPS, TOKENS, gemm};
    use super::neon::{DOT, I8MM, Neon};
    use super::*;

    /// # Safety
    /// As for [`gemm`].
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn dot<L: Block32>(job: &Job<'_>) {
        // SAFETY: the function has the features that the vector stands for; the rest is the caller's promise.
        unsafe { gemm::<L, DOT>(Neon::new(), job) }
    }

    /// # Safety
    /// As for [`gemm`].
    #[target_feature(enable = "neon,dotprod,i8mm")]
    unsafe fn i8mm<L: Block32>(job: &Job<'_>) {
        // SAFETY: as above.
        unsafe { gemm::<L, I8MM>(Neon::new(), job) }
    }

    const fn block32<L: Block32>(gemm: unsafe fn(&Job<'_>)) -> Kernels {
        Kernels { tile: (TOKENS, GROUPS), gemm, ..on_neondot::kernels::<block32::Blocks<L>>() }
    }

    pub(super) const fn with_dot<L: Block32>() -> Kernels {
        block32::<L>(dot::<L>)
    }

    pub(super) const fn with_i8mm<L: Block32>() -> Kernels {
        block32::<L>(i8mm::<L>)
    }
}

/// Plain Rust, which isn't for speed: one small function serves any number of tokens.
mod on_scalar {
    use super::*;

    /// # Safety
    /// The job's promise.
    unsafe fn each_token<K: Kernel>(job: &Job<'_>) {
        for (t, x) in job.x.iter().enumerate() {
            // SAFETY: the job's promise: it has a token `t`, and this is its part of the job.
            unsafe {
                let x = std::slice::from_ref(x);
                K::gemv::<_, 1>(scalar::Scalar, &Job { x, out: job.out(t, 0), ..*job });
            }
        }
    }

    fn pack<K: Kernel>(rows: &[u8], group: &mut [u8]) {
        layout::pack::<_, K::Layout>(scalar::Scalar, rows, group);
    }

    fn multiply(n: usize) -> u64 {
        rate::multiply(scalar::Scalar, n)
    }

    pub(super) const MULTIPLY: unsafe fn(usize) -> u64 = multiply;

    pub(super) const fn kernels<K: Kernel>() -> Kernels {
        Kernels {
            kind: K::KIND,
            lanes: scalar::Scalar::LANES,
            tile: (1, 1),
            sub: K::SUB,
            few: K::FEW,
            pack: pack::<K>,
            gemv: [each_token::<K>; MAX_GEMV],
            gemm: each_token::<K>,
        }
    }
}

fn of<K: Kernel>(isa: Isa) -> Option<&'static Kernels> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Some(const { &on_avx2::kernels::<K>() }),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => Some(const { &on_avxvnni::kernels::<K>() }),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni | Isa::Avx512Amx => Some(const { &on_avx512::kernels::<K>() }),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => Some(const { &on_neon::kernels::<K>() }),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot => Some(const { &on_neondot::kernels::<K>() }),
        #[cfg(target_arch = "aarch64")]
        // For few tokens it would only turn weights and sums round more often (Q4_K, two tokens: 45 instructions, 36).
        Isa::NeonI8mm => {
            Some(const { &Kernels { gemv: on_neondot::kernels::<K>().gemv, ..on_neoni8mm::kernels::<K>() } })
        }
        Isa::Scalar => Some(const { &on_scalar::kernels::<K>() }),
        #[allow(unreachable_patterns)]
        _ => None,
    }
}

/// The kernels of a format with blocks of 32 on an instruction set, if they are compiled for this machine.
pub(crate) fn block32<L: Block32>(isa: Isa) -> Option<&'static Kernels> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Amx => Some(const { &on_amx::block32::<L>() }),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot => Some(const { &on_gathered::with_dot::<L>() }),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => Some(const { &on_gathered::with_i8mm::<L>() }),
        _ => of::<block32::Blocks<L>>(isa),
    }
}

/// The kernels of a format with superblocks of 256, likewise.
pub(crate) fn superblock<L: Superblock>(isa: Isa) -> Option<&'static Kernels> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Amx => Some(const { &on_amx::superblock::<L>() }),
        _ => of::<superblock::Superblocks<L>>(isa),
    }
}

/// The kernels of a format without blocks, likewise.
pub(crate) fn number<L: Number>(isa: Isa) -> Option<&'static Kernels> {
    of::<number::Numbers<L>>(isa)
}
