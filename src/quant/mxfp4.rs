//! MXFP4: 32 weights of 4-bit floating point (E2M1) and a power of two (E8M0), 4.25 bits a weight.
//! The OCP Microscaling formats specification 1.0 defines both; gpt-oss stores its experts so.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | exponent e: the scale is 2^(e - 127) |
//! | 1..17 | codes: byte j holds weight j (low nibble) and weight j + 16 (high nibble) |
//!
//! A code's top bit is the sign; the others stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6. The codebook holds twice
//! that, which is whole, and the scale is halved: 2^(e - 128). The specification's NaN (e = 255) is read as
//! 2^127, as ggml does.

use super::act::largest;
use super::block32::{dequantize_scaled, dot_scaled, join, nibbles, pack_nibbles, quantize};
use super::kernels::{Block, Block32, Field, Layout, Vector, unpack};
use super::{ActKind, Format, kernels};

/// The format's entry in the registry.
pub(super) static FORMAT: Format = Format {
    id: 39,
    name: "mxfp4",
    block_len: 32,
    block_bytes: BYTES,
    act: ActKind::Q8_0,
    dequantize_row: |src, dst| dequantize_scaled(src, dst, unpack),
    quantize_row: |src, dst| quantize(src, dst, pack),
    vec_dot: |row, x| dot_scaled(row, x, unpack),
    kernels: kernels::block32::<Mxfp4>,
};

const BYTES: usize = 17;

/// Twice the value of each code.
pub(super) const CODEBOOK: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The scale of the doubled codebook, 2^(e - 128): below f32's normal range for e < 2.
#[inline]
pub(super) fn half_scale(e: u8) -> f32 {
    match e {
        0 => f32::from_bits(1 << 21),
        1 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(e - 1) << 23),
    }
}

/// The integer weights (the codebook's values) and their scale.
#[inline]
pub(super) fn unpack(block: &[u8; BYTES]) -> ([i8; 32], f32) {
    let (_, qs) = block.split_last_chunk::<16>().expect("a block has its codes");
    (nibbles(qs).map(|q| CODEBOOK[q as usize]), half_scale(block[0]))
}

/// The exponent is that of the weight of largest size, less two, so that it falls on 4 or 6 (or is cut to 6);
/// each weight becomes the nearest value, ties to the lower code.
fn pack(w: &[f32; 32]) -> [u8; BYTES] {
    let amax = largest(w).abs();
    // The logarithm is rounded to f32 before it is cut, as in ggml: a hair below a power of two counts as one. By way of f64,
    // since a C library's log2f differs between systems.
    let e = if amax > 0.0 { ((f64::from(amax).log2() as f32).floor() - 2.0 + 127.0) as u8 } else { 0 };
    join(&[&[e], &pack_nibbles(&codes(w, half_scale(e)))])
}

/// The codes whose values, times `d`, are nearest to the weights: how many of the midpoints between neighbouring
/// sizes lie below a weight's size, and its sign unless that's none.
fn codes(w: &[f32; 32], d: f32) -> [u8; 32] {
    let mut codes = [0u32; 32];
    for pair in CODEBOOK[..8].windows(2) {
        // Exact: the scale is a power of two.
        let midpoint = (f32::from(pair[0]) + f32::from(pair[1])) / 2.0 * d;
        for (code, x) in codes.iter_mut().zip(w) {
            *code += u32::from(x.abs() > midpoint);
        }
    }
    for (code, x) in codes.iter_mut().zip(w) {
        *code += u32::from(*x < 0.0 && *code > 0) * 8;
    }
    codes.map(|code| code as u8)
}

/// The layout for the kernels.
struct Mxfp4;

/// The codebook plus [`Mxfp4::ZERO`](Block32::ZERO), so that it has no sign.
const UNSIGNED_CODEBOOK: [i8; 16] = {
    let mut table = CODEBOOK;
    let mut i = 0;
    while i < table.len() {
        table[i] += Mxfp4::ZERO as i8;
        i += 1;
    }
    table
};

impl Layout for Mxfp4 {
    const BYTES: usize = BYTES;
    const FIELDS: &'static [Field] = &[Field::Byte(0), Field::Words(1, 4)];
}

impl Block32 for Mxfp4 {
    const BITS: u32 = 5;
    const ZERO: i32 = 16;

    #[inline(always)]
    fn codes<V: Vector>(v: V, b: Block<V, Self>) -> [V::I; 8] {
        unpack::codebook(v, &UNSIGNED_CODEBOOK, unpack::nibbles(v, b, 1))
    }

    #[inline(always)]
    fn scale<V: Vector>(v: V, b: Block<V, Self>) -> V::F {
        half_scales(v, b.byte(0))
    }
}

/// [`half_scale`] of integers e of 0..=255: the product of two powers of two in f32's normal range, which is exact.
#[inline(always)]
fn half_scales<V: Vector>(v: V, e: V::I) -> V::F {
    let (half, odd) = (v.shr(e, 1), v.and(e, v.splat(1)));
    let power = |e: V::I| v.as_f32(v.shl(v.add_i32(e, v.splat(63)), 23));
    v.mul(power(half), power(v.add_i32(half, odd)))
}
