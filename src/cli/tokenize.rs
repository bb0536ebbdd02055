//! `oncall tokenize`: text to tokens.

use super::args::model_of_env;
use super::{Failure, output};
use crate::engine::EMBEDDED_NAME;
use crate::gguf::Gguf;
use crate::session::tokenizer::Tokenizer;
use clap::Args;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Read;

/// Flags of `tokenize`.
#[derive(Args)]
pub(super) struct TokenizeArgs {
    /// The text [default: the standard input]
    #[arg(value_name = "TEXT")]
    text: Option<String>,
    /// Don't add the tokens that begin or end a text
    #[arg(long)]
    no_special: bool,
    /// Take `<|im_end|>` and the like as plain text
    #[arg(long)]
    no_parse_special: bool,
    /// Print one JSON array of objects
    #[arg(long)]
    json: bool,
    /// A GGUF file [default: $ONCALL_MODEL, or the model that is built in]
    #[arg(short, long, value_name = "FILE", default_values = model_of_env(), hide_default_value = true)]
    model: Option<std::path::PathBuf>,
}

#[derive(Serialize)]
struct Token {
    id: u32,
    piece: String,
}

pub(super) fn run(a: TokenizeArgs) -> Result<(), Failure> {
    let gguf = match &a.model {
        Some(path) => Gguf::open(path)?,
        None => Gguf::from_static(EMBEDDED_NAME, crate::engine::embedded_bytes())?,
    };
    let t = Tokenizer::from_metadata(gguf.metadata()).map_err(|e| Failure::new(format!("{}: {e}", gguf.name())))?;
    let text = match a.text {
        Some(t) => t,
        None => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .map_err(|e| Failure::new(format!("reading the text from the standard input: {e}")))?;
            text
        }
    };
    let tokens: Vec<Token> = t
        .encode(&text, !a.no_special, !a.no_parse_special)
        .into_iter()
        .map(|id| Token { id, piece: String::from_utf8_lossy(&t.token_bytes(id)).into_owned() })
        .collect();
    if a.json {
        return output::json(&tokens);
    }
    let mut out = String::new();
    for Token { id, piece } in &tokens {
        match t.token_bytes(*id) {
            // Part of a character.
            bytes if std::str::from_utf8(&bytes).is_err() => writeln!(out, "{id:>7}  \"{}\"", bytes.escape_ascii())?,
            _ => writeln!(out, "{id:>7}  {piece:?}")?,
        }
    }
    output::text(&out)?;
    output::note(&output::counted(tokens.len(), "token"));
    Ok(())
}
