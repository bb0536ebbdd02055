use super::*;
use crate::cpu::simd::tests::noise;
use proptest::prelude::*;

const LAYERS: [KvLayer; 2] =
    [KvLayer { n_head_kv: 2, head_dim_k: 8, head_dim_v: 20 }, KvLayer { n_head_kv: 1, head_dim_k: 33, head_dim_v: 16 }];

fn pool(t: KvType, n_blocks: usize) -> Arc<KvPool> {
    KvPool::new(&LAYERS, t, t, n_blocks).unwrap()
}

/// Appends `n` positions whose contents are made from `seed` and the position.
fn append(seq: &mut SeqKv, n: usize, seed: u64) -> Result<(), KvError> {
    seq.reserve(n)?;
    for pos in seq.len()..seq.len() + n {
        for (l, s) in LAYERS.iter().enumerate() {
            for h in 0..s.n_head_kv {
                let x = noise(64, seed * 1_000_003 + (pos * 10 + l * 3 + h) as u64);
                let (k, v) = (Rows::new(&x, 64, 0), Rows::new(&x, 64, 30));
                // SAFETY: one thread.
                unsafe { seq.write(l, h, pos, 1, k, v) };
            }
        }
    }
    seq.advance(n);
    Ok(())
}

fn saved(seq: &SeqKv) -> Vec<u8> {
    let mut bytes = Vec::new();
    seq.save(&mut bytes).unwrap();
    assert_eq!(bytes.len(), seq.pool().saved_bytes(seq.len()));
    bytes
}

/// The bytes that a fresh pool holds after the same appends: `(from, to, seed)`.
fn expected(t: KvType, pieces: &[(usize, usize, u64)]) -> Vec<u8> {
    let pool = pool(t, 64);
    let mut seq = SeqKv::new(&pool);
    for &(from, to, seed) in pieces {
        assert_eq!(from, seq.len());
        append(&mut seq, to - from, seed).unwrap();
    }
    saved(&seq)
}

#[test]
fn a_block_weighs_what_its_parts_do() {
    let layer = [KvLayer { n_head_kv: 4, head_dim_k: 128, head_dim_v: 128 }];
    assert_eq!(KvPool::bytes_per_block(&layer, KvType::F16, KvType::F16), Some(4 * 2 * 128 * 64 * 2));
    assert_eq!(KvPool::bytes_per_block(&layer, KvType::Q8_0, KvType::Q8_0), Some(4 * 2 * 64 * (128 + 8)));
    let huge = [KvLayer { n_head_kv: usize::MAX / 2, head_dim_k: 128, head_dim_v: 128 }];
    assert_eq!(KvPool::bytes_per_block(&huge, KvType::F16, KvType::F16), None);
    assert!(matches!(KvPool::new(&huge, KvType::F16, KvType::F16, 1), Err(KvError::TooLarge { .. })));
    assert!(matches!(KvPool::new(&layer, KvType::F16, KvType::F16, 1 << 60), Err(KvError::TooLarge { .. })));
}

#[test]
fn a_full_pool_says_so_and_changes_nothing() {
    let pool = pool(KvType::F16, 2);
    let mut seq = SeqKv::new(&pool);
    append(&mut seq, 70, 1).unwrap();
    let error = seq.reserve(59).unwrap_err();
    assert!(matches!(error, KvError::Full { wanted: 1, free: 0, total: 2 }), "{error}");
    append(&mut seq, 58, 1).unwrap();
    drop(seq);
    assert_eq!(pool.n_free(), 2);
}

#[test]
fn save_and_restore_give_the_same_bytes() {
    for t in [KvType::F32, KvType::F16, KvType::Q8_0] {
        let pool = pool(t, 9);
        for n in [0, 1, 63, 64, 65, 150] {
            let mut seq = SeqKv::new(&pool);
            append(&mut seq, n, 5).unwrap();
            let bytes = saved(&seq);
            let back = SeqKv::restore(&pool, n, &mut &bytes[..]).unwrap();
            assert_eq!(saved(&back), bytes);
            if n > 0 {
                assert!(matches!(SeqKv::restore(&pool, n, &mut &bytes[1..]), Err(KvError::Restore(_))));
            }
        }
        assert_eq!(pool.n_free(), 9);
        assert!(matches!(SeqKv::restore(&pool, usize::MAX, &mut &[][..]), Err(KvError::Full { .. })));
    }
}

#[test]
#[should_panic(expected = "isn't reserved")]
fn writing_what_is_held_already_panics() {
    let pool = pool(KvType::F16, 2);
    let mut seq = SeqKv::new(&pool);
    append(&mut seq, 3, 1).unwrap();
    seq.reserve(1).unwrap();
    let x = [0.0; 64];
    // SAFETY: one thread.
    unsafe { seq.write(0, 0, 2, 1, Rows::new(&x, 64, 0), Rows::new(&x, 64, 0)) };
}

#[derive(Clone, Debug)]
enum Op {
    Append(usize, usize),
    Truncate(usize, usize),
    Fork(usize),
    Drop(usize),
    Restore(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (any::<usize>(), 0..150usize).prop_map(|(i, n)| Op::Append(i, n)),
        2 => (any::<usize>(), 0..200usize).prop_map(|(i, n)| Op::Truncate(i, n)),
        2 => any::<usize>().prop_map(Op::Fork),
        1 => any::<usize>().prop_map(Op::Drop),
        1 => any::<usize>().prop_map(Op::Restore),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]

    /// Whatever is done to the others, each sequence holds what was appended to it, and no block is lost.
    #[test]
    fn sequences_keep_their_contents(ops in proptest::collection::vec(op(), 1..24)) {
        let pool = pool(KvType::Q8_0, 12);
        let mut seqs = vec![(SeqKv::new(&pool), Vec::<(usize, usize, u64)>::new())];
        for (seed, op) in ops.into_iter().enumerate() {
            let seed = seed as u64 + 1;
            let n_seqs = seqs.len();
            match op {
                Op::Append(i, n) => {
                    let (seq, pieces) = &mut seqs[i % n_seqs];
                    let (len, free) = (seq.len(), pool.n_free());
                    match append(seq, n, seed) {
                        Ok(()) => pieces.push((len, len + n, seed)),
                        Err(_) => prop_assert_eq!((seq.len(), pool.n_free()), (len, free)),
                    }
                }
                Op::Truncate(i, n) => {
                    let (seq, pieces) = &mut seqs[i % n_seqs];
                    seq.truncate(n);
                    pieces.retain(|p| p.0 < n);
                    pieces.iter_mut().for_each(|p| p.1 = p.1.min(n));
                }
                Op::Fork(i) => {
                    let (seq, pieces) = &seqs[i % n_seqs];
                    if let Ok(fork) = seq.fork() {
                        let pieces = pieces.clone();
                        seqs.push((fork, pieces));
                    }
                }
                Op::Drop(i) if n_seqs > 1 => drop(seqs.swap_remove(i % n_seqs)),
                Op::Drop(_) => {}
                Op::Restore(i) => {
                    let (seq, pieces) = &seqs[i % n_seqs];
                    if let Ok(back) = SeqKv::restore(&pool, seq.len(), &mut &saved(seq)[..]) {
                        let pieces = pieces.clone();
                        seqs.push((back, pieces));
                    }
                }
            }
        }
        for (seq, pieces) in &seqs {
            prop_assert!(saved(seq) == expected(KvType::Q8_0, pieces));
        }
        let mut blocks: Vec<u32> = seqs.iter().flat_map(|(s, _)| s.blocks.clone()).collect();
        blocks.sort_unstable();
        blocks.dedup();
        prop_assert_eq!(pool.n_free() + blocks.len(), pool.n_blocks());
        drop(seqs);
        prop_assert_eq!(pool.n_free(), pool.n_blocks());
    }
}

#[test]
fn held_blocks_outlive_their_sequence_and_begin_others() {
    let pool = pool(KvType::F16, 5);
    let mut first = SeqKv::new(&pool);
    append(&mut first, 2 * KV_BLOCK + 10, 7).unwrap();
    let held: Vec<HeldBlock> = (0..2).map(|i| first.hold(i)).collect();
    assert_eq!((first.n_blocks(), first.n_own_blocks()), (3, 3));
    drop(first);
    assert_eq!(pool.n_free(), 3);
    assert!(!held[0].is_shared());

    let mut second = SeqKv::beginning(&pool, held.iter());
    assert!(held[0].is_shared() && second.len() == 2 * KV_BLOCK);
    append(&mut second, 5, 7).unwrap();
    let want = expected(KvType::F16, &[(0, 2 * KV_BLOCK + 5, 7)]);
    assert_eq!(saved(&second), want);
    // A sequence cut back into a shared block writes to a copy of it.
    second.truncate(KV_BLOCK + 3);
    append(&mut second, 1, 8).unwrap();
    assert_eq!(saved(&SeqKv::beginning(&pool, held.iter())), want[..pool.saved_bytes(2 * KV_BLOCK)]);
    drop((second, held));
    assert_eq!(pool.n_free(), 5);
}

#[test]
#[should_panic(expected = "isn't full")]
fn a_block_that_is_still_written_can_not_be_held() {
    let pool = pool(KvType::F16, 2);
    let mut seq = SeqKv::new(&pool);
    append(&mut seq, KV_BLOCK + 1, 1).unwrap();
    seq.hold(1);
}

/// Keeps blocks, and remembers how many it was asked for.
#[derive(Default)]
struct Keeps {
    blocks: Mutex<Vec<HeldBlock>>,
    asked: Mutex<Vec<usize>>,
}

impl Keeper for Keeps {
    fn give_back(&self, n: usize) -> usize {
        let mut blocks = self.blocks.lock().unwrap();
        self.asked.lock().unwrap().push(n);
        let idle: Vec<HeldBlock> = blocks.extract_if(.., |b| !b.is_shared()).take(n).collect();
        idle.len()
    }
}

#[test]
fn what_is_only_kept_is_had_by_who_needs_it() {
    let pool = pool(KvType::F16, 5);
    let keeper = Arc::new(Keeps::default());
    let weak: Weak<Keeps> = Arc::downgrade(&keeper);
    pool.add_keeper(weak);
    let mut first = SeqKv::new(&pool);
    append(&mut first, 3 * KV_BLOCK, 7).unwrap();
    *keeper.blocks.lock().unwrap() = (0..3).map(|i| first.hold(i)).collect();
    assert_eq!((pool.n_free(), pool.n_available(), first.n_own_blocks()), (2, 2, 3));
    first.truncate(KV_BLOCK);
    assert_eq!((pool.n_free(), pool.n_available()), (2, 4));

    let mut second = SeqKv::new(&pool);
    let error = second.reserve(5 * KV_BLOCK).unwrap_err();
    assert!(matches!(error, KvError::Full { wanted: 5, free: 4, total: 5 }), "{error}");
    assert!(keeper.asked.lock().unwrap().is_empty(), "nothing is given up in vain");
    append(&mut second, 3 * KV_BLOCK, 8).unwrap();
    assert_eq!((pool.n_free(), pool.n_available(), &keeper.asked.lock().unwrap()[..]), (0, 1, &[1][..]));
    assert_eq!(saved(&first), expected(KvType::F16, &[(0, KV_BLOCK, 7)]), "what is in use stays");
    second.truncate(2 * KV_BLOCK + 1);
    assert_eq!(saved(&second.fork().unwrap()), expected(KvType::F16, &[(0, 2 * KV_BLOCK + 1, 8)]));
    drop((first, second, keeper));
    assert_eq!(pool.n_free(), 5);
}

#[test]
fn a_beginning_that_two_computed_is_in_memory_once() {
    let pool = pool(KvType::F16, 4);
    let (mut first, mut second) = (SeqKv::new(&pool), SeqKv::new(&pool));
    append(&mut first, KV_BLOCK, 7).unwrap();
    append(&mut second, KV_BLOCK + 1, 7).unwrap();
    let held = first.hold(0);
    second.share(0, &held);
    first.share(0, &held);
    assert_eq!((pool.n_free(), second.n_own_blocks()), (2, 1));
    drop((first, held));
    assert_eq!(saved(&second), expected(KvType::F16, &[(0, KV_BLOCK + 1, 7)]));
    assert_eq!((pool.n_free(), second.n_own_blocks()), (2, 2));
}

#[test]
#[should_panic(expected = "different pools")]
fn a_block_of_tokens_has_sequences_of_one_pool() {
    let (one, other) = (pool(KvType::F16, 1), pool(KvType::F32, 1));
    drop(crate::ops::attention::KvBatch::new([(&mut SeqKv::new(&one), 1), (&mut SeqKv::new(&other), 1)]));
}

#[test]
fn the_memory_of_free_blocks_can_be_given_back() {
    let pool = KvPool::new(&LAYERS, KvType::F32, KvType::F32, 8).unwrap();
    let (mut a, mut b) = (SeqKv::new(&pool), SeqKv::new(&pool));
    append(&mut a, 3 * KV_BLOCK, 1).unwrap();
    append(&mut b, KV_BLOCK, 2).unwrap();
    let mut c = SeqKv::new(&pool);
    append(&mut c, 2 * KV_BLOCK, 3).unwrap();
    let kept = saved(&b);
    drop((a, c));
    assert_eq!((pool.n_touched(), pool.n_free()), (6, 7));
    pool.discard_free(1);
    assert_eq!((pool.n_touched(), pool.n_free()), (2, 7));
    assert!(saved(&b) == kept, "its neighbours' memory is gone");
    let mut d = SeqKv::new(&pool);
    append(&mut d, 7 * KV_BLOCK, 4).unwrap();
    assert_eq!((pool.n_touched(), pool.n_free()), (8, 0));
    assert!(saved(&d) == expected(KvType::F32, &[(0, 7 * KV_BLOCK, 4)]) && saved(&b) == kept);
}
