//! Saved sessions: tokens and KV cache in a file, bound to the model that they came from. A checksum ends it.

use super::outline::layer_of;
use super::{Engine, EngineError, Session};
use crate::gguf::{Fnv, GgufError, PartFile};
use crate::moe::heat;
use crate::ops::kv::SeqKv;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

const MAGIC: &[u8; 8] = b"oncall03";
/// The format's number is the magic's end.
const ANY_VERSION: &[u8] = b"oncall";

/// Magic, fingerprint, tokens, and how many of them the KV cache holds.
const HEADER: usize = 8 + 8 + 8 + 8;
/// Of tensors that tell models with the same header apart, so many bytes are looked at.
const SAMPLE: usize = 4096;

/// A file with the checksum of what was read or written of it.
struct Summed<T> {
    file: T,
    sum: Fnv,
}

impl<T> Summed<T> {
    fn new(file: T) -> Self {
        Summed { file, sum: Fnv::default() }
    }
}

impl<T: Read> Read for Summed<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(bytes)?;
        self.sum.write(&bytes[..n]);
        Ok(n)
    }
}

impl<T: Write> Write for Summed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.sum.write(&bytes[..n]);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Engine {
    /// What a saved session must have in common with this engine: the model, the cache's types, and what changes a model's answer. A
    /// model's fine-tunes have its header, so the beginning of every tensor of some layers, and of those outside of layers, counts too.
    fn fingerprint(&self) -> Result<u64, GgufError> {
        let (gguf, config, o) = (self.gguf(), self.config(), &self.0.options);
        let mut h = Fnv::default();
        h.write(&heat::identity(gguf).to_le_bytes());
        let n_expert_used = config.moe.as_ref().map(|m| m.router.n_expert_used);
        h.write(format!("{:?} {:?} {n_expert_used:?} {:?}", o.type_k, o.type_v, o.lossy).as_bytes());
        let looked_at = [0, config.n_layer / 2, config.n_layer.saturating_sub(1)];
        for t in gguf.tensors().iter().filter(|t| layer_of(t).is_none_or(|l| looked_at.contains(&l))) {
            let mut bytes = [0; SAMPLE];
            let n = (t.n_bytes as usize).min(SAMPLE);
            gguf.read_at(t, 0, &mut bytes[..n])?;
            h.write(&bytes[..n]);
        }
        Ok(h.finish())
    }

    /// Reads a session that [`Session::save`] wrote.
    ///
    /// # Errors
    /// When a file can't be read, or this one is damaged or comes from another model, other types of KV cache, other lossy options or a
    /// longer context.
    pub fn restore(&self, path: &Path) -> Result<Session, EngineError> {
        let bad = |why: String| EngineError::Saved { path: path.display().to_string(), why };
        let file = File::open(path).map_err(|e| bad(e.to_string()))?;
        let size = file.metadata().map_err(|e| bad(e.to_string()))?.len();
        let mut input = Summed::new(BufReader::new(file));
        let mut head = [0; HEADER];
        input.read_exact(&mut head).map_err(|_| bad("it is too short to be a saved session".into()))?;
        let number = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| head[at + i]));
        if &head[..8] != MAGIC {
            let ours = head.starts_with(ANY_VERSION);
            let what =
                if ours { "it was saved by another version of oncall" } else { "it isn't a saved session of oncall" };
            return Err(bad(what.into()));
        }
        if number(8) != self.fingerprint()? {
            return Err(bad("it was saved with another model, another type of KV cache or other lossy options".into()));
        }
        let n = usize::try_from(number(16)).ok().filter(|&n| n <= self.n_ctx());
        let n = n.ok_or_else(|| bad(format!("{} tokens don't fit into a context of {}", number(16), self.n_ctx())))?;
        let n_computed = usize::try_from(number(24)).ok().filter(|&c| c <= n);
        let n_computed =
            n_computed.ok_or_else(|| bad(format!("it is damaged: it holds {} of {n} tokens", number(24))))?;
        let n_bytes = self.0.kv.saved_bytes(n_computed);
        if size != (HEADER + 4 * n + n_bytes + 8) as u64 {
            return Err(bad(format!("it is damaged: {size} bytes aren't what {n} tokens take")));
        }
        let mut raw = vec![0; 4 * n];
        input.read_exact(&mut raw).map_err(|e| bad(e.to_string()))?;
        let tokens: Vec<u32> = raw.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let kv = SeqKv::restore(&self.0.kv, n_computed, &mut input.by_ref().take(n_bytes as u64))?;
        let mut sum = [0; 8];
        input.file.read_exact(&mut sum).map_err(|e| bad(e.to_string()))?;
        if u64::from_le_bytes(sum) != input.sum.finish() {
            return Err(bad("it is damaged: its checksum is wrong".into()));
        }
        let n_vocab = self.config().n_vocab;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= n_vocab) {
            return Err(bad(format!("token {token} isn't in the vocabulary of {n_vocab}")));
        }
        Ok(Session::with_tokens(self.clone(), kv, tokens))
    }
}

impl Session {
    /// Writes the session to a file: beside it first, then under its name, so that it is never half there.
    ///
    /// # Errors
    /// When the file can't be written, or the model's not be read.
    pub fn save(&self, path: &Path) -> Result<(), EngineError> {
        let fingerprint = self.engine().fingerprint()?;
        let mut out = Summed::new(PartFile::replace(path)?);
        let mut head = MAGIC.to_vec();
        head.extend(fingerprint.to_le_bytes());
        head.extend((self.tokens().len() as u64).to_le_bytes());
        head.extend((self.n_computed() as u64).to_le_bytes());
        head.extend(self.tokens().iter().flat_map(|t| t.to_le_bytes()));
        let written = out.write_all(&head).and_then(|()| self.kv().save(&mut out));
        let Summed { mut file, sum } = out;
        let written = written.and_then(|()| file.write_all(&sum.finish().to_le_bytes()));
        written.map_err(|e| file.error(e))?;
        Ok(file.commit()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{EngineOptions, Generation, GenerationParams};
    use crate::gguf::Gguf;
    use crate::ops::kv::KvType;
    use crate::synth::{self, Preset};

    /// An engine, and a file with some tokens of it.
    fn saved(path: &Path) -> Engine {
        let options = EngineOptions { n_ctx: Some(64), n_threads: Some(1), ..EngineOptions::default() };
        let engine = Engine::embedded(&options).unwrap();
        let mut session = engine.session();
        session.feed(&[1, 500, 700], &mut |_| true).unwrap();
        session.save(path).unwrap();
        engine
    }

    /// With the right checksum for whatever it holds.
    fn rewrite(path: &Path, change: impl Fn(&mut [u8])) {
        let mut bytes = std::fs::read(path).unwrap();
        let end = bytes.len() - 8;
        change(&mut bytes[..end]);
        let sum = Fnv::of(&bytes[..end]);
        bytes[end..].copy_from_slice(&sum.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn damage_anywhere_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.kv");
        let engine = saved(&path);
        assert_eq!(engine.restore(&path).unwrap().tokens(), [1, 500, 700]);
        let good = std::fs::read(&path).unwrap();
        let why = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            engine.restore(&path).err().expect("it is damaged").to_string()
        };
        for at in (0..good.len()).step_by(97).chain([HEADER + 1, good.len() - 1]) {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            let why = why(&bad);
            assert!(why.contains("s.kv"), "{why}");
            assert!(at < HEADER || why.contains("checksum"), "{why}");
        }
        let mut old = good.clone();
        old[7] = b'1';
        assert!(why(&old).contains("another version"));
        std::fs::write(&path, &good).unwrap();
        rewrite(&path, |bytes| bytes[HEADER..HEADER + 4].copy_from_slice(&16919u32.to_le_bytes()));
        let why = engine.restore(&path).err().unwrap().to_string();
        assert!(why.contains("s.kv: token 16919 isn't in the vocabulary of 3072"), "{why}");
    }

    #[test]
    fn what_was_written_last_is_saved_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.kv");
        let engine = saved(&path);
        let mut session = engine.restore(&path).unwrap();
        let params = GenerationParams { n_predict: Some(3), ignore_eos: true, ..GenerationParams::default() };
        let mut g = Generation::new(&mut session, params).unwrap();
        while g.next().unwrap().is_some() {}
        assert_eq!((session.tokens().len(), session.n_computed()), (6, 5));
        session.save(&path).unwrap();
        let text = session.tokens().to_vec();
        session.free_kv();
        let mut back = engine.restore(&path).unwrap();
        assert_eq!(back.tokens(), text);
        back.feed(&[7], &mut |_| true).unwrap();
        let (tokens, logits) = (back.tokens().to_vec(), back.logits().to_vec());
        drop(back);
        let mut anew = engine.session();
        anew.feed(&[&text[..], &[7]].concat(), &mut |_| true).unwrap();
        assert!(tokens == anew.tokens() && logits == anew.logits());
    }

    /// Their KV caches have as many bytes; with some of them the model would go on, and say something else.
    #[test]
    fn what_was_saved_under_other_conditions_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.kv");
        let base = EngineOptions { n_ctx: Some(64), n_threads: Some(1), ..EngineOptions::default() };
        let engine = |seed: u64, change: &dyn Fn(&mut EngineOptions)| {
            let model = synth::Options { seed, ..synth::Options::default() };
            let bytes = synth::to_bytes(Preset::by_name("tiny-olmoe").unwrap(), &model).unwrap();
            let mut options = base.clone();
            change(&mut options);
            Engine::from_gguf(Gguf::from_static("tiny", bytes.leak()).unwrap(), &options, &|_, _| ()).unwrap()
        };
        let mixed = |o: &mut EngineOptions| (o.type_k, o.type_v) = (KvType::F16, KvType::Q8_0);
        let saved = |by: &Engine| {
            let mut session = by.session();
            session.feed(&[1, 50, 70], &mut |_| true).unwrap();
            session.save(&path).unwrap();
        };
        let exact = engine(1, &mixed);
        saved(&exact);
        assert!(engine(1, &mixed).restore(&path).is_ok());
        let n_used = exact.config().moe.as_ref().unwrap().router.n_expert_used;
        let told = |o: &mut EngineOptions| (mixed(o), o.n_expert_used = Some(n_used)).1;
        assert!(engine(1, &told).restore(&path).is_ok(), "as many experts as the model uses anyway");
        let others: [(u64, &dyn Fn(&mut EngineOptions)); 4] = [
            (2, &mixed),
            (1, &|o| (o.type_k, o.type_v) = (KvType::Q8_0, KvType::F16)),
            (1, &|o| (mixed(o), o.n_expert_used = Some(1)).1),
            (1, &|o| (mixed(o), o.lossy.drop_cold = 0.1).1),
        ];
        for (i, (seed, change)) in others.into_iter().enumerate() {
            saved(&engine(seed, change));
            let why = exact.restore(&path).err().unwrap_or_else(|| panic!("{i} was taken")).to_string();
            assert!(why.contains("another model, another type"), "{i}: {why}");
        }
    }

    /// A file made with intent: numbers that are none, under the right checksum.
    #[test]
    fn what_is_not_a_number_ends_with_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.kv");
        let engine = saved(&path);
        rewrite(&path, |bytes| bytes[HEADER + 12..].fill(0xff));
        let mut session = engine.restore(&path).unwrap();
        session.feed(&[7], &mut |_| true).unwrap();
        let error = Generation::new(&mut session, GenerationParams::default()).unwrap().next().unwrap_err().to_string();
        assert!(error.contains("NaN"), "{error}");
    }
}
