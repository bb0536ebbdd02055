//! How quantisers choose scales: least squares over a few candidates, in the order of operations of ggml's
//! reference quantisers, so that both write the same bytes.
//!
//! Rounding to the grid that spans the weights' range is rarely best: a slightly coarser or finer grid moves
//! the many small weights closer and the few large ones a little further. So the search tries some grids around that one,
//! and for each, with the codes held, solves for the scale (and offset) of least weighted squared error. Sums run in
//! the weights' order in f32, each product rounded: that's what makes the bytes reproducible.
//!
//! Such a sum is a chain that waits for itself. The groups of a superblock don't wait for each other, so they are fitted
//! side by side, a lane each: `w[k][l]` is weight k of group l.

use half::f16;

use super::act::nearest;
use super::superblock::LEN;
use crate::cpu::simd::ROUND;

/// Below this a group of weights counts as zero: its reciprocal scales would lose all meaning.
pub(super) const NOTHING: f32 = 1e-15;

/// The weights of a superblock, or their codes: `L` groups of `N` side by side.
pub(super) type Groups<const N: usize, const L: usize> = [[f32; L]; N];

/// Puts the groups of a superblock side by side.
fn side_by_side<const N: usize, const L: usize>(w: &[f32; LEN]) -> Groups<N, L> {
    std::array::from_fn(|k| std::array::from_fn(|l| w[l * N + k]))
}

/// The codes of groups side by side, in the superblock's order.
fn in_order<const N: usize, const L: usize>(codes: &Groups<N, L>) -> [u8; LEN] {
    std::array::from_fn(|at| codes[at % N][at / N] as u8)
}

/// Grids fitted to groups of weights: a weight is about `scale * code - offset` of its group.
struct AffineFit<const L: usize> {
    scale: [f32; L],
    offset: [f32; L],
    codes: [u8; LEN],
}

/// The candidates of [`affine`]: grids of `n_max + first`, `n_max + first + 0.1`, … steps over the range.
pub(super) struct AffineSearch {
    /// The largest code.
    pub n_max: u8,
    /// The first candidate's excess over `n_max` steps.
    pub first: f32,
    /// How many candidates follow the first.
    pub more: u8,
    /// Which fit is better: the one with the smaller sum of absolute errors, or of squared ones?
    pub absolute: bool,
}

/// Fits codes 0..=n_max to each group with an offset of at least zero, errors weighted by `importance`.
///
/// A group whose weights are all the same has a range of zero, an infinite reciprocal scale, hence the scale zero, and
/// errors that aren't numbers, so that no candidate beats it.
fn affine<const N: usize, const L: usize>(
    w: &Groups<N, L>,
    importance: &Groups<N, L>,
    search: &AffineSearch,
) -> AffineFit<L> {
    let n_max = f32::from(search.n_max);
    let (mut min, max) = ranges(w);
    let sums = Sums::new(w, importance);
    let mut best_inverse: [f32; L] = std::array::from_fn(|l| n_max / (max[l] - min[l]));
    let mut best_base = min;
    let mut scale = best_inverse.map(|inverse| 1.0 / inverse);
    let codes = affine_codes(w, &best_inverse, &min, n_max);
    let mut least = errors(w, importance, &codes, &scale, &min, search.absolute);
    for step in 0..=search.more {
        let steps = search.first + 0.1 * f32::from(step) + n_max;
        let inverse: [f32; L] = std::array::from_fn(|l| steps / (max[l] - min[l]));
        let codes = affine_codes(w, &inverse, &min, n_max);
        let (s, m) = sums.solve(w, importance, &codes);
        let error = errors(w, importance, &codes, &s, &m, search.absolute);
        for l in 0..L {
            if error[l] < least[l] {
                (best_inverse[l], best_base[l]) = (inverse[l], min[l]);
                // The next candidates' grids begin at the better offset.
                (least[l], scale[l], min[l]) = (error[l], s[l], m[l]);
            }
        }
    }
    let codes = in_order(&affine_codes(w, &best_inverse, &best_base, n_max));
    AffineFit { scale, offset: min.map(|min| -min), codes }
}

/// What a superblock's [`affine`] fit is stored as: scales are `d * sc`, offsets `dmin * m`.
pub(super) struct Stored<const L: usize> {
    pub d: f16,
    pub sc: [u8; L],
    pub dmin: f16,
    pub m: [u8; L],
    pub codes: [u8; LEN],
}

/// Fits each group by itself. Then scales and offsets are rounded to 0..=`most`, the largest becoming `most`, and the codes chosen anew
/// for what they became.
pub(super) fn stored<const N: usize, const L: usize>(
    w: &[f32; LEN],
    importance: impl Fn(&Groups<N, L>) -> Groups<N, L>,
    search: &AffineSearch,
    most: u8,
) -> Stored<L> {
    let groups = side_by_side(w);
    let AffineFit { scale, offset, mut codes } = affine(&groups, &importance(&groups), search);
    let (d, sc) = to_integers(&scale, most);
    let (dmin, m) = to_integers(&offset, most);
    for (j, (w, codes)) in w.as_chunks::<N>().0.iter().zip(codes.as_chunks_mut::<N>().0).enumerate() {
        let (d, offset) = (d.to_f32() * f32::from(sc[j]), dmin.to_f32() * f32::from(m[j]));
        recode_affine(w, d, offset, search.n_max, codes);
    }
    Stored { d, sc, dmin, m, codes }
}

/// Numbers of at least zero as a scale times 0..=`most`.
fn to_integers<const L: usize>(numbers: &[f32; L], most: u8) -> (f16, [u8; L]) {
    let max = numbers.iter().fold(0.0, |max, x| if *x > max { *x } else { max });
    let inverse = if max > 0.0 { f32::from(most) / max } else { 0.0 };
    let integers = numbers.map(|x| nearest(inverse * x).clamp(0, i32::from(most)) as u8);
    (f16::from_f32(max / f32::from(most)), integers)
}

/// The least weight of each group, or zero if that's less, and the greatest.
fn ranges<const N: usize, const L: usize>(w: &Groups<N, L>) -> ([f32; L], [f32; L]) {
    let (mut min, mut max) = (w[0], w[0]);
    for x in w {
        for l in 0..L {
            min[l] = if x[l] < min[l] { x[l] } else { min[l] };
            max[l] = if x[l] > max[l] { x[l] } else { max[l] };
        }
    }
    (min.map(|min| if min > 0.0 { 0.0 } else { min }), max)
}

/// Codes as floats: all that's done with them is arithmetic, and lanes of one type are quickest.
#[inline]
fn affine_codes<const N: usize, const L: usize>(
    w: &Groups<N, L>,
    inverse: &[f32; L],
    min: &[f32; L],
    n_max: f32,
) -> Groups<N, L> {
    let mut codes = [[0.0; L]; N];
    for (code, x) in codes.iter_mut().zip(w) {
        for l in 0..L {
            code[l] = rounded(inverse[l] * (x[l] - min[l]), 0.0, n_max);
        }
    }
    codes
}

/// The nearest whole number, ties to even, held within a range; what isn't a number becomes the least.
#[inline]
fn rounded(x: f32, least: f32, most: f32) -> f32 {
    let x = (x + ROUND) - ROUND;
    let x = if x > least { x } else { least };
    if x < most { x } else { most }
}

/// What doesn't depend on the codes: the sums of the importances, and of importance times weight.
struct Sums<const L: usize> {
    i: [f32; L],
    x: [f32; L],
}

impl<const L: usize> Sums<L> {
    fn new<const N: usize>(w: &Groups<N, L>, importance: &Groups<N, L>) -> Self {
        let mut sums = Self { i: [0.0; L], x: [0.0; L] };
        for (x, i) in w.iter().zip(importance) {
            for l in 0..L {
                sums.i[l] += i[l];
                sums.x[l] += i[l] * x[l];
            }
        }
        sums
    }

    /// The scales and least weights (at most zero) that fit the codes best; not numbers where the codes of a group are all
    /// the same.
    fn solve<const N: usize>(
        &self,
        w: &Groups<N, L>,
        importance: &Groups<N, L>,
        codes: &Groups<N, L>,
    ) -> ([f32; L], [f32; L]) {
        let (mut sum_l, mut sum_ll, mut sum_xl) = ([0.0f32; L], [0.0f32; L], [0.0f32; L]);
        for ((x, i), code) in w.iter().zip(importance).zip(codes) {
            for l in 0..L {
                let il = i[l] * code[l];
                sum_l[l] += il;
                sum_ll[l] += il * code[l];
                sum_xl[l] += il * x[l];
            }
        }
        let (mut scale, mut min) = ([f32::NAN; L], [f32::NAN; L]);
        for l in 0..L {
            let determinant = self.i[l] * sum_ll[l] - sum_l[l] * sum_l[l];
            if determinant > 0.0 {
                scale[l] = (self.i[l] * sum_xl[l] - self.x[l] * sum_l[l]) / determinant;
                min[l] = (sum_ll[l] * self.x[l] - sum_l[l] * sum_xl[l]) / determinant;
                if min[l] > 0.0 {
                    (scale[l], min[l]) = (sum_xl[l] / sum_ll[l], 0.0);
                }
            }
        }
        (scale, min)
    }
}

#[inline]
fn errors<const N: usize, const L: usize>(
    w: &Groups<N, L>,
    importance: &Groups<N, L>,
    codes: &Groups<N, L>,
    scale: &[f32; L],
    min: &[f32; L],
    absolute: bool,
) -> [f32; L] {
    let mut error = [0.0; L];
    for ((x, i), code) in w.iter().zip(importance).zip(codes) {
        for l in 0..L {
            let off = scale[l] * code[l] + min[l] - x[l];
            error[l] += i[l] * if absolute { off.abs() } else { off * off };
        }
    }
    error
}

/// Fits codes -32..=31 to groups of 16: the scales (of either sign) and the codes plus 32.
///
/// Large weights count most: the importance of a weight is its square.
pub(super) fn signed_6_bits(w: &[f32; LEN]) -> ([f32; 16], [u8; LEN]) {
    let w = &side_by_side::<16, 16>(w);
    let max = largest(w);
    let mut best_inverse = max.map(|max| -32.0 / max);
    let (sum_xl, sum_ll) = signed_sums(w, &best_inverse);
    let mut scale: [f32; 16] = std::array::from_fn(|l| if sum_ll[l] != 0.0 { sum_xl[l] / sum_ll[l] } else { 0.0 });
    let mut gain: [f32; 16] = std::array::from_fn(|l| scale[l] * sum_xl[l]);
    for step in (-9i8..=9).filter(|step| *step != 0) {
        let inverse = max.map(|max| -(32.0 + 0.1 * f32::from(step)) / max);
        let (sum_xl, sum_ll) = signed_sums(w, &inverse);
        for l in 0..16 {
            if sum_ll[l] > 0.0 && sum_xl[l] * sum_xl[l] > gain[l] * sum_ll[l] {
                best_inverse[l] = inverse[l];
                scale[l] = sum_xl[l] / sum_ll[l];
                gain[l] = scale[l] * sum_xl[l];
            }
        }
    }
    let mut codes = [[0.0; 16]; 16];
    for (code, x) in codes.iter_mut().zip(w) {
        for l in 0..16 {
            code[l] = rounded(best_inverse[l] * x[l], -32.0, 31.0) + 32.0;
        }
    }
    for l in (0..16).filter(|l| max[*l].abs() < NOTHING) {
        scale[l] = 0.0;
        codes.iter_mut().for_each(|code| code[l] = 0.0);
    }
    (scale, in_order(&codes))
}

/// The first of the weights that are largest in size, with its sign.
fn largest(w: &Groups<16, 16>) -> [f32; 16] {
    let mut max = [0.0f32; 16];
    for x in w {
        for l in 0..16 {
            max[l] = if x[l].abs() > max[l].abs() { x[l] } else { max[l] };
        }
    }
    max
}

/// Sums of importance times weight times code, and of importance times code squared.
#[inline]
fn signed_sums(w: &Groups<16, 16>, inverse: &[f32; 16]) -> ([f32; 16], [f32; 16]) {
    let (mut sum_xl, mut sum_ll) = ([0.0; 16], [0.0; 16]);
    for x in w {
        for l in 0..16 {
            let code = rounded(inverse[l] * x[l], -32.0, 31.0);
            let importance = x[l] * x[l];
            sum_xl[l] += importance * x[l] * code;
            sum_ll[l] += importance * code * code;
        }
    }
    (sum_xl, sum_ll)
}

/// Fits codes -4..=3 to `w`: the scale (of either sign) and the codes plus 4.
///
/// With so few codes it pays to move them one by one: up to five rounds, in each of which a code changes if
/// the least squared error falls with it.
pub(super) fn signed_3_bits(w: &[f32; 16]) -> (f32, [u8; 16]) {
    let max = super::act::largest(w);
    if max.abs() < NOTHING {
        return (0.0, [0; 16]);
    }
    let inverse = -4.0 / max;
    let mut codes = w.map(|x| nearest(inverse * x).clamp(-4, 3));
    let (mut sum_xl, mut sum_ll) = (0.0, 0.0);
    for (&x, &code) in w.iter().zip(&codes) {
        let (importance, l) = (x * x, code as f32);
        sum_xl += importance * x * l;
        sum_ll += importance * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for (&x, code) in w.iter().zip(&mut codes) {
            let (importance, l) = (x * x, *code as f32);
            let others_xl = sum_xl - importance * x * l;
            if others_xl <= 0.0 {
                continue;
            }
            let others_ll = sum_ll - importance * l * l;
            let better = nearest(x * others_ll / others_xl).clamp(-4, 3);
            if better == *code {
                continue;
            }
            let l = better as f32;
            let (xl, ll) = (others_xl + importance * x * l, others_ll + importance * l * l);
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

/// Codes 0..2 * zero nearest to `w / d + zero`, unless `d` is zero: then any code means zero and those of the fit stay.
pub(super) fn recode_signed(w: &[f32], d: f32, zero: i32, codes: &mut [u8]) {
    if d != 0.0 {
        for (code, x) in codes.iter_mut().zip(w) {
            *code = (nearest(x / d).clamp(-zero, zero - 1) + zero) as u8;
        }
    }
}

/// Codes 0..=n_max nearest to `(w + offset) / d`, unless `d` is zero: then any code means the
/// same and those of the fit stay.
fn recode_affine(w: &[f32], d: f32, offset: f32, n_max: u8, codes: &mut [u8]) {
    if d != 0.0 {
        for (code, x) in codes.iter_mut().zip(w) {
            *code = nearest((x + offset) / d).clamp(0, i32::from(n_max)) as u8;
        }
    }
}
