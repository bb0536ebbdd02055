//! A job: keeps the engine's queue filled from the input, and writes each result when it's complete.

use super::answer::{self, About, Choice, Whose};
use super::input::{self, Line, Lines, Source};
use super::output::{Done, Output};
use super::request::{self, Asked, Prompt, Refused};
use super::{BatchError, Files, Fnv, text_of};
use crate::engine::{
    Account, BatchShape, Engine, EngineError, Event, Finish, GenerationParams, QueueStats, Request, Ticket,
};
use crate::moe::Losses;
use crate::ops::kv::KvError;
use crate::session::grammar::GrammarError;
use crate::session::template::ChatTemplate;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

/// How long what is in flight may take after it was asked to stop.
const GRACE: Duration = Duration::from_secs(4);
/// How often the job looks around if nothing happens.
const TICK: Duration = Duration::from_millis(100);
/// Sequences that wait in the queue for each that runs, so that a place is never empty.
const AHEAD: usize = 2;

/// How a job stands.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// Requests that have a result.
    pub done: u64,
    /// Requests in the input; unknown for a pipe.
    pub total: Option<u64>,
    /// Results that are errors, those of earlier runs too, as far as their requests are in this input.
    pub failed: u64,
    /// Results that an earlier run had written.
    pub resumed: u64,
    /// Seconds since the job began.
    pub seconds: f64,
    /// Seconds that the rest will take at this rate.
    pub seconds_left: Option<f64>,
    /// Tokens of prompts that were read, those of common beginnings too, a second.
    pub tokens_in_per_s: f64,
    /// Tokens written a second.
    pub tokens_out_per_s: f64,
    /// The share of expert uses that were at hand.
    pub hit_rate: Option<f64>,
    /// Bytes of experts read for each token that went through the model.
    pub bytes_per_token: Option<f64>,
    /// Lossy: what was given up.
    #[serde(flatten)]
    pub losses: Losses,
    /// What the queue did.
    pub queue: QueueStats,
    /// Whether it was asked to stop before the end.
    pub interrupted: bool,
}

/// A job that is about to begin: the input looked through, the output read, nothing written.
pub struct Job {
    source: Source,
    output: Output,
    done: Done,
}

/// What comes in while the job runs.
enum Incoming {
    /// A line of a stream; `None` at its end.
    Line(Result<Option<Line>, BatchError>),
    /// Of a request and one of its choices.
    Event(u64, usize, Event),
}

/// A request in flight.
struct InFlight {
    id: String,
    custom_id: String,
    chat: bool,
    model: String,
    logprobs: bool,
    n_prompt: usize,
    prompts: Vec<Vec<u32>>,
    /// Completions of each prompt.
    n: usize,
    params: GenerationParams,
    priority: i32,
    /// All of them.
    choices: Vec<Choice>,
    /// Of those that the queue has got.
    tickets: Vec<Ticket>,
}

impl InFlight {
    /// Choice `i`, for the queue.
    fn request(&self, i: usize) -> Request {
        let mut params = self.params.clone();
        params.sampling.seed = params.sampling.seed.map(|s| s.wrapping_add(i as u64));
        Request { prompt: self.prompts[i / self.n].clone(), params, priority: self.priority }
    }
}

impl Job {
    /// Opens the files and looks through the input. Nothing is run if something is wrong with them.
    ///
    /// # Errors
    /// See [`BatchError`].
    pub fn open(files: &Files) -> Result<Self, BatchError> {
        let (output, done) = match &files.output {
            Some(path) => Output::file(path, files.resume)?,
            None => (Output::stdout(), Done::default()),
        };
        let source = Source::open(files.input.as_deref(), &done)?;
        Ok(Job { source, output, done })
    }

    /// How it stands if there is nothing left to do: no model is needed then.
    pub fn finished(&self) -> Option<Figures> {
        let Source::Lines(lines) = &self.source else { return None };
        let (n_done, n_failed) = lines.n_done();
        let (done, failed) = (n_done as u64, n_failed as u64);
        let figures = Figures { done, total: Some(done), failed, resumed: done, ..Figures::default() };
        (n_done == lines.total()).then_some(figures)
    }

    /// What its requests are like; nothing is known of a pipe's.
    pub fn shape(&self) -> BatchShape {
        match &self.source {
            Source::Lines(l) => l.shape(),
            Source::Stream(..) => BatchShape::default(),
        }
    }
}

/// Runs a job. `progress` is called from time to time; `stop` says whether it was asked to stop: then no new request begins, and what
/// is in flight has a few seconds to end.
///
/// # Errors
/// When a file can't be read or written, or the engine can't go on. Results up to there are written.
pub fn run(
    engine: &Engine,
    job: Job,
    progress: &mut dyn FnMut(&Figures),
    stop: &dyn Fn() -> bool,
) -> Result<Figures, BatchError> {
    let (send, receive) = channel();
    let (input, stream, lines) = match job.source {
        Source::Lines(lines) => (lines.name().to_string(), None, Some(lines)),
        Source::Stream(input, name) => (name, Some(input), None),
    };
    let mut r = Run {
        template: engine.chat_template()?,
        model: Path::new(engine.gguf().name()).file_name().unwrap_or_default().to_string_lossy().into_owned(),
        fingerprint: answer::fingerprint(engine.options()),
        window: AHEAD * engine.n_sessions(),
        engine,
        input,
        output: job.output,
        earlier: job.done,
        seen: HashSet::new(),
        stream: None,
        figures: Figures { total: lines.as_ref().map(|l| l.total() as u64), ..Figures::default() },
        lines,
        events: send,
        in_flight: HashMap::new(),
        partial: None,
        n_running: 0,
        exhausted: false,
        asked_for_line: false,
        began: Instant::now(),
        before: engine.account(),
    };
    r.output.begin()?;
    r.stream = stream.map(|stream| read_stream(stream, r.input.clone(), r.events.clone()));
    let result = r.work(&receive, progress, stop);
    // In any case nothing goes on in the background, and what is written is safe.
    r.in_flight.values().flat_map(|f| &f.tickets).for_each(Ticket::cancel);
    let synced = r.output.sync();
    result.and(synced)?;
    r.update();
    Ok(r.figures)
}

/// Lines of a stream, one for each permit.
fn read_stream(mut input: Box<dyn BufRead + Send>, name: String, to: Sender<Incoming>) -> SyncSender<()> {
    let (permits, permitted) = sync_channel::<()>(1);
    std::thread::spawn(move || {
        let mut number = 0;
        while permitted.recv().is_ok() {
            let line = input::read_line(&mut input, &mut number)
                .map(|l| l.map(|l| l.0))
                .map_err(|source| BatchError::Io { name: name.clone(), source });
            let last = !matches!(line, Ok(Some(_)));
            if to.send(Incoming::Line(line)).is_err() || last {
                return;
            }
        }
    });
    permits
}

struct Run<'e> {
    engine: &'e Engine,
    template: Option<ChatTemplate>,
    /// The model's name, for answers to requests that name none.
    model: String,
    /// What answers depend on besides the model.
    fingerprint: String,
    /// The input's name.
    input: String,
    output: Output,
    /// Whose results an earlier run has written, as far as their requests haven't come yet.
    earlier: Done,
    /// The `custom_id`s that have come.
    seen: HashSet<String>,
    lines: Option<Lines>,
    stream: Option<SyncSender<()>>,
    asked_for_line: bool,
    exhausted: bool,
    events: Sender<Incoming>,
    /// By the number of their line.
    in_flight: HashMap<u64, InFlight>,
    /// The one of which the queue hasn't got all choices yet.
    partial: Option<u64>,
    /// Choices that the queue has got and that aren't complete.
    n_running: usize,
    /// How many these are at most.
    window: usize,
    began: Instant,
    before: Account,
    figures: Figures,
}

impl Run<'_> {
    fn work(
        &mut self,
        incoming: &Receiver<Incoming>,
        progress: &mut dyn FnMut(&Figures),
        stop: &dyn Fn() -> bool,
    ) -> Result<(), BatchError> {
        let mut stopped: Option<Instant> = None;
        loop {
            if stopped.is_none() && stop() {
                stopped = Some(Instant::now());
                self.figures.interrupted = true;
            }
            let none_left = self.in_flight.is_empty() && (self.exhausted || stopped.is_some());
            if none_left || stopped.is_some_and(|at| at.elapsed() > GRACE) {
                return Ok(());
            }
            // As long as there is something to begin, only what has come already is looked at.
            let wait = if self.fill(stopped.is_none())? { Duration::ZERO } else { TICK };
            match incoming.recv_timeout(wait) {
                Ok(Incoming::Event(number, choice, event)) => self.event(number, choice, event)?,
                Ok(Incoming::Line(line)) => {
                    self.asked_for_line = false;
                    match line? {
                        Some(line) => self.begin(&line)?,
                        None => self.exhausted = true,
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            self.update();
            progress(&self.figures);
        }
    }

    /// Hands a choice to the queue, or else begins a request, if not too many are in flight. Whether there was one.
    fn fill(&mut self, may_begin: bool) -> Result<bool, BatchError> {
        if self.n_running >= self.window {
            return Ok(false);
        }
        if let Some(number) = self.partial {
            return self.submit(number).map(|()| true);
        }
        if self.exhausted || !may_begin {
            return Ok(false);
        }
        if let Some(permits) = &self.stream {
            self.asked_for_line = self.asked_for_line || permits.try_send(()).is_ok();
            return Ok(false);
        }
        match self.lines.as_mut().map(Lines::next).transpose()?.flatten() {
            Some(line) => self.begin(&line)?,
            None => self.exhausted = true,
        }
        Ok(true)
    }

    /// Begins a request, or writes why it can't be.
    fn begin(&mut self, line: &Line) -> Result<(), BatchError> {
        let parsed = match &line.bytes {
            Some(b) if text_of(b).is_empty() => return Ok(()),
            Some(b) => request::line(b),
            None => {
                let why = format!("the line is longer than {} MiB", input::MAX_LINE >> 20);
                Err(Refused::new("line_too_long", why))
            }
        };
        let (custom_id, fields) = match parsed {
            Ok(parsed) => parsed,
            Err(why) => return self.refuse_line(line, &why),
        };
        let id = input::id_of(line.bytes.as_deref().unwrap_or_default());
        if let Some(known) = self.earlier.custom_ids.remove(&custom_id) {
            if known.id != id {
                // A pipe's, or a file's that was written over: it couldn't be found out before.
                let (name, number) = (self.input.clone(), line.number);
                return Err(BatchError::Changed { name, n: 1, custom_id, number });
            }
            self.seen.insert(custom_id);
            self.resumed(known.failed);
            return Ok(());
        }
        if !self.seen.insert(custom_id.clone()) {
            let why = format!("custom_id {custom_id:?} was on an earlier line");
            return self.refuse_line(line, &Refused::new("duplicate_custom_id", why));
        }
        let chat = request::is_chat(&fields);
        let asked = request::asked(fields, Fnv::of(custom_id.as_bytes())).and_then(|a| Ok((self.prompts(&a)?, a)));
        match asked {
            Ok((prompts, asked)) => {
                self.in_flight.insert(line.number, self.in_flight(id, custom_id, chat, asked, prompts));
                self.partial = Some(line.number);
                Ok(())
            }
            Err(why) => self.write_refused(&Whose { id: &id, custom_id: Some(&custom_id) }, &why),
        }
    }

    fn in_flight(&self, id: String, custom_id: String, chat: bool, asked: Asked, prompts: Vec<Vec<u32>>) -> InFlight {
        let n = asked.n as usize;
        InFlight {
            id,
            custom_id,
            chat,
            model: if asked.model.is_empty() { self.model.clone() } else { asked.model },
            logprobs: asked.params.logprobs.is_some(),
            n_prompt: prompts.iter().map(Vec::len).sum(),
            choices: (0..n * prompts.len()).map(|_| Choice::default()).collect(),
            tickets: Vec::new(),
            prompts,
            n,
            params: asked.params,
            priority: asked.priority,
        }
    }

    /// Counts a request whose result was there.
    fn resumed(&mut self, failed: bool) {
        self.figures.resumed += 1;
        self.figures.done += 1;
        self.figures.failed += u64::from(failed);
    }

    /// The tokens of a request's prompts, if the model can go on from them.
    fn prompts(&self, asked: &Asked) -> Result<Vec<Vec<u32>>, Refused> {
        let prompts = self.tokens(&asked.prompt)?;
        let (n_ctx, n_vocab) = (self.engine.n_ctx(), self.engine.config().n_vocab);
        let strange = |t: u32| t as usize >= n_vocab;
        if let Some((token, _)) = asked.params.sampling.logit_bias.iter().find(|b| strange(b.0)) {
            return Err(Refused::field("logit_bias", format!("has token {token}, the vocabulary has {n_vocab}")));
        }
        for p in &prompts {
            if let Some(&token) = p.iter().find(|t| strange(**t)) {
                return Err(Refused::field("prompt", format!("has token {token}, the vocabulary has {n_vocab}")));
            }
            if p.is_empty() {
                return Err(Refused::field("prompt", format!("is empty: {}", EngineError::Empty)));
            }
            let wanted = p.len().saturating_add(asked.params.n_predict.unwrap_or(0));
            if wanted > n_ctx {
                let rest = asked.params.n_predict.map_or(String::new(), |n| format!(" and {n} to write"));
                let why = format!(
                    "the context holds {n_ctx} tokens, this request takes {wanted}: {} of its prompt{rest}; \
                     shorten it, or give the job a longer context (-c)",
                    p.len()
                );
                return Err(Refused::new("context_length_exceeded", why));
            }
        }
        check_logprobs(asked, &prompts, n_ctx)?;
        Ok(prompts)
    }

    /// Hands the next choice of a request to the queue.
    fn submit(&mut self, number: u64) -> Result<(), BatchError> {
        // It may have failed with an earlier choice.
        let Some(f) = self.in_flight.get_mut(&number) else {
            self.partial = None;
            return Ok(());
        };
        let i = f.tickets.len();
        let to = self.events.clone();
        let on_event = move |e| drop(to.send(Incoming::Event(number, i, e)));
        match self.engine.submit_with(f.request(i), on_event) {
            Ok(ticket) => {
                f.tickets.push(ticket);
                self.n_running += 1;
                if f.tickets.len() == f.choices.len() {
                    self.partial = None;
                }
                Ok(())
            }
            Err(e) => self.failed(number, Arc::new(e)),
        }
    }

    /// The tokens of the prompts.
    fn tokens(&self, prompt: &Prompt) -> Result<Vec<Vec<u32>>, Refused> {
        match prompt {
            Prompt::Chat(messages) => {
                let template = self.template.as_ref().ok_or_else(|| {
                    let why = "this model has no chat template: ask for /v1/completions";
                    Refused::new("no_chat_template", why)
                })?;
                let tokens = self.engine.chat_tokens(template, messages);
                Ok(vec![tokens.map_err(|e| Refused::new("invalid_messages", e.to_string()))?])
            }
            Prompt::Texts(texts) => Ok(texts.iter().map(|t| self.engine.tokenizer().encode(t, true, true)).collect()),
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
        }
    }

    fn event(&mut self, number: u64, choice: usize, event: Event) -> Result<(), BatchError> {
        // A request that failed in one choice has its line already.
        let Some(f) = self.in_flight.get_mut(&number) else { return Ok(()) };
        match event {
            Event::Piece(piece) => f.choices[choice].push(piece),
            Event::Finished(done) if done.finish == Finish::Cancelled => {}
            Event::Finished(done) => {
                f.choices[choice].finish(done);
                self.n_running -= 1;
                if f.choices.iter().all(Choice::is_done) {
                    self.complete(number)?;
                }
            }
            Event::Failed(e) => self.failed(number, e)?,
        }
        Ok(())
    }

    fn complete(&mut self, number: u64) -> Result<(), BatchError> {
        let Some(f) = self.in_flight.remove(&number) else { return Ok(()) };
        let whose = Whose { id: &f.id, custom_id: Some(&f.custom_id) };
        let (model, fingerprint) = (&f.model, &self.fingerprint);
        let about = About { chat: f.chat, model, fingerprint, n_prompt: f.n_prompt, logprobs: f.logprobs };
        let line = answer::answered(self.engine.tokenizer(), &whose, &about, &f.choices);
        self.figures.done += 1;
        self.output.write(&line)
    }

    /// What lies in the request, or in what the model makes of it, is its result; what lies in the machine ends the job, so that the
    /// request can be tried again.
    fn failed(&mut self, number: u64, e: Arc<EngineError>) -> Result<(), BatchError> {
        let Some(why) = own_fault(&e) else { return Err(BatchError::Engine(e)) };
        let Some(f) = self.in_flight.remove(&number) else { return Ok(()) };
        f.tickets.iter().for_each(Ticket::cancel);
        self.n_running -= f.tickets.len() - f.choices.iter().filter(|c| c.is_done()).count();
        self.write_refused(&Whose { id: &f.id, custom_id: Some(&f.custom_id) }, &why)
    }

    /// A line that has no `custom_id` of its own is known by its number and its bytes.
    fn refuse_line(&mut self, line: &Line, why: &Refused) -> Result<(), BatchError> {
        let id = input::id_of_line(line);
        if self.earlier.ids.remove(&id) {
            self.resumed(true);
            return Ok(());
        }
        let why = Refused { message: format!("line {}: {}", line.number, why.message), ..why.clone() };
        self.write_refused(&Whose { id: &id, custom_id: None }, &why)
    }

    fn write_refused(&mut self, whose: &Whose<'_>, why: &Refused) -> Result<(), BatchError> {
        self.figures.done += 1;
        self.figures.failed += 1;
        self.output.write(&answer::refused(whose, why))
    }

    /// Brings the figures up to date.
    fn update(&mut self) {
        let f = &mut self.figures;
        f.queue = self.engine.queue_stats();
        f.seconds = self.began.elapsed().as_secs_f64();
        f.tokens_in_per_s = f.queue.n_prompt as f64 / f.seconds;
        f.tokens_out_per_s = f.queue.n_written as f64 / f.seconds;
        let done = self.engine.account().since(&self.before);
        let store = done.store();
        f.hit_rate = store.hit_rate();
        f.losses = store.losses();
        f.bytes_per_token = f
            .hit_rate
            .filter(|_| f.queue.n_computed > 0)
            .map(|_| store.bytes_read() as f64 / f.queue.n_computed as f64);
        let fresh = f.done - f.resumed;
        f.seconds_left = f.total.filter(|_| fresh > 0).map(|t| f.seconds / fresh as f64 * (t - f.done.min(t)) as f64);
    }
}

/// A line's log-probabilities are held until it's complete: some 130 bytes each, with their text.
fn check_logprobs(asked: &Asked, prompts: &[Vec<u32>], n_ctx: usize) -> Result<(), Refused> {
    const MOST: usize = 250_000;
    let Some(top) = asked.params.logprobs else { return Ok(()) };
    let n_predict = |p: &Vec<u32>| asked.params.n_predict.unwrap_or(n_ctx.saturating_sub(p.len()));
    let n = prompts.iter().map(n_predict).sum::<usize>() * asked.n as usize * (top + 1);
    if n <= MOST {
        return Ok(());
    }
    let why =
        format!("come to up to {n} numbers, a line can have {MOST}: give max_tokens, fewer of them, or divide it");
    Err(Refused::field("logprobs", why))
}

/// What is wrong with a request, if it's the request that something is wrong with.
fn own_fault(e: &EngineError) -> Option<Refused> {
    match e {
        EngineError::Grammar(GrammarError::System(_)) => None,
        EngineError::Grammar(GrammarError::Failed { .. })
        | EngineError::Sampler(_)
        | EngineError::Kv(KvError::Full { .. }) => Some(Refused::new("generation_failed", e.to_string())),
        EngineError::Grammar(e) => Some(Refused::field("response_format", format!("can't be used: {e}"))),
        EngineError::Stop(_) => Some(Refused::field("stop", format!("can't be used: {e}"))),
        _ => None,
    }
}
