//! Every format's blocks against ggml's own: dequantised values bit for bit, quantised bytes one for one; and rows of
//! activations likewise.

#![cfg(feature = "llama-cpp")]
#![allow(unsafe_code)]

mod common;

use common::llama;
use oncall::quant::FORMATS;
use oncall::quant::act::{quantize_q8_0, quantize_q8_k};

// ggml's quantisers of activations, which its headers keep to themselves: rows of `n` to blocks.
unsafe extern "C" {
    /// The processor's own version, not the reference, which rounds ties the other way.
    fn quantize_row_q8_0(x: *const f32, y: *mut u8, n: i64);
    /// Likewise; with sums.
    fn quantize_row_q8_1(x: *const f32, y: *mut u8, n: i64);
    fn quantize_row_q8_K_ref(x: *const f32, y: *mut u8, n: i64);
}

const N: usize = 256 * 64;

/// Splitmix64: the tests need bytes that are the same on every machine, not good randomness.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In -1..1.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// About normal, with standard deviation 1.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() / 2.0
    }
}

#[test]
fn dequantised_values_equal_ggml_s_bit_for_bit() {
    let mut rng = Rng(1);
    for format in FORMATS {
        if format.name == "f32" {
            continue; // ggml has no function for what is f32 already
        }
        for round in 0..20 {
            let bytes: Vec<u8> = (0..N / format.block_len * format.block_bytes).map(|_| rng.next() as u8).collect();
            let mut ours = vec![0.0; N];
            (format.dequantize_row)(&bytes, &mut ours);
            let theirs = llama::dequantize(format.id, &bytes, N);
            for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                // Which NaN comes out is the processor's choice, not the format's.
                assert!(
                    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
                    "{}, round {round}, weight {i}: {a} but ggml has {b}",
                    format.name
                );
            }
        }
    }
}

/// Rows that look like weights, and rows that don't.
fn rows() -> Vec<(&'static str, Vec<f32>)> {
    let mut rng = Rng(2);
    let mut row = |f: &mut dyn FnMut(&mut Rng, usize) -> f32| (0..N).map(|i| f(&mut rng, i)).collect::<Vec<f32>>();
    vec![
        ("normal", row(&mut |r, _| r.normal())),
        ("like weights", row(&mut |r, _| r.normal() * 0.02)),
        ("uniform", row(&mut |r, _| r.uniform())),
        ("positive", row(&mut |r, _| r.uniform().abs() + 0.5)),
        ("negative", row(&mut |r, _| -r.uniform().abs() - 0.1)),
        ("off centre", row(&mut |r, _| r.normal() + 3.0)),
        ("outliers", row(&mut |r, i| r.normal() * if i % 61 == 0 { 50.0 } else { 1.0 })),
        ("scales that vary", row(&mut |r, i| r.normal() * 2f32.powi((i / 16 % 23) as i32 - 11))),
        ("sparse", row(&mut |r, _| if r.next() % 10 == 0 { r.normal() } else { 0.0 })),
        ("zero blocks", row(&mut |r, i| if i / 16 % 3 == 0 { 0.0 } else { r.normal() })),
        ("zero", row(&mut |_, _| 0.0)),
        ("constant", row(&mut |_, i| [1.0, -0.75, 0.1][i / 256 % 3])),
        ("whole numbers", row(&mut |r, _| (r.next() % 17) as f32 - 8.0)),
        ("halves", row(&mut |r, _| (r.next() % 33) as f32 * 0.5 - 8.0)),
        ("large", row(&mut |r, _| r.normal() * 1e4)),
        ("small", row(&mut |r, _| r.normal() * 1e-5)),
        ("smaller", row(&mut |r, _| r.normal() * 1e-8)),
        ("steps", row(&mut |_, i| (i % 32) as f32 - 11.5)),
    ]
}

#[test]
fn quantised_bytes_equal_ggml_s() {
    let mut differ = Vec::new();
    for format in FORMATS {
        for (what, row) in rows() {
            let mut ours = vec![0x55; N / format.block_len * format.block_bytes];
            (format.quantize_row)(&row, &mut ours);
            let theirs = llama::quantize(format.id, &row, N);
            let blocks = ours.chunks(format.block_bytes).zip(theirs.chunks(format.block_bytes));
            let bad: Vec<_> = blocks.enumerate().filter(|(_, (a, b))| a != b).collect();
            if let Some((i, (a, b))) = bad.first() {
                differ.push(format!("{} {what}: {} blocks, first {i}:\n{a:?}\n{b:?}", format.name, bad.len()));
            }
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}

#[test]
fn activations_equal_ggml_s() {
    llama::init(); // sets up the tables of halves
    for (what, row) in rows() {
        let (mut q, mut d, mut s) = (vec![0; N], vec![0.0; N / 32], vec![0.0; N / 32]);
        quantize_q8_0(&row, &mut q, &mut d, &mut s);
        let mut theirs = vec![0u8; N / 32 * 34];
        // SAFETY: the input has N floats, the output room for N / 32 blocks of a half and 32 bytes.
        unsafe { quantize_row_q8_0(row.as_ptr(), theirs.as_mut_ptr(), N as i64) };
        for (i, block) in theirs.chunks(34).enumerate() {
            let ours = &q[32 * i..][..32];
            let scale = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
            assert_eq!(d[i], scale, "q8_0 {what}, block {i}");
            // Where the scale rounds to zero so do ours, whatever ggml leaves there.
            let same = ours.iter().zip(&block[2..]).all(|(a, b)| *a == *b as i8 || scale == 0.0);
            assert!(same, "q8_0 {what}, block {i}: {ours:?}");
        }
        let mut theirs = vec![0u8; N / 32 * 36];
        // SAFETY: the input has N floats, the output room for N / 32 blocks of two halves and 32 bytes.
        unsafe { quantize_row_q8_1(row.as_ptr(), theirs.as_mut_ptr(), N as i64) };
        for (i, block) in theirs.chunks(36).enumerate() {
            let sum = half::f16::from_le_bytes([block[2], block[3]]).to_f32();
            // As above where the scale rounds to zero; and where a half overflows ours is the exact sum.
            let same = s[i] == sum || d[i] == 0.0 || sum.is_infinite() && s[i].abs() >= 65504.0;
            assert!(same, "q8_1 {what}, block {i}: {} but ggml has {sum}", s[i]);
        }

        let (mut q, mut d) = (vec![0; N], vec![0.0; N / 256]);
        quantize_q8_k(&row, &mut q, &mut d);
        let mut theirs = vec![0u8; N / 256 * 292];
        // SAFETY: the input has N floats, the output room for N / 256 blocks of a float, 256 bytes and 16 sums.
        unsafe { quantize_row_q8_K_ref(row.as_ptr(), theirs.as_mut_ptr(), N as i64) };
        for (i, block) in theirs.chunks(292).enumerate() {
            let ours = &q[256 * i..][..256];
            assert_eq!(d[i].to_le_bytes(), block[..4], "q8_k {what}, block {i}");
            assert!(ours.iter().zip(&block[4..]).all(|(a, b)| *a == *b as i8), "q8_k {what}, block {i}");
        }
    }
}
