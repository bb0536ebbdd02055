//! Watches the routers: counts each expert's uses, and writes a trace of them where one is wanted.

use super::trace::{Phase, TraceHeader, TraceWriter};
use super::{ExpertStore, Pick};
use crate::gguf::{PartFile, WriteError};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

/// Counts uses; records them.
pub struct Recorder {
    n_expert: usize,
    n_expert_used: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Uses of each expert in passes that ended well, and in this pass. (n_layer x n_expert)
    uses: Vec<u64>,
    pass_uses: Vec<u64>,
    /// This pass's layers, in order: the tokens' picks, and whether each was at hand. Empty where nothing is recorded.
    pass: Vec<(usize, Vec<(Pick, bool)>)>,
    /// Tokens so far.
    step: u32,
    trace: Option<TraceWriter<PartFile>>,
}

/// Writing a trace failed.
#[derive(Debug, thiserror::Error)]
#[error("the routing trace: {0}")]
pub struct RecordError(#[from] WriteError);

impl Recorder {
    /// For a model of these sizes; with a path it writes a trace, which gets that name when it's [ended](Recorder::end) and
    /// replaces what was.
    ///
    /// # Errors
    /// When the file can't be made.
    pub fn new(header: &TraceHeader, path: Option<&Path>) -> Result<Self, RecordError> {
        let begin = |path: &Path| {
            let file = PartFile::replace(path)?;
            TraceWriter::new(file, header).map_err(|e| WriteError::of(path, e))
        };
        let trace = path.map(begin).transpose()?;
        let n = header.n_layer * header.n_expert;
        Ok(Recorder {
            n_expert: header.n_expert,
            n_expert_used: header.n_expert_used,
            state: Mutex::new(State { uses: vec![0; n], pass_uses: vec![0; n], trace, ..State::default() }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A layer has chosen: (n_tokens, n_expert_used).
    pub fn routed(&self, layer: usize, picks: &[Pick], store: Option<&ExpertStore>) {
        let s = &mut *self.lock();
        let of_layer = &mut s.pass_uses[layer * self.n_expert..][..self.n_expert];
        picks.iter().filter(|p| !p.is_dropped()).for_each(|p| of_layer[p.expert as usize] += 1);
        if s.trace.is_some() {
            let at_hand = store.map(|store| store.at_hand(layer));
            let here = |p: &Pick| at_hand.as_ref().is_some_and(|h| h.get(p.expert as usize) == Some(&true));
            s.pass.push((layer, picks.iter().map(|p| (*p, here(p))).collect()));
        }
    }

    /// Forgets the layers of a pass that failed.
    pub fn discard(&self) {
        let mut s = self.lock();
        s.pass_uses.fill(0);
        s.pass.clear();
    }

    /// The pass is done: its uses count, and its tokens are written, in their order, in whole lines.
    ///
    /// # Errors
    /// When the file can't be written. What was written of it is removed, and later passes aren't recorded.
    pub fn finish(&self, phase: Phase) -> Result<(), RecordError> {
        let s = &mut *self.lock();
        s.uses.iter_mut().zip(&mut s.pass_uses).for_each(|(all, now)| *all += std::mem::take(now));
        let pass = std::mem::take(&mut s.pass);
        let n_tokens = pass.first().map_or(0, |p| p.1.len() / self.n_expert_used);
        let Some(trace) = &mut s.trace else { return Ok(()) };
        let mut write = || {
            for t in 0..n_tokens {
                for (layer, picks) in &pass {
                    let picks = &picks[t * self.n_expert_used..(t + 1) * self.n_expert_used];
                    let only: Vec<Pick> = picks.iter().map(|p| p.0).filter(|p| !p.is_dropped()).collect();
                    let here = |e| picks.iter().any(|p| p.0.expert == e && p.1);
                    trace.token((0, phase, s.step + t as u32), *layer, &only, here)?;
                }
            }
            trace.flush()
        };
        if let Err(e) = write() {
            let error = trace.out().error(e);
            s.trace = None;
            return Err(error.into());
        }
        s.step += n_tokens as u32;
        Ok(())
    }

    /// Gives the trace its name: it's whole.
    ///
    /// # Errors
    /// When that fails; the trace is removed then.
    pub fn end(&self) -> Result<(), RecordError> {
        match self.lock().trace.take() {
            Some(trace) => Ok(trace.into_out().commit()?),
            None => Ok(()),
        }
    }

    /// Experts that a token uses in a layer.
    pub fn n_expert_used(&self) -> usize {
        self.n_expert_used
    }

    /// Uses of each expert so far. (n_layer x n_expert)
    pub fn uses(&self) -> Vec<u64> {
        self.lock().uses.clone()
    }
}
