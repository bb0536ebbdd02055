//! Special tokens: which there are, which of them end a generation, and how they are found in a text.
//!
//! The rules by name are those of llama.cpp (`llama_vocab::load`): files often don't say what their tokens are for.

use super::data::{N_SPECIAL, Special, VocabData};
use super::error::TokenizerError;
use super::store::Attr;
use aho_corasick::{AhoCorasick, AhoCorasickKind, Anchored, Input, MatchKind};
use std::collections::HashMap;

/// Tokens recognised by name, if the metadata don't name one for the function. Where a vocabulary has several, the first of
/// this list is taken (llama.cpp: whichever its hash map lists first).
const BY_NAME: &[(Special, &[&str])] = &[
    (
        Special::Eot,
        &[
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<end_of_turn>",
            "<|endoftext|>",
            "<|end_of_text|>",
            "<EOT>",
            "_<EOT>",
            "[EOT]",
            "<｜end▁of▁sentence｜>",
            "<end_of_utterance>",
        ],
    ),
    (Special::Eom, &["<|eom_id|>"]),
    (
        Special::FimPre,
        &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
    ),
    (
        Special::FimSuf,
        &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
    ),
    (
        Special::FimMid,
        &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
    ),
    (Special::FimPad, &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    (Special::FimRep, &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    (Special::FimSep, &["<|file_sep|>"]),
];

/// Tokens that end a generation whatever the metadata say.
const EOG: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// gpt-oss: marks of the channel format that are shown, so that a reader of the stream can tell the channels apart.
const SHOWN: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// The most bytes that all special tokens together may have: their matcher takes some fifty times that. Real vocabularies
/// stay below 200 kB.
const MAX_SPECIAL_BYTES: usize = 4 << 20;

/// The functions of tokens and the set of those that end a generation.
pub(super) struct Roles {
    ids: [Option<u32>; N_SPECIAL],
    /// Sorted.
    eog: Vec<u32>,
}

impl Roles {
    pub(super) fn get(&self, special: Special) -> Option<u32> {
        self.ids[special as usize]
    }

    pub(super) fn eog(&self) -> &[u32] {
        &self.eog
    }

    /// Finds every function's token and corrects the tokens' properties by name.
    pub(super) fn find(data: &VocabData, attrs: &mut [Attr]) -> Result<Roles, TokenizerError> {
        let mut ids = given_ids(data)?;
        let named = well_known(&data.tokens);
        let at = |name: &str| named.get(name).copied();
        for (special, names) in BY_NAME {
            if ids[*special as usize].is_none()
                && let Some(id) = names.iter().find_map(|n| at(n))
            {
                ids[*special as usize] = Some(id);
                attrs[id as usize].0 |= Attr::CONTROL;
            }
        }
        for (attr, text) in attrs.iter_mut().zip(&data.tokens) {
            if attr.any(Attr::CONTROL) && text.contains("unused") {
                attr.0 |= Attr::UNUSED;
            }
        }
        let mut eog: Vec<u32> = EOG.iter().filter_map(|n| at(n)).collect();
        for &id in &eog {
            attrs[id as usize].0 |= Attr::CONTROL;
        }
        for id in SHOWN.iter().filter_map(|n| at(n)) {
            attrs[id as usize] = Attr(Attr::USER_DEFINED);
        }
        use Special::{Eom, Eos, Eot, FimPad, FimRep, FimSep};
        eog.extend([Eos, Eot, Eom, FimPad, FimRep, FimSep].into_iter().filter_map(|s| ids[s as usize]));
        eog.sort_unstable();
        eog.dedup();
        let mut roles = Roles { ids, eog };
        roles.exceptions(&named, attrs);
        Ok(roles)
    }

    /// Names that end a generation in one model and not in another.
    fn exceptions(&mut self, named: &HashMap<&str, u32>, attrs: &mut [Attr]) {
        let ends = |eog: &[u32], name: &str| named.get(name).filter(|id| eog.contains(id)).copied();
        let any = |eog: &[u32], name: &str| ends(eog, name).is_some();
        // gpt-oss and solar-open: <|end|> ends a message, after which the model goes on.
        let eog = &self.eog;
        let call = any(eog, "<|call|>") || any(eog, "<|calls|>");
        if let Some(end) = ends(eog, "<|end|>")
            && call
            && (any(eog, "<|return|>") || any(eog, "<|flush|>"))
        {
            attrs[end as usize] = Attr(Attr::USER_DEFINED);
            self.eog.retain(|&id| id != end);
        }
        // Gemma 4: </s> is an HTML tag.
        if any(&self.eog, "<|tool_response>")
            && let Some(tag) = ends(&self.eog, "</s>")
        {
            attrs[tag as usize] = Attr(Attr::NORMAL);
            self.eog.retain(|&id| id != tag);
        }
    }
}

/// The ids that the metadata give, each inside the vocabulary, over the model's defaults.
fn given_ids(data: &VocabData) -> Result<[Option<u32>; N_SPECIAL], TokenizerError> {
    let n_vocab = data.tokens.len();
    let mut ids = [None; N_SPECIAL];
    if data.model == "llama" {
        // SentencePiece's own defaults. (For `gpt2` llama.cpp takes 11, Falcon's: no good guess for any other model.)
        for (special, id) in [(Special::Bos, 1), (Special::Eos, 2), (Special::Unk, 0)] {
            ids[special as usize] = Some(id).filter(|&id| (id as usize) < n_vocab);
        }
    }
    for &(key, special, id) in &data.ids {
        if id as usize >= n_vocab {
            return Err(TokenizerError::SpecialOutside { key, id, n_vocab });
        }
        ids[special as usize] = Some(id);
    }
    Ok(ids)
}

/// The ids of the tokens whose names mean something here.
fn well_known<'a>(tokens: &[&'a str]) -> HashMap<&'a str, u32> {
    let lists = BY_NAME.iter().map(|(_, names)| *names).chain([EOG, SHOWN]);
    let names: std::collections::HashSet<&str> = lists.flatten().copied().collect();
    let first: Vec<u8> = names.iter().map(|n| n.as_bytes()[0]).collect();
    let mut found = HashMap::new();
    for (id, token) in tokens.iter().enumerate() {
        if token.as_bytes().first().is_some_and(|b| first.contains(b)) && names.contains(token) {
            found.insert(*token, id as u32);
        }
    }
    found
}

/// A part of a text: to be tokenised, or a special token.
pub(super) enum Part<'t> {
    Text(&'t str),
    Token(u32),
}

/// Finds special tokens in a text.
///
/// Of several that begin at the same place the longest counts, and what is left of it goes first. (llama.cpp takes the
/// longest of the whole text first: the same, unless special tokens overlap without sharing their beginning.)
pub(super) struct Specials {
    all: Option<Matcher>,
    /// Without those that are only recognised on request.
    user_defined: Option<Matcher>,
}

struct Matcher {
    automaton: AhoCorasick,
    /// For each pattern its token, and whether it swallows the white space after it.
    tokens: Vec<(u32, bool)>,
}

impl Specials {
    /// Matchers for all tokens that `attrs` calls special.
    pub(super) fn new(tokens: &[&str], attrs: &[Attr]) -> Result<Specials, TokenizerError> {
        const ALL: u8 = Attr::CONTROL | Attr::USER_DEFINED | Attr::UNKNOWN;
        let pick = |wanted: &dyn Fn(Attr) -> bool| {
            let ids = (0..tokens.len()).filter(|&i| wanted(attrs[i]) && !tokens[i].is_empty());
            Matcher::new(tokens, attrs, ids.collect())
        };
        Ok(Specials {
            all: pick(&|a| a.any(ALL))?,
            user_defined: pick(&|a| a.any(ALL) && !a.any(Attr::CONTROL | Attr::UNKNOWN))?,
        })
    }

    /// Calls `each` with the parts of `text` in order. Text parts are never empty.
    pub(super) fn split<'t>(&self, text: &'t str, parse_special: bool, mut each: impl FnMut(Part<'t>)) {
        let matcher = if parse_special { &self.all } else { &self.user_defined };
        let mut at = 0;
        if let Some(matcher) = matcher {
            while at < text.len()
                && let Some(found) = matcher.automaton.find(Input::new(text).range(at..).anchored(Anchored::No))
            {
                if found.start() > at {
                    each(Part::Text(&text[at..found.start()]));
                }
                let (id, rstrip) = matcher.tokens[found.pattern().as_usize()];
                each(Part::Token(id));
                at = found.end();
                if rstrip {
                    let is_space = |b: &u8| matches!(b, b' ' | b'\t'..=b'\r');
                    at += text.as_bytes()[at..].iter().take_while(|b| is_space(b)).count();
                }
            }
        }
        if at < text.len() {
            each(Part::Text(&text[at..]));
        }
    }

    /// The special token with this name.
    pub(super) fn by_name(&self, name: &str) -> Option<u32> {
        let matcher = self.all.as_ref()?;
        let found = matcher.automaton.find(Input::new(name).anchored(Anchored::Yes))?;
        (found.end() == name.len()).then(|| matcher.tokens[found.pattern().as_usize()].0)
    }
}

impl Matcher {
    fn new(tokens: &[&str], attrs: &[Attr], ids: Vec<usize>) -> Result<Option<Matcher>, TokenizerError> {
        if ids.is_empty() {
            return Ok(None);
        }
        let bytes: usize = ids.iter().map(|&i| tokens[i].len()).sum();
        if bytes > MAX_SPECIAL_BYTES {
            let what = "the text of all special tokens";
            return Err(TokenizerError::TooLarge { what, got: bytes, max: MAX_SPECIAL_BYTES });
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .start_kind(aho_corasick::StartKind::Both)
            .build(ids.iter().map(|&i| tokens[i]))
            .map_err(|e| TokenizerError::Build { what: "matcher of special tokens", why: e.to_string() })?;
        let tokens = ids.iter().map(|&i| (i as u32, attrs[i].any(Attr::RSTRIP))).collect();
        Ok(Some(Matcher { automaton, tokens }))
    }
}
