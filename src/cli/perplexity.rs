//! `oncall perplexity`: how well a model predicts a text, in chunks as llama.cpp's tool does; and how far its
//! predictions are from another run's.

use super::args::ModelArgs;
use super::figures::{Stats, losses};
use super::{Failure, output, unreadable};
use crate::engine::Engine;
use crate::gguf::PartFile;
use crate::moe::Losses;
use crate::session::tokenizer::Tokenizer;
use clap::Args;
use serde::Serialize;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::PathBuf;
use std::time::Instant;

/// Flags of `perplexity`.
#[derive(Args)]
#[command(
    after_help = "The text is cut into chunks of the context's length; in each, tokens of the second half are scored. \
To compare two models, write the logits of one with --save-logits and give them to the other with --kl-base.

What --drop-cold and --prefer-resident cost shows only with -ub 1, a token at a time as when a text is written: of many tokens read together, \
most find their experts in memory already, because the others want them too.",
    mut_arg("ctx_size", |a| a.help("Tokens of a chunk; 0 for the model's own context [default: 512]"))
)]
pub(super) struct PerplexityArgs {
    /// The text
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Only the first N chunks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Write the logits of the scored tokens to a file: 4 bytes for each token of the vocabulary
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,
    /// Compare with logits that --save-logits wrote: mean Kullback-Leibler divergence, and how often the best token agrees
    #[arg(long, value_name = "FILE", conflicts_with = "save_logits")]
    kl_base: Option<PathBuf>,
    /// Say where the time went and what was reached of the machine's limits, as `run --stats` does
    #[arg(long)]
    stats: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Serialize)]
struct Report {
    model: String,
    perplexity: f64,
    /// Of the perplexity: one standard error.
    error: f64,
    nats_per_token: f64,
    chunks: usize,
    scored_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    kl_divergence: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    same_best_token: Option<f64>,
    #[serde(flatten)]
    losses: Losses,
    #[serde(flatten)]
    stats: Stats,
}

/// Running sums over the scored tokens.
#[derive(Default)]
struct Sums {
    n: usize,
    nll: f64,
    nll_squared: f64,
    kl: f64,
    same_top: usize,
}

/// Logits that are written, or read to compare with.
enum Base {
    None,
    Write(PartFile),
    Read(BufReader<File>),
}

const MAGIC: &[u8; 8] = b"oncallL1";

pub(super) fn run(mut a: PerplexityArgs) -> Result<(), Failure> {
    // llama.cpp's default: chunks of 512.
    a.model.ctx_size = a.model.ctx_size.or(Some(512));
    let file = File::open(&a.file).map_err(|e| Failure::new(format!("{}: {}", a.file.display(), unreadable(&e))))?;
    let engine = a.model.load()?;
    if engine.n_ctx() < 4 {
        let n_ctx = engine.n_ctx();
        return Err(Failure::usage(format!(
            "-c {n_ctx} is too short: half of a chunk is scored, so it takes 4 tokens"
        )));
    }
    if !a.model.options().lossy.is_off() && a.model.ubatch_size > 1 {
        output::note("-ub 1 shows what --drop-cold and --prefer-resident cost; tokens read together hide it");
    }
    let n_ctx = engine.n_ctx();
    let mut text = Text::new(file, engine.tokenizer());
    let mut base = open_base(&a, &engine)?;
    let (mut sums, mut n_chunks) = (Sums::default(), 0);
    let (bar, began) = (output::bar("reading the text", "chunks"), Instant::now());
    while a.chunks.is_none_or(|most| n_chunks < most as usize) {
        let chunk = text.next(n_ctx).map_err(|e| Failure::new(format!("{}: {e}", a.file.display())))?;
        let Some(chunk) = chunk else { break };
        let in_text = n_chunks as u64 + 1 + (text.tokens.len() / n_ctx) as u64;
        bar.set_length(a.chunks.map_or(in_text, |most| in_text.min(most.into())));
        let scored = score(&engine, &chunk, &mut base, &mut sums);
        if output::stopped() {
            return Err(Failure::interrupted());
        }
        scored?;
        n_chunks += 1;
        bar.inc(1);
    }
    bar.finish_and_clear();
    if n_chunks == 0 {
        return Err(Failure::new(format!(
            "{}: {} are less than one chunk of {n_ctx}; give a longer text or a shorter context (-c)",
            a.file.display(),
            output::counted(text.tokens.len(), "token")
        )));
    }
    let compared = matches!(base, Base::Read(_));
    if let Base::Write(file) = base {
        file.commit()?;
    }
    let mut stats = Stats::new(&engine, engine.account(), [Some(began.elapsed().as_secs_f64()), None]);
    if a.stats {
        stats.measure(&engine, true);
    }
    report(&a, stats, n_chunks, &sums, compared)
}

/// Bytes of text that are made tokens of together: longer texts needn't fit into memory, and may have another token or two where they are
/// cut, at the end of a line.
const WINDOW: u64 = 4 << 20;

/// The tokens of a file.
struct Text<'a> {
    file: BufReader<File>,
    tokenizer: &'a Tokenizer,
    /// Not yet handed out.
    tokens: VecDeque<u32>,
    /// The beginning of a character that was cut.
    cut: Vec<u8>,
    begun: bool,
    window: u64,
}

impl<'a> Text<'a> {
    fn new(file: File, tokenizer: &'a Tokenizer) -> Self {
        let file = BufReader::new(file);
        Text { file, tokenizer, tokens: VecDeque::new(), cut: Vec::new(), begun: false, window: WINDOW }
    }

    /// The next `n` tokens, if there are as many.
    fn next(&mut self, n: usize) -> Result<Option<Vec<u32>>, String> {
        while self.tokens.len() < n && self.read()? {}
        Ok((self.tokens.len() >= n).then(|| self.tokens.drain(..n).collect()))
    }

    /// Reads on; false at the end.
    fn read(&mut self) -> Result<bool, String> {
        let mut bytes = std::mem::take(&mut self.cut);
        let (file, window) = (&mut self.file, self.window);
        let mut read = || {
            file.by_ref().take(window).read_to_end(&mut bytes)?;
            file.by_ref().take(window).read_until(b'\n', &mut bytes)?;
            Ok(file.fill_buf()?.is_empty())
        };
        let ends = read().map_err(|e: std::io::Error| unreadable(&e))?;
        if bytes.is_empty() {
            return Ok(false);
        }
        if let Err(e) = std::str::from_utf8(&bytes) {
            if e.error_len().is_some() || ends {
                return Err(unreadable(&ErrorKind::InvalidData.into()));
            }
            self.cut = bytes.split_off(e.valid_up_to());
        }
        let text = String::from_utf8(bytes).map_err(|e| e.to_string())?;
        let t = self.tokenizer;
        match (self.begun, ends) {
            (true, _) => self.tokens.extend(t.encode_within(&text)),
            (false, true) => self.tokens.extend(t.encode(&text, true, false)),
            (false, false) => {
                self.tokens.extend(t.bos().filter(|_| t.adds_bos()));
                self.tokens.extend(t.encode(&text, false, false));
            }
        }
        self.begun = true;
        Ok(!ends)
    }
}

fn report(a: &PerplexityArgs, stats: Stats, chunks: usize, s: &Sums, compared: bool) -> Result<(), Failure> {
    let n = s.n as f64;
    let mean = s.nll / n;
    let variance = (s.nll_squared / n - mean * mean).max(0.0);
    let perplexity = mean.exp();
    let r = Report {
        model: a.model.name(),
        perplexity,
        error: perplexity * (variance / (n - 1.0).max(1.0)).sqrt(),
        nats_per_token: mean,
        chunks,
        scored_tokens: s.n,
        kl_divergence: compared.then_some(s.kl / n),
        same_best_token: compared.then_some(s.same_top as f64 / n),
        losses: stats.account.store().losses(),
        stats,
    };
    if a.json {
        return output::json(&r);
    }
    output::text(&format!(
        "perplexity {:.4} ± {:.4}   {:.4} nats a token, {} scored in {}\n",
        r.perplexity,
        r.error,
        r.nats_per_token,
        output::counted(r.scored_tokens, "token"),
        output::counted(r.chunks, "chunk")
    ))?;
    if let Some(losses) = losses(r.losses) {
        output::text(&format!("{losses}\n"))?;
    }
    if let (Some(kl), Some(same)) = (r.kl_divergence, r.same_best_token) {
        output::text(&format!("KL divergence {kl:.6} nats, the best token is the same for {:.2} %\n", 100.0 * same))?;
    }
    if a.stats {
        output::note(r.stats.table().trim_end());
    }
    Ok(())
}

/// Adds a chunk's scores.
fn score(engine: &Engine, chunk: &[u32], base: &mut Base, sums: &mut Sums) -> Result<(), Failure> {
    let (n_ctx, n_vocab) = (chunk.len(), engine.config().n_vocab);
    let first = n_ctx / 2;
    let mut input = chunk.to_vec();
    if let Some(bos) = engine.tokenizer().bos().filter(|_| engine.tokenizer().adds_bos()) {
        input[0] = bos;
    }
    let mut result = Ok(());
    engine.session().feed_all(&input, &mut |start, logits| {
        for (i, logits) in logits.chunks(n_vocab).enumerate() {
            let at = start + i;
            if at >= first && at + 1 < n_ctx && result.is_ok() {
                result = score_token(logits, chunk[at + 1], base, sums);
            }
        }
    })?;
    result
}

fn score_token(logits: &[f32], next: u32, base: &mut Base, s: &mut Sums) -> Result<(), Failure> {
    let log_sum = log_sum_exp(logits);
    let nll = log_sum - f64::from(logits[next as usize]);
    (s.n, s.nll, s.nll_squared) = (s.n + 1, s.nll + nll, s.nll_squared + nll * nll);
    match base {
        Base::None => {}
        Base::Write(file) => {
            logits.iter().try_for_each(|l| file.write_all(&l.to_le_bytes())).map_err(|e| file.error(e))?;
        }
        Base::Read(r) => {
            let mut raw = vec![0; logits.len() * 4];
            r.read_exact(&mut raw)
                .map_err(|e| Failure::new(format!("the logits to compare with end early or can't be read: {e}")))?;
            let theirs: Vec<f32> = raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let their_sum = log_sum_exp(&theirs);
            s.kl += theirs
                .iter()
                .zip(logits)
                .map(|(&p, &q)| {
                    let (p, q) = (f64::from(p) - their_sum, f64::from(q) - log_sum);
                    p.exp() * (p - q)
                })
                .sum::<f64>();
            s.same_top += usize::from(best(&theirs) == best(logits));
        }
    }
    Ok(())
}

fn best(logits: &[f32]) -> usize {
    logits.iter().enumerate().fold(0, |best, (i, l)| if *l > logits[best] { i } else { best })
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln()
}

/// The file of logits: a magic number, the vocabulary's size and the context's length, then rows of f32.
fn open_base(a: &PerplexityArgs, engine: &Engine) -> Result<Base, Failure> {
    let mut head = MAGIC.to_vec();
    head.extend((engine.config().n_vocab as u32).to_le_bytes());
    head.extend((engine.n_ctx() as u32).to_le_bytes());
    if let Some(path) = &a.save_logits {
        let mut file = PartFile::replace(path)?;
        file.write_all(&head).map_err(|e| file.error(e))?;
        return Ok(Base::Write(file));
    }
    let Some(path) = &a.kl_base else { return Ok(Base::None) };
    let at = |e: std::io::Error| Failure::new(format!("{}: {}", path.display(), unreadable(&e)));
    let mut r = BufReader::new(File::open(path).map_err(at)?);
    let mut found = vec![0; head.len()];
    r.read_exact(&mut found).map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof => {
            Failure::new(format!("{}: it is too short to be logits of --save-logits", path.display()))
        }
        _ => at(e),
    })?;
    if found != head {
        let why = "these logits are of another vocabulary or another context (-c), or not of --save-logits";
        return Err(Failure::new(format!("{}: {why}", path.display())));
    }
    Ok(Base::Read(r))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineOptions;
    use std::io::Seek;

    /// In windows, whose ends are lines' ends or, within endless lines, characters'.
    #[test]
    fn a_text_of_any_length_is_read_a_window_at_a_time() {
        let engine = Engine::embedded(&EngineOptions { n_ctx: Some(64), ..EngineOptions::default() }).unwrap();
        let t = engine.tokenizer();
        let line = "Once upon a time there was a dog.\n";
        for text in [line.repeat(9), line.repeat(99), "aü".repeat(2000), String::new()] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            file.rewind().unwrap();
            let mut tokens = Vec::new();
            let mut reader = Text { window: 512, ..Text::new(file, t) };
            while let Some(next) = reader.next(50).unwrap() {
                assert!(reader.tokens.len() <= 1024);
                tokens.extend(next);
            }
            tokens.extend(&reader.tokens);
            assert!(t.decode(&tokens, true, false) == text, "{} bytes", text.len());
            if text.len() < 512 {
                assert_eq!(tokens, if text.is_empty() { Vec::new() } else { t.encode(&text, true, false) });
            }
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"a\xff").unwrap();
        file.rewind().unwrap();
        assert!(Text::new(file, t).next(1).unwrap_err().contains("UTF-8"));
    }
}
