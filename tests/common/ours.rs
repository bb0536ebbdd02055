//! oncall's logits, for comparing.
#![allow(dead_code)] // each test uses its part

use oncall::engine::{Engine, EngineOptions};
use oncall::ops::KvType;
use std::path::Path;

/// The logits after each of the tokens, (n_tokens, n_vocab), with keys and values of this type in the cache.
pub fn logits_all(path: &Path, tokens: &[u32], kv: KvType) -> Vec<f32> {
    let options = EngineOptions { n_ctx: Some(1024), type_k: kv, type_v: kv, ..EngineOptions::default() };
    let engine = Engine::load(path, &options, &|_, _| ()).unwrap_or_else(|e| panic!("{e}"));
    let mut logits = Vec::new();
    engine.session().feed_all(tokens, &mut |_, part| logits.extend_from_slice(part)).expect("the tokens fit");
    logits
}
