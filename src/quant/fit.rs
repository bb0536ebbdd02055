//! How quantisers choose scales: least squares over a few candidates, in the order of operations of ggml's
//! reference quantisers, so that both write the same bytes.
//!
//! Rounding to the grid that spans the weights' range is rarely best: a slightly coarser or finer grid moves
//! the many small weights closer and the few large ones a little further. So the search tries some grids around that one,
//! and for each, with the codes held, solves for the scale (and offset) of least weighted squared error. Sums run in
//! the weights' order in f32, each product rounded: that's what makes the bytes reproducible.

use super::act::{largest, nearest};

/// Below this a group of weights counts as zero: its reciprocal scales would lose all meaning.
const NOTHING: f32 = 1e-15;

/// A grid fitted to weights: `w` is about `scale * code - offset`.
pub(super) struct AffineFit<const N: usize> {
    pub scale: f32,
    pub offset: f32,
    pub codes: [u8; N],
}

/// The candidates of [`affine`]: grids of `n_max + first`, `n_max + first + 0.1`, … steps over the range.
pub(super) struct AffineSearch {
    /// The largest code.
    pub n_max: i32,
    /// The first candidate's excess over `n_max` steps.
    pub first: f32,
    /// How many candidates follow the first.
    pub more: u8,
    /// Which fit is better: the one with the smaller sum of absolute errors, or of squared ones?
    pub absolute: bool,
}

/// Fits codes 0..=n_max to `w` with an offset of at least zero, errors weighted by `importance`.
pub(super) fn affine<const N: usize>(w: &[f32; N], importance: &[f32; N], search: &AffineSearch) -> AffineFit<N> {
    let n_max = search.n_max as f32;
    let (mut min, mut max) = (w[0], w[0]);
    let (mut sum_i, mut sum_x) = (importance[0], importance[0] * w[0]);
    for (&x, &i) in w.iter().zip(importance).skip(1) {
        min = if x < min { x } else { min };
        max = if x > max { x } else { max };
        sum_i += i;
        sum_x += i * x;
    }
    if min > 0.0 {
        min = 0.0;
    }
    if max == min {
        return AffineFit { scale: 0.0, offset: -min, codes: [0; N] };
    }
    let inverse = n_max / (max - min);
    let mut codes = affine_codes(w, inverse, min, search.n_max);
    let mut scale = 1.0 / inverse;
    let mut least = affine_error(w, importance, &codes, scale, min, search.absolute);
    for step in 0..=search.more {
        let inverse = (search.first + 0.1 * f32::from(step) + n_max) / (max - min);
        let candidate = affine_codes(w, inverse, min, search.n_max);
        let Some((s, m)) = affine_solve(w, importance, &candidate, sum_i, sum_x) else { continue };
        let error = affine_error(w, importance, &candidate, s, m, search.absolute);
        if error < least {
            // The next candidates' grids begin at the better offset.
            (codes, least, scale, min) = (candidate, error, s, m);
        }
    }
    AffineFit { scale, offset: -min, codes }
}

fn affine_codes<const N: usize>(w: &[f32; N], inverse: f32, min: f32, n_max: i32) -> [u8; N] {
    w.map(|x| nearest(inverse * (x - min)).clamp(0, n_max) as u8)
}

/// The scale and the least weight (at most zero) that fit the codes best; `None` if they are all the same.
fn affine_solve<const N: usize>(
    w: &[f32; N],
    importance: &[f32; N],
    codes: &[u8; N],
    sum_i: f32,
    sum_x: f32,
) -> Option<(f32, f32)> {
    let (mut sum_l, mut sum_ll, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
    for ((&x, &i), &code) in w.iter().zip(importance).zip(codes) {
        let l = f32::from(code);
        sum_l += i * l;
        sum_ll += i * l * l;
        sum_xl += i * l * x;
    }
    let determinant = sum_i * sum_ll - sum_l * sum_l;
    (determinant > 0.0).then(|| {
        let min = (sum_ll * sum_x - sum_l * sum_xl) / determinant;
        if min > 0.0 { (sum_xl / sum_ll, 0.0) } else { ((sum_i * sum_xl - sum_x * sum_l) / determinant, min) }
    })
}

fn affine_error<const N: usize>(
    w: &[f32; N],
    importance: &[f32; N],
    codes: &[u8; N],
    scale: f32,
    min: f32,
    absolute: bool,
) -> f32 {
    let mut error = 0.0;
    for ((&x, &i), &code) in w.iter().zip(importance).zip(codes) {
        let off = scale * f32::from(code) + min - x;
        error += i * if absolute { off.abs() } else { off * off };
    }
    error
}

/// Fits codes -32..=31 to `w`: the scale (of either sign) and the codes plus 32.
///
/// Large weights count most: the importance of a weight is its square.
pub(super) fn signed_6_bits(w: &[f32; 16]) -> (f32, [u8; 16]) {
    let max = largest(w);
    if max.abs() < NOTHING {
        return (0.0, [0; 16]);
    }
    let codes = |inverse: f32| w.map(|x| nearest(inverse * x).clamp(-32, 31));
    let mut best_inverse = -32.0 / max;
    let (sum_xl, sum_ll) = signed_sums(w, &codes(best_inverse));
    let mut scale = if sum_ll != 0.0 { sum_xl / sum_ll } else { 0.0 };
    let mut gain = scale * sum_xl;
    for step in (-9i8..=9).filter(|step| *step != 0) {
        let inverse = -(32.0 + 0.1 * f32::from(step)) / max;
        let (sum_xl, sum_ll) = signed_sums(w, &codes(inverse));
        if sum_ll > 0.0 && sum_xl * sum_xl > gain * sum_ll {
            best_inverse = inverse;
            scale = sum_xl / sum_ll;
            gain = scale * sum_xl;
        }
    }
    (scale, codes(best_inverse).map(|l| (l + 32) as u8))
}

/// Sums of importance times weight times code, and of importance times code squared.
fn signed_sums(w: &[f32; 16], codes: &[i32; 16]) -> (f32, f32) {
    let (mut sum_xl, mut sum_ll) = (0.0, 0.0);
    for (&x, &code) in w.iter().zip(codes) {
        let (i, l) = (x * x, code as f32);
        sum_xl += i * x * l;
        sum_ll += i * l * l;
    }
    (sum_xl, sum_ll)
}

/// Fits codes -4..=3 to `w`: the scale (of either sign) and the codes plus 4.
///
/// With so few codes it pays to move them one by one: up to five rounds, in each of which a code changes if
/// the least squared error falls with it.
pub(super) fn signed_3_bits(w: &[f32; 16]) -> (f32, [u8; 16]) {
    let max = largest(w);
    if max.abs() < NOTHING {
        return (0.0, [0; 16]);
    }
    let inverse = -4.0 / max;
    let mut codes = w.map(|x| nearest(inverse * x).clamp(-4, 3));
    let (mut sum_xl, mut sum_ll) = signed_sums(w, &codes);
    for _ in 0..5 {
        let mut changed = false;
        for (&x, code) in w.iter().zip(&mut codes) {
            let (i, l) = (x * x, *code as f32);
            let others_xl = sum_xl - i * x * l;
            if others_xl <= 0.0 {
                continue;
            }
            let others_ll = sum_ll - i * l * l;
            let better = nearest(x * others_ll / others_xl).clamp(-4, 3);
            if better == *code {
                continue;
            }
            let l = better as f32;
            let (xl, ll) = (others_xl + i * x * l, others_ll + i * l * l);
            if ll > 0.0 && xl * xl * sum_ll > sum_xl * sum_xl * ll {
                (*code, sum_xl, sum_ll, changed) = (better, xl, ll, true);
            }
        }
        if !changed {
            break;
        }
    }
    let scale = if sum_ll > 0.0 { sum_xl / sum_ll } else { 0.0 };
    (scale, codes.map(|l| (l + 4) as u8))
}

/// Codes `zero - zero..2 * zero` nearest to `w / d + zero`, unless `d` is zero: then any code means zero
/// and those of the fit stay.
pub(super) fn recode_signed(w: &[f32], d: f32, zero: i32, codes: &mut [u8]) {
    if d != 0.0 {
        for (code, x) in codes.iter_mut().zip(w) {
            *code = (nearest(x / d).clamp(-zero, zero - 1) + zero) as u8;
        }
    }
}

/// Codes 0..=n_max nearest to `(w + offset) / d`, unless `d` is zero: then any code means the
/// same and those of the fit stay.
pub(super) fn recode_affine(w: &[f32], d: f32, offset: f32, n_max: i32, codes: &mut [u8]) {
    if d != 0.0 {
        for (code, x) in codes.iter_mut().zip(w) {
            *code = nearest((x + offset) / d).clamp(0, n_max) as u8;
        }
    }
}
