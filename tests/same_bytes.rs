//! Promise 2: logits depend on the model and the tokens, not on threads, chunks, neighbours, slots or what was saved.

use oncall::engine::{Engine, EngineOptions, Generation, GenerationParams, Input, Memory, Want};
use oncall::gguf::Gguf;
use oncall::gguf::mixture;
use oncall::moe::IoMode;
use oncall::moe::policy::POLICIES;
use oncall::session::sampler::SamplingParams;
use oncall::synth::{self, PRESETS, Preset};

/// A tiny model in memory.
fn model(preset: &Preset, mix: &str) -> &'static [u8] {
    let options = synth::Options { mixture: mixture::by_name(mix).unwrap(), ..synth::Options::parity(preset) };
    synth::to_bytes(preset, &options).unwrap().leak()
}

fn load(bytes: &'static [u8], options: &EngineOptions) -> Engine {
    Engine::from_gguf(Gguf::from_static("tiny.gguf", bytes).unwrap(), options, &|_, _| ()).unwrap()
}

/// Some tokens that differ.
fn tokens(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) % 1000 + 3).collect()
}

/// The logits of all tokens, as bits.
fn logits(engine: &Engine, tokens: &[u32]) -> Vec<u32> {
    let mut all = Vec::new();
    engine.session().feed_all(tokens, &mut |_, l| all.extend(l.iter().map(|v| v.to_bits()))).unwrap();
    all
}

fn tiny() -> impl Iterator<Item = &'static Preset> {
    PRESETS.iter().filter(|p| p.is_tiny())
}

#[test]
fn threads_chunks_and_slots_change_nothing() {
    for preset in tiny() {
        for mix in ["q4_k_m", "q8_0"] {
            let bytes = model(preset, mix);
            let text = tokens(150, 1);
            let base = EngineOptions { n_ctx: Some(256), n_threads: Some(1), ..EngineOptions::default() };
            let want = logits(&load(bytes, &base), &text);
            assert!(want.iter().all(|&b| f32::from_bits(b).is_finite()), "{} {mix}", preset.name);
            for chunk in [1, 7, 64] {
                let o = EngineOptions { chunk, n_threads: Some(2), ..base.clone() };
                assert!(logits(&load(bytes, &o), &text) == want, "{} {mix}: chunks of {chunk}", preset.name);
            }
            // The fewest slots: one of each size.
            for lookahead in [true, false] {
                let o = EngineOptions { expert_bytes: Some(1), n_threads: Some(3), lookahead, ..base.clone() };
                assert!(logits(&load(bytes, &o), &text) == want, "{} {mix}: one slot", preset.name);
            }
        }
    }
}

/// Every policy, every way of reading, and slots that come and go between the tokens.
#[test]
fn policies_reads_and_budgets_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for preset in tiny().filter(|p| p.moe.is_some()) {
        let bytes = model(preset, "q4_k_m");
        let path = dir.path().join("tiny.gguf");
        std::fs::write(&path, bytes).unwrap();
        let text = tokens(40, 4);
        let base = EngineOptions { n_ctx: Some(64), n_threads: Some(2), ..EngineOptions::default() };
        let want = logits(&load(bytes, &base), &text);
        for (i, (name, policy)) in POLICIES.iter().enumerate() {
            for io in [IoMode::Auto, IoMode::Direct, IoMode::Buffered] {
                let lookahead = i % 2 == 0;
                let o = EngineOptions { expert_bytes: Some(60_000), policy: *policy, io, lookahead, ..base.clone() };
                let engine = Engine::load(&path, &o, &|_, _| ()).unwrap();
                assert!(logits(&engine, &text) == want, "{} {name} {io:?}", preset.name);
            }
        }
        let engine = Engine::load(&path, &base, &|_, _| ()).unwrap();
        let mut session = engine.session();
        let mut got = Vec::new();
        let budget = engine.budget();
        let least = budget.least;
        let most = budget.base + budget.dense + budget.kv + budget.activations + budget.slots;
        for (i, token) in text.iter().enumerate() {
            let bytes = least + (most - least) * [3, 0, 1, 2][i % 4] / 3;
            engine.set_memory_budget(Memory::Bytes(bytes)).unwrap();
            session.feed_all(&[*token], &mut |_, l| got.extend(l.iter().map(|v| v.to_bits()))).unwrap();
        }
        assert!(got == want, "{}: the budget changes between tokens", preset.name);
        let error = engine.set_memory_budget(Memory::Bytes(least - 1)).unwrap_err().to_string();
        assert!(error.contains("the least that works"), "{error}");
    }
}

#[test]
fn neighbours_change_nothing() {
    for preset in tiny() {
        let engine = load(
            model(preset, "q4_k_m"),
            &EngineOptions { n_ctx: Some(128), n_sessions: 3, n_threads: Some(2), ..EngineOptions::default() },
        );
        let texts = [tokens(33, 1), tokens(70, 2), tokens(1, 3)];
        let alone: Vec<Vec<u32>> = texts.iter().map(|t| logits(&engine, t)).collect();
        let mut sessions: Vec<_> = texts.iter().map(|_| engine.session()).collect();
        let mut inputs: Vec<Input> = sessions
            .iter_mut()
            .zip(&texts)
            .map(|(session, tokens)| Input { session, tokens, written: false, want: Want::All })
            .collect();
        engine.forward(&mut inputs).unwrap();
        for (session, alone) in sessions.iter().zip(&alone) {
            let together: Vec<u32> = session.logits().iter().map(|l| l.to_bits()).collect();
            assert!(together == *alone, "{}", preset.name);
        }
    }
}

#[test]
fn a_saved_session_goes_on_as_if_it_had_not_been() {
    let o = EngineOptions { n_ctx: Some(256), ..EngineOptions::default() };
    let engine = Engine::embedded(&o).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("session");
    let text = tokens(100, 5);
    let want = logits(&engine, &text);
    let n_vocab = engine.config().n_vocab;
    let mut first = engine.session();
    first.feed(&text[..77], &mut |_| true).unwrap();
    first.save(&path).unwrap();
    let mut second = Engine::embedded(&o).unwrap().restore(&path).unwrap();
    assert_eq!(second.tokens(), &text[..77]);
    second.feed(&text[77..], &mut |_| true).unwrap();
    let last: Vec<u32> = second.logits().iter().map(|l| l.to_bits()).collect();
    assert!(last == want[want.len() - n_vocab..]);

    // Damaged in any place it is refused or read back, and never panics.
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 7, 23, 24, 100, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        assert!(engine.restore(&path).is_err(), "cut at {cut}");
    }
    let other = EngineOptions { type_k: oncall::ops::KvType::Q8_0, ..o };
    std::fs::write(&path, &whole).unwrap();
    let error = Engine::embedded(&other).unwrap().restore(&path).err().unwrap().to_string();
    assert!(error.contains("another model, another type"), "{error}");
}

/// Whoever reads along doesn't wait for the pass after a token, and a text's last token costs none.
#[test]
fn a_token_is_handed_out_before_it_is_computed() {
    let engine = Engine::embedded(&EngineOptions::default()).unwrap();
    let prompt = engine.tokenizer().encode("Once upon a time", true, true);
    let mut session = engine.session();
    session.feed(&prompt, &mut |_| true).unwrap();
    let params = GenerationParams { n_predict: Some(3), ..GenerationParams::default() };
    let mut g = Generation::new(&mut session, params).unwrap();
    let mut written = Vec::new();
    let decoded = || engine.account().decode.tokens as usize;
    while let Some(piece) = g.next().unwrap() {
        assert_eq!(decoded(), written.len());
        written.extend(piece.token);
    }
    assert_eq!((decoded(), written.len()), (2, 3));
    assert_eq!(session.tokens(), [&prompt[..], &written].concat());
    assert_eq!(session.n_computed() + 1, session.tokens().len());
}

#[test]
fn the_same_seed_writes_the_same_text() {
    let write = |seed, n_threads| {
        let engine =
            Engine::embedded(&EngineOptions { n_threads: Some(n_threads), ..EngineOptions::default() }).unwrap();
        let mut session = engine.session();
        session.feed(&engine.tokenizer().encode("Once upon a time", true, true), &mut |_| true).unwrap();
        let sampling = SamplingParams { seed: Some(seed), ..SamplingParams::default() };
        let params = GenerationParams { sampling, n_predict: Some(60), ..GenerationParams::default() };
        let mut g = Generation::new(&mut session, params).unwrap();
        let mut text = String::new();
        while let Some(piece) = g.next().unwrap() {
            text += &piece.text;
        }
        text
    };
    assert_eq!(write(1, 1), write(1, 2));
    assert_ne!(write(1, 1), write(2, 1));
}
