//! Routing traces: which experts each token used, in a file of comma-separated lines that other tools write too.
//!
//! ```text
//! # route_trace v1
//! # model=… arch=qwen3moe n_layer=48 n_expert=128 n_expert_used=6
//! # layer=0 expert_bytes=3059712 dense_bytes=11953152
//! turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
//! 0,1,28,0,0,60,0.215444,0,3059712
//! ```
//!
//! `phase` is 0 for a token that was read and 1 for one that was written, `step` counts tokens, `slot` is the expert's rank,
//! `residency` is 1 where the expert was at hand, `expert_bytes` is what had to be read for it.

use super::Pick;
use std::io::{BufRead, Read, Write};
use std::ops::Range;

const MAGIC: &str = "# route_trace v1";
const COLUMNS: &str = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes";
/// The longest line that is read.
const MAX_LINE: u64 = 4096;
/// As in a model's file: more is damage.
const MAX_LAYER: usize = 1 << 10;
const MAX_EXPERT: usize = 1 << 12;
const MAX_BYTES: u64 = 1 << 40;

/// What a trace says of the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TraceHeader {
    /// The model file's name.
    pub model: String,
    /// Its architecture.
    pub arch: String,
    /// Layers.
    pub n_layer: usize,
    /// Experts in a layer.
    pub n_expert: usize,
    /// Experts that a token uses in a layer.
    pub n_expert_used: usize,
    /// Bytes of one expert of each layer, 0 for a dense layer, and of the layer's dense weights. (n_layer)
    pub layer_bytes: Vec<(u64, u64)>,
}

/// Whether a token was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// It was in the prompt.
    Prefill,
    /// It was sampled.
    Decode,
}

/// A recorded run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// The model's sizes.
    pub header: TraceHeader,
    tokens: Vec<(Phase, Range<usize>)>,
    /// Layer and expert, a token's together, layers rising.
    uses: Vec<(u32, u32)>,
}

/// Why a trace can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The system.
    #[error("reading a routing trace: {0}")]
    Io(#[from] std::io::Error),
    /// A line.
    #[error("line {line} of the routing trace: {why}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
}

/// A row, in the order that rows are sorted by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    turn: u32,
    step: u32,
    layer: u32,
    slot: u32,
    expert: u32,
    phase: Phase,
    line: u32,
}

impl Trace {
    /// Reads and checks a trace. Rows may come in any order: a prompt's are written layer by layer.
    ///
    /// # Errors
    /// A line that isn't as it should be, by its number.
    pub fn read(mut source: impl BufRead) -> Result<Self, TraceError> {
        let mut header = TraceHeader::default();
        let (mut rows, mut line, mut in_rows) = (Vec::new(), Vec::new(), false);
        for n in 1usize.. {
            line.clear();
            if source.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let fail = |why: String| TraceError::Line { line: n, why };
            if line.len() as u64 == MAX_LINE {
                return Err(fail(format!("it is longer than {MAX_LINE} bytes")));
            }
            let text = std::str::from_utf8(&line).map_err(|_| fail("it isn't text".into()))?.trim_end();
            if n == 1 && text != MAGIC {
                return Err(fail(format!("{:?} isn't {MAGIC:?}: this is no routing trace", shorten(text))));
            }
            match text.strip_prefix('#') {
                Some(comment) if !in_rows => header.read(comment).map_err(fail)?,
                _ if in_rows => rows.push(header.row(text, n).map_err(fail)?),
                _ if text == COLUMNS => {
                    header.check().map_err(fail)?;
                    in_rows = true;
                }
                _ => return Err(fail(format!("{:?} isn't {COLUMNS:?}", shorten(text)))),
            }
        }
        if !in_rows {
            return Err(TraceError::Line { line: 1, why: "the file ends before its column names".into() });
        }
        Self::from_rows(header, rows)
    }

    fn from_rows(header: TraceHeader, mut rows: Vec<Row>) -> Result<Self, TraceError> {
        rows.sort_unstable();
        let fail = |r: &Row, why: String| TraceError::Line { line: r.line as usize, why };
        let mut trace = Trace { header, ..Trace::default() };
        for (i, r) in rows.iter().enumerate() {
            let of_layer =
                rows[..i].iter().rev().take_while(|o| (o.turn, o.step, o.layer) == (r.turn, r.step, r.layer));
            for other in of_layer {
                if other.slot == r.slot || other.expert == r.expert {
                    return Err(fail(r, format!("it says again what line {} says", other.line)));
                }
            }
            match (rows[..i].last().filter(|l| (l.turn, l.step) == (r.turn, r.step)), trace.tokens.last_mut()) {
                (Some(last), Some(token)) => {
                    if last.phase != r.phase {
                        return Err(fail(r, format!("line {} has the same step in another phase", last.line)));
                    }
                    token.1.end += 1;
                }
                _ => trace.tokens.push((r.phase, i..i + 1)),
            }
            trace.uses.push((r.layer, r.expert));
        }
        Ok(trace)
    }

    /// Tokens.
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// A token's phase, and its (layer, expert) pairs, layers rising.
    pub fn token(&self, i: usize) -> (Phase, &[(u32, u32)]) {
        let (phase, range) = &self.tokens[i];
        (*phase, &self.uses[range.clone()])
    }

    /// All tokens, as [`Trace::token`].
    pub fn tokens(&self) -> impl Iterator<Item = (Phase, &[(u32, u32)])> {
        (0..self.n_tokens()).map(|i| self.token(i))
    }
}

/// A name as a trace has it: one word.
pub fn word(name: &str) -> String {
    name.split_whitespace().collect::<Vec<_>>().join("_")
}

/// The beginning of a text, for a message.
fn shorten(text: &str) -> String {
    text.chars().take(60).collect()
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{name} is {:?}, which isn't a number that it can be", shorten(text)))
}

impl TraceHeader {
    /// A comment line: words of the form key=value; the rest is for people.
    fn read(&mut self, comment: &str) -> Result<(), String> {
        let (mut layer, mut expert_bytes, mut dense_bytes) = (None, 0, 0);
        for word in comment.split_whitespace() {
            let Some((key, value)) = word.split_once('=') else { continue };
            match key {
                "model" => self.model = value.into(),
                "arch" => self.arch = value.into(),
                "n_layer" => self.n_layer = number(key, value)?,
                "n_expert" => self.n_expert = number(key, value)?,
                "n_expert_used" => self.n_expert_used = number(key, value)?,
                "layer" => layer = Some(number::<usize>(key, value)?),
                "expert_bytes" => expert_bytes = number(key, value)?,
                "dense_bytes" => dense_bytes = number(key, value)?,
                _ => {}
            }
        }
        let Some(layer) = layer else { return Ok(()) };
        if layer != self.layer_bytes.len() || layer >= MAX_LAYER {
            return Err(format!("layer {layer} comes where layer {} should", self.layer_bytes.len()));
        }
        if expert_bytes.max(dense_bytes) > MAX_BYTES {
            return Err(format!("layer {layer} has {} bytes, more than a layer can", expert_bytes.max(dense_bytes)));
        }
        self.layer_bytes.push((expert_bytes, dense_bytes));
        Ok(())
    }

    /// Whether the sizes can be.
    fn check(&mut self) -> Result<(), String> {
        let sizes = [("n_layer", self.n_layer, MAX_LAYER), ("n_expert", self.n_expert, MAX_EXPERT)];
        for (name, n, max) in sizes.into_iter().chain([("n_expert_used", self.n_expert_used, self.n_expert)]) {
            if n == 0 || n > max {
                return Err(format!("the lines before it say {name}={n}, which isn't from 1 to {max}"));
            }
        }
        if !self.layer_bytes.is_empty() && self.layer_bytes.len() != self.n_layer {
            return Err(format!("there are {} layer= lines for {} layers", self.layer_bytes.len(), self.n_layer));
        }
        self.layer_bytes.resize(self.n_layer, (0, 0));
        Ok(())
    }

    fn row(&self, text: &str, line: usize) -> Result<Row, String> {
        let mut fields = [""; 9];
        let mut n = 0;
        for field in text.split(',') {
            *fields.get_mut(n).ok_or("it has more than 9 fields")? = field;
            n += 1;
        }
        if n < 9 {
            return Err(format!("it has {n} of 9 fields: the file is cut short or damaged"));
        }
        let below = |i: usize, name: &str, limit: usize| -> Result<u32, String> {
            let v: u32 = number(name, fields[i])?;
            if (v as usize) < limit {
                Ok(v)
            } else {
                Err(format!("{name} is {v}, but the header allows up to {}", limit - 1))
            }
        };
        let weight: f32 = number("weight", fields[6])?;
        if !weight.is_finite() {
            return Err(format!("weight is {weight}"));
        }
        number::<u64>("residency", fields[7])?;
        number::<u64>("expert_bytes", fields[8])?;
        Ok(Row {
            turn: number("turn", fields[0])?,
            phase: if below(1, "phase", 2)? == 0 { Phase::Prefill } else { Phase::Decode },
            step: number("step", fields[2])?,
            layer: below(3, "layer", self.n_layer)?,
            slot: below(4, "slot", self.n_expert_used)?,
            expert: below(5, "expert", self.n_expert)?,
            line: u32::try_from(line).map_err(|_| "there are too many lines")?,
        })
    }
}

/// Writes a trace, a whole line at a time: give it a [`std::io::BufWriter`], which never splits what fits into it.
pub struct TraceWriter<W: Write> {
    out: W,
    /// Bytes of an expert, by layer.
    expert_bytes: Vec<u64>,
    line: Vec<u8>,
}

impl<W: Write> TraceWriter<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// The writer's.
    pub fn new(mut out: W, header: &TraceHeader) -> std::io::Result<Self> {
        let h = header;
        writeln!(out, "{MAGIC}")?;
        writeln!(
            out,
            "# model={} arch={} n_layer={} n_expert={} n_expert_used={}",
            word(&h.model),
            word(&h.arch),
            h.n_layer,
            h.n_expert,
            h.n_expert_used
        )?;
        for (layer, (expert, dense)) in h.layer_bytes.iter().enumerate() {
            writeln!(out, "# layer={layer} expert_bytes={expert} dense_bytes={dense}")?;
        }
        writeln!(out, "{COLUMNS}")?;
        Ok(TraceWriter { out, expert_bytes: h.layer_bytes.iter().map(|b| b.0).collect(), line: Vec::new() })
    }

    /// A token's experts in a layer, best first, each with whether it was at hand.
    ///
    /// # Errors
    /// The writer's.
    pub fn token(
        &mut self,
        (turn, phase, step): (u32, Phase, u32),
        layer: usize,
        picks: &[Pick],
        resident: impl Fn(u32) -> bool,
    ) -> std::io::Result<()> {
        let phase = u8::from(phase == Phase::Decode);
        for (slot, p) in picks.iter().enumerate() {
            let here = resident(p.expert);
            let bytes = if here { 0 } else { self.expert_bytes.get(layer).copied().unwrap_or(0) };
            self.line.clear();
            writeln!(
                self.line,
                "{turn},{phase},{step},{layer},{slot},{},{},{},{bytes}",
                p.expert,
                p.weight,
                u8::from(here)
            )?;
            self.out.write_all(&self.line)?;
        }
        Ok(())
    }

    /// What it writes to.
    pub fn out(&self) -> &W {
        &self.out
    }

    /// As [`TraceWriter::out`], at the trace's end.
    pub fn into_out(self) -> W {
        self.out
    }

    /// Hands what is buffered on.
    ///
    /// # Errors
    /// The writer's.
    pub fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEAD: &str = "# route_trace v1\n# model=m arch=a n_layer=2 n_expert=4 n_expert_used=2\n";

    fn read(text: &str) -> Result<Trace, TraceError> {
        Trace::read(text.as_bytes())
    }

    #[test]
    fn what_was_written_is_read_again() {
        let header = TraceHeader {
            model: "a b.gguf".into(),
            arch: "olmoe".into(),
            n_layer: 2,
            n_expert: 4,
            n_expert_used: 2,
            layer_bytes: vec![(10, 3), (12, 4)],
        };
        let mut bytes = Vec::new();
        let mut w = TraceWriter::new(&mut bytes, &header).unwrap();
        let picks = |a, b| [Pick { expert: a, weight: 0.75 }, Pick { expert: b, weight: 0.25 }];
        // A prompt's tokens come layer by layer.
        for layer in 0..2 {
            for step in 0..2 {
                w.token((0, Phase::Prefill, step), layer, &picks(layer as u32, 2 + step), |e| e == 2).unwrap();
            }
        }
        w.token((0, Phase::Decode, 2), 0, &picks(3, 0), |_| true).unwrap();
        w.flush().unwrap();
        let trace = Trace::read(&bytes[..]).unwrap();
        assert_eq!(trace.header, TraceHeader { model: "a_b.gguf".into(), ..header });
        assert_eq!(trace.token(0), (Phase::Prefill, &[(0, 0), (0, 2), (1, 1), (1, 2)][..]));
        assert_eq!(trace.token(1), (Phase::Prefill, &[(0, 0), (0, 3), (1, 1), (1, 3)][..]));
        assert_eq!(trace.token(2), (Phase::Decode, &[(0, 3), (0, 0)][..]));
        assert!(String::from_utf8(bytes).unwrap().ends_with("0,1,2,0,0,3,0.75,1,0\n0,1,2,0,1,0,0.25,1,0\n"));
    }

    #[test]
    fn hostile_lines_are_named() {
        let rows = |rows: &str| format!("{HEAD}{COLUMNS}\n0,0,0,0,0,1,0.5,0,0\n{rows}");
        let cases: &[(&str, usize, &str)] = &[
            ("", 1, "ends before"),
            ("hello\n", 1, "no routing trace"),
            ("# route_trace v1\n\n", 2, "isn't"),
            (&format!("{MAGIC}\n{COLUMNS}\n"), 2, "n_layer=0"),
            (&format!("{MAGIC}\n# n_layer=99999999999999999999\n"), 2, "n_layer"),
            (&format!("{MAGIC}\n# n_layer=5000 n_expert=4 n_expert_used=2\n{COLUMNS}\n"), 3, "1024"),
            (&format!("{MAGIC}\n# layer=1 expert_bytes=1\n"), 2, "layer 0 should"),
            (&format!("{MAGIC}\n# layer=0 expert_bytes=18446744073709551615\n"), 2, "more than a layer can"),
            (&format!("{HEAD}# layer=0 expert_bytes=1\n{COLUMNS}\n"), 4, "1 layer= lines for 2"),
            (&format!("{MAGIC}\n{}", "x".repeat(5000)), 2, "longer"),
            (&rows("0,0,1,2,0,1,0.5,0,0"), 5, "layer is 2"),
            (&rows("0,0,1,1,2,1,0.5,0,0"), 5, "slot is 2"),
            (&rows("0,0,1,1,1,4,0.5,0,0"), 5, "expert is 4"),
            (&rows("0,2,1,1,1,1,0.5,0,0"), 5, "phase is 2"),
            (&rows("0,0,1,1,1,-1,0.5,0,0"), 5, "\"-1\""),
            (&rows("0,0,1,1,1,1,NaN,0,0"), 5, "weight is NaN"),
            (&rows("0,0,1,1,1,1,0.5,0"), 5, "8 of 9"),
            (&rows("0,0,1,1,1,1,0.5,0,0,0"), 5, "more than 9"),
            (&rows("0,0,0,0,0,2,0.5,0,0"), 5, "line 4"),
            (&rows("0,0,0,0,1,1,0.5,0,0"), 5, "line 4"),
            (&rows("0,1,0,1,0,1,0.5,0,0"), 5, "another phase"),
        ];
        for (text, at, words) in cases {
            match read(text) {
                Err(TraceError::Line { line, why }) => {
                    assert!(line == *at && why.contains(words), "{text}: {line}: {why}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
        assert!(matches!(Trace::read(&b"\xff\n"[..]), Err(TraceError::Line { line: 1, .. })));
        assert_eq!(read(&rows("")).unwrap().n_tokens(), 1);
    }

    proptest! {
        #[test]
        fn no_text_panics(tail in "[0-9,#=a-z\n. -]{0,200}", rows in prop::collection::vec(
            (0u32..2, 0u32..2, 0u32..3, 0u32..3, 0u32..3, 0u32..5), 0..20))
        {
            let rows: String = rows.iter().map(|r| format!("{},{},{},{},{},{},1,0,0\n", r.0, r.1, r.2, r.3, r.4, r.5)).collect();
            for text in [tail.clone(), format!("{MAGIC}\n{tail}"), format!("{HEAD}{COLUMNS}\n{rows}{tail}")] {
                if let Ok(t) = read(&text) {
                    prop_assert!(t.tokens().flat_map(|t| t.1).all(|u| (u.0 as usize) < t.header.n_layer));
                }
            }
        }
    }
}
