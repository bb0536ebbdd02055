//! Models in several files: `NAME-00001-of-00003.gguf`, each with its own header, all in one directory.

use std::path::{Path, PathBuf};

/// A shard's place, as its name tells it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ShardName {
    /// The name without the numbers.
    prefix: String,
    /// From 1.
    pub(super) no: u32,
    /// Shards altogether.
    pub(super) count: u32,
}

impl ShardName {
    /// Takes a name apart; `None` if it isn't that of a shard.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (stem, count) = stem.rsplit_once("-of-")?;
        let (prefix, no) = stem.rsplit_once('-')?;
        let (no, count) = (number(no)?, number(count)?);
        (1..=count).contains(&no).then(|| Self { prefix: prefix.into(), no, count })
    }

    /// The path of a shard of the same model, beside `path`.
    pub(super) fn sibling(&self, path: &Path, no: u32) -> PathBuf {
        path.with_file_name(format!("{}-{no:05}-of-{:05}.gguf", self.prefix, self.count))
    }

    /// The numbers of the shards that aren't beside `path`.
    pub(super) fn missing(&self, path: &Path) -> Vec<u32> {
        let gone = |&no: &u32| matches!(self.sibling(path, no).try_exists(), Ok(false));
        (1..=self.count).filter(gone).collect()
    }
}

/// Which others are missing besides the first, in words: ` (and 3 and 5)`; of many the first few.
pub(super) fn more(missing: &[u32]) -> String {
    const TOLD: usize = 8;
    let Some((_, rest @ [_, ..])) = missing.split_first() else { return String::new() };
    let told: Vec<String> = rest.iter().take(TOLD).map(u32::to_string).collect();
    match rest.len() - told.len() {
        0 => format!(" (and number {})", told.join(", ")),
        n => format!(" (and number {} and {n} more)", told.join(", ")),
    }
}

/// Five digits, as the tools write them.
fn number(digits: &str) -> Option<u32> {
    (digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}
