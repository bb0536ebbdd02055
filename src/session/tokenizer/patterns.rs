//! The patterns of the pre-tokenisers, and the names under which files ask for them.
//!
//! The cuts are those of llama.cpp (`llm_tokenizer_bpe` and `unicode_regex_split`), its simplifications included, since models
//! are served with them: `\p{Lu}` and its sisters mean any letter there (`tekken`, `gpt-4o`), and in patterns without
//! categories white space beyond ASCII matches nothing but `\s`.
//!
//! The published patterns end with `\s+(?!\S)|\s+`. A look-ahead would need a backtracking engine; instead the pattern here ends
//! with `\s+` and [`Cut::Words`] gives the run's last character back if something follows. That leaves regular
//! languages, matched in linear time.

/// One way of cutting.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    /// At the matches of a pattern.
    Pattern(&'static str),
    /// At the matches of a pattern whose last alternative is `\s+`, standing for `\s+(?!\S)|\s+`: its match gives the last
    /// character back if it has others and something follows.
    Words {
        pattern: &'static str,
        /// An alternative of its own takes the runs with line ends, so those stay whole.
        line_ends_apart: bool,
    },
    /// Runs of digits, in threes from the right.
    DigitTriples,
}

/// A pre-tokeniser: its names in files, its cuts, and what else its name implies.
pub(super) struct Pre {
    pub(super) names: &'static [&'static str],
    pub(super) cuts: &'static [Cut],
    /// A word that is a token is that token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// The text begins with BOS unless the file says otherwise.
    pub(super) add_bos: bool,
}

const fn pre(names: &'static [&'static str], cuts: &'static [Cut]) -> Pre {
    Pre { names, cuts, ignore_merges: false, add_bos: false }
}

/// English contractions in any case; no `(?i)`, which would also match ſ for s.
macro_rules! contractions {
    () => {
        "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
    };
}
/// The end of llama3's pattern and of its many relatives.
macro_rules! marks_and_spaces {
    () => {
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    };
}
/// gpt-4o's words without their contractions: `$a` is any letter that isn't an ASCII small one, `$b` any that isn't an ASCII
/// capital.
macro_rules! cased {
    ($a:literal, $b:literal, $end:expr) => {
        concat!(r"[^\r\n\p{L}\p{N}]?", $a, "*", $b, "+", $end, r"|[^\r\n\p{L}\p{N}]?", $a, "+", $b, "*", $end)
    };
}
macro_rules! ascii_marks_then_words {
    () => {
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"##
    };
}

const fn words(pattern: &'static str) -> Cut {
    Cut::Words { pattern, line_ends_apart: true }
}

const GPT2: Cut =
    Cut::Words { pattern: r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", line_ends_apart: false };
const LLAMA3: Cut = words(concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}", marks_and_spaces!()));
const QWEN2: Cut = words(concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", marks_and_spaces!()));
const QWEN35: Cut = words(concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
));
const TEKKEN: Cut = words(concat!(
    cased!(r"[\p{L}--[a-z]]", r"[\p{L}--[A-Z]]", ""),
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
));
const GPT4O: Cut = words(concat!(
    cased!(r"[\p{L}--[a-z]]", r"[\p{L}--[A-Z]]", concat!("(?:", contractions!(), ")?")),
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
));
const GPT4O_MARKS: Cut = words(concat!(
    cased!(r"[[\p{L}\p{M}]--[a-z]]", r"[[\p{L}\p{M}]--[A-Z]]", concat!("(?:", contractions!(), ")?")),
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
));
/// `[\p{L}\p{M}]` for every class of cased letters, as llama.cpp reads them.
const COHERE2: Cut = words(concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?:",
    contractions!(),
    ")?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
));
const YOUTU: Cut = words(concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?:",
    contractions!(),
    ")?",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
));
const DEEPSEEK3: Cut = words(concat!(ascii_marks_then_words!(), r"[\r\n]*|\s*[\r\n]+|\s+"));
/// A line end is a word, unless white space stands before it: then it belongs to the run.
const SPARK: Cut = Cut::Words { pattern: concat!(ascii_marks_then_words!(), r"|[\r\n]|\s+"), line_ends_apart: false };
/// Moonshot's: Han apart, other letters with their contraction.
const KIMI: Cut = words(concat!(
    r"[\u{4E00}-\u{9FFF}\u{3400}-\u{4DBF}\u{20000}-\u{2A6DF}\u{2A700}-\u{2EBEF}\u{F900}-\u{FAFF}\u{2F800}-\u{2FA1F}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{L}--[\u{4E00}-\u{9FFF}\u{3400}-\u{4DBF}\u{20000}-\u{2A6DF}\u{2A700}-\u{2EBEF}\u{F900}-\u{FAFF}\u{2F800}-\u{2FA1F}]]+(?:",
    contractions!(),
    r")?|\p{N}{1,3}",
    marks_and_spaces!()
));

const DIGIT: Cut = Cut::Pattern(r"\p{N}");
const DIGITS_3: Cut = Cut::Pattern(r"\p{N}{1,3}");
const LINE_END: Cut = Cut::Pattern(r"[\r\n]");
const LINES: Cut = Cut::Pattern(r"[^\n]+|\n+");
const CJK: Cut = Cut::Pattern(r"[\u{4E00}-\u{9FA5}\u{3040}-\u{30FF}]+");
/// Spans U+0800 to U+4E00 and more, but no white space: llama.cpp hides it from patterns without categories.
const CJK_WIDE: Cut = Cut::Pattern(r"[[\u{0800}-\u{9FA5}\u{AC00}-\u{D7FF}]--\s]+");
/// Any of the letters of cased scripts, as DeepSeek LLM's published pattern lists them.
const CASED_LETTERS: Cut = Cut::Pattern(concat!(
    r"\s?[",
    r"A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}",
    r"\u{295}-\u{2AF}\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}",
    r"\u{38E}-\u{3A1}\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}",
    r"\u{13A0}-\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}",
    r"\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}",
    r"\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}",
    r"\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}",
    r"\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}",
    r"\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}",
    r"\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}",
    r"\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}",
    r"\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}",
    r"\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}",
    r"\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}",
    r"]+",
));
/// Hangul, full-width punctuation, Bopomofo, Han and Kana, each apart.
const SCRIPTS: Cut = Cut::Pattern(concat!(
    r"[\u{AC00}-\u{D7A3}\u{3131}-\u{318E}]+",
    r"|[\u{FF01}\u{2026}\u{201C}\u{201D}\u{2018}\u{2019}\u{2014}\u{FF1A}\u{FF1B}\u{FF0C}\u{3001}-\u{303F}\u{FE30}-\u{FE4F}]+",
    r"|[\u{3105}-\u{312F}]+|[\u{4E00}-\u{9FA5}\u{3040}-\u{30FF}]+",
));
/// The scripts that are written without spaces. (U+8C48 stands where U+F900 was meant, its compatibility form, in
/// llama.cpp too: Hangul and private use come along.)
const ASIAN: Cut = Cut::Pattern(concat!(
    r"[\u{4E00}-\u{9FFF}\u{3400}-\u{4DBF}\u{8C48}-\u{FAFF}\u{3040}-\u{30FF}\u{FF65}-\u{FF9F}\u{2F00}-\u{2FDF}",
    r"\u{E40}-\u{EFF}\u{1780}-\u{17FF}\u{1000}-\u{109F}\u{AA60}-\u{AA7F}\u{A9E0}-\u{A9FF}\u{AC00}-\u{D7AF}\u{1100}-\u{11FF}]+",
));
const SENTENCE: Cut = Cut::Pattern(r" ?[^(\s|.,!?\u{2026}\u{3002}\u{FF0C}\u{3001}\u{964}\u{6D4}\u{60C})]+");

/// Every pre-tokeniser that oncall knows.
pub(super) static PRES: &[Pre] = &[
    pre(
        &["default"],
        &[Cut::Pattern(r"[\p{P}$+<=>^~|]+"), GPT2, Cut::Pattern(r"\p{N}+"), Cut::Pattern("[0-9][0-9][0-9]")],
    ),
    Pre {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        cuts: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    pre(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    Pre { ignore_merges: true, ..pre(&["glm4", "glm5"], &[LLAMA3]) },
    pre(
        &["qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2", "kormo", "f2llmv2"],
        &[QWEN2],
    ),
    pre(&["qwen35"], &[QWEN35]),
    pre(&["laguna"], &[LINES, QWEN2]),
    pre(
        &[
            "gpt-2",
            "olmo",
            "phi-2",
            "mpt",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "mellum",
            "a.x-4.0",
            "modern-bert",
            "roberta-bpe",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
        ],
        &[GPT2],
    ),
    pre(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[DIGIT, GPT2],
    ),
    pre(&["falcon"], &[Cut::Pattern(r"[\p{P}$+<=>^~|`]+"), GPT2, Cut::Pattern("[0-9][0-9][0-9]")]),
    pre(
        &["deepseek-llm"],
        &[
            LINE_END,
            CASED_LETTERS,
            // U+3000 begins the published last range, but is white space: see `CJK_WIDE`.
            Cut::Pattern(r"\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3001}\u{3002}]+"),
            Cut::Pattern(r"\s+$"),
            CJK_WIDE,
            Cut::Pattern(r"\p{N}+"),
        ],
    ),
    pre(&["deepseek-coder"], &[LINE_END, Cut::Pattern(r"\s?\p{L}+"), Cut::Pattern(r"\s?\p{P}+"), CJK_WIDE, DIGIT]),
    pre(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &[DIGITS_3, CJK, DEEPSEEK3]),
    pre(&["spark2_5"], &[DIGITS_3, CJK, SPARK, DIGIT]),
    Pre { ignore_merges: true, ..pre(&["youtu"], &[SCRIPTS, YOUTU]) },
    Pre { ignore_merges: true, add_bos: true, ..pre(&["tekken"], &[TEKKEN]) },
    pre(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT4O]),
    Pre { ignore_merges: true, ..pre(&["granite-embed-multi-97m"], &[GPT4O_MARKS]) },
    pre(&["tiny_aya", "cohere2moe"], &[Cut::DigitTriples, COHERE2]),
    pre(&["kimi-k2"], &[KIMI]),
    pre(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[words(
            r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+",
        )],
    ),
    pre(
        &["seed-coder"],
        &[words(concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"))],
    ),
    pre(&["ufakzeka"], &[words(concat!(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", marks_and_spaces!()))]),
    pre(
        &["exaone-moe"],
        &[words(concat!(
            contractions!(),
            r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+"
        ))],
    ),
    pre(&["afmoe"], &[Cut::DigitTriples, ASIAN, DEEPSEEK3]),
    Pre {
        ignore_merges: true,
        ..pre(
            &["minicpm5"],
            &[DIGITS_3, words(concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+", marks_and_spaces!()))],
        )
    },
    pre(&["poro-chat", "bloom", "gpt3-finnish"], &[SENTENCE]),
    pre(&["viking"], &[SENTENCE, DIGIT]),
    Pre {
        add_bos: true,
        ..pre(
            &["chameleon"],
            &[
                Cut::Pattern("<sentinel:[0-9]+>"),
                Cut::Pattern("IMGIMG[A-I]{1,4}Z"),
                Cut::Pattern(r"[\t\n]|    |  "),
                DIGIT,
                Cut::Pattern(r"[\p{P}!-/:-@\[-`{-~]"),
                GPT2,
            ],
        )
    },
];
