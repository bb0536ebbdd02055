//! What a rendering may still cost.
//!
//! A template comes with the model file and is as little to be trusted. minijinja bounds the instructions that it executes, but one instruction
//! can double a text, and a list can hold itself twice over: sixty of those fill any memory. So all that is made is paid for from a purse,
//! before it is made wherever it could be large: 1 for a byte of text, 32 for a value. What is only read through takes time and no memory,
//! and is paid for from another: 32 for a value, 1 for sixteen bytes.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// What one value costs, about its size.
const NODE: u64 = 32;

/// How deep lists and maps may nest. The parser of JSON stops at 128.
const MAX_DEPTH: usize = 200;

/// Why a rendering ended, carried through minijinja's error as its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The purse for what is made is empty.
    TooMuch,
    /// The purse for what is read is empty.
    TooLong,
    TooDeep,
    /// Something other than plain data was put into a namespace, where it could come to hold itself.
    NotPlain,
    /// The template called `raise_exception`.
    Refused(String),
    /// Found before it ran.
    Unsupported {
        line: usize,
        detail: String,
    },
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMuch => f.write_str("it makes more text and data than a rendering may"),
            Self::TooLong => f.write_str("it reads through more data than a rendering may"),
            Self::TooDeep => write!(f, "it nests data more than {MAX_DEPTH} deep"),
            Self::NotPlain => {
                f.write_str("a namespace can hold only plain data here, no namespace and nothing callable")
            }
            Self::Refused(message) => f.write_str(message),
            Self::Unsupported { detail, .. } => f.write_str(detail),
        }
    }
}

impl std::error::Error for Cause {}

impl From<Cause> for Error {
    fn from(cause: Cause) -> Self {
        Error::new(ErrorKind::InvalidOperation, cause.to_string()).with_source(cause)
    }
}

/// The purses of one rendering.
#[derive(Debug)]
pub(super) struct Meter {
    memory: AtomicU64,
    time: AtomicU64,
}

fn take(purse: &AtomicU64, cost: u64, empty: Cause) -> Result<(), Error> {
    // One thread renders; the atomics only satisfy minijinja's `Sync`.
    let left = purse.load(Ordering::Relaxed).checked_sub(cost).ok_or(empty)?;
    purse.store(left, Ordering::Relaxed);
    Ok(())
}

/// What a value holds, everything in it counted as often as it can be reached.
#[derive(Clone, Copy, Default)]
pub(super) struct Weight {
    nodes: u64,
    bytes: u64,
}

impl Weight {
    /// What it costs to read all of it.
    fn read(self) -> u64 {
        self.nodes * NODE + self.bytes / 16
    }

    /// About what it takes when printed.
    pub(super) fn printed(self) -> u64 {
        self.nodes * NODE + self.bytes
    }
}

impl Meter {
    pub(super) fn new(memory: u64, time: u64) -> Self {
        Self { memory: AtomicU64::new(memory), time: AtomicU64::new(time) }
    }

    /// For what is about to be made.
    pub(super) fn spend(&self, cost: u64) -> Result<(), Error> {
        take(&self.memory, cost, Cause::TooMuch)
    }

    /// For what is about to be read.
    pub(super) fn look(&self, cost: u64) -> Result<(), Error> {
        take(&self.time, cost, Cause::TooLong)
    }

    pub(super) fn spend_len(&self, len: usize) -> Result<(), Error> {
        self.spend(len as u64)
    }

    /// So many pieces of so many bytes.
    pub(super) fn spend_product(&self, n: usize, bytes: usize) -> Result<(), Error> {
        self.spend((n as u64).saturating_mul(bytes as u64))
    }

    /// A new value. What is computed only when asked for is computed now, so that such values can't be stacked on one another, and how deep
    /// it is gets checked, because dropping a value takes stack for each level.
    pub(super) fn fresh(&self, value: Value) -> Result<Value, Error> {
        let value = self.joined(value)?;
        if matches!(value.kind(), ValueKind::Seq | ValueKind::Map) {
            self.read(&value)?;
        }
        Ok(value)
    }

    /// A new text, or a list that shares its items with others and is no deeper.
    pub(super) fn joined(&self, value: Value) -> Result<Value, Error> {
        match value.kind() {
            ValueKind::String => self.spend_len(value.as_str().map_or(0, str::len))?,
            ValueKind::Bytes => self.spend_len(value.as_bytes().map_or(0, <[u8]>::len))?,
            ValueKind::Seq | ValueKind::Map => self.spend_product(value.len().unwrap_or(1) + 1, NODE as usize)?,
            ValueKind::Iterable => {
                let mut items = Vec::new();
                for item in value.try_iter()?.checked() {
                    self.spend(NODE)?;
                    items.push(item?);
                }
                return Ok(Value::from(items));
            }
            _ => self.look(1)?,
        }
        Ok(value)
    }

    /// Something will read all of this value.
    pub(super) fn read(&self, value: &Value) -> Result<Weight, Error> {
        let weight = self.weigh(value, false)?;
        self.look(weight.read())?;
        Ok(weight)
    }

    /// As [`Meter::read`], and nothing but plain data may be inside.
    pub(super) fn read_plain(&self, value: &Value) -> Result<(), Error> {
        let weight = self.weigh(value, true)?;
        self.look(weight.read())
    }

    /// Something will take this value apart: a text into characters, each a value.
    pub(super) fn take_apart(&self, value: &Value) -> Result<(), Error> {
        match value.as_str() {
            Some(text) => self.spend_product(text.len(), NODE as usize),
            None => self.look(value.len().unwrap_or(1) as u64),
        }
    }

    fn weigh(&self, value: &Value, plain: bool) -> Result<Weight, Error> {
        let mut weight = Weight::default();
        // Whatever is read may be printed next, so it must fit the one purse and not only the other.
        let room = self.memory.load(Ordering::Relaxed);
        add_weight(value, 0, plain, room, &mut weight)?;
        Ok(weight)
    }
}

/// Walks the value as a tree and gives up as soon as it outweighs `room`: a few lists that hold each other twice would take for ever.
fn add_weight(value: &Value, depth: usize, plain: bool, room: u64, weight: &mut Weight) -> Result<(), Error> {
    weight.nodes += 1;
    weight.bytes += match value.kind() {
        ValueKind::String => value.as_str().map_or(0, str::len),
        ValueKind::Bytes => value.as_bytes().map_or(0, <[u8]>::len),
        _ => 0,
    } as u64;
    if weight.printed() > room {
        return Err(Cause::TooMuch.into());
    }
    let kind = value.kind();
    if plain && (kind == ValueKind::Plain || is_engine_object(value)) {
        return Err(Cause::NotPlain.into());
    }
    if !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(());
    }
    if depth == MAX_DEPTH {
        return Err(Cause::TooDeep.into());
    }
    for item in value.try_iter()?.checked() {
        let item = item?;
        if kind == ValueKind::Map {
            add_weight(&value.get_item(&item)?, depth + 1, plain, room, weight)?;
        }
        add_weight(&item, depth + 1, plain, room, weight)?;
    }
    Ok(())
}

/// A namespace, macro or loop. These types are private to minijinja; their names are all that shows.
fn is_engine_object(value: &Value) -> bool {
    let is = |name: &str| name.ends_with("::Namespace") || name.starts_with("minijinja::vm::");
    value.as_object().is_some_and(|o| is(o.type_name()))
}
