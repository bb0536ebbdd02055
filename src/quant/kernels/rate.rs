//! How fast a core can multiply bytes when it has to do nothing else: what `gemm` is held against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::vector::Vector;
use crate::cpu::Isa;

/// Sums that grow side by side, so that no step waits for the one before: four cycles of two multiplications, and some to spare.
const SUMS: usize = 10;
/// Steps between two looks at the clock, some tens of microseconds.
const STEPS: usize = 10_000;

/// Multiplications and additions (a product added to a sum is two) that this thread does in a second with an instruction set,
/// in a loop on registers that runs for about `time`: the best part of it counts.
///
/// # Panics
/// If the processor lacks the instruction set.
pub fn multiply_rate(isa: Isa, time: Duration) -> f64 {
    assert!(isa.is_available(), "this processor lacks {isa}");
    let multiply = match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => super::on_avx2::MULTIPLY,
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => super::on_avxvnni::MULTIPLY,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => super::on_avx512::MULTIPLY,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Amx => super::on_amx::MULTIPLY,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => super::on_neon::MULTIPLY,
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot => super::on_neondot::MULTIPLY,
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => super::on_neoni8mm::MULTIPLY,
        _ => super::on_scalar::MULTIPLY,
    };
    let (began, mut best) = (Instant::now(), 0.0f64);
    while began.elapsed() < time {
        let start = Instant::now();
        // SAFETY: the processor has the instruction set (asserted).
        let n_ops = unsafe { multiply(black_box(STEPS)) };
        best = best.max(n_ops as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// `n` steps on each sum; how many operations that were.
#[inline(always)]
pub(super) fn multiply<V: Vector>(v: V, n: usize) -> u64 {
    let w = v.splat(black_box(0x0705_0301));
    let mut sums = [v.splat(black_box(0x0102_0304)); SUMS];
    for _ in 0..n {
        for sum in &mut sums {
            *sum = v.multiply_add(*sum, w);
        }
    }
    black_box(&sums);
    (n * SUMS * V::LANES * V::PRODUCTS * 2) as u64
}
