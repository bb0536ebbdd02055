//! Flags that several commands share. Names and defaults are llama.cpp's.

use super::Failure;
use crate::arch::ModelError;
use crate::cpu::Cores;
use crate::engine::{DEFAULT_CHUNK, EMBEDDED_NAME, Engine, EngineError, EngineOptions, GenerationParams, Memory};
use crate::moe::Lossy;
use crate::ops::kv::KvType;
use crate::session::grammar::Grammar;
use crate::session::sampler::{SamplerError, SamplingParams};
use clap::{Args, Parser, ValueEnum};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Mutex, OnceLock};

/// Mixture-of-experts language models on your own machine, larger than its memory if need be.
#[derive(Parser)]
#[command(name = "oncall", bin_name = "oncall", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "Examples:
  oncall run \"Once upon a time\"   the built-in model writes a story
  oncall chat -m model.gguf       talk with a model
  oncall show model.gguf          what is in a file, and what it weighs
  oncall bench -m model.gguf      how fast it is here
  echo \"Why is the sky blue?\" | oncall run -m model.gguf

Environment: ONCALL_MODEL is the model where no -m is given, ONCALL_ISA forces an instruction set, ONCALL_LOG=info says what \
happens, NO_COLOR is respected.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 after Ctrl-C.")]
pub(super) struct Cli {
    #[command(subcommand)]
    pub command: super::Command,
}

/// llama.cpp's flags of one dash and several letters, which clap has no notion of.
const LONG_SHORTS: &[(&str, &str)] =
    &[("-sys", "--system"), ("-ctk", "--cache-type-k"), ("-ctv", "--cache-type-v"), ("-ub", "--ubatch-size")];

/// Writes `-sys`, `-ctk` and the like as the flags they stand for.
pub(super) fn rewrite(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut literal = false;
    args.map(|a| {
        literal |= a == "--";
        let known = LONG_SHORTS.iter().find(|(short, _)| !literal && a == *short);
        known.map_or(a, |(_, long)| long.into())
    })
    .collect()
}

/// Flags of llama.cpp that clap would take for others with a value behind them, and why there are none here.
const FOREIGN: &[(&str, &str)] = &[
    ("-ngl", "oncall computes on the CPU alone; leave it out"),
    ("-fa", "attention is always computed in tiles; leave it out"),
    ("-cnv", "`oncall chat` is a conversation"),
    ("-no-cnv", "`oncall run --raw` goes on with a text as it is"),
    ("-st", "`oncall run` answers once"),
];

/// Refuses a flag that isn't here by its name.
pub(super) fn refuse_foreign(args: &[OsString]) -> Result<(), Failure> {
    let mut flags = args.iter().take_while(|a| *a != "--");
    match flags.find_map(|a| FOREIGN.iter().find(|(flag, _)| a == flag)) {
        Some((flag, why)) => Err(Failure::usage(format!("there is no {flag} here: {why}"))),
        None => Ok(()),
    }
}

/// `ONCALL_MODEL`, if it's anything. It's a default like another, which gives way to what is given: clap's own notion of an environment
/// counts as given.
pub(super) fn model_of_env() -> Option<&'static OsStr> {
    static MODEL: OnceLock<Option<OsString>> = OnceLock::new();
    MODEL.get_or_init(|| std::env::var_os("ONCALL_MODEL").filter(|m| !m.is_empty())).as_deref()
}

/// The engine that records, until [`take_recording`].
static RECORDING: Mutex<Option<Engine>> = Mutex::new(None);

/// The engine that was loaded with `--record`, for the end of the command.
pub(super) fn take_recording() -> Option<Engine> {
    RECORDING.lock().unwrap_or_else(|e| e.into_inner()).take()
}

/// Which model, and how it is held.
#[derive(Args, Clone)]
#[command(next_help_heading = "Model")]
pub(super) struct ModelArgs {
    /// A GGUF file, or the first of a split model's files [default: $ONCALL_MODEL, or the tiny model that
    /// is built in]
    #[arg(short, long, value_name = "FILE", default_values = model_of_env(), hide_default_value = true)]
    pub model: Option<PathBuf>,
    /// Context in tokens; 0 for the model's own [default: the model's own, up to 4096]
    #[arg(short, long, value_name = "N", value_parser = parse_count, allow_negative_numbers = true)]
    pub ctx_size: Option<usize>,
    /// Memory for everything: weights, KV cache, buffers, experts; e.g. 4GiB (or 4G) or 900MiB, where 4GB are 4000 million
    /// bytes. Experts that don't fit are read from the file when they are called [default: nine tenths of what the machine can spare]
    #[arg(long, value_name = "SIZE|auto", value_parser = parse_memory)]
    pub memory: Option<Memory>,
    /// Threads that compute [default: one for each core]
    #[arg(short, long, value_name = "N", value_parser = parse_threads, allow_negative_numbers = true)]
    pub threads: Option<u16>,
    /// Tokens of a prompt that are read together (-ub); the answer doesn't depend on it
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CHUNK as u32, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub ubatch_size: u32,
    /// How keys are stored (-ctk)
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub cache_type_k: CacheType,
    /// How values are stored (-ctv)
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub cache_type_v: CacheType,
    /// Write which experts each token uses to this file: a trace for `oncall replay` and `oncall plan`
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Don't keep which experts were hot in the cache folder, nor fill memory with them at the start
    #[arg(long)]
    pub no_heat: bool,
    /// Lossy: each token uses only its N best experts
    #[arg(long, value_name = "N", value_parser = parse_experts, allow_negative_numbers = true, help_heading = "Lossy: less to read, another answer")]
    pub experts: Option<usize>,
    /// Lossy: drop an expert that isn't in memory if its share of the token's weight is below this, e.g. 0.05
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = parse_share, allow_negative_numbers = true, help_heading = "Lossy: less to read, another answer")]
    pub drop_cold: f32,
    /// Lossy: take an expert in memory for one that isn't, if it's at most this much less probable, e.g. 0.2; never for a token's two best
    #[arg(long, value_name = "MARGIN", default_value_t = 0.0, value_parser = parse_share, allow_negative_numbers = true, help_heading = "Lossy: less to read, another answer")]
    pub prefer_resident: f32,
}

/// The types of the KV cache.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum CacheType {
    /// Single precision
    F32,
    /// Half precision
    F16,
    /// Eight bits: about half of f16's memory
    #[value(name = "q8_0")]
    Q8_0,
}

impl From<CacheType> for KvType {
    fn from(t: CacheType) -> Self {
        match t {
            CacheType::F32 => KvType::F32,
            CacheType::F16 => KvType::F16,
            CacheType::Q8_0 => KvType::Q8_0,
        }
    }
}

impl ModelArgs {
    /// As the engine takes them.
    pub fn options(&self) -> EngineOptions {
        EngineOptions {
            n_ctx: self.ctx_size,
            n_threads: self.threads.map(usize::from),
            chunk: self.ubatch_size as usize,
            memory: self.memory.unwrap_or_default(),
            type_k: self.cache_type_k.into(),
            type_v: self.cache_type_v.into(),
            n_expert_used: self.experts,
            lossy: Lossy { drop_cold: self.drop_cold, prefer_resident: self.prefer_resident },
            record: self.record.clone(),
            heat: !self.no_heat && self.model.is_some(),
            ..EngineOptions::default()
        }
    }

    /// Loads the model, with a progress bar if it takes long.
    pub fn load(&self) -> Result<Engine, Failure> {
        self.load_with(&EngineOptions { stop: Some(super::output::stop()), ..self.options() })
    }

    /// As [`ModelArgs::load`], with other options. From here on Ctrl-C only asks for an end; up to here nothing would be lost by one.
    pub fn load_with(&self, options: &EngineOptions) -> Result<Engine, Failure> {
        let engine = self.read(options)?;
        super::output::catch_ctrl_c();
        if options.record.is_some() {
            *RECORDING.lock().unwrap_or_else(|e| e.into_inner()) = Some(engine.clone());
        }
        if self.prefer_resident > 0.0 && engine.config().moe.as_ref().is_some_and(|m| m.router.n_expert_used <= 2) {
            super::output::note(
                "--prefer-resident changes nothing: a token's two best experts stay, and this model uses no more",
            );
        }
        let budget = engine.budget();
        if let (Some(bytes), Some(bound), Some((slots, all))) = (budget.bytes, budget.share_of, engine.n_slots())
            && slots < all
        {
            super::output::note(&format!(
                "taking {} of memory, nine tenths of {bound}: {slots} of {all} experts have a slot (--memory takes another share)",
                super::output::memory(bytes)
            ));
        }
        Ok(engine)
    }

    fn read(&self, options: &EngineOptions) -> Result<Engine, Failure> {
        let Some(path) = &self.model else { return Engine::embedded(options).map_err(of_engine) };
        let bar = super::output::bar("reading the model", "bytes");
        let engine = Engine::load(path, options, &|done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        engine.map_err(of_engine)
    }

    /// The model's name for people.
    pub fn name(&self) -> String {
        let file = self.model.as_deref().and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned());
        file.unwrap_or_else(|| EMBEDDED_NAME.into())
    }
}

/// A number of experts that is out of its range is wrong usage, though only the model says what the range is.
pub(super) fn of_engine(e: EngineError) -> Failure {
    match e {
        EngineError::Model { source: ModelError::FewerExperts { .. }, .. } => Failure::usage(e.to_string()),
        e => e.into(),
    }
}

/// A number; `-1` is none.
#[derive(Clone, Copy, Debug, PartialEq)]
struct OrNone<T>(Option<T>);

impl<T: FromStr> FromStr for OrNone<T> {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let number = || s.parse().map_err(|_| format!("{NO_COUNT}, or -1"));
        Ok(OrNone(if s == "-1" { None } else { Some(number()?) }))
    }
}

const NO_COUNT: &str = "it takes a whole number, e.g. 512";

fn parse_count(s: &str) -> Result<usize, String> {
    s.parse().map_err(|_| NO_COUNT.to_string())
}

/// How tokens are chosen.
#[derive(Args, Clone)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// Randomness: 0 (or less, as in llama.cpp) takes the most likely token always
    #[arg(long, value_name = "X", default_value_t = 0.8, value_parser = ranged(|p, x| p.temp = x), allow_negative_numbers = true)]
    temp: f32,
    /// Only the best N tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 40, allow_negative_numbers = true)]
    top_k: i32,
    /// Only the best tokens that together reach this probability, from 0 to 1; 1 for all
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = ranged(|p, x| p.top_p = x), allow_negative_numbers = true)]
    top_p: f32,
    /// Only tokens at least this fraction as likely as the best, from 0 to 1; 0 for all
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = ranged(|p, x| p.min_p = x), allow_negative_numbers = true)]
    min_p: f32,
    /// Locally typical sampling, from 0 to 1; 1 is off
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = ranged(|p, x| p.typical_p = x), allow_negative_numbers = true)]
    typical: f32,
    /// Penalise tokens of the last --repeat-last-n by this factor; 1 is off
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = ranged(|p, x| p.repeat_penalty = x), allow_negative_numbers = true)]
    repeat_penalty: f32,
    /// The window of the penalties; -1 for everything so far
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = ranged(|p, x: i32| p.repeat_last_n = x), allow_negative_numbers = true)]
    repeat_last_n: i32,
    /// Taken from the logit of every token in the window
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = ranged(|p, x| p.presence_penalty = x), allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Taken from a token's logit for each time that it's in the window
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = ranged(|p, x| p.frequency_penalty = x), allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// The same seed writes the same text; -1 for a random one [default: -1]
    #[arg(short, long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<OrNone<u64>>,
    /// Add to a token's logit, e.g. 15043+1 or 15043-inf; may be given several times
    #[arg(long, value_name = "TOKEN±X", value_parser = parse_bias, allow_hyphen_values = true)]
    logit_bias: Vec<(u32, f32)>,
    /// Tokens to write at most; -1 for as many as come until the model ends or the context is full [default: -1]
    #[arg(short = 'n', long, value_name = "N", allow_negative_numbers = true)]
    predict: Option<OrNone<usize>>,
    /// End when this text comes; may be given several times
    #[arg(short = 'r', long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on past tokens that end a text
    #[arg(long)]
    ignore_eos: bool,
    /// A grammar that the text has to follow, in llguidance's variant of Lark, such as 'start: "yes" | "no"'
    #[arg(long, value_name = "GRAMMAR", value_parser = parse_grammar, conflicts_with = "json_schema")]
    grammar: Option<Grammar>,
    /// A file with such a grammar
    #[arg(long, value_name = "FILE", value_parser = read_grammar, conflicts_with_all = ["json_schema", "grammar"])]
    grammar_file: Option<Grammar>,
    /// A JSON schema under which the text has to be valid; {} for any JSON
    #[arg(short, long, value_name = "SCHEMA", value_parser = parse_schema)]
    json_schema: Option<Grammar>,
}

impl SamplingArgs {
    /// As the engine takes them.
    pub fn params(&self) -> GenerationParams {
        GenerationParams {
            sampling: SamplingParams {
                temp: self.temp,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                typical_p: self.typical,
                repeat_penalty: self.repeat_penalty,
                repeat_last_n: self.repeat_last_n,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                seed: self.seed.and_then(|s| s.0),
                logit_bias: self.logit_bias.clone(),
            },
            n_predict: self.predict.and_then(|n| n.0),
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            show_special: false,
            logprobs: None,
            grammar: [&self.grammar, &self.grammar_file, &self.json_schema].into_iter().find_map(Clone::clone),
        }
    }

    /// Replaces the random seed of a chat's next answer, or sets a parameter by its flag's name.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        fn to<T: FromStr>(name: &str, value: &str) -> Result<T, String> {
            value.parse().map_err(|_| format!("{value:?} isn't a value for {name}"))
        }
        let mut new = self.clone();
        match name {
            "temp" => new.temp = to(name, value)?,
            "top-k" => new.top_k = to(name, value)?,
            "top-p" => new.top_p = to(name, value)?,
            "min-p" => new.min_p = to(name, value)?,
            "typical" => new.typical = to(name, value)?,
            "repeat-penalty" => new.repeat_penalty = to(name, value)?,
            "repeat-last-n" => new.repeat_last_n = to(name, value)?,
            "presence-penalty" => new.presence_penalty = to(name, value)?,
            "frequency-penalty" => new.frequency_penalty = to(name, value)?,
            // Without a value: as if it had never been given.
            "predict" => new.predict = (!value.is_empty()).then(|| to(name, value)).transpose()?,
            "seed" => new.seed = (!value.is_empty()).then(|| to(name, value)).transpose()?,
            _ => {
                return Err(format!(
                    "there is no {name:?} to set; there are temp, top-k, top-p, min-p, typical, repeat-penalty, repeat-last-n, \
                     presence-penalty, frequency-penalty, predict, seed and system"
                ));
            }
        }
        new.params().sampling.validate().map_err(|e| e.to_string())?;
        *self = new;
        Ok(())
    }
}

/// A parser of a sampling parameter that `set` sets, with the sampler's own range.
fn ranged<T: FromStr + Copy + Send + Sync + 'static>(
    set: fn(&mut SamplingParams, T),
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync {
    move |s| {
        let value: T = s.parse().map_err(|_| "it takes a number")?;
        let mut params = SamplingParams::default();
        set(&mut params, value);
        in_range(&params).map(|()| value)
    }
}

fn in_range(params: &SamplingParams) -> Result<(), String> {
    params.validate().map_err(|e| match e {
        SamplerError::Parameter { range, .. } => format!("it must be {range}"),
        e => e.to_string(),
    })
}

/// A number of experts that a token uses. How many there are only the model says.
fn parse_experts(s: &str) -> Result<usize, String> {
    match parse_count(s) {
        Ok(0) | Err(_) => Err("it takes a whole number: 1 or more, and no more than the model uses".into()),
        n => n,
    }
}

/// A number from 0 to 1.
fn parse_share(s: &str) -> Result<f32, String> {
    s.parse().ok().filter(|x| (0.0..=1.0).contains(x)).ok_or_else(|| "it takes a number from 0 to 1".into())
}

/// A grammar in Lark.
fn parse_grammar(s: &str) -> Result<Grammar, String> {
    if !s.contains(':') {
        return Err(
            "a grammar has rules, as in 'start: \"yes\" | \"no\"'; a file with one goes to --grammar-file".into()
        );
    }
    Grammar::lark(s).map_err(|e| e.to_string())
}

/// A file in Lark.
fn read_grammar(path: &str) -> Result<Grammar, String> {
    // clap names the file.
    let source = std::fs::read_to_string(path).map_err(|e| super::unreadable(&e))?;
    Grammar::lark(source.trim_start_matches('\u{feff}')).map_err(|e| e.to_string())
}

fn parse_schema(s: &str) -> Result<Grammar, String> {
    Grammar::json_schema(s).map_err(|e| e.to_string())
}

/// `4GiB`, `900MiB`, `2.5GB`, `1073741824`, `auto`.
pub(super) fn parse_memory(s: &str) -> Result<Memory, String> {
    if s.eq_ignore_ascii_case("auto") {
        return Ok(Memory::Auto);
    }
    let at = s.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(s.len());
    let wrong = || "sizes are written as 4GiB (or 4G), 900MiB or 2.5GB, which is 2500 million bytes".to_string();
    let unit: f64 = match s[at..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(wrong()),
    };
    let number: f64 = s[..at].trim().parse().map_err(|_| wrong())?;
    match number * unit {
        bytes if at == s.len() && (0.0..f64::from(1 << 20)).contains(&bytes) => {
            Err(format!("that is {bytes} bytes: {s}GiB or {s}MiB?"))
        }
        bytes if (0.0..2f64.powi(63)).contains(&bytes) => Ok(Memory::Bytes(bytes as u64)),
        bytes if bytes < 0.0 => Err("it can't be negative".into()),
        _ => Err("no machine has as much".into()),
    }
}

/// Threads for each processor, at most: they take turns, and wait for each other at every step.
const MAX_TURNS: usize = 8;

/// A number of threads that this machine can have.
pub(super) fn parse_threads(s: &str) -> Result<u16, String> {
    let here = Cores::count().allowed;
    let most = here.saturating_mul(MAX_TURNS).min(1024) as u16;
    let n: u16 = s.parse().map_err(|_| format!("it takes a whole number from 1 to {most}"))?;
    if !(1..=most).contains(&n) {
        let processors = super::output::counted(here, "processor");
        return Err(format!(
            "it's from 1 to {most} here: this process may use {processors}, and more threads only wait"
        ));
    }
    Ok(n)
}

/// `15043+1`, `15043-0.5`, `15043-inf`.
fn parse_bias(s: &str) -> Result<(u32, f32), String> {
    let at = s.find(['+', '-']).ok_or("it takes a token and a signed number, as 15043+1")?;
    let token = s[..at].parse().map_err(|_| format!("{:?} isn't a token's number", &s[..at]))?;
    let bias = s[at..].parse().map_err(|_| format!("{:?} isn't a number", &s[at..]))?;
    in_range(&SamplingParams { logit_bias: vec![(token, bias)], ..SamplingParams::default() })?;
    Ok((token, bias))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_flags_of_several_letters() {
        let args = ["oncall", "run", "-sys", "be brief", "-ctk", "q8_0", "--", "-sys"].map(OsString::from);
        let want = ["oncall", "run", "--system", "be brief", "--cache-type-k", "q8_0", "--", "-sys"];
        assert_eq!(rewrite(args.into_iter()), want.map(OsString::from));
        let refused = |args: &[&str]| refuse_foreign(&args.iter().map(OsString::from).collect::<Vec<_>>()).is_err();
        assert!(refused(&["oncall", "run", "-ngl", "99"]) && !refused(&["oncall", "run", "-n", "9", "--", "-ngl"]));
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_memory("4GiB"), Ok(Memory::Bytes(4 << 30)));
        assert_eq!(parse_memory("1.5m"), Ok(Memory::Bytes(3 << 19)));
        assert_eq!(parse_memory("2GB"), Ok(Memory::Bytes(2_000_000_000)));
        assert_eq!(parse_memory("1T"), parse_memory("1TiB"));
        assert_eq!(parse_memory("1TiB"), parse_memory("1024G"));
        assert_eq!(parse_memory("12345678"), Ok(Memory::Bytes(12_345_678)));
        assert_eq!(parse_memory("123b"), Ok(Memory::Bytes(123)));
        assert_eq!(parse_memory("auto"), Ok(Memory::Auto));
        for bad in ["", "4", "GiB", "4 parsecs", "-1G", "infG", "NaN", "99999999999999999999G"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn less_than_nothing_is_no_limit() {
        assert_eq!("-1".parse(), Ok(OrNone::<u64>(None)));
        assert_eq!("18446744073709551615".parse(), Ok(OrNone(Some(u64::MAX))));
        assert_eq!(("-1".parse(), "0".parse()), (Ok(OrNone::<usize>(None)), Ok(OrNone(Some(0_usize)))));
        assert!("-2".parse::<OrNone<u64>>().is_err() && "x".parse::<OrNone<usize>>().is_err());
    }

    #[test]
    fn threads() {
        assert_eq!(parse_threads("1"), Ok(1));
        assert!(parse_threads("0").is_err() && parse_threads("x").is_err());
        assert!(parse_threads("60000").unwrap_err().contains("processor"));
    }

    #[test]
    fn biases() {
        assert_eq!(parse_bias("15043+1"), Ok((15043, 1.0)));
        assert_eq!(parse_bias("7-inf"), Ok((7, f32::NEG_INFINITY)));
        assert!(parse_bias("7+inf").is_err() && parse_bias("7+nan").is_err());
        assert!(parse_bias("7").is_err() && parse_bias("x+1").is_err() && parse_bias("7+x").is_err());
    }
}
