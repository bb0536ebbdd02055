use super::*;

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
