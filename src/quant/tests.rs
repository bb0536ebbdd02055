//! What every format of the registry has to keep: a newcomer is tested from the line that registers it.

use proptest::prelude::*;

use super::act::{quantize_q8_0, quantize_q8_k};
use super::*;

/// Half a unit in the last place of f32, relative.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// Splitmix64: bytes and numbers that are the same on every machine.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// In -1..1.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// About normal, with standard deviation 1.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() / 2.0
    }

    fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

fn dequantized(format: &Format, row: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; row.len() / format.block_bytes * format.block_len];
    (format.dequantize_row)(row, &mut out);
    out
}

fn quantized(format: &Format, x: &[f32]) -> Vec<u8> {
    let mut out = vec![0xa5; x.len() / format.block_len * format.block_bytes];
    (format.quantize_row)(x, &mut out);
    out
}

/// A row of random bytes, whose blocks are redrawn until every weight in them is finite and of moderate size.
fn random_row(format: &Format, n: usize, rng: &mut Rng) -> Vec<u8> {
    let mut row = vec![0; n / format.block_len * format.block_bytes];
    for block in row.chunks_mut(format.block_bytes) {
        loop {
            // Now and then a block's bytes are all alike: zero scales, or every bit set.
            let fill = rng.below(64);
            block.fill_with(|| match fill {
                0 => 0,
                1 => 0xff,
                _ => rng.next() as u8,
            });
            if dequantized(format, block).iter().all(|w| w.abs() < 1e15) {
                break;
            }
        }
    }
    row
}

/// Activations with blocks of very different sizes, zeros, outliers and numbers near the end of f32's range.
fn random_activations(n: usize, rng: &mut Rng) -> Vec<f32> {
    let mut x = Vec::with_capacity(n);
    while x.len() < n {
        let size = match rng.below(8) {
            0 => 0.0,
            1 => 1e-40,
            2 => 1e-30,
            3 => 1e-6,
            4 => 1e4,
            _ => 1.0,
        };
        let outliers = rng.below(3) == 0;
        for _ in 0..[16, 32, 256][rng.below(3) as usize].min(n - x.len()) {
            let outlier = if outliers && rng.below(40) == 0 { 30.0 } else { 1.0 };
            x.push(rng.normal() * size * outlier);
        }
    }
    x
}

/// Activations as a format's dot product takes them.
struct Acts {
    f32: Vec<f32>,
    q: Vec<i8>,
    d: Vec<f32>,
    s: Vec<f32>,
}

impl Acts {
    fn new(kind: ActKind, x: &[f32]) -> Self {
        let (mut q, block) = (vec![0; x.len()], if kind == ActKind::Q8_0 { 32 } else { 256 });
        let (mut d, mut s) = (vec![0.0; x.len() / block], vec![]);
        match kind {
            ActKind::F32 => return Self { f32: x.to_vec(), q: vec![], d: vec![], s },
            ActKind::Q8_0 => {
                s.resize(d.len(), 0.0);
                quantize_q8_0(x, &mut q, &mut d, &mut s);
            }
            ActKind::Q8K => quantize_q8_k(x, &mut q, &mut d),
        }
        Self { f32: vec![], q, d, s }
    }

    fn row(&self) -> ActRow<'_> {
        ActRow { f32: &self.f32, q: &self.q, d: &self.d, s: &self.s }
    }

    /// The sums of the values, where the row has sums; its own are rounded further.
    fn exact_sums(&self) -> Vec<f32> {
        let sum = |i: usize| self.q[32 * i..][..32].iter().map(|q| i32::from(*q)).sum::<i32>() as f32;
        (0..self.s.len()).map(|i| sum(i) * self.d[i]).collect()
    }

    /// The values that they stand for, exactly.
    fn values(&self) -> Vec<f64> {
        if self.d.is_empty() {
            return self.f32.iter().map(|x| f64::from(*x)).collect();
        }
        let block = self.q.len() / self.d.len();
        self.q.iter().enumerate().map(|(k, q)| f64::from(*q) * f64::from(self.d[k / block])).collect()
    }
}

/// How large the terms of a dot product may be that the sum of weight times activation hides: a weight is
/// `w * d + m`, and the two can cancel. Codes have at most 5 bits where there's an offset, so either is at most the weight
/// and 32 times the spread of the weights around it.
fn amplitudes(format: &Format, w: &[f32]) -> Vec<f64> {
    let run = format.block_len.min(16);
    let amplitude = |run: &[f32]| {
        let (min, max) = run.iter().fold((f32::MAX, f32::MIN), |(a, b), w| (a.min(*w), b.max(*w)));
        let spread = f64::from(max) - f64::from(min);
        f64::from(max.abs().max(min.abs())) + 32.0 * spread
    };
    w.chunks(run).flat_map(|run| std::iter::repeat_n(amplitude(run), run.len())).collect()
}

fn assert_dot_is_near(format: &Format, row: &[u8], acts: &Acts) -> Result<(), TestCaseError> {
    let s = acts.exact_sums();
    let dot = f64::from((format.vec_dot)(row, ActRow { s: &s, ..acts.row() }));
    let (w, x) = (dequantized(format, row), acts.values());
    let exact: f64 = w.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum();
    // Each term passes through at most as many roundings as there are sums after it, and four of its own; what is
    // below f32's normal range is lost in steps of 2^-149.
    let sums = 2 * w.len() / format.block_len.min(16) + 4;
    let size: f64 = amplitudes(format, &w).iter().zip(&x).map(|(a, x)| a * x.abs()).sum();
    let tolerance = sums as f64 * U * size + w.len() as f64 * 1e-33;
    prop_assert!((dot - exact).abs() <= tolerance, "{}: {dot}, exactly {exact} ± {tolerance}", format.name);
    Ok(())
}

#[test]
fn the_registry_is_consistent() {
    for format in FORMATS {
        assert!(by_id(format.id).is_some_and(|f| f.name == format.name), "{} shares its id", format.name);
        assert!(by_name(&format.name.to_uppercase()).is_some_and(|f| f.id == format.id));
        assert_eq!(format.name, format.name.to_lowercase());
        let len = format.block_len as u64;
        assert_eq!(
            format.block_len,
            format.act.block_len(),
            "{}: blocks of weights and of activations meet",
            format.name
        );
        assert_eq!(format.row_bytes(3 * len), Some(3 * format.block_bytes as u64));
        assert_eq!(format.row_bytes(0), Some(0));
        if format.block_bytes > format.block_len {
            assert_eq!(format.row_bytes(u64::MAX / len * len), None, "{}: too large a size", format.name);
        }
        if len > 1 {
            assert_eq!(format.row_bytes(len + 1), None);
        }
    }
    assert!(by_id(4).is_none() && by_name("q4_2").is_none());
}

#[test]
fn rows_of_no_weights_are_rows() {
    for format in FORMATS {
        assert!(dequantized(format, &[]).is_empty());
        assert!(quantized(format, &[]).is_empty());
        assert_eq!((format.vec_dot)(&[], ActRow::default()).to_bits(), 0, "{}", format.name);
    }
}

#[test]
fn lengths_that_do_not_match_panic() {
    let panics = |f: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err();
    for format in FORMATS {
        let row = vec![0; 2 * format.block_bytes];
        let x = vec![0.0; 2 * format.block_len];
        let acts = Acts::new(format.act, &x[format.block_len..]);
        assert!(panics(&|| (format.dequantize_row)(&row, &mut x.clone()[format.block_len..])));
        assert!(panics(&|| (format.dequantize_row)(&row[1..], &mut x.clone())));
        assert!(panics(&|| _ = (format.vec_dot)(&row, acts.row())), "{}", format.name);
        assert!(panics(&|| _ = (format.vec_dot)(&row, ActRow::default())));
        assert!(panics(&|| (format.quantize_row)(&x, &mut row.clone()[format.block_bytes..])));
        assert!(panics(&|| (format.quantize_row)(&x, &mut row.clone()[1..])));
    }
}

/// A row of zeros stays zeros, and a row of finite weights, whatever their sizes, stays finite.
#[test]
fn zeros_and_finite_rows_stay_so() {
    let mut rng = Rng(7);
    for format in FORMATS {
        let zeros = vec![0.0; 512];
        let row = quantized(format, &zeros);
        assert!(dequantized(format, &row).iter().all(|w| *w == 0.0), "{}", format.name);
        for _ in 0..200 {
            // Less a factor of 16: halves end at 65504.
            let x: Vec<f32> = random_activations(512, &mut rng).iter().map(|x| x / 16.0).collect();
            let row = quantized(format, &x);
            assert!(dequantized(format, &row).iter().all(|w| w.is_finite()), "{}", format.name);
        }
    }
}

/// The error of a normal row's quantisation, relative to its size: the format's bits say what to expect.
#[test]
fn the_error_of_normal_weights_is_what_the_bits_allow() {
    let x = Rng(3).normals(256 * 100);
    for format in FORMATS {
        let row = quantized(format, &x);
        let bits = 8.0 * format.block_bytes as f64 / format.block_len as f64;
        let squares = |it: &mut dyn Iterator<Item = f64>| it.map(|e| e * e).sum::<f64>();
        let error = squares(&mut dequantized(format, &row).iter().zip(&x).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let rms = (error / squares(&mut x.iter().map(|x| f64::from(*x)))).sqrt();
        // No code of b bits a weight has an error below 2^-b for normal weights (Shannon); these come within a factor of 3,
        // except the plain floats, whose bits go into range.
        let least = 2f64.powf(-bits);
        if format.block_len > 1 {
            assert!(rms > least && rms < 3.0 * least, "{}: {rms}, bound {least}", format.name);
        } else {
            assert!(rms < 2f64.powi(-8), "{}: {rms}", format.name);
        }
    }
}

/// FNV-1a of bytes.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// What these formats are, to the bit, on every machine: taken when blocks and bytes equalled ggml's (tests/ggml_blocks.rs)
/// and dots followed the order that kernels keep. If one changes, so do the answers of every model that holds it.
#[test]
fn numbers_are_what_they_have_always_been() {
    // Name; hash of random blocks dequantised; hash of a normal row quantised; bits of the dot of those blocks.
    const GOLDEN: &[(&str, u64, u64, u32)] = &[
        ("f32", 0x06b1_8d84_4234_97eb, 0x17c4_516b_2f94_d72f, 0xddd4_8316),
        ("f16", 0xabee_47c8_220b_f791, 0xba26_f205_d95e_b79d, 0x48c9_5a34),
        ("bf16", 0x17d0_28bf_c080_58b5, 0x5c32_faf1_afd8_50dc, 0xdde2_1909),
        ("q4_0", 0xc5af_6eb0_b0f8_81e7, 0x2f8d_2444_8b43_52ce, 0xc88f_46c6),
        ("q4_1", 0x72fe_d7d2_be29_1c04, 0x178d_c6b1_70bc_8336, 0x4fb2_eb19),
        ("q5_0", 0x8891_330f_bd8f_52cb, 0x4a48_16a6_fa41_16dc, 0xcfb0_2b2d),
        ("q5_1", 0x3ccd_9442_7e33_6e22, 0x3ed0_f418_e98c_6cf9, 0xce85_cfb0),
        ("q8_0", 0xd35e_6621_2c77_b8e6, 0xae86_ddc7_4148_6f84, 0xce96_368b),
        ("q2_k", 0x92c1_7d27_1bda_decd, 0x0f7d_ec80_0af4_1bf9, 0xc933_c619),
        ("q3_k", 0x139c_84e0_2788_b479, 0xb0ab_0adf_064a_fd03, 0x4a80_b9fe),
        ("q4_k", 0x5964_0e18_8d2f_6549, 0x7e4d_7203_bf7b_5b39, 0xd13c_d2db),
        ("q5_k", 0x6da3_e929_f4b8_397d, 0xf548_1de8_c788_019e, 0xc59a_4c07),
        ("q6_k", 0x5fb5_07f1_d6b0_9835, 0xf1f7_5057_497c_62de, 0x4d85_0aa4),
        ("iq4_nl", 0x93e7_bb55_94bb_6be5, 0x1d96_82e9_e7f1_077c, 0x525d_b83c),
        ("iq4_xs", 0xf214_8058_9069_0b11, 0xcfb0_e850_e6d1_66ca, 0x49b6_6ef9),
        ("mxfp4", 0x51fc_84b4_e81b_424f, 0x1f28_76cf_069b_ab42, 0x5874_faba),
    ];
    let found: Vec<_> = FORMATS
        .iter()
        .map(|format| {
            let mut rng = Rng(u64::from(format.id));
            let row = random_row(format, 1024, &mut rng);
            let values = dequantized(format, &row);
            let acts = Acts::new(format.act, &random_activations(1024, &mut rng));
            let dot = (format.vec_dot)(&row, acts.row());
            let bytes = quantized(format, &rng.normals(1024));
            (format.name, hash(values.iter().flat_map(|w| w.to_le_bytes())), hash(bytes), dot.to_bits())
        })
        .collect();
    for known in GOLDEN {
        let now = found.iter().find(|f| f.0 == known.0).expect("formats are for ever");
        assert_eq!(now, known, "all are now: {found:#x?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn dots_are_near_the_exact_ones(seed: u64, blocks in 1usize..6) {
        let mut rng = Rng(seed);
        for format in FORMATS {
            let n = if format.block_len == 1 { 37 * blocks } else { blocks * format.block_len };
            let row = random_row(format, n, &mut rng);
            let acts = Acts::new(format.act, &random_activations(n, &mut rng));
            assert_dot_is_near(format, &row, &acts)?;
        }
    }

    /// Whatever the weights, none is off by more than four steps of its block's largest: one for rounding, the rest for
    /// fits that give up the largest weight for the others, and for the rounding of scales. Halves add their own limit:
    /// scales that are small enough round to zero.
    #[test]
    fn no_weight_is_far_off(seed: u64) {
        // No larger than halves can be.
        let x: Vec<f32> = random_activations(1024, &mut Rng(seed)).iter().map(|x| (x / 16.0).clamp(-6e4, 6e4)).collect();
        for format in FORMATS {
            let row = quantized(format, &x);
            let bits = if format.block_len == 1 { 9 } else { 8 * format.block_bytes / format.block_len };
            let y = dequantized(format, &row);
            for (x, y) in x.chunks(format.block_len).zip(y.chunks(format.block_len)) {
                let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                let allowed = max * 4.0 / (1u32 << bits) as f32 + 2e-4;
                for (x, y) in x.iter().zip(y) {
                    prop_assert!((x - y).abs() <= allowed, "{}: {x} became {y}, largest {max}", format.name);
                }
            }
        }
    }

    #[test]
    fn dots_of_rows_of_one_sign_are_near_the_exact_ones(seed: u64) {
        let mut rng = Rng(seed);
        for format in FORMATS {
            let x: Vec<f32> = (0..512).map(|_| rng.uniform().abs()).collect();
            let w: Vec<f32> = (0..512).map(|_| rng.uniform().abs() + 0.5).collect();
            let row = quantized(format, &w);
            assert_dot_is_near(format, &row, &Acts::new(format.act, &x))?;
        }
    }
}
