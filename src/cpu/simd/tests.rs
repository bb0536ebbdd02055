use super::*;
use std::cell::Cell;

thread_local! {
    /// The instruction set that [`run`] uses on this thread, if a test wants another than the process's.
    pub static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// Repeatable values between -2 and 2.
pub fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        })
        .collect()
}

/// Checks that `f` gives the same bits on every instruction set of this machine. What it runs must run on its thread.
pub fn same_bits_on_every_isa(f: impl Fn() -> Vec<f32>) {
    let on = |isa| {
        FORCED.set(Some(isa));
        let out = f();
        FORCED.set(None);
        out
    };
    let scalar = on(Isa::Scalar);
    for isa in Isa::available() {
        for (i, (a, b)) in on(isa).iter().zip(&scalar).enumerate() {
            assert!(
                a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
                "{isa}: element {i} is {a:e}, in scalar {b:e}"
            );
        }
    }
}

struct Exp<'a>(&'a mut [f32]);
impl Kernel for Exp<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Lanes>(self) {
        map::<V>(self.0, exp);
    }
}

#[test]
fn exp_is_accurate_and_saturates() {
    let xs: Vec<f32> = (0..200_000).map(|i| -87.0 + i as f32 * (175.0 / 200_000.0)).collect();
    let mut ys = xs.clone();
    run(Exp(&mut ys));
    let worst =
        xs.iter().zip(&ys).map(|(&x, &y)| ((f64::from(y) / f64::from(x).exp()) - 1.0).abs()).fold(0.0, f64::max);
    assert!(worst < 1.5e-7, "{worst:e}");
    let mut special = [f32::NEG_INFINITY, -87.1, -1e30, 0.0, -0.0, f32::INFINITY, 1000.0, f32::NAN];
    run(Exp(&mut special));
    assert_eq!(special[..5], [0.0, 0.0, 0.0, 1.0, 1.0]);
    assert!(special[5] > 1e38 && special[5] == special[6] && special[5].is_finite());
    assert!(special[7].is_nan());
}

/// Every operation of [`Lanes`], on ordinary and on odd values.
struct All<'a>(&'a [f32]);
impl Kernel for All<'_> {
    type Out = Vec<f32>;
    #[inline(always)]
    fn run<V: Lanes>(self) -> Vec<f32> {
        let mut out = Vec::new();
        let chunks = self.0.as_chunks::<LANES>().0;
        for (i, c) in chunks.iter().enumerate() {
            let (a, b, d): (V, V, V) =
                (load(c), load(&chunks[(i + 1) % chunks.len()]), load(&chunks[(i + 3) % chunks.len()]));
            let mut half = [0u16; LANES];
            let bytes: [i8; LANES] = std::array::from_fn(|j| (i * 37 + j * 101) as i8);
            // SAFETY: arrays of 16.
            let (h, n) = unsafe {
                a.store_f16(half.as_mut_ptr());
                (V::load_f16(half.as_ptr()), V::load_i8(bytes.as_ptr()))
            };
            let magic = n.mul(V::splat(0.5)).add(V::splat(ROUND)).pow2();
            for v in [a.add(b), a.sub(b), a.mul(b), a.div(b), a.fma(b, d), a.max(b), a.min(b), a.zero_if_less(b, 0.25)]
                .into_iter()
                .chain([h, n, magic, exp(a), exp(a.mul(V::splat(40.0)))])
                .chain([a.larger_size(V::splat(0.0)), a.larger_size(V::splat(0.5))])
            {
                let mut buf = [0.0; LANES];
                store(v, &mut buf);
                out.extend(buf);
            }
            out.extend([a.sum(), a.larger_size(V::splat(0.0)).largest_size()]);
            for id in [0.25, 0.5, 0.99] {
                let mut q = [0; LANES];
                out.push(n.quantize(id, &mut q) as f32);
                out.extend(q.map(f32::from));
            }
            if c.iter().all(|x| !x.is_nan()) {
                out.push(a.max_lane());
            }
        }
        out
    }
}

#[test]
fn lanes_agree_on_every_isa() {
    let mut x = noise(1024, 7);
    let odd =
        [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-45, -1e-40, 65520.0, -65519.0, 6e-8, 3e-8, 3.4e38];
    x.iter_mut().zip(odd.into_iter().cycle()).step_by(5).for_each(|(x, o)| *x = o);
    same_bits_on_every_isa(|| run(All(&x)));
    same_bits_on_every_isa(|| run(All(&noise(1024, 8))));
}
