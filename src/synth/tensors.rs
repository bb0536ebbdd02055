//! Which tensors a preset has, in the file's order, and what they are filled with.

use super::preset::{Mla, Moe, Preset, Rope};
use super::{Options, router};
use crate::gguf::mixture::Facts;
use crate::quant::{self, Format};

/// A tensor to be written.
pub(super) struct Spec {
    pub(super) name: String,
    /// The fastest dimension first.
    pub(super) shape: Vec<u64>,
    pub(super) format: &'static Format,
    pub(super) fill: Fill,
}

impl Spec {
    /// Bytes of the tensor's data.
    pub(super) fn n_bytes(&self) -> u64 {
        let blocks = self.shape.iter().product::<u64>() / self.format.block_len as u64;
        blocks * self.format.block_bytes as u64
    }
}

/// What a tensor holds.
pub(super) enum Fill {
    /// Independent normal weights.
    Normal {
        mean: f32,
        std: f32,
    },
    /// Normal weights of mean 0, but for the leading columns of each row, which all hold the row's value.
    Headed {
        std: f32,
        head: fn(&Preset, row: u64) -> f32,
    },
    /// A router: see [`router::weights`].
    Router {
        layer: u32,
    },
    Values(Vec<f32>),
}

/// Spread of the norms around 1 and of the biases around 0.
const SMALL: f32 = 0.02;

/// The tensors of a preset.
pub(super) fn specs(preset: &Preset, options: &Options) -> Vec<Spec> {
    let n_layer = preset.n_layer;
    let facts = Facts {
        n_layer,
        n_expert: preset.moe.as_ref().map_or(0, |moe| moe.n_expert),
        n_gqa: preset.n_head / preset.n_head_kv,
        tied: preset.tied,
    };
    let mut b = Builder { preset, options, facts, specs: Vec::new(), layer: String::new(), listens: false };
    let (n_embd, n_vocab) = (preset.n_embd, preset.n_vocab);
    b.embedding();
    if let Rope::Llama3 { factor, n_ctx_orig } = preset.rope {
        let values = llama3_factors(preset, factor, n_ctx_orig as f32);
        b.push("rope_freqs.weight".into(), &[preset.n_rot() / 2], Fill::Values(values));
    }
    for il in 0..n_layer {
        b.layer = format!("blk.{il}.");
        b.listens = il == 0 && options.router_skew > 0.0 && router::listens(preset);
        b.vector("attn_norm.weight", &[n_embd], 1.0, SMALL);
        match &preset.mla {
            Some(mla) => b.latent_attention(mla),
            None => b.attention(),
        }
        // gpt-oss calls the norm before its experts by what stands before it
        let norm = if preset.arch == "gpt-oss" { "post_attention_norm.weight" } else { "ffn_norm.weight" };
        b.vector(norm, &[n_embd], 1.0, SMALL);
        match &preset.moe {
            Some(moe) if il >= moe.n_dense => b.experts(moe, il),
            _ => b.feed_forward("", preset.n_ff),
        }
    }
    b.layer.clear();
    b.vector("output_norm.weight", &[n_embd], 1.0, SMALL);
    if !preset.tied {
        b.matrix("output.weight", &[n_embd, n_vocab], 1.0);
    }
    b.specs
}

struct Builder<'a> {
    preset: &'a Preset,
    options: &'a Options,
    facts: Facts,
    specs: Vec<Spec>,
    /// `blk.N.`, or nothing outside of the layers.
    layer: String,
    /// This layer's attention is made to look at the tokens just before, see [`router`].
    listens: bool,
}

impl Builder<'_> {
    fn push(&mut self, name: String, shape: &[u32], fill: Fill) {
        let shape: Vec<u64> = shape.iter().map(|&n| n.into()).collect();
        let f32 = quant::by_name("f32").expect("F32 is registered");
        let format = self.options.mixture.format(&self.facts, &name, &shape).unwrap_or(f32);
        self.specs.push(Spec { name, shape, format, fill });
    }

    fn vector(&mut self, name: &str, shape: &[u32], mean: f32, std: f32) {
        self.push(format!("{}{name}", self.layer), shape, Fill::Normal { mean, std });
    }

    /// A matrix that turns inputs of order one into outputs of order `gain`.
    fn matrix(&mut self, name: &str, shape: &[u32], gain: f32) {
        self.vector(name, shape, 0.0, gain / (shape[0] as f32).sqrt());
    }

    /// A matrix that attention begins with: what it makes of the stream's constant matters if the layer listens.
    fn projection(&mut self, name: &str, shape: &[u32], head: fn(&Preset, u64) -> f32) {
        if !self.listens {
            return self.matrix(name, shape, 1.0);
        }
        let std = 1.0 / (shape[0] as f32).sqrt();
        self.push(format!("{}{name}", self.layer), shape, Fill::Headed { std, head });
    }

    /// What attention ends with.
    fn attn_output(&mut self, n_in: u32) {
        let gain = self.options.residual_gain;
        let gain = if self.listens { router::listening_gain(gain) } else { gain };
        self.matrix("attn_output.weight", &[n_in, self.preset.n_embd], gain);
    }

    /// A matrix whose output is added to the residual stream.
    fn residual(&mut self, name: &str, shape: &[u32]) {
        self.matrix(name, shape, self.options.residual_gain);
    }

    fn embedding(&mut self) {
        let shape = [self.preset.n_embd, self.preset.n_vocab];
        let fill = if self.options.router_skew > 0.0 {
            Fill::Headed { std: 1.0, head: |preset, _| router::constant(preset.n_embd) }
        } else {
            Fill::Normal { mean: 0.0, std: 1.0 }
        };
        self.push("token_embd.weight".into(), &shape, fill);
    }

    fn attention(&mut self) {
        let p = self.preset;
        let (n_embd, n_q, n_kv) = (p.n_embd, p.n_head * p.head_dim, p.n_head_kv * p.head_dim);
        let biased = matches!(p.arch, "qwen2moe" | "gpt-oss");
        let parts: [(_, _, fn(&Preset, u64) -> f32); 3] =
            [("q", n_q, router::query_head), ("k", n_kv, router::key_head), ("v", n_kv, router::value_head)];
        for (letter, n, head) in parts {
            self.projection(&format!("attn_{letter}.weight"), &[n_embd, n], head);
            if biased {
                self.vector(&format!("attn_{letter}.bias"), &[n], 0.0, SMALL);
            }
        }
        self.attn_output(n_q);
        // olmoe normalises the whole row, qwen3moe each head
        let norms = match p.arch {
            "olmoe" => Some((n_q, n_kv)),
            "qwen3moe" => Some((p.head_dim, p.head_dim)),
            _ => None,
        };
        if let Some((n_q, n_k)) = norms {
            self.vector("attn_q_norm.weight", &[n_q], 1.0, SMALL);
            self.vector("attn_k_norm.weight", &[n_k], 1.0, SMALL);
        }
        if p.arch == "gpt-oss" {
            self.vector("attn_output.bias", &[n_embd], 0.0, SMALL);
            self.vector("attn_sinks.weight", &[p.n_head], 0.0, 1.0);
        }
    }

    fn latent_attention(&mut self, mla: &Mla) {
        let p = self.preset;
        let (n_embd, n_head, n_q) = (p.n_embd, p.n_head, p.n_head * p.head_dim);
        if mla.q_rank > 0 {
            self.matrix("attn_q_a.weight", &[n_embd, mla.q_rank], 1.0);
            self.vector("attn_q_a_norm.weight", &[mla.q_rank], 1.0, SMALL);
            self.matrix("attn_q_b.weight", &[mla.q_rank, n_q], 1.0);
        } else {
            self.projection("attn_q.weight", &[n_embd, n_q], router::query_head);
        }
        self.projection("attn_kv_a_mqa.weight", &[n_embd, mla.kv_rank + mla.n_rot], router::key_head);
        self.vector("attn_kv_a_norm.weight", &[mla.kv_rank], 1.0, SMALL);
        // keys are never built: a query's unrotated part is taken to the latent space by this matrix' transpose
        self.matrix("attn_k_b.weight", &[p.head_dim - mla.n_rot, mla.kv_rank, n_head], 1.0);
        self.matrix("attn_v_b.weight", &[mla.kv_rank, mla.v_dim, n_head], 1.0);
        self.attn_output(n_head * mla.v_dim);
    }

    fn experts(&mut self, moe: &Moe, il: u32) {
        let (p, n_embd) = (self.preset, self.preset.n_embd);
        let (n_ff, n_expert) = (moe.n_ff_exp, moe.n_expert);
        let router = format!("{}ffn_gate_inp.weight", self.layer);
        self.push(router, &[n_embd, n_expert], Fill::Router { layer: il });
        self.matrix("ffn_gate_exps.weight", &[n_embd, n_ff, n_expert], 1.0);
        self.matrix("ffn_up_exps.weight", &[n_embd, n_ff, n_expert], 1.0);
        self.residual("ffn_down_exps.weight", &[n_ff, n_embd, n_expert]);
        if p.arch == "gpt-oss" {
            self.vector("ffn_gate_inp.bias", &[n_expert], 0.0, SMALL);
            for (part, n) in [("gate", n_ff), ("up", n_ff), ("down", n_embd)] {
                self.vector(&format!("ffn_{part}_exps.bias"), &[n, n_expert], 0.0, SMALL);
            }
        }
        if moe.n_ff_shexp > 0 {
            self.feed_forward("_shexp", moe.n_ff_shexp);
        }
        if p.arch == "qwen2moe" {
            self.vector("ffn_gate_inp_shexp.weight", &[n_embd], 0.0, 1.0 / (n_embd as f32).sqrt());
        }
        if moe.deepseek.as_ref().is_some_and(|gating| gating.bias) {
            self.vector("exp_probs_b.bias", &[n_expert], 0.0, SMALL);
        }
    }

    fn feed_forward(&mut self, suffix: &str, n_ff: u32) {
        let n_embd = self.preset.n_embd;
        self.matrix(&format!("ffn_gate{suffix}.weight"), &[n_embd, n_ff], 1.0);
        self.matrix(&format!("ffn_up{suffix}.weight"), &[n_embd, n_ff], 1.0);
        self.residual(&format!("ffn_down{suffix}.weight"), &[n_ff, n_embd]);
    }
}

/// Llama 3.1's divisors of the rotary frequencies: 1 for short wavelengths, `factor` for long ones, and
/// a blend between; its low and high factors are 1 and 4.
fn llama3_factors(preset: &Preset, factor: f32, n_ctx_orig: f32) -> Vec<f32> {
    let (low, high) = (1.0, 4.0);
    (0..preset.n_rot() / 2)
        .map(|i| {
            let exponent = f64::from(2 * i) / f64::from(preset.n_rot());
            let wavelength = std::f64::consts::TAU * f64::from(preset.rope_base).powf(exponent);
            let turns = n_ctx_orig / wavelength as f32;
            let blend = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            1.0 / ((1.0 - blend) / factor + blend)
        })
        .collect()
}
