//! How sensitive a model is by nature: the same file with its norms' weights changed by one unit in the last place.
//!
//! Quantised activations make a forward pass discontinuous. A sum that comes out one unit higher moves an activation over a
//! rounding boundary now and then, by a 127th of its block's largest; the next layers see that, and round other activations
//! differently. So two engines whose arithmetic differs in nothing but the order of f32 sums drift apart, and so does one engine
//! from itself when its input moves by as little. What the reference moves by under such a nudge is the yardstick for
//! an engine that isn't the reference bit for bit.
#![allow(dead_code)] // each test uses its part

use super::vocab::Random;
use oncall::gguf::Gguf;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Copies a model; in the copy each weight of a norm is its neighbour among the f32 numbers, above or below.
pub fn nudge(from: &Path, to: &Path, seed: u64) {
    std::fs::copy(from, to).unwrap_or_else(|e| panic!("{} to {}: {e}", from.display(), to.display()));
    let file = std::fs::File::options().read(true).write(true).open(to).expect("the copy opens");
    let gguf = Gguf::open(to).expect("the copy is sound");
    let mut random = Random(seed);
    let mut n = 0;
    for tensor in gguf.tensors().iter().filter(|t| t.format.name == "f32" && t.name.contains("norm")) {
        let mut bytes = vec![0; tensor.n_bytes as usize];
        file.read_exact_at(&mut bytes, tensor.offset).expect("the tensor is there");
        for weight in bytes.as_chunks_mut::<4>().0 {
            let x = f32::from_le_bytes(*weight);
            *weight = if random.below(2) == 0 { x.next_up() } else { x.next_down() }.to_le_bytes();
        }
        file.write_all_at(&bytes, tensor.offset).expect("the tensor is written");
        n += 1;
    }
    assert!(n > 0, "{} has no norms in f32", from.display());
}
