//! Element-wise operations, dot products and softmax over rows.

use crate::cpu::simd::{self, Kernel, LANES, Lanes, exp, load, load_part, store};

/// `x += y`, of equal length: the residual.
pub fn add(x: &mut [f32], y: &[f32]) {
    simd::run(ZipMap(x, y, Add));
}

/// `x += factor * y`, of equal length, each product rounded.
pub fn add_scaled(x: &mut [f32], y: &[f32], factor: f32) {
    simd::run(ZipMap(x, y, AddScaled(factor)));
}

/// `x *= factor`
pub fn scale(x: &mut [f32], factor: f32) {
    simd::run(Map(x, Scale(factor)));
}

/// The dot product of two rows of equal length.
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    simd::run(Dot(x, y))
}

/// Sigmoid of each value, in place.
pub fn sigmoid(x: &mut [f32]) {
    simd::run(Map(x, Sigmoid));
}

/// `gate = silu(gate) * up`, of equal length (Shazeer 2020).
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    simd::run(ZipMap(gate, up, Swiglu));
}

/// gpt-oss's gated unit: gate is bounded above by `limit`, up on both sides;
/// `gate = gate * sigmoid(alpha * gate) * (up + 1)`.
pub fn swiglu_oai(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) {
    simd::run(ZipMap(gate, up, SwigluOai { alpha, limit }));
}

/// Softmax of the row, in place. An empty row stays empty.
pub fn softmax(x: &mut [f32]) {
    simd::run(Softmax(x));
}

/// A function of one value.
trait Unary {
    fn apply<V: Lanes>(&self, x: V) -> V;
}

/// A function of two values.
trait Binary {
    fn apply<V: Lanes>(&self, x: V, y: V) -> V;
}

struct Map<'a, F>(&'a mut [f32], F);
impl<F: Unary> Kernel for Map<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        simd::map::<V>(
            self.0,
            #[inline(always)]
            |x| self.1.apply(x),
        );
    }
}

struct ZipMap<'a, F>(&'a mut [f32], &'a [f32], F);
impl<F: Binary> Kernel for ZipMap<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        simd::zip_map::<V>(
            self.0,
            self.1,
            #[inline(always)]
            |x, y| self.2.apply(x, y),
        );
    }
}

struct Scale(f32);
impl Unary for Scale {
    #[inline(always)]
    fn apply<V: Lanes>(&self, x: V) -> V {
        x.mul(V::splat(self.0))
    }
}

struct Add;
impl Binary for Add {
    #[inline(always)]
    fn apply<V: Lanes>(&self, x: V, y: V) -> V {
        x.add(y)
    }
}

struct AddScaled(f32);
impl Binary for AddScaled {
    #[inline(always)]
    fn apply<V: Lanes>(&self, x: V, y: V) -> V {
        x.add(y.mul(V::splat(self.0)))
    }
}

struct Sigmoid;
impl Unary for Sigmoid {
    #[inline(always)]
    fn apply<V: Lanes>(&self, x: V) -> V {
        let one = V::splat(1.0);
        one.div(one.add(exp(V::splat(0.0).sub(x))))
    }
}

struct Swiglu;
impl Binary for Swiglu {
    #[inline(always)]
    fn apply<V: Lanes>(&self, gate: V, up: V) -> V {
        let e = exp(V::splat(0.0).sub(gate));
        gate.div(V::splat(1.0).add(e)).mul(up)
    }
}

struct SwigluOai {
    alpha: f32,
    limit: f32,
}
impl Binary for SwigluOai {
    #[inline(always)]
    fn apply<V: Lanes>(&self, gate: V, up: V) -> V {
        let gate = V::splat(self.limit).min(gate);
        let up = V::splat(-self.limit).max(V::splat(self.limit).min(up));
        let e = exp(gate.mul(V::splat(-self.alpha)));
        gate.div(V::splat(1.0).add(e)).mul(up.add(V::splat(1.0)))
    }
}

struct Dot<'a>(&'a [f32], &'a [f32]);
impl Kernel for Dot<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<V: Lanes>(self) -> f32 {
        dot_lanes::<V>(self.0, self.1)
    }
}

/// Four accumulators of 16 lanes taken in turn (the latency of one would be the limit), then summed as a tree.
#[inline(always)]
pub(super) fn dot_lanes<V: Lanes>(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    let mut acc = [V::splat(0.0); 4];
    let ((xs, x_tail), (ys, y_tail)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let ((x_fours, x_rest), (y_fours, y_rest)) = (xs.as_chunks::<4>(), ys.as_chunks::<4>());
    for (x, y) in x_fours.iter().zip(y_fours) {
        for (acc, (x, y)) in acc.iter_mut().zip(x.iter().zip(y)) {
            *acc = load::<V>(x).fma(load(y), *acc);
        }
    }
    for (acc, (x, y)) in acc.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *acc = load::<V>(x).fma(load(y), *acc);
    }
    if !x_tail.is_empty() {
        acc[3] = load_part::<V>(x_tail, 0.0).fma(load_part(y_tail, 0.0), acc[3]);
    }
    acc[0].add(acc[1]).add(acc[2].add(acc[3])).sum()
}

struct Softmax<'a>(&'a mut [f32]);
impl Kernel for Softmax<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let x = self.0;
        let mut max = V::splat(f32::NEG_INFINITY);
        let (chunks, tail) = x.as_chunks::<LANES>();
        for c in chunks {
            max = load::<V>(c).max(max);
        }
        let max = load_part::<V>(tail, f32::NEG_INFINITY).max(max).max_lane();
        let mut sum = V::splat(0.0);
        let (chunks, tail) = x.as_chunks_mut::<LANES>();
        for c in chunks {
            let p = exp(load::<V>(c).sub(V::splat(max)));
            store(p, c);
            sum = sum.add(p);
        }
        if !tail.is_empty() {
            let p = exp(load_part::<V>(tail, f32::NEG_INFINITY).sub(V::splat(max)));
            let mut buf = [0.0; LANES];
            store(p, &mut buf);
            tail.copy_from_slice(&buf[..tail.len()]);
            sum = sum.add(p);
        }
        let factor = V::splat(1.0 / sum.sum());
        simd::map::<V>(
            x,
            #[inline(always)]
            |x| x.mul(factor),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::noise;

    fn close(a: f32, b: f64, tolerance: f64) {
        assert!((f64::from(a) - b).abs() <= tolerance * b.abs().max(1e-6), "{a} {b}");
    }

    const LENGTHS: [usize; 8] = [0, 1, 15, 16, 17, 100, 768, 1001];

    #[test]
    fn swiglu_matches_the_definition() {
        for n in LENGTHS {
            let (g, u) = (noise(n, 1).iter().map(|x| x * 20.0).collect::<Vec<_>>(), noise(n, 2));
            let mut out = g.clone();
            swiglu(&mut out, &u);
            for i in 0..n {
                let (g, u) = (f64::from(g[i]), f64::from(u[i]));
                close(out[i], g / (1.0 + (-g).exp()) * u, 4e-7);
            }
        }
        let mut out = [-200.0, 200.0, -0.0];
        swiglu(&mut out, &[1.0; 3]);
        assert!(out[0].abs() < 1e-35 && out[1] == 200.0 && out[2] == 0.0);
    }

    #[test]
    fn swiglu_oai_clamps() {
        for n in LENGTHS {
            let (g, u): (Vec<f32>, Vec<f32>) =
                (noise(n, 3).iter().map(|x| x * 8.0).collect(), noise(n, 4).iter().map(|x| x * 8.0).collect());
            let mut out = g.clone();
            swiglu_oai(&mut out, &u, 1.702, 7.0);
            for i in 0..n {
                let (g, u) = (f64::from(g[i]).min(7.0), f64::from(u[i]).clamp(-7.0, 7.0));
                close(out[i], g / (1.0 + (-1.702f32 as f64 * g).exp()) * (u + 1.0), 4e-6);
            }
        }
    }

    #[test]
    fn softmax_sums_to_one() {
        for n in LENGTHS {
            let x: Vec<f32> = noise(n, 5).iter().map(|x| x * 10.0).collect();
            let mut y = x.clone();
            softmax(&mut y);
            let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let e: Vec<f64> = x.iter().map(|&x| f64::from(x - max).exp()).collect();
            let sum: f64 = e.iter().sum();
            for i in 0..n {
                close(y[i], e[i] / sum, 6e-7);
            }
        }
        let mut masked = [1.0, f32::NEG_INFINITY, 1.0];
        softmax(&mut masked);
        assert_eq!(masked, [0.5, 0.0, 0.5]);
    }

    #[test]
    fn sigmoid_and_the_rest() {
        let x: Vec<f32> = noise(100, 6).iter().map(|x| x * 30.0).collect();
        let mut s = x.clone();
        sigmoid(&mut s);
        for i in 0..x.len() {
            close(s[i], 1.0 / (1.0 + (-f64::from(x[i])).exp()), 4e-7);
        }
        let mut y = vec![1.0, 2.0];
        add(&mut y, &[10.0, 20.0]);
        scale(&mut y, 2.0);
        add_scaled(&mut y, &[1.0, 3.0], -0.5);
        assert_eq!(y, [21.5, 42.5]);
    }

    #[test]
    fn dot_matches_the_definition() {
        for n in LENGTHS.into_iter().chain([33, 63, 64, 65, 80]) {
            let (x, y) = (noise(n, 9), noise(n, 10));
            let products = || x.iter().zip(&y).map(|(&x, &y)| f64::from(x) * f64::from(y));
            let (want, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
            assert!((f64::from(dot(&x, &y)) - want).abs() <= 1e-6 * size, "{n}");
            simd::tests::same_bits_on_every_isa(|| vec![dot(&x, &y)]);
        }
    }

    #[test]
    fn same_bits_on_every_isa() {
        for n in LENGTHS {
            let (x, y): (Vec<f32>, _) = (noise(n, 7).iter().map(|x| x * 30.0).collect(), noise(n, 8));
            simd::tests::same_bits_on_every_isa(|| {
                let mut out = vec![0.0; 4 * n];
                let (a, rest) = out.split_at_mut(n);
                a.copy_from_slice(&x);
                swiglu(a, &y);
                let (a, rest) = rest.split_at_mut(n);
                a.copy_from_slice(&x);
                swiglu_oai(a, &y, 1.702, 7.0);
                for (out, f) in rest.chunks_mut(n.max(1)).zip([softmax, sigmoid]) {
                    out.copy_from_slice(&x);
                    f(out);
                }
                out
            });
        }
    }
}
