//! The queue inside a program: callbacks that submit or panic, threads that wait, sessions beside it that need room.

use oncall::engine::{
    Engine, EngineError, EngineOptions, Event, Finish, Finished, Generation, GenerationParams, Input, Memory, Queue,
    Request, Want,
};
use oncall::ops::kv::{KV_BLOCK, KvError, KvType};
use oncall::session::sampler::SamplingParams;
use rayon::prelude::*;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Far longer than anything here takes.
const TOO_LONG: Duration = Duration::from_secs(60);

fn engine(o: EngineOptions) -> Engine {
    Engine::embedded(&o).unwrap()
}

fn options(n_sessions: usize) -> EngineOptions {
    EngineOptions { n_sessions, n_ctx: Some(256), n_threads: Some(2), ..EngineOptions::default() }
}

fn request(prompt: impl IntoIterator<Item = u32>, n_predict: usize) -> Request {
    let sampling = SamplingParams { temp: 0.0, ..SamplingParams::default() };
    let params =
        GenerationParams { sampling, n_predict: Some(n_predict), ignore_eos: true, ..GenerationParams::default() };
    Request { prompt: prompt.into_iter().collect(), params, priority: 0 }
}

/// The tokens that a request gets on its own.
fn alone(engine: &Engine, r: &Request) -> Vec<u32> {
    let mut session = engine.session();
    session.feed(&r.prompt, &mut |_| true).unwrap();
    let mut g = Generation::new(&mut session, r.params.clone()).unwrap();
    let mut tokens = Vec::new();
    while let Some(p) = g.next().unwrap() {
        tokens.extend(p.token);
    }
    tokens
}

/// The tokens of a request that was finished, and how.
fn got(events: impl IntoIterator<Item = Event>) -> (Vec<u32>, Finished) {
    let mut tokens = Vec::new();
    for event in events {
        match event {
            Event::Piece(p) => tokens.extend(p.token),
            Event::Finished(f) => return (tokens, f),
            Event::Failed(e) => panic!("{e}"),
        }
    }
    panic!("no end");
}

/// Fails instead of hanging.
fn within<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let (send, done) = mpsc::channel();
    let thread = std::thread::spawn(move || drop(send.send(what())));
    match done.recv_timeout(TOO_LONG) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => panic!("it hangs"),
        Err(RecvTimeoutError::Disconnected) => std::panic::resume_unwind(thread.join().unwrap_err()),
    }
}

#[test]
fn sessions_of_other_engines_are_refused() {
    let one = engine(options(1));
    let other = engine(EngineOptions { type_k: KvType::F32, ..options(1) });
    let (mut own, mut foreign) = (one.session(), other.session());
    fn input(session: &mut oncall::engine::Session) -> Input<'_> {
        Input { session, tokens: &[1, 2], written: false, want: Want::Last }
    }
    let refused = one.forward(&mut [input(&mut own), input(&mut foreign)]);
    assert!(matches!(refused, Err(EngineError::OtherEngine)), "{refused:?}");
    assert_eq!((own.tokens().len(), foreign.tokens().len()), (0, 0));
    // A clone is the same engine.
    one.clone().forward(&mut [input(&mut own)]).unwrap();
}

#[test]
fn more_sequences_than_can_be_counted_are_refused() {
    let o = EngineOptions { kv_positions: Some(1024), memory: Memory::Bytes(1 << 30), ..options(1 << 60) };
    assert!(matches!(Engine::embedded(&o), Err(EngineError::Budget { .. })));
}
