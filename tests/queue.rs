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
fn the_end_of_a_request_for_nothing_may_begin_another() {
    for n_predict in [0, 1] {
        let engine = engine(options(1));
        let (send, events) = mpsc::channel();
        let other = engine.clone();
        let on_event = move |event| {
            if matches!(event, Event::Finished(_)) {
                let send = send.clone();
                other.submit_with(request([1, 600], 2), move |event| drop(send.send(event))).unwrap();
            }
        };
        engine.submit_with(request([1, 500], n_predict), on_event).unwrap();
        assert_eq!(within(move || got(events).0.len()), 2);
        // Without a thread of its own, a queue isn't done before the follow-up is.
        let (queue, (send, events)) = (Arc::new(Queue::new(&engine, 1)), mpsc::channel());
        let weak = Arc::downgrade(&queue);
        let on_event = move |event| {
            if let (Event::Finished(_), Some(queue)) = (event, weak.upgrade()) {
                let send = send.clone();
                queue.submit(request([1, 600], 2), move |event| drop(send.send(event))).unwrap();
            }
        };
        queue.submit(request([1, 500], n_predict), on_event).unwrap();
        within(move || queue.drive());
        assert_eq!(got(events.try_iter()).0.len(), 2);
    }
}

#[test]
fn the_last_engine_may_go_with_a_request_for_nothing() {
    let engine = engine(options(1));
    let (send, events) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    let on_event = move |event| {
        // Until the request's own engine is the only one.
        may_go_on.recv().unwrap();
        send.send(event).unwrap();
    };
    engine.submit_with(request([1, 500], 0), on_event).unwrap();
    drop(engine);
    go_on.send(()).unwrap();
    // The channel ends when the request was dropped, and with it the engine.
    let events: Vec<Event> = within(move || events.iter().collect());
    assert!(matches!(events[..], [Event::Finished(f)] if f.finish == Finish::Length), "{events:?}");
}

/// Panics when it's dropped.
struct Grenade;

impl Drop for Grenade {
    fn drop(&mut self) {
        panic!("in a destructor");
    }
}

#[test]
fn a_callback_that_panics_ends_its_request_alone() {
    let engine = engine(options(4));
    let want = alone(&engine, &request([1, 600], 60));
    let neighbour = engine.submit(request([1, 600], 60)).unwrap();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let log = calls.clone();
    let on_piece = move |event: Event| {
        log.lock().unwrap().push(event);
        panic!("on a piece");
    };
    engine.submit_with(request([1, 500], 20), on_piece).unwrap();
    let on_finished = move |event| assert!(matches!(event, Event::Piece(_)), "on its end");
    engine.submit_with(request([1, 500], 2), on_finished).unwrap();
    let grenade = Grenade;
    engine.submit_with(request([1, 500], 2), move |_| assert_eq!(size_of_val(&grenade), 0)).unwrap();
    assert_eq!(within(move || got(neighbour)).0, want);
    let later = engine.submit(request([1, 600], 60)).unwrap();
    assert_eq!(within(move || got(later)).0, want);
    assert_eq!(calls.lock().unwrap().len(), 1, "it isn't called again");
    let s = engine.queue_stats();
    assert_eq!((s.n_finished, s.n_cancelled, s.n_failed), (4, 1, 0));
}

#[test]
fn what_the_queue_only_keeps_is_a_sessions_when_it_needs_room() {
    let engine = engine(EngineOptions { n_ctx: Some(1024), ..options(1) });
    let prompts: Vec<Request> = (0..4).map(|i| request((0..300).map(|t| 300 + i * 400 + t), 2)).collect();
    let first: Vec<Vec<u32>> = prompts.iter().map(|r| got(engine.submit(r.clone()).unwrap()).0).collect();
    assert_eq!(engine.queue_stats().n_kept_blocks, 15);
    let mut session = engine.session();
    session.feed(&[7; 600], &mut |_| true).unwrap();
    // Another queue's are as good.
    let queue = Queue::new(&engine, 1);
    let (send, events) = mpsc::channel();
    queue.submit(request([9; 370], 2), move |event| drop(send.send(event))).unwrap();
    queue.drive();
    assert_eq!(got(events).0.len(), 2);
    // What is in use isn't given away.
    let full = engine.session().feed(&[7; 600], &mut |_| true);
    assert!(matches!(full, Err(EngineError::Kv(KvError::Full { total: 16, .. }))), "{full:?}");
    for (r, first) in prompts.into_iter().zip(first) {
        assert_eq!(got(engine.submit(r).unwrap()).0, first);
    }
}

/// Locks are taken in one order, and what one thread takes away doesn't spoil what another one reads.
#[test]
fn sessions_and_queues_contend_for_blocks() {
    let reference = engine(options(1));
    let requests: Vec<Request> = (0..6).map(|i| request((0..70 + 10 * i).map(|t| 300 + i / 2 * 100 + t), 70)).collect();
    let want: Vec<Vec<u32>> = requests.iter().map(|r| alone(&reference, r)).collect();
    let engine = engine(EngineOptions { kv_positions: Some(8 * KV_BLOCK), ..options(3) });
    within(move || {
        std::thread::scope(|scope| {
            for t in 0..2 {
                let engine = &engine;
                scope.spawn(move || {
                    for i in 0..40 {
                        // It may be full; then the next one tries.
                        let _ = engine.session().feed(&vec![300 + i; 100 + 60 * t], &mut |_| true);
                    }
                });
            }
            for round in 0..6 {
                let streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
                for (stream, want) in streams.into_iter().zip(&want) {
                    let last = stream.fold((Vec::new(), None), |(mut tokens, _), event| {
                        tokens.extend(if let Event::Piece(p) = &event { p.token } else { None });
                        (tokens, Some(event))
                    });
                    match last {
                        (tokens, Some(Event::Finished(_))) => assert_eq!(tokens, *want, "round {round}"),
                        (_, Some(Event::Failed(e))) => assert!(e.to_string().contains("KV cache is full"), "{e}"),
                        other => panic!("{other:?}"),
                    }
                }
            }
        });
    });
}

#[test]
fn the_urgent_take_the_blocks_of_the_less_urgent() {
    // Places for all, blocks for one.
    let engine = engine(EngineOptions { kv_positions: Some(4 * KV_BLOCK), ..options(4) });
    let (low, high) = (request(300..320, 200), Request { priority: 100, ..request(600..720, 5) });
    let (want_low, want_high) = (alone(&engine, &low), alone(&engine, &high));
    let queue = Queue::new(&engine, 4);
    let (send_low, low_events) = mpsc::channel();
    let (send_high, high_events) = mpsc::channel();
    queue.submit(low, move |event| drop(send_low.send(event))).unwrap();
    (0..130).for_each(|_| assert!(queue.step()));
    queue.submit(high, move |event| drop(send_high.send(event))).unwrap();
    (0..10).for_each(|_| assert!(queue.step()));
    assert_eq!((got(high_events.try_iter()).0, queue.stats().n_preempted), (want_high, 1));
    queue.drive();
    assert_eq!(got(low_events.try_iter()).0, want_low);
}

#[test]
fn nobody_yields_to_who_finds_no_room_then_either() {
    let engine = engine(EngineOptions { kv_positions: Some(4 * KV_BLOCK), ..options(1) });
    let mut outside = engine.session();
    outside.feed(&[7; 2 * KV_BLOCK], &mut |_| true).unwrap();
    let low = request(300..310, 30);
    let want = alone(&engine, &low);
    let queue = Queue::new(&engine, 1);
    let (send, events) = mpsc::channel();
    queue.submit(low, move |event| drop(send.send(event))).unwrap();
    (0..5).for_each(|_| assert!(queue.step()));
    let (send_high, high_events) = mpsc::channel();
    let high = Request { priority: 100, ..request(600..750, 5) };
    queue.submit(high.clone(), move |event| drop(send_high.send(event))).unwrap();
    (0..5).for_each(|_| assert!(queue.step()));
    assert_eq!((queue.stats().n_preempted, queue.stats().n_running), (0, 1));
    drop(outside);
    queue.step();
    assert_eq!((queue.stats().n_preempted, queue.stats().n_running), (1, 1));
    queue.drive();
    assert_eq!((got(events.try_iter()).0, got(high_events.try_iter()).0), (want, alone(&engine, &high)));
}

#[test]
fn the_next_turn_shares_the_whole_answer() {
    let engine = engine(EngineOptions { n_ctx: Some(1024), ..options(1) });
    let mut text: Vec<u32> = (300..400).collect();
    let mut n_before = 0;
    for turn in 0..3 {
        let r = request(text.clone(), 200);
        let before = engine.queue_stats();
        let (tokens, done) = got(engine.submit(r.clone()).unwrap());
        assert_eq!(tokens, alone(&engine, &r));
        // The last token of an answer was written, but never computed.
        assert!(done.n_shared >= (n_before.max(1) - 1) / KV_BLOCK * KV_BLOCK, "turn {turn}: {done:?}");
        let s = engine.queue_stats();
        assert_eq!(s.n_shared - before.n_shared, done.n_shared as u64);
        assert_eq!(s.n_computed - before.n_computed, (text.len() - done.n_shared + tokens.len() - 1) as u64);
        text.extend(tokens);
        n_before = text.len();
        text.extend([400, 401, 402]);
    }
}

/// Two who write the same hold its blocks once, and what is kept never takes more than the pool.
#[test]
fn what_is_written_alike_is_kept_once() {
    let engine = engine(EngineOptions { kv_positions: Some(4 * KV_BLOCK), ..options(2) });
    let queue = Queue::new(&engine, 2);
    for i in 0..3 {
        // Three blocks each, of which two are full.
        let r = request([300 + i, 500], 150);
        let (send, events) = mpsc::channel();
        for _ in 0..2 {
            let send = send.clone();
            queue.submit(r.clone(), move |event| drop(send.send(event))).unwrap();
        }
        queue.drive();
        let both: Vec<Event> = events.try_iter().collect();
        assert_eq!(both.iter().filter(|e| matches!(e, Event::Finished(_))).count(), 2);
        let want = alone(&engine, &r);
        let written = both.iter().filter_map(|e| if let Event::Piece(p) = e { p.token } else { None });
        assert_eq!(written.collect::<Vec<_>>(), want.iter().flat_map(|&t| [t, t]).collect::<Vec<_>>());
        assert!(queue.stats().n_kept_blocks <= 4);
    }
    assert_eq!(queue.stats().n_preempted, 0, "there is room for both");
}

#[test]
fn all_threads_of_a_pool_can_wait_for_the_queue() {
    let engine = engine(options(8));
    let prompts: Vec<Request> = (0..8).map(|i| request([1, 500 + i], 20)).collect();
    let want: Vec<Vec<u32>> = prompts.iter().map(|r| alone(&engine, r)).collect();
    let texts = within(move || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        pool.install(|| prompts.par_iter().map(|r| got(engine.submit(r.clone()).unwrap()).0).collect::<Vec<_>>())
    });
    assert_eq!(texts, want);
}

#[test]
fn who_hears_of_an_end_finds_it_counted_and_the_room_free() {
    let engine = engine(EngineOptions { kv_positions: Some(2 * KV_BLOCK), ..options(1) });
    for i in 0..100 {
        let mut stream = engine.submit(request([1, 500], 2)).unwrap();
        assert!(stream.any(|event| matches!(event, Event::Finished(_))));
        let s = engine.queue_stats();
        assert_eq!((s.n_finished, s.n_running, s.n_written), (i + 1, 0, 2 * (i + 1)));
        engine.session().feed(&[7; 2 * KV_BLOCK], &mut |_| true).unwrap();
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
