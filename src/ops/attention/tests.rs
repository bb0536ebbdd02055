use super::*;
use crate::cpu::simd::tests::noise;
use crate::ops::kv::{KvLayer, KvPool, KvType};
use std::sync::Arc;

/// One layer's shape and parameters, with the inputs of `n` positions.
struct Case {
    shape: KvLayer,
    group: usize,
    n_swa: Option<usize>,
    sinks: Option<Vec<f32>>,
    types: (KvType, KvType),
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    n: usize,
}

impl Case {
    fn new(n_head_kv: usize, group: usize, head_dim_k: usize, head_dim_v: usize, n: usize) -> Self {
        Case {
            shape: KvLayer { n_head_kv, head_dim_k, head_dim_v },
            group,
            n_swa: None,
            sinks: None,
            types: (KvType::F32, KvType::F32),
            q: noise(n * n_head_kv * group * head_dim_k, 1),
            k: noise(n * n_head_kv * head_dim_k, 2),
            v: noise(n * n_head_kv * head_dim_v, 3),
            n,
        }
    }

    fn n_head(&self) -> usize {
        self.shape.n_head_kv * self.group
    }

    fn params(&self) -> AttnParams<'_> {
        AttnParams {
            n_head: self.n_head(),
            scale: 2.0 / (self.shape.head_dim_k as f32).sqrt(),
            n_swa: self.n_swa,
            sinks: self.sinks.as_deref(),
        }
    }

    fn pool(&self) -> Arc<KvPool> {
        KvPool::new(&[self.shape], self.types.0, self.types.1, self.n.div_ceil(KV_BLOCK) + 2).unwrap()
    }

    /// Rows `r` of a matrix with `width` values for each position.
    fn rows<'a>(&self, x: &'a [f32], width: usize, r: &Range<usize>) -> &'a [f32] {
        &x[r.start * width..r.end * width]
    }

    /// The outputs of all positions, computed in chunks of these sizes in turn.
    fn run(&self, chunks: &[usize], team: &Team) -> Vec<f32> {
        let (s, pool) = (&self.shape, self.pool());
        let mut seq = SeqKv::new(&pool);
        let mut out = vec![f32::NAN; self.n * self.n_head() * s.head_dim_v];
        let (mut at, mut chunks) = (0, chunks.iter().cycle());
        while at < self.n {
            let r = at..(at + chunks.next().unwrap()).min(self.n);
            let mut batch = KvBatch::new([(&mut seq, r.len())]).unwrap();
            let (k, v) = (
                self.rows(&self.k, s.n_head_kv * s.head_dim_k, &r),
                self.rows(&self.v, s.n_head_kv * s.head_dim_v, &r),
            );
            batch.write(team, 0, k, v);
            let width = self.n_head() * s.head_dim_v;
            let q = self.rows(&self.q, self.n_head() * s.head_dim_k, &r);
            batch.attend(team, 0, &self.params(), q, &mut out[r.start * width..r.end * width]);
            batch.advance();
            at = r.end;
        }
        out
    }

    /// Head `h` of position `pos` by the definition, in f64.
    fn reference(&self, pos: usize, h: usize) -> Vec<f64> {
        let (s, kv_head, p) = (&self.shape, h / self.group, self.params());
        let q = &self.q[(pos * self.n_head() + h) * s.head_dim_k..][..s.head_dim_k];
        let from = self.n_swa.map_or(0, |n| (pos + 1).saturating_sub(n));
        let dot = |k: &[f32]| q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let scores: Vec<f64> = (from..=pos)
            .map(|j| dot(&self.k[(j * s.n_head_kv + kv_head) * s.head_dim_k..][..s.head_dim_k]) * f64::from(p.scale))
            .collect();
        let sink = p.sinks.map(|s| f64::from(s[h]));
        let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().copied().chain(sink).map(|x| (x - max).exp()).sum();
        let mut out = vec![0.0; s.head_dim_v];
        for (j, x) in (from..=pos).zip(scores) {
            let v = &self.v[(j * s.n_head_kv + kv_head) * s.head_dim_v..][..s.head_dim_v];
            out.iter_mut().zip(v).for_each(|(o, &v)| *o += (x - max).exp() / sum * f64::from(v));
        }
        out
    }

    /// Compares every `step`-th position with the definition: largest error over largest value.
    fn error(&self, out: &[f32], step: usize) -> f64 {
        let dv = self.shape.head_dim_v;
        let mut worst = 0.0f64;
        for pos in (0..self.n).step_by(step).chain([self.n - 1]) {
            for h in 0..self.n_head() {
                let r = self.reference(pos, h);
                let size = r.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
                let o = &out[(pos * self.n_head() + h) * dv..][..dv];
                assert!(o.iter().all(|x| x.is_finite()));
                worst = o.iter().zip(r).fold(worst, |w, (&o, r)| w.max((f64::from(o) - r).abs() / size));
            }
        }
        worst
    }

    /// Correct, and bitwise the same one token at a time, in chunks that cross tiles, and split among threads.
    fn check(&self, tolerance: f64, step: usize) {
        let (one, three) = (Team::new(1).unwrap(), Team::new(3).unwrap());
        let whole = self.run(&[self.n], &one);
        let error = self.error(&whole, step);
        assert!(error < tolerance, "error {error:e}");
        for (chunks, team) in [(&[1][..], &three), (&[7, 64, 1, 100], &one), (&[self.n], &three)] {
            let out = self.run(chunks, team);
            let same = out.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "chunks {chunks:?}, {} threads", team.n_threads());
        }
    }
}

#[test]
fn groups_and_odd_sizes() {
    for (n_head_kv, group, dk, dv) in
        [(2, 1, 64, 64), (1, 3, 32, 32), (2, 4, 16, 16), (1, 7, 80, 48), (1, 1, 23, 9), (1, 13, 24, 17)]
    {
        Case::new(n_head_kv, group, dk, dv, 150).check(4e-6, 7);
    }
}

#[test]
fn every_length_around_a_block() {
    for n in [1, 2, 63, 64, 65, 127, 128, 129] {
        Case::new(1, 2, 16, 16, n).check(4e-6, 1);
    }
}

#[test]
fn windows_see_their_last_positions_only() {
    for n_swa in [1, 5, 63, 64, 65, 128, 1000] {
        Case { n_swa: Some(n_swa), ..Case::new(1, 2, 16, 16, 300) }.check(4e-6, 3);
    }
}

#[test]
fn sinks_take_their_share() {
    let sinks = Some(vec![3.0, -2.0, 0.5, 90.0]);
    Case { sinks: sinks.clone(), ..Case::new(2, 2, 16, 16, 130) }.check(4e-6, 3);
    Case { sinks, n_swa: Some(70), ..Case::new(2, 2, 16, 16, 200) }.check(1e-5, 3);
}

#[test]
fn long_contexts_merge_ranges() {
    Case::new(1, 2, 8, 16, 2 * RANGE + 77).check(6e-6, 97);
    Case { n_swa: Some(RANGE + 100), ..Case::new(1, 1, 8, 16, 3 * RANGE) }.check(6e-6, 97);
}

#[test]
fn latent_attention_sizes() {
    Case::new(1, 16, 576, 512, 70).check(1e-5, 23);
}

#[test]
fn stored_types_lose_what_they_must() {
    for (types, tolerance) in [
        ((KvType::F16, KvType::F16), 2e-3),
        ((KvType::Q8_0, KvType::F16), 3e-2),
        ((KvType::F16, KvType::Q8_0), 2e-2),
        ((KvType::Q8_0, KvType::Q8_0), 4e-2),
    ] {
        for (group, dk, dv) in [(1, 64, 64), (2, 40, 24), (16, 96, 80)] {
            Case { types, ..Case::new(1, group, dk, dv, 140) }.check(tolerance, 5);
        }
    }
}

/// What the cache rounds is rounded once: with inputs that a type holds exactly the result is f32's.
#[test]
fn stored_types_are_exact_on_what_they_hold() {
    let mut case = Case::new(2, 2, 32, 32, 100);
    for x in case.k.iter_mut().chain(&mut case.v) {
        *x = (*x * 60.0).round() / 64.0;
    }
    // A value of 127/64 in each group makes its scale 1/64.
    case.k.chunks_mut(32).chain(case.v.chunks_mut(32)).for_each(|g| g[7] = 127.0 / 64.0);
    let team = Team::new(1).unwrap();
    let exact = case.run(&[100], &team);
    for t in [KvType::F16, KvType::Q8_0] {
        case.types = (t, t);
        assert_eq!(case.run(&[100], &team), exact, "{t:?}");
    }
}

#[test]
fn sequences_in_one_batch_do_not_see_each_other() {
    let a = Case::new(2, 2, 16, 16, 100);
    let b = Case {
        q: noise(90 * 64, 11),
        k: noise(90 * 32, 12),
        v: noise(90 * 32, 13),
        n: 90,
        ..Case::new(2, 2, 16, 16, 0)
    };
    let team = Team::new(2).unwrap();
    let (alone_a, alone_b) = (a.run(&[100], &team), b.run(&[90], &team));
    let pool = KvPool::new(&[a.shape], KvType::F32, KvType::F32, 4).unwrap();
    let (mut sa, mut sb) = (SeqKv::new(&pool), SeqKv::new(&pool));
    let (mut got_a, mut got_b) = (Vec::new(), Vec::new());
    for (na, nb) in [(30, 1), (0, 60), (1, 1), (69, 28)] {
        let (ra, rb) = (sa.len()..sa.len() + na, sb.len()..sb.len() + nb);
        let join = |x: &[f32], y: &[f32], width| [a.rows(x, width, &ra), b.rows(y, width, &rb)].concat();
        let mut batch = KvBatch::new([(&mut sa, na), (&mut sb, nb)]).unwrap();
        assert_eq!(batch.positions(), ra.clone().chain(rb.clone()).map(|p| p as u32).collect::<Vec<_>>());
        batch.write(&team, 0, &join(&a.k, &b.k, 32), &join(&a.v, &b.v, 32));
        let mut out = vec![f32::NAN; (na + nb) * 64];
        batch.attend(&team, 0, &a.params(), &join(&a.q, &b.q, 64), &mut out);
        batch.advance();
        got_a.extend_from_slice(&out[..na * 64]);
        got_b.extend_from_slice(&out[na * 64..]);
    }
    assert_eq!(got_a, alone_a);
    assert_eq!(got_b, alone_b);
}

/// Memory that another sequence used before holds its values, and what isn't a number: neither may leak.
#[test]
fn leftovers_in_reused_blocks_are_not_seen() {
    let case = Case::new(1, 2, 16, 16, 40);
    let team = Team::new(1).unwrap();
    let clean = case.run(&[40], &team);
    let pool = KvPool::new(&[case.shape], KvType::F32, KvType::F32, 1).unwrap();
    let mut old = SeqKv::new(&pool);
    let mut batch = KvBatch::new([(&mut old, 64)]).unwrap();
    batch.write(&team, 0, &[f32::NAN; 64 * 16], &[f32::INFINITY; 64 * 16]);
    batch.advance();
    drop(old);
    let mut seq = SeqKv::new(&pool);
    let mut out = vec![0.0; clean.len()];
    for t in 0..40 {
        let mut batch = KvBatch::new([(&mut seq, 1)]).unwrap();
        batch.write(&team, 0, &case.k[t * 16..][..16], &case.v[t * 16..][..16]);
        batch.attend(&team, 0, &case.params(), &case.q[t * 32..][..32], &mut out[t * 32..][..32]);
        batch.advance();
    }
    assert_eq!(out, clean);
}

/// Numbers beyond half precision's reach are stored as its largest, so that they stay numbers.
#[test]
fn huge_values_saturate() {
    let mut case = Case { types: (KvType::F16, KvType::F16), ..Case::new(1, 1, 16, 16, 3) };
    case.v.fill(1e30);
    let out = case.run(&[3], &Team::new(1).unwrap());
    assert!(out.iter().all(|&x| (x - 65504.0).abs() < 0.1), "{out:?}");
}

/// A key or a value that isn't finite shows in what every later token gets, and in nothing earlier, however it's stored and in
/// whatever chunks it came.
#[test]
fn what_is_not_finite_shows_from_there_on() {
    for t in [KvType::F32, KvType::F16, KvType::Q8_0] {
        for bad in [f32::NAN, f32::INFINITY] {
            for in_keys in [true, false] {
                for at in [3, 40] {
                    let mut case = Case { types: (t, t), ..Case::new(1, 2, 40, 24, 70) };
                    let width = if in_keys { 40 } else { 24 };
                    let x = if in_keys { &mut case.k } else { &mut case.v };
                    x[at * width + 7] = bad;
                    check_finite_up_to(&case, at, &[&[1], &[70], &[7, 64]]);
                }
            }
        }
    }
    // Alone in its range.
    let mut case = Case::new(1, 1, 8, 16, RANGE + 1);
    case.k[RANGE * 8] = f32::NAN;
    check_finite_up_to(&case, RANGE, &[&[RANGE + 1]]);
}

fn check_finite_up_to(case: &Case, at: usize, chunks: &[&[usize]]) {
    let team = Team::new(1).unwrap();
    let width = case.n_head() * case.shape.head_dim_v;
    simd::tests::same_bits_on_every_isa(|| {
        let outs: Vec<Vec<f32>> = chunks.iter().map(|chunks| case.run(chunks, &team)).collect();
        for out in &outs {
            for (pos, heads) in out.chunks(width).enumerate() {
                let shows = heads.chunks(case.shape.head_dim_v).all(|head| head.iter().any(|x| !x.is_finite()));
                let finite = heads.iter().all(|x| x.is_finite());
                assert!(if pos < at { finite } else { shows }, "{:?}, {at}, {pos}: {heads:?}", case.types);
            }
            assert!(out[..at * width] == outs[0][..at * width]);
        }
        outs.concat()
    });
}

#[test]
fn same_bits_on_every_isa() {
    let team = Team::new(1).unwrap();
    for types in [(KvType::F32, KvType::F32), (KvType::F16, KvType::F16), (KvType::Q8_0, KvType::Q8_0)] {
        for (group, dk, dv) in [(1, 64, 64), (2, 40, 24), (3, 16, 112), (7, 33, 80)] {
            let sinks = Some(noise(group, 4));
            let case = Case { types, sinks, n_swa: Some(90), ..Case::new(1, group, dk, dv, 200) };
            simd::tests::same_bits_on_every_isa(|| case.run(&[3, 64], &team));
        }
    }
    let long = Case::new(1, 1, 8, 16, RANGE + 70);
    simd::tests::same_bits_on_every_isa(|| long.run(&[500], &team));
}
