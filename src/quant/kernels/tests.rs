//! Every format on every instruction set that this machine has, against the scalar dot product, bit for bit.

use super::{Acts, MAX_LANES, OutRows, Packed, Product, matmul_here, pack};
use crate::cpu::Isa;
use crate::quant::{FORMATS, Format};

/// Small and repeatable: a 64-bit linear congruential generator's upper half.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// -1.0..1.0, now and then much smaller, as activations are.
    fn activation(&mut self) -> f32 {
        let x = self.next() as i32 as f32 / 2147483648.0;
        if self.next().is_multiple_of(5) { x / 300.0 } else { x }
    }
}

/// Blocks of any bits whose weights are numbers of ordinary size.
fn random_rows(format: &Format, n_rows: usize, n_cols: usize, rng: &mut Rng) -> Vec<u8> {
    let mut data = vec![0; format.row_bytes(n_cols as u64).unwrap() as usize * n_rows];
    let mut weights = vec![0.0; format.block_len];
    for block in data.chunks_exact_mut(format.block_bytes) {
        loop {
            block.fill_with(|| rng.next() as u8);
            (format.dequantize_row)(block, &mut weights);
            if weights.iter().all(|w| w.abs() < 1e3) {
                break;
            }
        }
    }
    data
}

/// Token rows, one of them zero, one tiny, one huge.
fn random_acts(format: &Format, n_tokens: usize, n_cols: usize, rng: &mut Rng) -> Acts {
    let mut acts = Acts::new();
    acts.reset(n_tokens, n_cols, &[format.act]);
    for t in 0..n_tokens {
        let size = match t {
            1 => 0.0,
            2 => 1e-30,
            3 => 1e4,
            _ => 1.0,
        };
        let row: Vec<f32> = (0..n_cols).map(|_| rng.activation() * size).collect();
        acts.put(t, &row);
    }
    acts
}

/// The instruction sets that are there; only the one that `ONCALL_ISA` names, if it does: under an emulator each takes minutes.
fn isas() -> Vec<Isa> {
    let forced = std::env::var_os("ONCALL_ISA").is_some_and(|name| !name.is_empty());
    if forced { vec![Isa::get().expect("ONCALL_ISA names one")] } else { Isa::available() }
}

/// One shape with random weights and activations.
fn check(format: &'static Format, isa: Isa, n_rows: usize, n_blocks: usize, n_tokens: usize, rng: &mut Rng) {
    let n_cols = n_blocks * format.block_len;
    let rows = random_rows(format, n_rows, n_cols, rng);
    compare(format, isa, n_cols, &rows, &random_acts(format, n_tokens, n_cols, rng));
}

/// All tokens at once (gemm), one to four at a time (gemv), with the groups in two calls.
fn compare(format: &'static Format, isa: Isa, n_cols: usize, rows: &[u8], acts: &Acts) {
    let row_bytes = format.row_bytes(n_cols as u64).unwrap() as usize;
    let (n_rows, n_tokens) = (rows.len() / row_bytes, acts.n_tokens());
    let dots =
        |t: usize| rows.chunks(row_bytes).map(|row| (format.vec_dot)(row, acts.row(format, t))).collect::<Vec<_>>();
    let expected: Vec<Vec<f32>> = (0..n_tokens).map(dots).collect();

    // A file's tensors are aligned to 32 bytes, a slot's experts to nothing.
    let mut memory = vec![0xaa; rows.len() + 3];
    let packed = &mut memory[3..];
    pack(format, isa, n_rows, n_cols, rows, packed);
    let w = Packed::new(format, isa, n_rows, n_cols, packed);

    let (before, after) = (2, 3);
    let stride = before + n_rows + after;
    // Tokens in another order than their rows.
    let tokens: Vec<u32> = (0..n_tokens as u32).rev().collect();
    for at_once in [n_tokens, 1, 2, 3, 4] {
        let mut out = vec![f32::NAN; n_tokens * stride];
        for (tokens, out) in tokens.chunks(at_once).zip(out.chunks_mut(at_once * stride)) {
            let out = OutRows::new(out, stride).columns(before..before + n_rows);
            let middle = w.n_groups() / 2;
            let mut product = Product::new(w, acts, tokens, out);
            for groups in [0..middle, middle..w.n_groups()] {
                product.groups = groups;
                matmul_here(&mut product);
            }
        }
        for (i, row) in out.chunks(stride).enumerate() {
            for (c, y) in row.iter().enumerate() {
                if (before..before + n_rows).contains(&c) {
                    let e = expected[tokens[i] as usize][c - before];
                    assert!(
                        y.to_bits() == e.to_bits(),
                        "{format:?} on {isa}, {n_rows} x {n_cols}, {n_tokens} tokens, {at_once} at once: token {i} row {} is {y:e}, not {e:e}",
                        c - before
                    );
                } else {
                    assert!(y.is_nan(), "{format:?} on {isa}: wrote column {c}, outside of its columns");
                }
            }
        }
    }
}

#[test]
fn every_format_gives_the_scalar_bits_on_every_instruction_set() {
    let mut rng = Rng(1);
    for format in FORMATS {
        for isa in isas() {
            for n_rows in [1, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 40] {
                check(format, isa, n_rows, 3, 5, &mut rng);
            }
            let blocks: &[usize] =
                if format.block_len == 1 { &[1, 2, 5, 63, 127, 128, 130, 515] } else { &[1, 2, 4, 17] };
            for n_blocks in blocks {
                check(format, isa, 35, *n_blocks, 7, &mut rng);
            }
            for n_tokens in (1..=13).chain([16, 17, 31, 70, 128, 129, 131]) {
                check(format, isa, 33, 2, n_tokens, &mut rng);
            }
            // Groups that are multiplied together, two panels and a part, tiles of tokens and a rest that is less or more than half of one.
            for n_tokens in [37, 29] {
                check(format, isa, 80, if format.block_len == 32 { 35 } else { 3 }, n_tokens, &mut rng);
            }
        }
    }
}

/// Sums that are kept in 16 bits for a while have room for the largest codes and activations, which random ones stay far from.
#[test]
fn extreme_codes_and_activations_do_not_overflow() {
    // Formats whose zero is in the middle have one code more on one side, which the first of each sixteen weights takes.
    let (n_rows, n_tokens, n_cols) = (35, 7, 512);
    let weight = |k: usize| if k.is_multiple_of(16) { -1.0 } else { 1.0 };
    for format in FORMATS {
        let rows: Vec<f32> = (0..n_rows)
            .flat_map(|r| (0..n_cols).map(move |k| if r % 2 == 0 { weight(k) } else { -weight(k) }))
            .collect();
        let mut quantised = vec![0; rows.len() / format.block_len * format.block_bytes];
        (format.quantize_row)(&rows, &mut quantised);
        let mut acts = Acts::new();
        acts.reset(n_tokens, n_cols, &[format.act]);
        for t in 0..n_tokens {
            acts.put(t, &vec![if t % 2 == 0 { 1.0 } else { -1.0 }; n_cols]);
        }
        for isa in isas() {
            compare(format, isa, n_cols, &quantised, &acts);
        }
    }
}

/// A token whose activations aren't all numbers has no product that is one, and its neighbours have theirs.
#[test]
fn an_activation_that_is_not_finite_shows_in_every_product() {
    let mut rng = Rng(3);
    for format in FORMATS {
        let (n_rows, n_cols, n_tokens) = (17, 2 * format.block_len.max(32), 6);
        let rows = random_rows(format, n_rows, n_cols, &mut rng);
        for (isa, bad) in isas().into_iter().flat_map(|isa| [(isa, f32::NAN), (isa, f32::INFINITY)]) {
            let mut acts = Acts::new();
            acts.reset(n_tokens, n_cols, &[format.act]);
            for t in 0..n_tokens {
                let mut row: Vec<f32> = (0..n_cols).map(|_| rng.activation()).collect();
                if t == 2 {
                    row[n_cols - 3] = bad;
                }
                acts.put(t, &row);
            }
            let mut packed = vec![0; rows.len()];
            pack(format, isa, n_rows, n_cols, &rows, &mut packed);
            let w = Packed::new(format, isa, n_rows, n_cols, &packed);
            for at_once in [1, n_tokens] {
                let mut out = vec![0.0; n_tokens * n_rows];
                let tokens: Vec<u32> = (0..n_tokens as u32).collect();
                for (tokens, out) in tokens.chunks(at_once).zip(out.chunks_mut(at_once * n_rows)) {
                    matmul_here(&mut Product::new(w, &acts, tokens, OutRows::new(out, n_rows)));
                }
                for (t, row) in out.chunks(n_rows).enumerate() {
                    let right = row.iter().all(|y| y.is_finite() == (t != 2));
                    assert!(right, "{format:?} on {isa}, {at_once} at once, {bad}: token {t} is {row:?}");
                }
            }
        }
    }
}

/// Every bit of the packed group is another bit of the rows. Which one is found out one bit of its number at a time: rows in which all
/// bits are set whose number has that bit.
#[test]
fn packing_is_a_permutation_of_bits() {
    for format in FORMATS {
        for isa in isas() {
            let (n_rows, n_cols) = (MAX_LANES, 2 * format.block_len);
            let n_bytes = n_rows * 2 * format.block_bytes;
            let (mut from, mut packed) = (vec![0; 8 * n_bytes], vec![0; n_bytes]);
            for k in 0..from.len().next_power_of_two().trailing_zeros() {
                let set = |number: usize| (number >> k & 1) as u8;
                let rows: Vec<u8> = (0..n_bytes).map(|i| (0..8).map(|j| set(8 * i + j) << j).sum()).collect();
                pack(format, isa, n_rows, n_cols, &rows, &mut packed);
                for (i, from) in from.iter_mut().enumerate() {
                    *from |= usize::from(packed[i / 8] >> (i % 8) & 1) << k;
                }
            }
            from.sort_unstable();
            assert!(from.into_iter().eq(0..8 * n_bytes), "{format:?} on {isa}");
        }
    }
}

/// MXFP4's scales below f32's normal range and at its end, too, which random rows don't have.
#[test]
fn every_exponent_gives_the_scalar_bits() {
    let format = crate::quant::by_name("mxfp4").unwrap();
    let mut rows = vec![0; 256 * format.block_bytes];
    for (e, block) in rows.chunks_mut(format.block_bytes).enumerate() {
        (block[0], block[1]) = (e as u8, 1);
    }
    let mut acts = Acts::new();
    acts.reset(7, format.block_len, &[format.act]);
    (0..7).for_each(|t| acts.put(t, &vec![1.0; format.block_len]));
    for isa in isas() {
        compare(format, isa, format.block_len, &rows, &acts);
    }
}

#[test]
#[should_panic(expected = "no activations yet")]
fn tokens_are_put_in_before_they_are_read() {
    let format = FORMATS[0];
    let mut acts = Acts::new();
    acts.reset(1, 4, &[format.act]);
    let w = [0; 16];
    let w = Packed::new(format, Isa::Scalar, 1, 4, &w);
    matmul_here(&mut Product::new(w, &acts, &[0], OutRows::new(&mut [0.0], 1)));
}

#[test]
#[should_panic(expected = "already")]
fn tokens_are_put_in_once() {
    let mut acts = Acts::new();
    acts.reset(1, 4, &[FORMATS[0].act]);
    acts.put(0, &[1.0; 4]);
    acts.put(0, &[1.0; 4]);
}
