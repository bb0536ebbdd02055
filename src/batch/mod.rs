//! Offline batches: requests from a file of OpenAI's batch JSONL, results to another.
//!
//! Every request has one line in the output, written when it's done, in any order. A line depends on its request, the model and the
//! instruction set alone, so a job that was cut off goes on where it was, and the union is what one run would have written.

mod answer;
mod input;
mod order;
mod output;
mod request;
mod run;

use crate::gguf::Fnv;
use std::path::PathBuf;

pub use run::{Figures, Job, run};

/// Where requests come from and results go.
#[derive(Clone, Debug)]
pub struct Files {
    /// The requests; `None` for the standard input.
    pub input: Option<PathBuf>,
    /// The results; `None` for the standard output.
    pub output: Option<PathBuf>,
    /// Keep results that are there, and leave out their requests.
    pub resume: bool,
}

/// Why a job as a whole can't begin or go on. What a single request is refused for is in its line of the output.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// A file, or the standard input or output.
    #[error("{name}: {source}")]
    Io {
        /// The file.
        name: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The results' disk.
    #[error("the disk of {name} is full: whole results up to here are kept; free some space, then --resume goes on")]
    Full {
        /// The file.
        name: String,
    },
    /// The folder of the output.
    #[error("{name}: the folder {folder} doesn't exist: make it first")]
    NoFolder {
        /// The file.
        name: String,
        /// The folder.
        folder: String,
    },
    /// There are results already.
    #[error("{name} holds something already: --resume goes on with it, another name begins anew")]
    Exists {
        /// The file.
        name: String,
    },
    /// Another run has it open.
    #[error("{name} is being written by another run of this program")]
    Busy {
        /// The file.
        name: String,
    },
    /// Something else than results.
    #[error("{name}, line {number} isn't a result of a batch ({why}): is it the right file? Nothing was changed in it")]
    NotResults {
        /// The file.
        name: String,
        /// Counted from 1.
        number: u64,
        /// What is wrong.
        why: String,
    },
    /// Something else than requests.
    #[error("{name}: none of its {n} lines is a JSON object, so these aren't requests: is it the right file?")]
    NotRequests {
        /// The input.
        name: String,
        /// How many.
        n: usize,
    },
    /// Two requests with the same name.
    #[error(
        "{name}: lines {first} and {second} have the same custom_id {custom_id:?}; results couldn't be told apart, nothing was run"
    )]
    Duplicate {
        /// The file.
        name: String,
        /// The name.
        custom_id: String,
        /// A line's number, from 1.
        first: u64,
        /// The other's.
        second: u64,
    },
    /// Results answer other requests than those that have their `custom_id`s now.
    #[error(
        "{name}, line {number}: this isn't the request that was answered as {custom_id:?}{}. Take such results out of the output to have \
         their requests answered anew, or write to another file", nor(*n - 1)
    )]
    Changed {
        /// The input.
        name: String,
        /// How many.
        n: usize,
        /// The first one's name.
        custom_id: String,
        /// Its line, from 1.
        number: u64,
    },
    /// The engine can't go on.
    #[error("{0}; results up to here are written, --resume goes on")]
    Engine(std::sync::Arc<crate::engine::EngineError>),
    /// The chat template in the model's file.
    #[error(transparent)]
    Model(#[from] crate::engine::EngineError),
}

/// What is wrong with a line of JSON, by its byte: the line's own number is said elsewhere.
fn json_error(e: &serde_json::Error) -> String {
    let message = e.to_string();
    let what = message.split(" at line ").next().unwrap_or_default();
    match what {
        "recursion limit exceeded" => format!("it is nested more than 127 levels deep, from byte {}", e.column()),
        _ if e.column() > 0 => format!("{what}, at byte {}", e.column()),
        _ => what.into(),
    }
}

/// That so many others aren't, either.
fn nor(n: usize) -> String {
    match n {
        0 => String::new(),
        1 => " (nor is 1 more)".into(),
        _ => format!(" (nor are {n} more)"),
    }
}

/// A line without white space around it, and without the mark that some editors put before the first.
fn text_of(line: &[u8]) -> &[u8] {
    line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line).trim_ascii()
}
