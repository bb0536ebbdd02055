//! Continuous batching: many requests share each pass through the model. They join and leave at every step; prompts are read in
//! chunks beside the writing of others; a common beginning is computed once; who is short of KV blocks yields and is
//! computed again later. What a request gets back doesn't depend on any of that.

mod plan;
mod prefix;
mod run;

use super::generate::{Finish, GenerationParams, Piece, Writer};
use super::{Engine, EngineError};
use crate::ops::kv::KvPool;
use run::{Scheduler, Sequence};
use std::cmp::Reverse;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError, mpsc};

/// What to write.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The tokens to go on from.
    pub prompt: Vec<u32>,
    /// How.
    pub params: GenerationParams,
    /// Higher ones are served first; among equals, who came first.
    pub priority: i32,
}

/// What becomes of a request. The last one is `Finished` or `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// A token and its text.
    Piece(Piece),
    /// It's done.
    Finished(Finished),
    /// It couldn't be done. The engine stays usable.
    Failed(Arc<EngineError>),
}

/// A request that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Why it ended. [`Finish::Stop`] also when the text is complete by its grammar.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Those of them that weren't computed since another text had begun alike. It depends on the neighbours.
    pub n_shared: usize,
    /// Tokens written.
    pub n_written: usize,
    /// The seed that was used.
    pub seed: u64,
}

/// What a queue has done so far, and how it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct QueueStats {
    /// Requests taken up.
    pub n_submitted: u64,
    /// Requests that were written to their end.
    pub n_finished: u64,
    /// Requests that failed.
    pub n_failed: u64,
    /// Requests that were cancelled.
    pub n_cancelled: u64,
    /// Times that a sequence gave its KV blocks to another.
    pub n_preempted: u64,
    /// Tokens of prompts of the requests that have begun.
    pub n_prompt: u64,
    /// Those of them that weren't computed because another request had begun alike.
    pub n_shared: u64,
    /// Tokens that had to be computed again after a preemption.
    pub n_recomputed: u64,
    /// Tokens that went through the model.
    pub n_computed: u64,
    /// Tokens written.
    pub n_written: u64,
    /// Passes through the model.
    pub n_steps: u64,
    /// KV blocks of texts that are kept for others that begin alike, until somebody needs their room.
    pub n_kept_blocks: usize,
    /// Sequences that run.
    pub n_running: usize,
    /// Requests that wait.
    pub n_waiting: usize,
}

/// Where a request's events go. It says how the request ended in any case, even if the worker dies. A panic there is the end of this
/// request alone.
struct Sink {
    on_event: Option<Box<dyn FnMut(Event) + Send>>,
    /// The last event was sent, or the callback panicked: it isn't called again.
    ended: bool,
}

impl Sink {
    fn new(on_event: Box<dyn FnMut(Event) + Send>) -> Self {
        Sink { on_event: Some(on_event), ended: false }
    }

    fn send(&mut self, event: Event) {
        let Some(on_event) = self.on_event.as_mut().filter(|_| !self.ended) else { return };
        let is_last = !matches!(event, Event::Piece(_));
        // Nobody but this request sees what a panic leaves behind in the callback, which isn't called again.
        let panicked = catch_unwind(AssertUnwindSafe(|| on_event(event))).is_err();
        self.ended = is_last || panicked;
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.send(Event::Failed(Arc::new(EngineError::Stopped)));
        let on_event = self.on_event.take();
        drop(catch_unwind(AssertUnwindSafe(|| drop(on_event))));
    }
}

/// A queue of requests to one engine. Without a thread of its own: [`Queue::drive`] does the work. [`Engine::submit`] has one
/// with a thread.
pub struct Queue {
    engine: Engine,
    shared: Arc<Shared>,
}

/// A queue's state, which a worker and those who submit share.
struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    scheduler: Mutex<Scheduler>,
    stats: Mutex<QueueStats>,
}

#[derive(Default)]
struct Inbox {
    new: Vec<Sequence>,
    n_arrived: u64,
    /// Nobody will work any more.
    closed: bool,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Shared {
    fn new(max_sequences: usize, pool: &KvPool) -> Arc<Self> {
        Arc::new(Shared {
            inbox: Mutex::default(),
            wake: Condvar::new(),
            scheduler: Mutex::new(Scheduler::new(max_sequences, pool)),
            stats: Mutex::default(),
        })
    }

    fn submit(
        self: &Arc<Self>,
        engine: &Engine,
        request: Request,
        on_event: Box<dyn FnMut(Event) + Send>,
    ) -> Result<Ticket, EngineError> {
        let session = engine.session();
        if request.prompt.is_empty() {
            return Err(EngineError::Empty);
        }
        session.check_room(request.prompt.len())?;
        let n_vocab = engine.config().n_vocab;
        if let Some(&token) = request.prompt.iter().find(|&&t| t as usize >= n_vocab) {
            return Err(EngineError::NoSuchToken { token, n_vocab });
        }
        let writer = Writer::new(engine, request.params, &request.prompt)?;
        let cancelled = Arc::new(AtomicBool::new(false));
        let mut inbox = lock(&self.inbox);
        if inbox.closed {
            return Err(EngineError::Stopped);
        }
        inbox.n_arrived += 1;
        let rank = (Reverse(request.priority), inbox.n_arrived);
        inbox.new.push(Sequence {
            rank,
            session,
            writer,
            n_prompt: request.prompt.len(),
            tokens: request.prompt,
            n_shared: None,
            path: Vec::new(),
            cancelled: cancelled.clone(),
            sink: Sink::new(on_event),
        });
        drop(inbox);
        self.wake.notify_all();
        Ok(Ticket { cancelled, shared: self.clone() })
    }

    /// Takes up what came in, and does one step. False when there is nothing left to do.
    fn step(&self) -> bool {
        let mut scheduler = lock(&self.scheduler);
        // A statement of its own: the inbox isn't locked any more when a request ends that is never begun.
        let new = std::mem::take(&mut lock(&self.inbox).new);
        new.into_iter().for_each(|s| scheduler.add(s));
        let more = scheduler.step();
        let ended = std::mem::take(&mut scheduler.ended);
        *lock(&self.stats) = scheduler.stats;
        drop(scheduler);
        // Without a lock, since what is called may submit, and what is dropped may be the last of the engine.
        for (mut s, event) in ended {
            s.sink.send(event);
        }
        more || !lock(&self.inbox).new.is_empty()
    }

    /// The worker's life: works while there is work, sleeps while there is none, ends when the engine does.
    fn work(&self) {
        loop {
            while self.step() {}
            let mut inbox = lock(&self.inbox);
            while inbox.new.is_empty() && !inbox.closed {
                inbox = self.wake.wait(inbox).unwrap_or_else(|e| e.into_inner());
            }
            if inbox.closed {
                return;
            }
        }
    }
}

/// Closes a queue when its engine goes, or when its worker dies: whoever waits is told, and nobody can submit.
pub(super) struct Closes(Arc<Shared>);

impl Drop for Closes {
    fn drop(&mut self) {
        let mut inbox = lock(&self.0.inbox);
        inbox.closed = true;
        let left = std::mem::take(&mut inbox.new);
        drop(inbox);
        drop(left);
        // Only a step that is under way holds the lock: its thread closes the queue once more when it ends.
        let left = match self.0.scheduler.try_lock() {
            Ok(mut scheduler) => scheduler.abandon(),
            Err(TryLockError::Poisoned(e)) => e.into_inner().abandon(),
            Err(TryLockError::WouldBlock) => Vec::new(),
        };
        drop(left);
        self.0.wake.notify_all();
    }
}

impl Queue {
    /// A queue for this engine that runs up to so many sequences at the same time.
    pub fn new(engine: &Engine, max_sequences: usize) -> Self {
        Queue { engine: engine.clone(), shared: Shared::new(max_sequences, &engine.0.kv) }
    }

    /// Puts a request in. [`Queue::drive`] works on it, and calls `on_event` meanwhile: that may submit and cancel, but not drive. If it
    /// panics, its request is cancelled, and it isn't called again; the other requests go on.
    ///
    /// # Errors
    /// A request that can never be done: empty, longer than the context, a token or a parameter out of its range.
    pub fn submit(
        &self,
        request: Request,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<Ticket, EngineError> {
        self.shared.submit(&self.engine, request, Box::new(on_event))
    }

    /// One pass through the model for all who are in the queue. False when there is nothing left to do.
    pub fn step(&self) -> bool {
        self.shared.step()
    }

    /// Works until nothing is left to do.
    pub fn drive(&self) {
        while self.step() {}
    }

    /// What it has done so far. A request is counted before its last event is handed out.
    pub fn stats(&self) -> QueueStats {
        *lock(&self.shared.stats)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        drop(Closes(self.shared.clone()));
    }
}

/// A request's handle for ending it, from any thread.
#[derive(Clone)]
pub struct Ticket {
    cancelled: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl Ticket {
    /// Ends the request before the next step; its last event says so.
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
        self.shared.wake.notify_all();
    }
}

/// A request's events as they come. Dropping it cancels the request.
pub struct Stream {
    events: mpsc::Receiver<Event>,
    ticket: Ticket,
}

impl Stream {
    /// The handle for ending the request.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }
}

impl Iterator for Stream {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.events.recv().ok()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.ticket.cancel();
    }
}

impl Engine {
    /// Puts a request into the engine's queue, which a thread works on: as many sequences run together as the engine was loaded for
    /// sessions.
    ///
    /// # Errors
    /// A request that can never be done: empty, longer than the context, a token or a parameter out of its range.
    pub fn submit(&self, request: Request) -> Result<Stream, EngineError> {
        let (send, events) = mpsc::channel();
        let ticket = self.submit_with(request, move |event| drop(send.send(event)))?;
        Ok(Stream { events, ticket })
    }

    /// As [`Engine::submit`], with the events handed to `on_event` on the queue's thread, which waits for it: it may submit and cancel, but
    /// not wait for another request. If it panics, its request is cancelled, and it isn't called again; the other requests go on.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn submit_with(
        &self,
        request: Request,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<Ticket, EngineError> {
        self.worker()?.submit(self, request, Box::new(on_event))
    }

    /// What the engine's queue has done so far. A request is counted before its last event is handed out.
    pub fn queue_stats(&self) -> QueueStats {
        self.0.queue.get().map(|q| *lock(&q.0.stats)).unwrap_or_default()
    }

    /// The engine's own queue; the first call starts its thread. The thread holds no engine while it has nothing to do, so it
    /// doesn't keep one alive.
    fn worker(&self) -> Result<&Arc<Shared>, EngineError> {
        if let Some(queue) = self.0.queue.get() {
            return Ok(&queue.0);
        }
        let shared = Shared::new(self.0.options.n_sessions, &self.0.kv);
        let queue = self.0.queue.get_or_init(|| Closes(shared.clone()));
        // Whoever came second finds the first one's queue, and its own is dropped unused.
        if Arc::ptr_eq(&queue.0, &shared) {
            let closes = Closes(shared.clone());
            let work = move || {
                let closes = closes;
                closes.0.work();
            };
            std::thread::Builder::new()
                .name("oncall-queue".into())
                .spawn(work)
                .map_err(|source| EngineError::System { what: "a thread for the queue", source })?;
        }
        Ok(&queue.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineOptions;

    /// Whoever still has a ticket keeps a queue that is gone, but nothing of the KV cache.
    #[test]
    fn a_queue_that_goes_gives_its_blocks_back() {
        let o = EngineOptions { n_ctx: Some(256), n_threads: Some(1), ..EngineOptions::default() };
        let engine = Engine::embedded(&o).unwrap();
        let params = GenerationParams { n_predict: Some(2), ..GenerationParams::default() };
        let request = Request { prompt: (300..430).collect(), params, priority: 0 };
        let queue = Queue::new(&engine, 1);
        let ticket = queue.submit(request, |_| ()).unwrap();
        queue.drive();
        assert_eq!((queue.stats().n_kept_blocks, engine.0.kv.n_free()), (2, 2));
        drop(queue);
        assert_eq!(engine.0.kv.n_free(), 4);
        drop(ticket);
    }
}
