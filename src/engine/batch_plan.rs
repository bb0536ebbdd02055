//! How many sequences a batch should run together: more of them share each read of an expert, but their KV cache takes the
//! memory that slots for experts could have. Pure arithmetic over the header and the budget.

use super::budget::needs;
use super::{Budget, EngineError, EngineOptions};
use crate::arch;
use crate::cpu::Isa;
use crate::gguf::Gguf;
use crate::ops::kv::KV_BLOCK;

/// What a batch is like, as far as it's known before it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchShape {
    /// Sequences in all.
    pub n_sequences: Option<usize>,
    /// Bytes of a prompt, in the mean.
    pub prompt_bytes: Option<usize>,
    /// Tokens that one writes at most, in the mean.
    pub n_predict: Option<usize>,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct BatchPlan {
    /// Sequences at the same time.
    pub n_sequences: usize,
    /// Positions of the KV cache for all of them.
    pub kv_positions: usize,
    /// Why, in a sentence.
    pub why: String,
}

/// Sequences that are considered. Beyond the last one nothing is gained on a CPU: its cores multiply as fast as they can.
const CANDIDATES: &[usize] = &[1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128];
/// Bytes of a prompt to a token, roughly: English text and JSON have about four.
const BYTES_A_TOKEN: usize = 4;
/// What a machine does in a second, by which only the *ratio* of rates is decided: bytes read from memory, packed bytes
/// multiplied by a token, bytes read from the disk. From a machine of two cores with AVX-512 (docs/performance.md).
const MEMORY: f64 = 15e9;
const MULTIPLY: f64 = 150e9;
const DISK: f64 = 0.9e9;
/// More sequences have to give at least this much more.
const WORTH: f64 = 1.03;

/// A model's sizes, as far as the rate depends on them.
#[derive(Clone, Copy, Debug)]
struct Costs {
    /// Bytes of dense weights.
    dense: f64,
    /// Bytes of all experts.
    experts: f64,
    /// Experts of a layer, and those that a token uses.
    n_expert: f64,
    used: f64,
}

impl Costs {
    /// Tokens a second with `n` sequences and so many bytes of slots.
    fn rate(&self, n: f64, slots: f64) -> f64 {
        let share = self.used / self.n_expert;
        // The share of experts that at least one of n tokens wants, if each chooses by itself.
        let wanted = self.experts * (1.0 - (1.0 - share).powf(n));
        let missing = 1.0 - (slots / self.experts.max(1.0)).min(1.0);
        let compute = ((self.dense + wanted) / MEMORY).max(n * (self.dense + self.experts * share) / MULTIPLY);
        n / compute.max(wanted * missing / DISK)
    }
}

/// Positions of the KV cache for `n` sequences of this shape: room for the mean, a block more for each, and for one full context.
fn kv_positions(shape: &BatchShape, n: usize, n_ctx: usize) -> usize {
    let prompt = shape.prompt_bytes.map_or(n_ctx / 4, |b| b / BYTES_A_TOKEN);
    let mean = prompt.saturating_add(shape.n_predict.unwrap_or(n_ctx / 4)).min(n_ctx);
    n.saturating_mul(mean + KV_BLOCK).max(n_ctx)
}

/// Chooses the number of sequences for a batch of this shape, or divides the memory for a number that was given.
///
/// # Errors
/// If the model isn't sound, or not even one sequence fits into the memory.
pub fn plan_batch(
    gguf: &Gguf,
    o: &EngineOptions,
    shape: &BatchShape,
    given: Option<usize>,
) -> Result<BatchPlan, EngineError> {
    let of_model = |source| EngineError::Model { file: gguf.name().into(), source };
    let (model, loader) = arch::declare(gguf, Isa::get()?, o.n_expert_used).map_err(of_model)?;
    let dense = loader.declared_bytes();
    let n_ctx = o.n_ctx_of(&model.config);
    let budget = |n: usize| {
        let o = EngineOptions { n_sessions: n, kv_positions: Some(kv_positions(shape, n, n_ctx)), ..o.clone() };
        Budget::new(&needs(&o, &model, dense, n_ctx)?, &o, o.memory)
    };
    if let Some(n) = given {
        budget(n)?;
        return Ok(BatchPlan {
            n_sequences: n,
            kv_positions: kv_positions(shape, n, n_ctx),
            why: "as asked for".into(),
        });
    }
    let (n_expert, used) =
        model.config.moe.as_ref().map_or((1.0, 1.0), |m| (m.router.n_expert as f64, m.router.n_expert_used as f64));
    let experts = model.store_layout().map_or(0.0, |l| l.bytes_for_all() as f64);
    let costs = Costs { dense: dense as f64, experts, n_expert, used };
    // More than a block of tokens holds, or than there are, would only wait.
    let most = shape.n_sequences.unwrap_or(usize::MAX).min(o.chunk).max(1);
    let one = budget(1)?;
    let fits = CANDIDATES.iter().filter(|&&n| n > 1 && n <= most).filter_map(|&n| Some((n, budget(n).ok()?)));
    let all: Vec<(usize, Budget, f64)> =
        [(1, one)].into_iter().chain(fits).map(|(n, b)| (n, b, costs.rate(n as f64, b.slots as f64))).collect();
    Ok(choose(&all, shape, n_ctx, experts))
}

fn choose(all: &[(usize, Budget, f64)], shape: &BatchShape, n_ctx: usize, experts: f64) -> BatchPlan {
    let best = all.iter().map(|c| c.2).fold(0.0, f64::max);
    let at = all.iter().position(|c| c.2 * WORTH >= best).unwrap_or(0);
    let (n, budget, _) = all[at];
    let sequences = if n == 1 { "1 sequence".into() } else { format!("{n} sequences") };
    let slots = if experts > 0.0 {
        format!(", slots for {:.0} % of the experts", 100.0 * budget.slots as f64 / experts)
    } else {
        String::new()
    };
    let others = if all.len() > 1 { "; by estimate neither more nor fewer write more tokens/s" } else { "" };
    let why = format!("{sequences}: {} MiB of KV cache{slots}{others}", budget.kv >> 20);
    BatchPlan { n_sequences: n, kv_positions: kv_positions(shape, n, n_ctx), why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{EMBEDDED_NAME, Memory, embedded_bytes};

    const OLMOE: Costs = Costs { dense: 0.3e9, experts: 3.6e9, n_expert: 64.0, used: 8.0 };

    #[test]
    fn paged_many_sequences_share_reads() {
        let quarter = 0.9e9;
        let (one, many) = (OLMOE.rate(1.0, quarter), OLMOE.rate(64.0, quarter));
        assert!(many > 6.0 * one, "{one} {many}");
        // Slots that went to the KV cache are missed.
        assert!(OLMOE.rate(64.0, 0.1e9) < many);
        let dense = Costs { dense: 1e9, experts: 0.0, n_expert: 1.0, used: 1.0 };
        assert!((dense.rate(1.0, 0.0) - 15.0).abs() < 1e-9);
    }

    #[test]
    fn the_budget_decides() {
        let gguf = Gguf::from_static(EMBEDDED_NAME, embedded_bytes()).unwrap();
        let shape = BatchShape { n_sequences: Some(1000), prompt_bytes: Some(400), n_predict: Some(100) };
        let plan = |mib: u64, n| {
            let o = EngineOptions { memory: Memory::Bytes(mib << 20), ..EngineOptions::default() };
            plan_batch(&gguf, &o, &shape, n)
        };
        let wide = plan(2048, None).unwrap();
        assert!(wide.n_sequences >= 8, "{wide:?}");
        assert_eq!(wide.kv_positions, wide.n_sequences * (200 + 64));
        // The least that works at all is a single sequence's.
        let Err(EngineError::Budget { smallest, .. }) = plan(1, None) else { panic!("one MiB is too little") };
        let tight = plan((smallest >> 20) + 1, None).unwrap();
        assert!(tight.n_sequences < wide.n_sequences, "{tight:?}");
        let e = plan((smallest >> 20) + 1, Some(5000)).unwrap_err().to_string();
        assert!(e.contains("too little") && e.contains("fewer sequences (--sequences)"), "{e}");
        let e = plan(1, Some(1)).unwrap_err().to_string();
        assert!(e.contains("too little") && !e.contains("--sequences"), "{e}");
        assert!(wide.why.starts_with(&format!("{} sequences: ", wide.n_sequences)) && wide.why.contains("experts"));
        assert_eq!(plan(2048, Some(5)).unwrap().n_sequences, 5);
        let few = BatchShape { n_sequences: Some(3), ..shape };
        assert!(plan_batch(&gguf, &EngineOptions::default(), &few, None).unwrap().n_sequences <= 3);
        let one = BatchShape { n_sequences: Some(1), ..shape };
        let plan = plan_batch(&gguf, &EngineOptions::default(), &one, None).unwrap();
        assert!(plan.why.starts_with("1 sequence: "), "{}", plan.why);
        let (bytes, share_of, dense, kv, activations, base, slots, chunk, least) =
            (None, None, 0, 1 << 20, 0, 0, 0, 1, 0);
        let budget = Budget { bytes, share_of, dense, kv, activations, base, slots, chunk, least };
        let dense = choose(&[(1, budget, 1.0)], &one, 256, 0.0);
        assert!(!dense.why.contains("experts"), "{}", dense.why);
    }
}
