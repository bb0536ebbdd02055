//! IQ4_NL: 32 weights of 4 bits through a codebook, and a scale: 4.5 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | 0..2 | scale d, f16 |
//! | 2..18 | codes: byte j holds weight j (low nibble) and weight j + 16 (high nibble) |
//!
//! A weight is d * CODEBOOK\[code\]. Weights are roughly normal, so the codebook's steps are narrow near
//! zero and wide at the ends. It has 16 signed bytes: one byte shuffle looks up a register of codes.

use super::act::largest;
use super::block32::{dequantize_scaled, dot_scaled, f16_at, f16_bytes, join, nibbles, pack_nibbles, quantize};
use super::fit::NOTHING;
use super::kernels::{Block, Block32, Field, Layout, Vector, unpack};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 20,
    name: "iq4_nl",
    block_len: 32,
    block_bytes: BYTES,
    act: ActKind::Q8_0,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_scaled(row, x, unpack),
    kernels: kernels::block32::<Iq4Nl>,
};

const BYTES: usize = 18;

/// The value of each code, also IQ4_XS's.
pub(super) const CODEBOOK: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The integer weights (the codebook's values) and their scale.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> ([i8; 32], f32) {
    let (_, qs) = block.split_last_chunk::<16>().expect("a block has its codes");
    (nibbles(qs).map(|q| CODEBOOK[q as usize]), f16_at(block, 0))
}

fn pack(w: &[f32; 32]) -> [u8; BYTES] {
    let d = fit(w);
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    join(&[&f16_bytes(d), &pack_nibbles(&codes(w, id))])
}

/// The scale that fits 32 weights best, a weight counting as much as its square: with the weight of largest size placed on 127,
/// then on -120 to -134, the codes nearest to the rest are held and the scale of least squared error is solved for.
pub(super) fn fit(w: &[f32; 32]) -> f32 {
    let max = largest(w);
    if max.abs() < NOTHING {
        return 0.0;
    }
    let (sum_qx, sum_qq) = sums(w, 1.0 / (max / 127.0));
    let mut d = if sum_qq > 0.0 { sum_qx / sum_qq } else { 0.0 };
    let mut gain = d * sum_qx;
    for place in -134i16..=-120 {
        let (sum_qx, sum_qq) = sums(w, f32::from(place) / max);
        if sum_qq > 0.0 && sum_qx * sum_qx > gain * sum_qq {
            d = sum_qx / sum_qq;
            gain = d * sum_qx;
        }
    }
    d
}

/// Sums of importance times value times weight, and of importance times value squared, in the weights' order.
fn sums(w: &[f32; 32], id: f32) -> (f32, f32) {
    let (mut sum_qx, mut sum_qq) = (0.0, 0.0);
    for (&x, q) in w.iter().zip(nearest(w, id)) {
        let importance = x * x;
        sum_qx += importance * q * x;
        sum_qq += importance * q * q;
    }
    (sum_qx, sum_qq)
}

/// The values that are nearest to `w * id`, ties to the higher: from the lowest a step up at each of the midpoints between
/// neighbouring values that lies at or below it. That's 15 comparisons, but of four weights at once: quicker than a table.
fn nearest(w: &[f32; 32], id: f32) -> [f32; 32] {
    let scaled = w.map(|x| x * id);
    let mut values = [f32::from(CODEBOOK[0]); 32];
    for pair in CODEBOOK.windows(2) {
        let (low, high) = (f32::from(pair[0]), f32::from(pair[1]));
        for (value, x) in values.iter_mut().zip(&scaled) {
            *value += if *x >= (low + high) / 2.0 { high - low } else { 0.0 };
        }
    }
    values
}

/// The codes of the values that are nearest to `w * id`, ties to the higher.
pub(super) fn codes(w: &[f32; 32], id: f32) -> [u8; 32] {
    let scaled = w.map(|x| x * id);
    let mut codes = [0u32; 32];
    for pair in CODEBOOK.windows(2) {
        let midpoint = (f32::from(pair[0]) + f32::from(pair[1])) / 2.0;
        for (code, x) in codes.iter_mut().zip(&scaled) {
            *code += u32::from(*x >= midpoint);
        }
    }
    codes.map(|code| code as u8)
}

/// The layout for the kernels.
struct Iq4Nl;

impl Layout for Iq4Nl {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] = &[Field::Halves(0, 1), Field::Words(2, 4)];
}

impl Block32 for Iq4Nl {
    const BITS: u32 = 8;
    const ZERO: i32 = 0;

    #[inline(always)]
    fn codes<V: Vector>(v: V, b: Block<V, Self>) -> [V::I; 8] {
        unpack::signed(v, unpack::codebook(v, &CODEBOOK, unpack::nibbles(v, b, 2)))
    }

    #[inline(always)]
    fn scale<V: Vector>(_: V, b: Block<V, Self>) -> V::F {
        b.f16(0)
    }
}
