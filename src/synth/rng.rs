//! The generator's random numbers: the same on every machine, because golden files depend on them.

/// SplitMix64 (Steele, Lea, Flood 2014): a counter and a mixing function, so every stream is cheap to start.
pub struct Rng(u64);

impl Rng {
    /// The stream of a seed and a name: the same tensor gets the same numbers whatever else the file holds.
    pub fn new(seed: u64, name: &str) -> Self {
        let mut rng = Rng(seed);
        for byte in name.bytes() {
            rng.0 = rng.next_u64() ^ u64::from(byte);
        }
        rng
    }

    /// The stream of one part of this one's work.
    pub fn part(&self, index: u64) -> Self {
        let mut rng = Rng(self.0 ^ index.wrapping_mul(0x2545_f491_4f6c_dd1d));
        Rng(rng.next_u64())
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, for an `n` far below 2^64.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// A normal variate: the sum of eight uniform ones. Unlike Box and Muller's method it needs no logarithm
    /// and no cosine, whose last bits depend on the platform; its tails end at 4.9 standard deviations.
    pub fn normal(&mut self) -> f32 {
        let sum = |bits: u64| (0..4).map(|i| (bits >> (16 * i)) as u16 as u32).sum::<u32>();
        let sum = sum(self.next_u64()) + sum(self.next_u64());
        // eight uniform integers below 2^16: mean 4 * (2^16 - 1), variance 8 * (2^32 - 1) / 12
        (sum as f32 - 262_140.0) * (1.0 / 53_509.94)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_variates_have_the_right_moments() {
        let mut rng = Rng::new(1, "moments");
        let n = 1 << 18;
        let x: Vec<f64> = (0..n).map(|_| f64::from(rng.normal())).collect();
        let moment = |k: i32| x.iter().map(|v| v.powi(k)).sum::<f64>() / f64::from(n);
        assert!(moment(1).abs() < 0.01, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.01, "{}", moment(2));
        assert!((moment(4) - 2.85).abs() < 0.06, "{}", moment(4));
    }

    #[test]
    fn streams_differ_by_seed_name_and_part() {
        let first = |mut rng: Rng| rng.next_u64();
        let a = Rng::new(1, "a");
        let all = [
            first(Rng::new(1, "a")),
            first(Rng::new(2, "a")),
            first(Rng::new(1, "b")),
            first(a.part(0)),
            first(a.part(1)),
        ];
        for (i, x) in all.iter().enumerate() {
            assert!(!all[..i].contains(x), "{all:?}");
        }
    }
}
