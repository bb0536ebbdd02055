//! Saved sessions: tokens and KV cache in a file, bound to the model that they came from.

use super::{Engine, EngineError, Session};
use crate::gguf::PartFile;
use crate::ops::kv::SeqKv;
use std::fs::File;
use std::hash::Hasher;
use std::io::{BufReader, Read, Write};
use std::path::Path;

const MAGIC: &[u8; 8] = b"oncall01";

impl Engine {
    /// What a saved session must have in common with this engine: the model's tensors and the cache's layout.
    fn fingerprint(&self) -> u64 {
        // FNV-1a: stable between versions of the standard library, which its own hasher isn't.
        struct Fnv(u64);
        impl Hasher for Fnv {
            fn finish(&self) -> u64 {
                self.0
            }
            fn write(&mut self, bytes: &[u8]) {
                bytes.iter().for_each(|&b| self.0 = (self.0 ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
            }
        }
        let mut h = Fnv(0xcbf2_9ce4_8422_2325);
        for t in self.gguf().tensors() {
            h.write(t.name.as_bytes());
            t.shape().iter().for_each(|d| h.write(&d.to_le_bytes()));
            h.write(&t.format.id.to_le_bytes());
        }
        h.write(&(self.0.kv.saved_bytes(1) as u64).to_le_bytes());
        h.finish()
    }

    /// Reads a session that [`Session::save`] wrote.
    ///
    /// # Errors
    /// When the file can't be read, is damaged, or comes from another model, KV cache type or a longer context.
    pub fn restore(&self, path: &Path) -> Result<Session, EngineError> {
        let bad = |why: String| EngineError::Saved { path: path.display().to_string(), why };
        let file = File::open(path).map_err(|e| bad(e.to_string()))?;
        let size = file.metadata().map_err(|e| bad(e.to_string()))?.len();
        let mut input = BufReader::new(file);
        let mut head = [0; 24];
        input.read_exact(&mut head).map_err(|_| bad("it is too short to be a saved session".into()))?;
        let number = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| head[at + i]));
        if &head[..8] != MAGIC {
            return Err(bad("it isn't a saved session of oncall".into()));
        }
        if number(8) != self.fingerprint() {
            return Err(bad("it was saved with another model or another type of KV cache".into()));
        }
        let n = usize::try_from(number(16)).ok().filter(|&n| n <= self.n_ctx());
        let n = n.ok_or_else(|| bad(format!("{} tokens don't fit into a context of {}", number(16), self.n_ctx())))?;
        if size != (24 + 4 * n + self.0.kv.saved_bytes(n)) as u64 {
            return Err(bad(format!("it is damaged: {size} bytes aren't what {n} tokens take")));
        }
        let mut raw = vec![0; 4 * n];
        input.read_exact(&mut raw).map_err(|e| bad(e.to_string()))?;
        let tokens: Vec<u32> = raw.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let n_vocab = self.config().n_vocab;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= n_vocab) {
            return Err(EngineError::NoSuchToken { token, n_vocab });
        }
        let kv = SeqKv::restore(&self.0.kv, n, &mut input)?;
        Ok(Session::with_tokens(self.clone(), kv, tokens))
    }
}

impl Session {
    /// Writes the session to a file: beside it first, then under its name, so that it is never half there.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save(&self, path: &Path) -> Result<(), EngineError> {
        let mut file = PartFile::replace(path)?;
        let mut head = MAGIC.to_vec();
        head.extend(self.engine().fingerprint().to_le_bytes());
        head.extend((self.tokens().len() as u64).to_le_bytes());
        head.extend(self.tokens().iter().flat_map(|t| t.to_le_bytes()));
        file.write_all(&head).and_then(|()| self.kv().save(&mut file)).map_err(|e| file.error(e))?;
        Ok(file.commit()?)
    }
}
