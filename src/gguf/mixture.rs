//! Quantisation mixtures: which format each tensor of a file takes when the file is called "Q4_K_M".
//!
//! A mixture has one base format; a few tensors that suffer more from rounding get more bits, by the same
//! rules as `llama-quantize` applies without an importance matrix, so that files of one name are comparable
//! between the two. Norms, biases, routers and other small tensors are never quantised.

use crate::quant::{self, Format};

/// A named choice of formats for the tensors of a model.
#[derive(Debug)]
pub struct Mixture {
    /// The name as users type it: `q4_k_m`.
    pub name: &'static str,
    /// The number that a file of this mixture carries as `general.file_type`.
    pub file_type: u32,
    /// The format of the tensors that no rule singles out.
    pub base: &'static str,
}

/// Every mixture that can be written.
pub static MIXTURES: &[Mixture] = &[
    mixture("f32", 0, "f32"),
    mixture("f16", 1, "f16"),
    mixture("bf16", 32, "bf16"),
    mixture("q8_0", 7, "q8_0"),
    mixture("q4_0", 2, "q4_0"),
    mixture("q4_1", 3, "q4_1"),
    mixture("q5_0", 8, "q5_0"),
    mixture("q5_1", 9, "q5_1"),
    mixture("q2_k", 10, "q2_k"),
    mixture("q3_k_s", 11, "q3_k"),
    mixture("q3_k_m", 12, "q3_k"),
    mixture("q3_k_l", 13, "q3_k"),
    mixture("q4_k_s", 14, "q4_k"),
    mixture("q4_k_m", 15, "q4_k"),
    mixture("q5_k_s", 16, "q5_k"),
    mixture("q5_k_m", 17, "q5_k"),
    mixture("q6_k", 18, "q6_k"),
    mixture("iq4_nl", 25, "iq4_nl"),
    mixture("iq4_xs", 30, "iq4_xs"),
    mixture("mxfp4", 38, "mxfp4"),
];

const fn mixture(name: &'static str, file_type: u32, base: &'static str) -> Mixture {
    Mixture { name, file_type, base }
}

/// The mixture of this name, in any case. `q3_k`, `q4_k` and `q5_k` mean the `_m` one; `mxfp4_moe` is `mxfp4`.
pub fn by_name(name: &str) -> Option<&'static Mixture> {
    let name = name.to_ascii_lowercase();
    let name = match name.as_str() {
        "q3_k" => "q3_k_m",
        "q4_k" => "q4_k_m",
        "q5_k" => "q5_k_m",
        "mxfp4_moe" => "mxfp4",
        other => other,
    };
    MIXTURES.iter().find(|m| m.name == name)
}

/// What the rules need to know of a model.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Transformer layers.
    pub n_layer: u32,
    /// Experts of a layer, 0 for a dense model.
    pub n_expert: u32,
    /// Query heads that share a key and value head.
    pub n_gqa: u32,
    /// No `output.weight`: the token embedding is the output matrix too.
    pub tied: bool,
}

/// A tensor's part in the model, as far as the rules distinguish.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Embedding,
    Output,
    AttnK,
    AttnV,
    AttnOutput,
    Experts,
    Down,
    Other,
}

fn role(tensor: &str) -> Role {
    // the order matters: `ffn_down_exps` is a down projection first, an expert's second
    let rules: [(&[&str], Role); 6] = [
        (&["attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"], Role::AttnV),
        (&["attn_k.weight"], Role::AttnK),
        (&["attn_output.weight"], Role::AttnOutput),
        (&["ffn_down"], Role::Down),
        (&["_exps."], Role::Experts),
        (&["token_embd.weight"], Role::Embedding),
    ];
    if tensor == "output.weight" {
        return Role::Output;
    }
    (rules.iter())
        .find(|(parts, _)| parts.iter().any(|part| tensor.contains(part)))
        .map_or(Role::Other, |&(_, role)| role)
}

/// The layer of a tensor called `blk.N.…`.
fn layer_of(tensor: &str) -> Option<u32> {
    tensor.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// Whether a tensor may be anything but F32: matrices and stacks of matrices that are no norm and no router.
pub fn quantizable(tensor: &str, shape: &[u64]) -> bool {
    shape.iter().filter(|&&n| n > 1).count() >= 2
        && tensor.ends_with("weight")
        && !tensor.contains("_norm.weight")
        && !tensor.contains("ffn_gate_inp")
}

impl Mixture {
    /// The format of a tensor in this mixture; `None` if the tensor is to stay as it is (F32 when a model is made).
    pub fn format(&self, facts: &Facts, tensor: &str, shape: &[u64]) -> Option<&'static Format> {
        if !quantizable(tensor, shape) {
            return None;
        }
        let n = shape[0];
        let chosen = if quantised(self.base) { self.choose(facts, tensor, n) } else { self.base };
        let format = named(chosen);
        if n.is_multiple_of(format.block_len as u64) {
            return Some(format);
        }
        // a row that isn't a whole number of blocks takes the nearest format of smaller blocks
        let fallback = named(match chosen {
            "q2_k" | "q3_k" => "q4_0",
            "q4_k" => "q5_0",
            "q5_k" => "q5_1",
            "q6_k" => "q8_0",
            "iq4_xs" => "iq4_nl",
            other => other,
        });
        let fits = n.is_multiple_of(fallback.block_len as u64);
        Some(if fits { fallback } else { named("f16") })
    }

    /// The format's name before the row's length has its say.
    fn choose(&self, facts: &Facts, tensor: &str, n: u64) -> &'static str {
        let (layer, n_layer) = (layer_of(tensor).unwrap_or(0), facts.n_layer);
        let more_bits = layer < n_layer / 8 || layer >= 7 * n_layer / 8 || (layer - n_layer / 8) % 3 == 2;
        let eight_experts = facts.n_expert == 8;
        let role = match role(tensor) {
            Role::Embedding if facts.tied => Role::Output,
            other => other,
        };
        if self.base == "mxfp4" {
            let expert = role == Role::Experts || tensor.contains("ffn_down_exps");
            return if expert { "mxfp4" } else { "q8_0" };
        }
        match (role, self.name) {
            (Role::Output, "q8_0") => "q8_0",
            (Role::Output, _) if !n.is_multiple_of(named(self.base).block_len as u64) => "q8_0",
            (Role::Output, _) => "q6_k",

            // eight experts: attention is a small part of the file
            (Role::AttnK | Role::AttnV, _) if eight_experts => "q8_0",
            (Role::AttnV, "q2_k") if facts.n_gqa >= 4 => "q4_k",
            (Role::AttnV, "q2_k") => "q3_k",
            (Role::AttnV, "q3_k_m") if layer < 2 => "q5_k",
            (Role::AttnV, "q3_k_m") => "q4_k",
            (Role::AttnV, "q3_k_l") => "q5_k",
            (Role::AttnV, "q4_k_s") if layer < 4 => "q5_k",
            (Role::AttnV, "iq4_nl" | "iq4_xs") if facts.n_gqa >= 4 => "q5_k",
            (Role::AttnV | Role::Down, "q4_k_m" | "q5_k_m") if more_bits => "q6_k",

            (Role::Down, "q2_k") => "q3_k",
            (Role::Down, "q3_k_m") if layer < n_layer / 16 => "q5_k",
            (Role::Down, "q3_k_m") => "q4_k",
            (Role::Down, "q3_k_l") => "q5_k",
            (Role::Down, "q4_k_s" | "iq4_nl" | "iq4_xs") if layer < n_layer / 8 => "q5_k",

            (Role::AttnOutput, "q3_k_s" | "q4_k_s" | "q4_k_m" | "iq4_nl" | "iq4_xs") if eight_experts => "q5_k",
            (Role::AttnOutput, "q2_k" | "q3_k_m") if eight_experts => "q5_k",
            (Role::AttnOutput, "q2_k") => "q3_k",
            (Role::AttnOutput, "q3_k_m") => "q4_k",
            (Role::AttnOutput, "q3_k_l") if !eight_experts => "q5_k",
            _ => self.base,
        }
    }
}

/// Whether a base format rounds in blocks: the plain floating-point mixtures have no exceptions.
fn quantised(base: &str) -> bool {
    named(base).block_len > 1
}

fn named(name: &str) -> &'static Format {
    quant::by_name(name).expect("mixtures name registered formats only")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLMOE: Facts = Facts { n_layer: 16, n_expert: 64, n_gqa: 1, tied: false };

    fn format(mixture: &str, facts: &Facts, tensor: &str, shape: &[u64]) -> &'static str {
        let m = by_name(mixture).unwrap();
        m.format(facts, tensor, shape).map_or("as it is", |f| f.name)
    }

    #[test]
    fn every_mixture_names_registered_formats() {
        for m in MIXTURES {
            assert!(quant::by_name(m.base).is_some(), "{}: {}", m.name, m.base);
            assert_eq!(by_name(&m.name.to_uppercase()).unwrap().name, m.name);
        }
        assert_eq!(by_name("Q4_K").unwrap().name, "q4_k_m");
        assert!(by_name("q4_k_x").is_none());
    }

    #[test]
    fn q4_k_m_gives_half_of_the_sensitive_tensors_six_bits() {
        let six: Vec<u32> = (0..16)
            .filter(|il| {
                let name = format!("blk.{il}.ffn_down_exps.weight");
                format("q4_k_m", &OLMOE, &name, &[1024, 2048, 64]) == "q6_k"
            })
            .collect();
        assert_eq!(six, [0, 1, 4, 7, 10, 13, 14, 15]);
        let gate = format("q4_k_m", &OLMOE, "blk.0.ffn_gate_exps.weight", &[2048, 1024, 64]);
        assert_eq!(gate, "q4_k");
        assert_eq!(format("q4_k_m", &OLMOE, "output.weight", &[2048, 50304]), "q6_k");
        assert_eq!(format("q4_k_m", &OLMOE, "token_embd.weight", &[2048, 50304]), "q4_k");
        let tied = Facts { tied: true, ..OLMOE };
        assert_eq!(format("q4_k_m", &tied, "token_embd.weight", &[2048, 50304]), "q6_k");
    }

    #[test]
    fn rows_that_no_block_divides_fall_back() {
        let down = "blk.2.ffn_down_exps.weight";
        assert_eq!(format("q4_k_m", &OLMOE, down, &[1408, 2048, 64]), "q5_0");
        assert_eq!(format("q6_k", &OLMOE, down, &[1408, 2048, 64]), "q8_0");
        assert_eq!(format("iq4_xs", &OLMOE, down, &[1408, 2048, 64]), "iq4_nl");
        assert_eq!(format("q4_0", &OLMOE, down, &[1400, 2048, 64]), "f16");
    }

    #[test]
    fn small_tensors_stay() {
        for (name, shape) in [
            ("blk.0.attn_norm.weight", &[2048][..]),
            ("blk.0.ffn_gate_inp.weight", &[2048, 64]),
            ("blk.0.ffn_gate_inp_shexp.weight", &[2048]),
            ("blk.0.ffn_gate_exps.bias", &[1024, 64]),
            ("blk.0.attn_sinks.weight", &[64]),
        ] {
            assert_eq!(format("q4_0", &OLMOE, name, shape), "as it is", "{name}");
        }
    }

    #[test]
    fn mxfp4_is_for_experts() {
        let facts = Facts { n_expert: 32, n_layer: 24, ..OLMOE };
        let up = "blk.0.ffn_up_exps.weight";
        assert_eq!(format("mxfp4", &facts, up, &[2880, 2880, 32]), "mxfp4");
        assert_eq!(format("mxfp4", &facts, "blk.0.attn_k_b.weight", &[128, 512, 16]), "q8_0");
        assert_eq!(format("mxfp4", &facts, "token_embd.weight", &[2880, 1000]), "q8_0");
    }
}
