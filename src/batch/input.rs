//! The requests, one a line: from a file, whose lines are looked through first, or from a pipe as they come.

use super::output::Done;
use super::{BatchError, Fnv, order, request, text_of};
use crate::engine::BatchShape;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// The longest line, in bytes; of a longer one only the number is told. Half a million tokens of English text fit; what is read from a
/// line may take 30 times as much memory.
pub(super) const MAX_LINE: u64 = 2 << 20;

/// A line of the input.
pub(super) struct Line {
    /// Counted from 1.
    pub number: u64,
    /// Without its end; `None` if it's too long.
    pub bytes: Option<Vec<u8>>,
}

/// A file's lines in the order in which they are served.
pub(super) struct Lines {
    file: File,
    name: String,
    /// Where each line is: number, offset, length.
    places: Vec<(u64, u64, usize)>,
    next: usize,
    shape: BatchShape,
    /// Those that were answered already, and of these the errors.
    n_done: (usize, usize),
}

/// A file of so many lines of which none is JSON is something else.
const SOMETHING_ELSE: usize = 20;

/// Where requests come from.
pub(super) enum Source {
    /// A file.
    Lines(Lines),
    /// What can only be read once, and its name.
    Stream(Box<dyn BufRead + Send>, String),
}

impl Source {
    /// Opens it, and looks through a file. `done`: what was answered already.
    ///
    /// # Errors
    /// If it can't be read, two lines of a file have the same `custom_id`, or a result is of another request than the one that has its
    /// `custom_id` now.
    pub fn open(path: Option<&Path>, done: &Done) -> Result<Self, BatchError> {
        let Some(path) = path else {
            return Ok(Source::Stream(Box::new(BufReader::new(std::io::stdin())), "the standard input".into()));
        };
        let name = path.display().to_string();
        let open = || {
            let file = File::open(path)?;
            let about = file.metadata()?;
            Ok(if about.is_file() || about.is_dir() { None } else { Some(file) })
        };
        match open() {
            // A pipe, a terminal.
            Ok(Some(file)) => Ok(Source::Stream(Box::new(BufReader::new(file)), name)),
            Ok(None) => Ok(Source::Lines(Lines::of_file(path, done)?)),
            Err(source) => Err(BatchError::Io { name, source }),
        }
    }
}

/// What is summed up over the lines for the plan.
#[derive(Default)]
struct Sums {
    n_sequences: u64,
    prompt_bytes: u64,
    /// Tokens to write at most, and the sequences that say so.
    n_predict: (u64, u64),
}

impl Sums {
    /// A list of prompts is so many sequences, each of its own length.
    fn add(&mut self, fields: &serde_json::Map<String, serde_json::Value>) {
        let number = |name: &str| fields.get("body").and_then(|b| b.get(name)).and_then(serde_json::Value::as_u64);
        let each = number("n").unwrap_or(1).min(request::MAX_N);
        let (n_prompts, bytes) = request::prompts(fields);
        let n = each * n_prompts;
        self.n_sequences += n;
        self.prompt_bytes += each * bytes;
        if let Some(most) = number("max_completion_tokens").or(number("max_tokens")) {
            self.n_predict.0 = self.n_predict.0.saturating_add(n * most.min(1 << 20));
            self.n_predict.1 += n;
        }
    }

    fn mean(&self) -> BatchShape {
        BatchShape {
            n_sequences: Some(self.n_sequences as usize),
            prompt_bytes: Some((self.prompt_bytes / self.n_sequences.max(1)) as usize),
            n_predict: (self.n_predict.1 == self.n_sequences)
                .then(|| (self.n_predict.0 / self.n_sequences.max(1)) as usize),
        }
    }
}

/// What a first look through a file finds.
#[derive(Default)]
struct Survey {
    /// Where each request is, as in [`Lines`], how urgent it is, and how it begins.
    places: Vec<(u64, u64, usize)>,
    priorities: Vec<i32>,
    beginnings: Vec<Vec<u64>>,
    /// The line of each `custom_id`.
    seen: HashMap<String, u64>,
    shape: Sums,
    /// Lines that are JSON, or too long to say.
    n_json: usize,
    /// See [`Lines`].
    n_done: (usize, usize),
    /// Results that are of other requests: how many, and the first such request.
    changed: Option<(usize, String, u64)>,
}

impl Survey {
    /// Takes a line up that stands at `offset`, `n` bytes long.
    fn line(&mut self, line: &Line, (offset, n): (u64, u64), name: &str, done: &Done) -> Result<(), BatchError> {
        let bytes = line.bytes.as_deref().unwrap_or_default();
        let parsed = request::line(bytes);
        let is_json = !parsed.as_ref().is_err_and(|e| e.code == request::NO_JSON);
        self.n_json += usize::from(is_json || line.bytes.is_none());
        self.places.push((line.number, offset, n as usize));
        let fields = parsed.as_ref().ok().map(|p| &p.1);
        self.beginnings.push(order::beginnings(&fields.map(request::beginning).unwrap_or_default()));
        self.priorities.push(fields.map_or(0, request::priority));
        let Ok((custom_id, fields)) = parsed else {
            self.answered(done.ids.contains(&id_of_line(line)), true);
            return Ok(());
        };
        if let Some(&first) = self.seen.get(&custom_id) {
            return Err(BatchError::Duplicate { name: name.into(), custom_id, first, second: line.number });
        }
        self.shape.add(&fields);
        if let Some(known) = done.custom_ids.get(&custom_id) {
            self.answered(true, known.failed);
            if known.id != id_of(bytes) {
                self.changed.get_or_insert_with(|| (0, custom_id.clone(), line.number)).0 += 1;
            }
        }
        self.seen.insert(custom_id, line.number);
        Ok(())
    }

    /// Counts a request that was answered already.
    fn answered(&mut self, it_was: bool, failed: bool) {
        self.n_done.0 += usize::from(it_was);
        self.n_done.1 += usize::from(it_was && failed);
    }
}

impl Lines {
    /// See [`Source::open`].
    fn of_file(path: &Path, done: &Done) -> Result<Self, BatchError> {
        let name = path.display().to_string();
        let io = |source| BatchError::Io { name: name.clone(), source };
        let file = File::open(path).map_err(io)?;
        let mut input = BufReader::with_capacity(1 << 18, &file);
        let (mut survey, mut number, mut offset) = (Survey::default(), 0, 0);
        while let Some((line, n)) = read_line(&mut input, &mut number).map_err(io)? {
            if line.bytes.as_deref().is_none_or(|bytes| !text_of(bytes).is_empty()) {
                survey.line(&line, (offset, n), &name, done)?;
            }
            offset += n;
        }
        let Survey { places, priorities, beginnings, shape, n_json, n_done, changed, .. } = survey;
        if let Some((n, custom_id, number)) = changed {
            return Err(BatchError::Changed { name, n, custom_id, number });
        }
        if n_json == 0 && places.len() >= SOMETHING_ELSE {
            return Err(BatchError::NotRequests { name, n: places.len() });
        }
        let places = order::order(&priorities, &beginnings).into_iter().map(|i| places[i]).collect();
        Ok(Lines { file, name, places, next: 0, shape: shape.mean(), n_done })
    }

    /// The file's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Requests in the file.
    pub fn total(&self) -> usize {
        self.places.len()
    }

    /// Requests that were answered already, and how many of the answers are errors.
    pub fn n_done(&self) -> (usize, usize) {
        self.n_done
    }

    /// What its requests are like.
    pub fn shape(&self) -> BatchShape {
        self.shape
    }

    /// The next line.
    ///
    /// # Errors
    /// If the file can't be read any more.
    pub fn next(&mut self) -> Result<Option<Line>, BatchError> {
        let Some(&(number, offset, n)) = self.places.get(self.next) else { return Ok(None) };
        self.next += 1;
        if n as u64 > MAX_LINE {
            return Ok(Some(Line { number, bytes: None }));
        }
        let mut bytes = vec![0; n];
        let read = self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|source| BatchError::Io { name: self.name.clone(), source })?;
        Ok(Some(Line { number, bytes: Some(bytes) }))
    }
}

/// The next line of a stream, and its bytes with the end; `number` counts on.
pub(super) fn read_line(input: &mut impl BufRead, number: &mut u64) -> std::io::Result<Option<(Line, u64)>> {
    let mut bytes = Vec::new();
    let mut n = input.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut bytes)? as u64;
    if n == 0 {
        return Ok(None);
    }
    *number += 1;
    if n <= MAX_LINE {
        return Ok(Some((Line { number: *number, bytes: Some(bytes) }, n)));
    }
    drop(bytes);
    while !input.fill_buf()?.is_empty() {
        let buffer = input.fill_buf()?;
        let end = buffer.iter().position(|&b| b == b'\n');
        let used = end.map_or(buffer.len(), |i| i + 1);
        input.consume(used);
        n += used as u64;
        if end.is_some() {
            break;
        }
    }
    Ok(Some((Line { number: *number, bytes: None }, n)))
}

/// The id of a request's result, made from its line: the same in every run, and another one when the request was changed.
pub(super) fn id_of(line: &[u8]) -> String {
    format!("batch_req_{:016x}", Fnv::of(text_of(line)))
}

/// The id of a result for a line that has no `custom_id` of its own: of its number, and of its bytes, so that it's another when the
/// line was edited.
pub(super) fn id_of_line(line: &Line) -> String {
    let bytes = line.bytes.as_deref().map_or(&b""[..], text_of);
    format!("batch_line_{}_{:016x}", line.number, Fnv::of(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_prompt_of_a_list_is_a_sequence() {
        let mut sums = Sums::default();
        for body in [
            json!({ "prompt": ["a".repeat(10), "b".repeat(30)], "n": 3, "max_tokens": 5 }),
            json!({ "prompt": [1, 2, 3], "max_tokens": 5 }),
            json!({ "prompt": [[1, 2], [3]], "max_tokens": 5 }),
            json!({ "prompt": "abcdefgh", "max_tokens": 5 }),
        ] {
            sums.add(json!({ "body": body }).as_object().unwrap());
        }
        assert_eq!((sums.n_sequences, sums.prompt_bytes), (6 + 1 + 2 + 1, 120 + 12 + 12 + 8));
        assert_eq!(sums.mean().n_predict, Some(5));
    }
}
