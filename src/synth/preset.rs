//! The shapes that can be generated: real models' dimensions, and tiny ones of every architecture and option.

/// A model's shape: what its metadata says and what follows from it for its tensors.
#[derive(Clone, Debug)]
pub struct Preset {
    /// The name on the command line.
    pub name: &'static str,
    /// `general.architecture`.
    pub arch: &'static str,
    /// Transformer layers.
    pub n_layer: u32,
    /// Width of the residual stream.
    pub n_embd: u32,
    /// Query heads.
    pub n_head: u32,
    /// Key and value heads.
    pub n_head_kv: u32,
    /// Width of a head; with [`Mla`] the two parts of a query together.
    pub head_dim: u32,
    /// Width of a dense feed-forward network.
    pub n_ff: u32,
    /// Tokens in the vocabulary.
    pub n_vocab: u32,
    /// Trained context length.
    pub n_ctx: u32,
    /// Base of the rotary angles.
    pub rope_base: f32,
    /// How positions beyond the original context are scaled.
    pub rope: Rope,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// The token embedding is the output matrix too.
    pub tied: bool,
    /// Experts; `None` for a dense model.
    pub moe: Option<Moe>,
    /// Latent attention, as DeepSeek's.
    pub mla: Option<Mla>,
    /// Tokens that every second layer looks back at, 0 for all.
    pub sliding_window: u32,
}

/// The experts of a layer.
#[derive(Clone, Debug)]
pub struct Moe {
    /// Experts.
    pub n_expert: u32,
    /// Experts that a token uses.
    pub n_expert_used: u32,
    /// Width of an expert.
    pub n_ff_exp: u32,
    /// Width of the shared experts together, 0 for none.
    pub n_ff_shexp: u32,
    /// Layers at the start that have a dense network instead.
    pub n_dense: u32,
    /// DeepSeek's options.
    pub deepseek: Option<Gating>,
}

/// How a DeepSeek-style router turns scores into choices and weights.
#[derive(Clone, Debug)]
pub struct Gating {
    /// `expert_gating_func`: 1 softmax, 2 sigmoid.
    pub func: u32,
    /// A bias on the scores that counts for choosing only.
    pub bias: bool,
    /// The chosen weights are scaled to sum to one.
    pub norm: bool,
    /// Factor of the weights.
    pub scale: f32,
    /// Groups of experts, and how many of them a token may use; 0 and 0 for no groups.
    pub groups: (u32, u32),
    /// Shared experts, each as wide as a routed one.
    pub n_shared: u32,
}

/// Ranks and head widths of latent attention.
#[derive(Clone, Debug)]
pub struct Mla {
    /// Rank of the queries' bottleneck, 0 for none.
    pub q_rank: u32,
    /// Rank of what is cached in place of keys and values.
    pub kv_rank: u32,
    /// Rotated dimensions of a head.
    pub n_rot: u32,
    /// Width of a value head.
    pub v_dim: u32,
}

/// Scaling of rotary positions.
#[derive(Clone, Debug)]
pub enum Rope {
    /// None.
    Plain,
    /// Positions divided by a factor.
    Linear(f32),
    /// YaRN: low frequencies interpolated, high ones kept.
    Yarn {
        /// How much longer the context got.
        factor: f32,
        /// Before that.
        n_ctx_orig: u32,
        /// DeepSeek's `yarn_log_multiplier`, 0 for none.
        log_multiplier: f32,
    },
    /// A factor for each frequency in `rope_freqs.weight`, as Llama 3.1 computes them.
    Llama3 {
        /// Divisor of the lowest frequencies.
        factor: f32,
        /// Context length before scaling.
        n_ctx_orig: u32,
    },
}

impl Preset {
    /// The preset of this name.
    pub fn by_name(name: &str) -> Option<&'static Preset> {
        PRESETS.iter().find(|p| p.name == name)
    }

    /// Small enough to be made in a test.
    pub fn is_tiny(&self) -> bool {
        self.name.starts_with("tiny-")
    }

    /// Rotated dimensions of a head.
    pub fn n_rot(&self) -> u32 {
        self.mla.as_ref().map_or(self.head_dim, |mla| mla.n_rot)
    }
}

/// What most tiny presets share.
const TINY: Preset = Preset {
    name: "tiny-llama",
    arch: "llama",
    n_layer: 3,
    n_embd: 256,
    n_head: 4,
    n_head_kv: 2,
    head_dim: 64,
    n_ff: 512,
    n_vocab: 1024,
    n_ctx: 2048,
    rope_base: 1e4,
    rope: Rope::Plain,
    norm_eps: 1e-5,
    tied: false,
    moe: None,
    mla: None,
    sliding_window: 0,
};

const fn moe(n_expert: u32, n_expert_used: u32, n_ff_exp: u32) -> Moe {
    Moe { n_expert, n_expert_used, n_ff_exp, n_ff_shexp: 0, n_dense: 0, deepseek: None }
}

const TINY_MOE: Preset = Preset { name: "tiny-llama-moe", moe: Some(moe(8, 2, 512)), ..TINY };

const V2_LITE_GATING: Gating = Gating { func: 1, bias: false, norm: false, scale: 1.0, groups: (0, 0), n_shared: 2 };

const V2_LITE_ROPE: Rope = Rope::Yarn { factor: 40.0, n_ctx_orig: 4096, log_multiplier: 0.0707 };

const GPT_OSS_ROPE: Rope = Rope::Yarn { factor: 32.0, n_ctx_orig: 4096, log_multiplier: 0.0 };

/// Every shape, real ones first.
pub static PRESETS: &[Preset] = &[
    Preset {
        name: "olmoe-1b-7b",
        arch: "olmoe",
        n_layer: 16,
        n_embd: 2048,
        n_head: 16,
        n_head_kv: 16,
        head_dim: 128,
        n_ff: 1024,
        n_vocab: 50304,
        n_ctx: 4096,
        moe: Some(moe(64, 8, 1024)),
        ..TINY
    },
    Preset {
        name: "qwen3-30b-a3b",
        arch: "qwen3moe",
        n_layer: 48,
        n_embd: 2048,
        n_head: 32,
        n_head_kv: 4,
        head_dim: 128,
        n_ff: 6144,
        n_vocab: 151936,
        n_ctx: 32768,
        rope_base: 1e6,
        norm_eps: 1e-6,
        moe: Some(moe(128, 8, 768)),
        ..TINY
    },
    Preset {
        name: "mixtral-8x7b",
        n_layer: 32,
        n_embd: 4096,
        n_head: 32,
        n_head_kv: 8,
        head_dim: 128,
        n_ff: 14336,
        n_vocab: 32000,
        n_ctx: 32768,
        rope_base: 1e6,
        moe: Some(moe(8, 2, 14336)),
        ..TINY
    },
    Preset {
        name: "gpt-oss-20b",
        arch: "gpt-oss",
        n_layer: 24,
        n_embd: 2880,
        n_head: 64,
        n_head_kv: 8,
        head_dim: 64,
        n_ff: 2880,
        n_vocab: 201088,
        n_ctx: 131072,
        rope_base: 1.5e5,
        rope: GPT_OSS_ROPE,
        moe: Some(moe(32, 4, 2880)),
        sliding_window: 128,
        ..TINY
    },
    Preset {
        name: "deepseek-v2-lite",
        arch: "deepseek2",
        n_layer: 27,
        n_embd: 2048,
        n_head: 16,
        n_head_kv: 1,
        head_dim: 192,
        n_ff: 10944,
        n_vocab: 102400,
        n_ctx: 163840,
        rope: V2_LITE_ROPE,
        norm_eps: 1e-6,
        moe: Some(Moe { n_ff_shexp: 2816, n_dense: 1, deepseek: Some(V2_LITE_GATING), ..moe(64, 6, 1408) }),
        mla: Some(Mla { q_rank: 0, kv_rank: 512, n_rot: 64, v_dim: 128 }),
        ..TINY
    },
    TINY,
    Preset { name: "tiny-llama-tied", tied: true, ..TINY },
    Preset { name: "tiny-llama-linear", rope: Rope::Linear(4.0), ..TINY },
    Preset { name: "tiny-llama-yarn", rope: Rope::Yarn { factor: 4.0, n_ctx_orig: 512, log_multiplier: 0.0 }, ..TINY },
    Preset { name: "tiny-llama3", rope_base: 5e5, rope: Rope::Llama3 { factor: 8.0, n_ctx_orig: 512 }, ..TINY },
    TINY_MOE,
    Preset {
        // no row is a multiple of 256: every K-quant falls back
        name: "tiny-llama-moe-288",
        n_embd: 288,
        n_head: 9,
        n_head_kv: 3,
        head_dim: 32,
        n_ff: 352,
        moe: Some(moe(8, 2, 352)),
        ..TINY
    },
    Preset {
        name: "tiny-qwen2moe",
        arch: "qwen2moe",
        n_head_kv: 4,
        rope_base: 1e6,
        moe: Some(Moe { n_ff_shexp: 512, ..moe(8, 2, 256) }),
        ..TINY
    },
    Preset {
        // heads wider than the embedding divided by their number
        name: "tiny-qwen3moe",
        arch: "qwen3moe",
        head_dim: 128,
        rope_base: 1e6,
        norm_eps: 1e-6,
        moe: Some(moe(16, 4, 256)),
        ..TINY
    },
    Preset { name: "tiny-olmoe", arch: "olmoe", n_head_kv: 4, n_ff: 256, moe: Some(moe(16, 4, 256)), ..TINY },
    Preset { name: "tiny-granitemoe", arch: "granitemoe", n_ff: 256, moe: Some(moe(16, 4, 256)), ..TINY },
    Preset {
        name: "tiny-granitemoe-shared",
        arch: "granitemoe",
        n_ff: 256,
        moe: Some(Moe { n_ff_shexp: 512, ..moe(16, 4, 256) }),
        ..TINY
    },
    Preset {
        // a window short enough that a test's prompt leaves it
        name: "tiny-gpt-oss",
        arch: "gpt-oss",
        n_layer: 4,
        n_ff: 256,
        rope_base: 1.5e5,
        rope: GPT_OSS_ROPE,
        moe: Some(moe(8, 2, 256)),
        sliding_window: 32,
        ..TINY
    },
    Preset {
        name: "tiny-deepseek2",
        arch: "deepseek2",
        n_layer: 4,
        n_head_kv: 1,
        head_dim: 192,
        rope: Rope::Yarn { factor: 40.0, n_ctx_orig: 4096, log_multiplier: 0.1 },
        norm_eps: 1e-6,
        moe: Some(Moe {
            n_ff_shexp: 256,
            n_dense: 1,
            deepseek: Some(Gating { func: 2, bias: true, norm: true, scale: 2.5, groups: (4, 2), n_shared: 1 }),
            ..moe(16, 4, 256)
        }),
        mla: Some(Mla { q_rank: 256, kv_rank: 256, n_rot: 64, v_dim: 128 }),
        ..TINY
    },
    Preset {
        // 26 layers: that is how llama.cpp knows a file without a bottleneck for the queries
        name: "tiny-deepseek2-lite",
        arch: "deepseek2",
        n_layer: 26,
        n_embd: 128,
        n_head: 2,
        n_head_kv: 1,
        head_dim: 96,
        n_ff: 256,
        rope: V2_LITE_ROPE,
        norm_eps: 1e-6,
        moe: Some(Moe { n_ff_shexp: 128, n_dense: 1, deepseek: Some(V2_LITE_GATING), ..moe(8, 2, 64) }),
        mla: Some(Mla { q_rank: 0, kv_rank: 64, n_rot: 32, v_dim: 64 }),
        ..TINY
    },
];
