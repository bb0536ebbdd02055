//! How hot each expert has been, kept between runs in a small file: what to fill the slots with at start-up.
//!
//! The file is a cache: safe to delete, replaced atomically, and refused when it isn't what it should be.

use crate::gguf::{Fnv, Gguf, PartFile, WriteError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 16] = b"oncall heat v1\r\n";
/// Magic, identity, layers, experts.
const HEADER: usize = 16 + 8 + 4 + 4;
/// As in a model's file: more is damage.
const MAX_EXPERTS: usize = 1 << 22;

/// Tokens of a run that is worth as much as all before it.
const LONG_RUN: f32 = 100.0;

/// The experts' heats.
#[derive(Clone, Debug, PartialEq)]
pub struct Heat {
    /// The model that they belong to, see [`identity`].
    pub identity: u64,
    /// Experts in a layer.
    pub n_expert: usize,
    /// Finite, not negative. (n_layer x n_expert)
    pub values: Vec<f32>,
}

impl Heat {
    /// No expert was used yet.
    pub fn cold(identity: u64, n_layer: usize, n_expert: usize) -> Self {
        Heat { identity, n_expert, values: vec![0.0; n_layer * n_expert] }
    }

    /// What a former run has left for this model; cold if there's nothing or it can't be trusted.
    pub fn load(path: &Path, identity: u64, n_layer: usize, n_expert: usize) -> Self {
        let cold = Heat::cold(identity, n_layer, n_expert);
        match read(path, cold.values.len()).and_then(|bytes| cold.parse(&bytes)) {
            Ok(heat) => heat,
            Err(e) if e.kind() == io::ErrorKind::NotFound => cold,
            Err(e) => {
                tracing::warn!(path = %path.display(), "ignoring the experts' heat of former runs: {e}");
                cold
            }
        }
    }

    /// The file's contents, for a model like this one.
    fn parse(&self, bytes: &[u8]) -> io::Result<Heat> {
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_string());
        let (body, sum) = bytes.split_last_chunk::<8>().ok_or_else(|| bad("it is too short"))?;
        if u64::from_le_bytes(*sum) != Fnv::of(body) {
            return Err(bad("its checksum is wrong"));
        }
        let values = body.strip_prefix(&self.header()[..]).ok_or_else(|| bad("it belongs to another model"))?;
        let (values, rest) = values.as_chunks::<4>();
        let values: Vec<f32> = values.iter().map(|v| f32::from_le_bytes(*v)).collect();
        if values.len() != self.values.len() || !rest.is_empty() {
            return Err(bad("its length is wrong"));
        }
        if values.iter().any(|v| !v.is_finite() || *v < 0.0) {
            return Err(bad("a heat in it isn't a number from 0 on"));
        }
        Ok(Heat { values, ..self.clone() })
    }

    fn header(&self) -> [u8; HEADER] {
        let mut h = [0; HEADER];
        h[..16].copy_from_slice(MAGIC);
        h[16..24].copy_from_slice(&self.identity.to_le_bytes());
        let n_layer = self.values.len() / self.n_expert.max(1);
        h[24..28].copy_from_slice(&(n_layer as u32).to_le_bytes());
        h[28..].copy_from_slice(&(self.n_expert as u32).to_le_bytes());
        h
    }

    /// Replaces the file: whoever reads sees the old or the new one, whole.
    ///
    /// # Errors
    /// The system's, or that another process is just doing the same. The old file is left as it was.
    pub fn save(&self, path: &Path) -> Result<(), WriteError> {
        regular(path).map_err(|e| WriteError::of(path, e))?;
        let mut bytes = self.header().to_vec();
        self.values.iter().for_each(|v| bytes.extend(v.to_le_bytes()));
        bytes.extend(Fnv::of(&bytes).to_le_bytes());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| WriteError::of(folder, e))?;
        }
        let mut file = PartFile::replace(path)?;
        file.write_all(&bytes).map_err(|e| file.error(e))?;
        file.commit()
    }

    /// A run has ended whose tokens used so many experts of a layer, each so often, (n_layer x n_expert): each layer's uses as shares of
    /// the layer's, half and half with what was known if the run was long enough to know better.
    pub fn learn(&mut self, uses: &[u64], n_expert_used: usize) {
        for (values, uses) in self.values.chunks_mut(self.n_expert.max(1)).zip(uses.chunks(self.n_expert.max(1))) {
            let all: u64 = uses.iter().sum();
            let n_tokens = all as f32 / n_expert_used.max(1) as f32;
            let weight = 0.5 * (n_tokens / LONG_RUN).min(1.0);
            if all > 0 {
                values.iter_mut().zip(uses).for_each(|(v, &n)| *v += (n as f32 / all as f32 - *v) * weight);
            }
        }
    }

    /// Experts that were used at all as (layer, expert), the hottest first.
    pub fn hottest(&self) -> Vec<(usize, u32)> {
        let mut order: Vec<usize> = (0..self.values.len()).filter(|&i| self.values[i] > 0.0).collect();
        order.sort_by(|&a, &b| self.values[b].total_cmp(&self.values[a]).then(a.cmp(&b)));
        order.into_iter().map(|i| (i / self.n_expert, (i % self.n_expert) as u32)).collect()
    }
}

/// Refuses a pipe or a device: who opens it may wait for ever.
fn regular(path: &Path) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it isn't a regular file; remove it"))
        }
        _ => Ok(()),
    }
}

/// The file's bytes, if there are as many as there should be.
fn read(path: &Path, n_values: usize) -> io::Result<Vec<u8>> {
    regular(path)?;
    let n_bytes = HEADER + 4 * n_values.min(MAX_EXPERTS) + 8;
    let mut bytes = Vec::new();
    // One byte more than it may have, so that a longer file is seen as one.
    std::fs::File::open(path)?.take(n_bytes as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() != n_bytes {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it isn't {n_bytes} bytes long")));
    }
    Ok(bytes)
}

/// Where a model's heat is kept; `None` where the system has no folder for such things.
pub fn path_for(identity: u64) -> Option<PathBuf> {
    Some(cache_folder(&|name| std::env::var_os(name).map(PathBuf::from))?.join(format!("heat-{identity:016x}")))
}

/// The program's folder for what can be made again.
fn cache_folder(env: &dyn Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    // The base directory specification: a relative path in the variable is to be ignored.
    let absolute = |name: &str| env(name).filter(|p| p.is_absolute());
    let base = if cfg!(windows) {
        absolute("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        absolute("HOME").map(|h| h.join("Library/Caches"))
    } else {
        absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|h| h.join(".cache")))
    };
    base.map(|b| b.join("oncall"))
}

/// What tells this model from others: its files' sizes, its metadata (of arrays their lengths), and every tensor's name,
/// shape, format and place.
pub fn identity(gguf: &Gguf) -> u64 {
    let mut h = Fnv::default();
    let mut add = |text: &str| {
        h.write(text.as_bytes());
        h.write(&[0]);
    };
    for file in gguf.files() {
        add(&file.n_bytes().to_string());
    }
    for (key, value) in gguf.metadata().iter() {
        add(key);
        match value.as_array() {
            Some(a) => add(&a.len().to_string()),
            None => add(&format!("{value:?}")),
        }
    }
    for t in gguf.tensors() {
        add(&format!("{} {:?} {} {} {}", t.name, t.shape(), t.format.name, t.file, t.offset));
    }
    h.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn some() -> Heat {
        Heat { identity: 7, n_expert: 3, values: vec![0.0, 2.5, 1.0, 0.0, 4.0, 1.0] }
    }

    #[test]
    fn what_was_saved_is_loaded_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/heat");
        some().save(&path).unwrap();
        assert_eq!(Heat::load(&path, 7, 2, 3), some());
        some().save(&path).unwrap();
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
        assert_eq!(some().hottest(), [(1, 1), (0, 1), (0, 2), (1, 2)]);
        for (identity, n_layer, n_expert) in [(8, 2, 3), (7, 3, 2), (7, 2, 4), (7, 1, 3)] {
            let cold = Heat::cold(identity, n_layer, n_expert);
            assert_eq!(Heat::load(&path, identity, n_layer, n_expert), cold, "another model's");
        }
        assert_eq!(Heat::load(&dir.path().join("none"), 7, 2, 3), Heat::cold(7, 2, 3));
    }

    #[test]
    fn a_run_is_learned_as_shares_of_each_layer() {
        let mut heat = Heat::cold(7, 2, 3);
        heat.learn(&[0, 300, 100, 0, 0, 0], 2);
        assert_eq!(heat.hottest(), [(0, 1), (0, 2)]);
        heat.learn(&[400, 0, 0, 200, 0, 0], 2);
        assert_eq!(heat.values, [0.5, 0.1875, 0.0625, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn a_few_tokens_don_t_outweigh_long_runs() {
        let mut heat = Heat::cold(7, 1, 3);
        (0..4).for_each(|_| heat.learn(&[0, 1500, 500], 2));
        let before = heat.clone();
        heat.learn(&[3, 0, 1], 2);
        assert_eq!(heat.hottest()[..2], [(0, 1), (0, 2)]);
        assert!(heat.values.iter().zip(&before.values).all(|(a, b)| (a - b).abs() < 0.02), "{heat:?}");
        let mut first = Heat::cold(7, 1, 3);
        first.learn(&[2, 0, 1], 1);
        assert_eq!(first.hottest(), [(0, 0), (0, 2)], "better than nothing");
    }

    #[test]
    fn a_heat_that_is_no_number_is_refused_even_with_the_right_checksum() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heat");
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            let mut heat = some();
            heat.values[2] = bad;
            heat.save(&path).unwrap();
            assert_eq!(Heat::load(&path, 7, 2, 3), Heat::cold(7, 2, 3), "{bad}");
        }
    }

    #[test]
    fn the_folder_is_the_system_s() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| pairs.iter().find(|p| p.0 == name).map(|p| PathBuf::from(p.1))
        };
        if cfg!(target_os = "linux") {
            let folder = |pairs| cache_folder(&env(pairs));
            assert_eq!(folder(&[("HOME", "/h")]), Some("/h/.cache/oncall".into()));
            assert_eq!(folder(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]), Some("/c/oncall".into()));
            assert_eq!(folder(&[("HOME", "/h"), ("XDG_CACHE_HOME", "c")]), Some("/h/.cache/oncall".into()));
            assert_eq!(folder(&[]), None);
        }
    }

    #[test]
    fn models_are_told_apart() {
        let bytes = include_bytes!("../../models/tinymoe-stories-Q8_0.gguf");
        let a = identity(&Gguf::from_static("a", bytes).unwrap());
        assert_eq!(a, identity(&Gguf::from_static("another name", bytes).unwrap()));
        let mut other = bytes.to_vec();
        let at = other.windows(12).position(|w| w == b"general.name").unwrap();
        other[at + 12 + 4 + 8] ^= 1; // a letter of the name
        assert_ne!(a, identity(&Gguf::from_static("a", other.leak()).unwrap()));
    }

    /// Opening it would wait for somebody at its other end.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_pipe_in_the_file_s_place_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heat");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        assert_eq!(Heat::load(&path, 7, 2, 3), Heat::cold(7, 2, 3));
        assert!(some().save(&path).unwrap_err().to_string().contains("regular"));
    }

    /// Killed at any moment of saving: the unfinished file is as long as it may be, the old one is whole, and the next run saves.
    #[test]
    fn a_kill_while_saving_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heat");
        some().save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for n in 0..=whole.len() {
            std::fs::write(path.with_added_extension("part"), &whole[..n]).unwrap();
            assert_eq!(Heat::load(&path, 7, 2, 3), some());
            some().save(&path).unwrap();
            assert_eq!(Heat::load(&path, 7, 2, 3), some());
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the unfinished file is gone");
        }
    }

    proptest! {
        #[test]
        fn damage_is_cold(at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(), grow: bool) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("heat");
            some().save(&path).unwrap();
            let good = std::fs::read(&path).unwrap();
            let mut bytes = good.clone();
            bytes[at.index(good.len())] ^= 1 << bit;
            std::fs::write(&path, &bytes).unwrap();
            prop_assert_eq!(Heat::load(&path, 7, 2, 3), Heat::cold(7, 2, 3));
            let mut bytes = good[..cut.index(good.len())].to_vec();
            if grow {
                bytes = [&good[..], b"x"].concat();
            }
            std::fs::write(&path, &bytes).unwrap();
            prop_assert_eq!(Heat::load(&path, 7, 2, 3), Heat::cold(7, 2, 3));
        }
    }
}
