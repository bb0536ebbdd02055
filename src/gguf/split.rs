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
}

/// Five digits, as the tools write them.
fn number(digits: &str) -> Option<u32> {
    (digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}
