//! The queue: many requests at once give each what it gets alone, whatever else happens around it.

use oncall::engine::{
    Engine, EngineError, EngineOptions, Event, Finish, Finished, Generation, GenerationParams, Piece, Queue, Request,
};
use oncall::session::grammar::Grammar;
use oncall::session::sampler::SamplingParams;
use std::sync::{Arc, Mutex};

/// Numbers that are the same in every run (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

fn engine(o: EngineOptions) -> Engine {
    Engine::embedded(&o).unwrap()
}

fn options(n_sessions: usize) -> EngineOptions {
    EngineOptions { n_sessions, n_ctx: Some(256), n_threads: Some(2), ..EngineOptions::default() }
}

/// What a request got, its log-probabilities as bits.
#[derive(Clone, Debug, PartialEq)]
struct Got {
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<(u32, Vec<(u32, u32)>)>,
    finish: Finish,
}

impl Got {
    fn new(pieces: &[Piece], finish: Finish) -> Got {
        let bits = |p: &Piece| {
            p.logprobs.as_ref().map(|l| (l.token.to_bits(), l.top.iter().map(|t| (t.0, t.1.to_bits())).collect()))
        };
        Got {
            text: pieces.iter().map(|p| &*p.text).collect(),
            tokens: pieces.iter().filter_map(|p| p.token).collect(),
            logprobs: pieces.iter().filter_map(bits).collect(),
            finish,
        }
    }
}

/// What a request gets on its own, without the queue.
fn alone(engine: &Engine, r: &Request) -> Got {
    let mut session = engine.session();
    session.feed(&r.prompt, &mut |_| true).unwrap();
    let mut g = Generation::new(&mut session, r.params.clone()).unwrap();
    let mut pieces = Vec::new();
    while let Some(p) = g.next().unwrap() {
        pieces.push(p);
    }
    Got::new(&pieces, g.finish().unwrap())
}

/// The events of a request, for those who look later.
type Log = Arc<Mutex<Vec<Event>>>;

fn log() -> (Log, impl FnMut(Event) + Send + 'static) {
    let log = Log::default();
    let to = log.clone();
    (log, move |e| to.lock().unwrap().push(e))
}

fn got(log: &Log) -> (Got, Finished) {
    let events = log.lock().unwrap();
    let pieces: Vec<Piece> =
        events.iter().filter_map(|e| if let Event::Piece(p) = e { Some(p.clone()) } else { None }).collect();
    let Some(Event::Finished(f)) = events.last() else { panic!("it ended with {:?}", events.last()) };
    (Got::new(&pieces, f.finish), *f)
}

const OPENINGS: &[&str] = &[
    "Once upon a time there was a little dragon who lived in a cave near the village. Every morning the dragon flew over the \
     hills and looked for something to eat. One day a girl named Lily came to the cave and said hello. The dragon was very \
     surprised because nobody had ever come to the cave before. Lily had a basket with bread and",
    "Once upon a time there was a little dragon who lived in a cave near the village. Every morning the dragon flew over the \
     hills and looked for something to eat. One day a girl named Lily came to the cave and said hello. The dragon slept and",
    "Tom and Mia went to the park.",
    "The",
];

fn random_request(engine: &Engine, r: &mut Random) -> Request {
    let mut prompt = engine.tokenizer().encode(OPENINGS[r.below(OPENINGS.len())], true, true);
    // Long ones share one or two full blocks with each other.
    let long = prompt.clone();
    prompt.extend(long.iter().skip(1).take(if long.len() > 60 { 70 } else { 0 }));
    prompt.extend((0..r.below(40)).map(|_| 300 + r.below(2000) as u32));
    if r.below(2) == 0 {
        prompt.truncate(1 + r.below(prompt.len()));
    }
    let sampling = SamplingParams {
        temp: [0.0, 0.8, 1.3][r.below(3)],
        top_k: [0, 1, 40][r.below(3)],
        seed: Some(r.below(1000) as u64),
        presence_penalty: [0.0, 0.5][r.below(2)],
        ..SamplingParams::default()
    };
    let params = GenerationParams {
        sampling,
        n_predict: [Some(0), Some(1), Some(3), Some(7), Some(20), Some(45), None][r.below(7)],
        stop: [vec![], vec!["was".to_string()]][r.below(2)].clone(),
        ignore_eos: r.below(4) == 0,
        logprobs: [None, Some(0), Some(3)][r.below(3)],
        grammar: (r.below(4) == 0).then(animal),
        ..GenerationParams::default()
    };
    Request { prompt, params, priority: r.below(3) as i32 - 1 }
}

/// JSON of which much is certain before it's written.
fn animal() -> Grammar {
    let schema = r#"{"type": "object", "additionalProperties": false, "required": ["appearance", "temperament"], "properties":
        {"appearance": {"enum": ["striped", "spotted"]}, "temperament": {"enum": ["gentle", "grumpy"]}}}"#;
    Grammar::json_schema(schema).unwrap()
}

/// What a grammar leaves no choice about costs no pass of its own, and is what a pass for each token gives.
#[test]
fn certain_tokens_share_a_pass() {
    let engine = engine(options(1));
    let prompt = engine.tokenizer().encode("Tom has a cat.", true, true);
    for seed in 0..8 {
        let request = |logprobs| {
            let sampling = SamplingParams { seed: Some(seed), ..SamplingParams::default() };
            let params =
                GenerationParams { sampling, logprobs, grammar: Some(animal()), ..GenerationParams::default() };
            Request { prompt: prompt.clone(), params, priority: 0 }
        };
        // Each token's log-probability takes a pass.
        let each = alone(&engine, &request(Some(0)));
        let before = engine.account();
        let together = alone(&engine, &request(None));
        let account = engine.account().since(&before);
        assert_eq!((&each.tokens, &each.text, each.finish), (&together.tokens, &together.text, Finish::Stop));
        assert_eq!(account.prefill.tokens, prompt.len() as u64, "they count as written, not as read");
        let queue = Queue::new(&engine, 1);
        let (log, on_event) = log();
        queue.submit(request(None), on_event).unwrap();
        queue.drive();
        assert_eq!(got(&log).0, together);
        let (passes, written) = (queue.stats().n_steps, together.tokens.len() as u64);
        assert!(2 * passes < written, "{passes} passes for {written} tokens: {}", together.text);
    }
}

/// Promise 2 for batches: 200 mixes of requests, sizes of the cache, chunks and sequences.
#[test]
fn neighbours_change_no_byte() {
    let reference = engine(options(1));
    let mut r = Random(1);
    let (mut preempted, mut shared, mut evicted) = (0, 0, 0);
    let requests: Vec<(Request, Got)> = (0..60)
        .map(|_| {
            let request = random_request(&reference, &mut r);
            let got = alone(&reference, &request);
            (request, got)
        })
        .collect();
    for machine in 0..10 {
        let n_sessions = 1 + r.below(9);
        let o = EngineOptions {
            kv_positions: [None, Some(256), Some(500)][machine % 3],
            chunk: [1, 5, 64, 512][r.below(4)],
            n_threads: Some(1 + r.below(2)),
            ..options(n_sessions)
        };
        let engine = engine(o.clone());
        for mix in 0..20 {
            let queue = Queue::new(&engine, n_sessions);
            let mut logs = Vec::new();
            for _ in 0..1 + r.below(10) {
                let (log, on_event) = log();
                let i = r.below(requests.len());
                let ticket = queue.submit(requests[i].0.clone(), on_event).unwrap();
                // Some are ended in the middle: their neighbours don't mind.
                let cancel = r.below(8) == 0;
                logs.push((i, log, cancel));
                for _ in 0..r.below(4) {
                    queue.step();
                }
                if cancel {
                    ticket.cancel();
                }
            }
            queue.drive();
            for (i, log, cancel) in logs {
                let (got, _) = got(&log);
                let want = &requests[i].1;
                if cancel && got.finish == Finish::Cancelled {
                    assert!(want.tokens.starts_with(&got.tokens), "request {i} of mix {machine}.{mix} {o:?}");
                } else {
                    assert_eq!(got, *want, "request {i} of mix {machine}.{mix} {o:?}");
                }
            }
            let s = queue.stats();
            assert_eq!(s.n_submitted, s.n_finished + s.n_cancelled, "{s:?}");
            preempted += s.n_preempted;
            shared += s.n_shared;
            evicted += u64::from(s.n_kept_blocks > 0);
        }
    }
    assert!(preempted > 10 && shared > 300 && evicted > 20, "the mixes are tame: {preempted} {shared} {evicted}");
}

/// Fifty requests that begin with the same thousand tokens, which aren't a whole number of blocks.
#[test]
fn a_common_beginning_is_computed_once() {
    let engine = engine(EngineOptions { n_ctx: Some(1024), ..options(50) });
    let text: Vec<u32> = (0..1000).map(|i| 300 + i * 7 % 2000).collect();
    let queue = Queue::new(&engine, 50);
    let requests: Vec<Request> = (0..50)
        .map(|i| {
            let n_predict = Some(2 + i as usize % 3);
            let sampling = SamplingParams { seed: Some(u64::from(i)), ..SamplingParams::default() };
            let params = GenerationParams { sampling, n_predict, ignore_eos: true, ..GenerationParams::default() };
            Request { prompt: [&text[..], &[400 + i, 700]].concat(), params, priority: 0 }
        })
        .collect();
    let logs: Vec<Log> = requests
        .iter()
        .map(|r| {
            let (log, on_event) = log();
            queue.submit(r.clone(), on_event).unwrap();
            log
        })
        .collect();
    queue.drive();
    let s = queue.stats();
    // One computes all, the others the two tokens that are theirs; of what is written all but each one's last goes through the model.
    let n_written: usize = logs.iter().map(|l| got(l).1.n_written).sum();
    assert_eq!((s.n_prompt, s.n_shared), (50 * 1002, 49 * 1000));
    assert_eq!(s.n_computed as usize, 1002 + 49 * 2 + n_written - 50);
    assert_eq!(logs.iter().filter(|l| got(l).1.n_shared == 1000).count(), 49);
    for i in [0, 1, 49] {
        assert_eq!(got(&logs[i]).0, alone(&engine, &requests[i]), "request {i}");
    }
}

#[test]
fn who_is_short_of_blocks_yields_and_nothing_is_lost() {
    // Four blocks for all: three who grow to three blocks each can't stay together.
    let o = EngineOptions { kv_positions: Some(256), ..options(3) };
    let engine = engine(o);
    let queue = Queue::new(&engine, 3);
    let requests: Vec<Request> = (0..3)
        .map(|i| Request {
            prompt: (0..20).map(|t| 300 + 50 * i + t).collect(),
            params: GenerationParams {
                n_predict: Some(150),
                ignore_eos: true,
                sampling: SamplingParams { seed: Some(u64::from(i)), ..SamplingParams::default() },
                ..GenerationParams::default()
            },
            priority: 0,
        })
        .collect();
    let logs: Vec<Log> = requests
        .iter()
        .map(|r| {
            let (log, on_event) = log();
            queue.submit(r.clone(), on_event).unwrap();
            log
        })
        .collect();
    queue.drive();
    let s = queue.stats();
    assert!(s.n_preempted > 0 && s.n_recomputed > 0, "{s:?}");
    for (r, log) in requests.iter().zip(&logs) {
        assert_eq!(got(log).0, alone(&engine, r));
    }
}

#[test]
fn requests_that_can_never_be_done_are_refused() {
    let engine = engine(options(2));
    let submit = |prompt: Vec<u32>| engine.submit(Request { prompt, ..Request::default() }).err().unwrap();
    assert!(matches!(submit(vec![]), EngineError::Empty));
    assert!(matches!(submit(vec![5; 257]), EngineError::ContextFull { wanted: 257, .. }));
    assert!(matches!(submit(vec![99_999]), EngineError::NoSuchToken { .. }));
    let sampling = SamplingParams { top_p: 7.0, ..SamplingParams::default() };
    let params = GenerationParams { sampling, ..GenerationParams::default() };
    let e = engine.submit(Request { prompt: vec![5], params, priority: 0 }).err().unwrap().to_string();
    assert!(e.contains("top_p"), "{e}");
    // What goes wrong later is told in the stream, and the queue goes on.
    let sampling = SamplingParams { logit_bias: vec![(99_999, 1.0)], ..SamplingParams::default() };
    let params = GenerationParams { sampling, ..GenerationParams::default() };
    let last = engine.submit(Request { prompt: vec![5], params, priority: 0 }).unwrap().last().unwrap();
    assert!(matches!(&last, Event::Failed(e) if e.to_string().contains("99999")), "{last:?}");
    // A session outside of the queue holds all blocks.
    let mut session = engine.session();
    let mut other = engine.session();
    session.feed(&[7; 256], &mut |_| true).unwrap();
    other.feed(&[7; 256], &mut |_| true).unwrap();
    let last = engine.submit(Request { prompt: vec![5], ..Request::default() }).unwrap().last().unwrap();
    assert!(matches!(&last, Event::Failed(e) if e.to_string().contains("KV cache is full")), "{last:?}");
    drop(session);
    let params = GenerationParams { n_predict: Some(3), ..GenerationParams::default() };
    let last = engine.submit(Request { prompt: vec![5], params, priority: 0 }).unwrap().last().unwrap();
    assert!(matches!(last, Event::Finished(_)), "{last:?}");
}

#[test]
fn a_stream_ends_when_it_is_cancelled_and_the_urgent_come_first() {
    let engine = engine(options(1));
    let endless = GenerationParams { ignore_eos: true, ..GenerationParams::default() };
    let request = |priority| Request { prompt: vec![1, 500], params: endless.clone(), priority };
    let mut first = engine.submit(request(0)).unwrap();
    assert!(matches!(first.next(), Some(Event::Piece(_))));
    // One place, and somebody more urgent comes: the first waits, then goes on.
    let urgent: Vec<Event> = engine.submit(request(5)).unwrap().collect();
    assert!(matches!(urgent.last(), Some(Event::Finished(f)) if f.finish == Finish::ContextFull));
    assert!(engine.queue_stats().n_preempted == 1);
    let ticket = first.ticket().clone();
    let cancel = std::thread::spawn(move || ticket.cancel());
    let last = first.by_ref().last().unwrap();
    cancel.join().unwrap();
    let ends = [Finish::Cancelled, Finish::ContextFull];
    assert!(matches!(last, Event::Finished(f) if ends.contains(&f.finish)), "{last:?}");
    // A stream that nobody reads is ended, too.
    drop(engine.submit(request(0)).unwrap());
    let again: Vec<Event> = engine.submit(request(0)).unwrap().collect();
    assert!(again.len() > 100);
}

#[test]
fn a_queue_that_goes_tells_who_still_waits() {
    let engine = engine(options(1));
    let queue = Queue::new(&engine, 1);
    let (log, on_event) = log();
    queue.submit(Request { prompt: vec![1, 500], ..Request::default() }, on_event).unwrap();
    queue.step();
    drop(queue);
    let events = log.lock().unwrap();
    assert!(matches!(events.last(), Some(Event::Failed(e)) if matches!(**e, EngineError::Stopped)), "{events:?}");
}
