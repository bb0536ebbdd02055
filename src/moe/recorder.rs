//! Watches the routers: counts each expert's uses, and writes a trace of them where one is wanted.

use super::trace::{Phase, TraceHeader, TraceWriter};
use super::{ExpertStore, Pick};
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

/// Counts uses; records them.
pub struct Recorder {
    n_expert: usize,
    n_expert_used: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Uses of each expert in passes that ended well. (n_layer x n_expert)
    uses: Vec<u64>,
    /// This pass's layers, in order: the tokens' picks, and whether each was at hand.
    pass: Vec<(usize, Vec<(Pick, bool)>)>,
    /// Tokens so far.
    step: u32,
    file: Option<(PathBuf, TraceWriter<BufWriter<File>>)>,
}

/// Writing a trace failed.
#[derive(Debug, thiserror::Error)]
#[error("writing the routing trace {path}: {source}")]
pub struct RecordError {
    /// The file.
    pub path: PathBuf,
    /// The system's error.
    pub source: std::io::Error,
}

impl Recorder {
    /// For a model of these sizes; with a path it writes a trace there, replacing what was.
    ///
    /// # Errors
    /// When the file can't be made.
    pub fn new(header: &TraceHeader, path: Option<&Path>) -> Result<Self, RecordError> {
        let create = |path: &Path| {
            let file = File::create(path).and_then(|f| TraceWriter::new(BufWriter::with_capacity(1 << 16, f), header));
            file.map_err(|source| RecordError { path: path.into(), source })
        };
        let file = path.map(|p| create(p).map(|w| (p.to_path_buf(), w))).transpose()?;
        let uses = vec![0; header.n_layer * header.n_expert];
        Ok(Recorder {
            n_expert: header.n_expert,
            n_expert_used: header.n_expert_used,
            state: Mutex::new(State { uses, file, ..State::default() }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A layer has chosen: (n_tokens, n_expert_used).
    pub fn routed(&self, layer: usize, picks: &[Pick], store: Option<&ExpertStore>) {
        let mut s = self.lock();
        let recording = s.file.is_some();
        let at_hand = store.filter(|_| recording).map(|store| store.at_hand(layer));
        let here = |p: &Pick| at_hand.as_ref().is_some_and(|h| h.get(p.expert as usize) == Some(&true));
        let picks = picks.iter().map(|p| (*p, here(p))).collect();
        s.pass.push((layer, picks));
    }

    /// Forgets the layers of a pass that failed.
    pub fn discard(&self) {
        self.lock().pass.clear();
    }

    /// The pass is done: its uses count, and its tokens are written, in their order, in whole lines.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn finish(&self, phase: Phase) -> Result<(), RecordError> {
        let s = &mut *self.lock();
        let pass = std::mem::take(&mut s.pass);
        for (layer, picks) in &pass {
            picks
                .iter()
                .filter(|p| !p.0.is_dropped())
                .for_each(|p| s.uses[layer * self.n_expert + p.0.expert as usize] += 1);
        }
        let n_tokens = pass.first().map_or(0, |p| p.1.len() / self.n_expert_used);
        if let Some((path, writer)) = &mut s.file {
            let mut write = || {
                for t in 0..n_tokens {
                    for (layer, picks) in &pass {
                        let picks = &picks[t * self.n_expert_used..(t + 1) * self.n_expert_used];
                        let only: Vec<Pick> = picks.iter().map(|p| p.0).filter(|p| !p.is_dropped()).collect();
                        let here = |e| picks.iter().any(|p| p.0.expert == e && p.1);
                        writer.token((0, phase, s.step + t as u32), *layer, &only, here)?;
                    }
                }
                writer.flush()
            };
            write().map_err(|source| RecordError { path: path.clone(), source })?;
        }
        s.step += n_tokens as u32;
        Ok(())
    }

    /// Uses of each expert so far. (n_layer x n_expert)
    pub fn uses(&self) -> Vec<u64> {
        self.lock().uses.clone()
    }
}
