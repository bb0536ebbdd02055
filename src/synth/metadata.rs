//! The keys of a preset, as each architecture wants them.

use super::Options;
use super::preset::{Gating, Mla, Moe, Preset, Rope};
use super::vocab::Vocab;
use crate::gguf::{Encode, GgufWriter};

/// Sets a preset's keys.
pub(super) fn set(w: &mut GgufWriter, preset: &Preset, options: &Options) {
    w.set("general.architecture", preset.arch);
    w.set("general.type", "model");
    w.set("general.name", format!("random {} {}", preset.name, options.mixture.name));
    w.set("general.file_type", options.mixture.file_type);
    w.set("general.quantization_version", 2u32);
    let mut keys = ArchKeys { w, arch: preset.arch };
    shape(&mut keys, preset);
    attention(&mut keys, preset);
    rope(&mut keys, preset);
    if let Some(moe) = &preset.moe {
        experts(&mut keys, preset.arch, moe);
    }
    tokenizer(w, preset.n_vocab as usize);
}

/// Keys that begin with the architecture's name.
struct ArchKeys<'w> {
    w: &'w mut GgufWriter,
    arch: &'static str,
}

impl ArchKeys<'_> {
    fn set(&mut self, key: &str, value: impl Encode) {
        self.w.set(&format!("{}.{key}", self.arch), value);
    }
}

fn shape(keys: &mut ArchKeys<'_>, p: &Preset) {
    keys.set("block_count", p.n_layer);
    keys.set("context_length", p.n_ctx);
    keys.set("embedding_length", p.n_embd);
    keys.set("feed_forward_length", p.n_ff);
    keys.set("vocab_size", p.n_vocab);
    keys.set("attention.layer_norm_rms_epsilon", p.norm_eps);
    if p.arch == "granitemoe" {
        keys.set("embedding_scale", 12f32);
        keys.set("residual_scale", 0.22f32);
        keys.set("attention.scale", 0.015625f32);
        keys.set("logit_scale", 6f32);
    }
}

fn attention(keys: &mut ArchKeys<'_>, p: &Preset) {
    keys.set("attention.head_count", p.n_head);
    keys.set("attention.head_count_kv", p.n_head_kv);
    if let Some(mla) = &p.mla {
        latent_attention(keys, p, mla);
    } else if p.head_dim * p.n_head != p.n_embd || matches!(p.arch, "qwen3moe" | "gpt-oss") {
        keys.set("attention.key_length", p.head_dim);
        keys.set("attention.value_length", p.head_dim);
    }
    if p.sliding_window > 0 {
        keys.set("attention.sliding_window", p.sliding_window);
    }
}

fn latent_attention(keys: &mut ArchKeys<'_>, p: &Preset, mla: &Mla) {
    if mla.q_rank > 0 {
        keys.set("attention.q_lora_rank", mla.q_rank);
    } else if !matches!(p.n_layer, 26 | 27) {
        // llama.cpp knows the real models without a bottleneck by their layers and wants to be told of others
        keys.set("attention.q_lora_rank", 0u32);
    }
    keys.set("attention.kv_lora_rank", mla.kv_rank);
    // heads as they are cached: one latent vector and the rotated part
    keys.set("attention.key_length", mla.kv_rank + mla.n_rot);
    keys.set("attention.value_length", mla.kv_rank);
    keys.set("attention.key_length_mla", p.head_dim);
    keys.set("attention.value_length_mla", mla.v_dim);
}

fn rope(keys: &mut ArchKeys<'_>, p: &Preset) {
    keys.set("rope.dimension_count", p.n_rot());
    keys.set("rope.freq_base", p.rope_base);
    match p.rope {
        Rope::Plain | Rope::Llama3 { .. } => {}
        Rope::Linear(factor) => {
            keys.set("rope.scaling.type", "linear");
            keys.set("rope.scaling.factor", factor);
        }
        Rope::Yarn { factor, n_ctx_orig, log_multiplier } => {
            keys.set("rope.scaling.type", "yarn");
            keys.set("rope.scaling.factor", factor);
            keys.set("rope.scaling.original_context_length", n_ctx_orig);
            if log_multiplier != 0.0 {
                keys.set("rope.scaling.yarn_log_multiplier", log_multiplier);
            }
        }
    }
}

fn experts(keys: &mut ArchKeys<'_>, arch: &str, moe: &Moe) {
    keys.set("expert_count", moe.n_expert);
    keys.set("expert_used_count", moe.n_expert_used);
    if matches!(arch, "qwen2moe" | "qwen3moe" | "gpt-oss" | "deepseek2") {
        keys.set("expert_feed_forward_length", moe.n_ff_exp);
    }
    if matches!(arch, "qwen2moe" | "granitemoe") && moe.n_ff_shexp > 0 {
        keys.set("expert_shared_feed_forward_length", moe.n_ff_shexp);
    }
    if let Some(gating) = &moe.deepseek {
        keys.set("leading_dense_block_count", moe.n_dense);
        deepseek(keys, gating);
    }
}

fn deepseek(keys: &mut ArchKeys<'_>, gating: &Gating) {
    keys.set("expert_shared_count", gating.n_shared);
    keys.set("expert_weights_scale", gating.scale);
    keys.set("expert_weights_norm", gating.norm);
    keys.set("expert_gating_func", gating.func);
    let (n_group, n_group_used) = gating.groups;
    if n_group > 0 {
        keys.set("expert_group_count", n_group);
        keys.set("expert_group_used_count", n_group_used);
    }
}

fn tokenizer(w: &mut GgufWriter, n_vocab: usize) {
    let vocab = Vocab::of_size(n_vocab);
    w.set("tokenizer.ggml.model", "llama");
    w.set("tokenizer.ggml.pre", "default");
    w.set("tokenizer.ggml.tokens", vocab.tokens);
    w.set("tokenizer.ggml.scores", vocab.scores);
    w.set("tokenizer.ggml.token_type", vocab.kinds);
    w.set("tokenizer.ggml.unknown_token_id", 0u32);
    w.set("tokenizer.ggml.bos_token_id", 1u32);
    w.set("tokenizer.ggml.eos_token_id", 2u32);
    w.set("tokenizer.ggml.add_bos_token", true);
}
