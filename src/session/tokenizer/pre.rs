//! Pre-tokenisers: how a byte-level vocabulary's text is cut into words, inside of which pairs are merged.
//!
//! `tokenizer.ggml.pre` names one. Each is a list of cuts; a cut is made in every piece that the one before it left, and what
//! a pattern doesn't match is a piece too.

use super::error::TokenizerError;
use super::patterns::{Cut, PRES};
use regex_automata::{Anchored, Input, meta::Regex};

/// The values of `tokenizer.ggml.pre` that oncall knows.
pub fn known_pre_tokenizers() -> impl Iterator<Item = &'static str> {
    PRES.iter().flat_map(|p| p.names).copied()
}

/// A pre-tokeniser, ready to cut.
pub(super) struct PreTokenizer {
    cuts: Vec<(Cut, Regex)>,
    pub(super) ignore_merges: bool,
    pub(super) add_bos: bool,
}

impl PreTokenizer {
    /// The pre-tokeniser of this name.
    pub(super) fn new(name: &str) -> Result<PreTokenizer, TokenizerError> {
        let Some(pre) = PRES.iter().find(|p| p.names.contains(&name)) else {
            let mut known: Vec<_> = known_pre_tokenizers().collect();
            known.sort_unstable();
            return Err(TokenizerError::UnknownPre { name: super::error::excerpt(name), known: known.join(", ") });
        };
        let compile = |cut: &Cut| {
            let pattern = match cut {
                Cut::Pattern(pattern) | Cut::Words { pattern, .. } => pattern,
                Cut::DigitTriples => r"\p{N}+",
            };
            let regex = Regex::new(pattern)
                .map_err(|e| TokenizerError::Build { what: "pre-tokeniser", why: format!("{pattern}: {e:?}") })?;
            Ok::<_, TokenizerError>((*cut, regex))
        };
        Ok(PreTokenizer {
            cuts: pre.cuts.iter().map(compile).collect::<Result<_, TokenizerError>>()?,
            ignore_merges: pre.ignore_merges,
            add_bos: pre.add_bos,
        })
    }

    /// Calls `each` with the words of `text`, in order and without a gap.
    pub(super) fn split<'t>(&self, text: &'t str, each: &mut dyn FnMut(&'t str)) {
        cut_all(&self.cuts, text, each);
    }
}

fn cut_all<'t>(cuts: &[(Cut, Regex)], text: &'t str, each: &mut dyn FnMut(&'t str)) {
    let Some(((cut, regex), rest)) = cuts.split_first() else {
        if !text.is_empty() {
            each(text);
        }
        return;
    };
    if matches!(cut, Cut::DigitTriples) {
        return cut_triples(regex, text, &mut |piece| cut_all(rest, piece, each));
    }
    let mut at = 0;
    while at < text.len() {
        let Some((start, end)) = next_match(regex, text, at) else { break };
        if start > at {
            cut_all(rest, &text[at..start], each);
        }
        at = match cut {
            Cut::Words { line_ends_apart, .. } => give_back(text, start, end, *line_ends_apart),
            _ => end,
        };
        cut_all(rest, &text[start..at], each);
    }
    if at < text.len() {
        cut_all(rest, &text[at..], each);
    }
}

/// The next match, never empty. Most begin where the last one ended, and finding those takes one pass instead of two.
#[inline]
fn next_match(regex: &Regex, text: &str, at: usize) -> Option<(usize, usize)> {
    let input = Input::new(text).range(at..);
    if let Some(half) = regex.search_half(&input.clone().anchored(Anchored::Yes)) {
        return Some((at, half.offset())).filter(|(start, end)| end > start);
    }
    let found = regex.search(&input)?;
    (!found.is_empty()).then(|| (found.start(), found.end()))
}

/// The end of a match that may be one of `\s+`: one character less if there are others and something follows.
#[inline]
fn give_back(text: &str, start: usize, end: usize, line_ends_apart: bool) -> usize {
    if end == text.len() {
        return end;
    }
    let Some(last) = text[start..end].chars().next_back() else { return end };
    let shorter = end - last.len_utf8();
    let apart = line_ends_apart && matches!(last, '\r' | '\n');
    if last.is_whitespace() && !apart && shorter > start { shorter } else { end }
}

/// Cuts runs of digits into threes from the right. What stands before a run belongs to its first piece, which isn't as
/// published (there the digits stand alone), but as llama.cpp does it.
fn cut_triples<'t>(digits: &Regex, text: &'t str, each: &mut dyn FnMut(&'t str)) {
    let (mut done, mut at) = (0, 0);
    while let Some((start, end)) = next_match(digits, text, at) {
        let n = text[start..end].chars().count();
        let ends = text[start..end].char_indices().map(|(i, c)| start + i + c.len_utf8());
        for (i, piece_end) in ends.enumerate() {
            if (n - 1 - i).is_multiple_of(3) {
                each(&text[done..piece_end]);
                done = piece_end;
            }
        }
        at = end;
    }
    if done < text.len() {
        each(&text[done..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(name: &str, text: &str) -> Vec<String> {
        let pre = PreTokenizer::new(name).unwrap();
        let mut out = Vec::new();
        pre.split(text, &mut |w| out.push(w.to_string()));
        assert_eq!(out.concat(), text);
        out
    }

    #[test]
    fn every_name_compiles_and_is_listed_once() {
        let mut names: Vec<_> = known_pre_tokenizers().collect();
        for name in &names {
            assert!(cut(name, "").is_empty());
            cut(name, " Hello  wörld\n\n 12345 (x)\t'S \u{3000}字。");
        }
        let n = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n);
    }

    #[test]
    fn an_unknown_name_is_an_error_that_names_it_and_the_known() {
        let message = PreTokenizer::new("nonesuch").err().unwrap().to_string();
        assert!(message.contains("\"nonesuch\"") && message.contains("llama-bpe"), "{message}");
    }

    #[test]
    fn white_space_gives_its_last_character_to_the_next_word() {
        assert_eq!(cut("llama-bpe", "a   b"), ["a", "  ", " b"]);
        assert_eq!(cut("llama-bpe", "a \n\n  b"), ["a", " \n\n", " ", " b"]);
        assert_eq!(cut("llama-bpe", "a   "), ["a", "   "]);
        assert_eq!(cut("gpt-2", "a\n\nb"), ["a", "\n", "\n", "b"]);
        assert_eq!(cut("gpt-2", "a\u{3000}\u{3000}b"), ["a", "\u{3000}", "\u{3000}", "b"]);
    }

    #[test]
    fn digits_and_contractions() {
        assert_eq!(cut("llama-bpe", "12345 I'LL"), ["123", "45", " I", "'LL"]);
        assert_eq!(cut("qwen2", "123"), ["1", "2", "3"]);
        assert_eq!(cut("gpt-2", "12345 I'LL we'll"), ["12345", " I", "'", "LL", " we", "'ll"]);
        assert_eq!(cut("smollm", " 12"), [" ", "1", "2"]);
        assert_eq!(cut("afmoe", "1234567 12"), ["1", "234", "567", " ", "12"]);
        assert_eq!(cut("gpt-4o", "HelloWORLDs don't"), ["Hello", "WORLDs", " don't"]);
    }
}
