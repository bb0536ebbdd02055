//! The feed-forward half of a layer: a dense network, or experts.

use super::config::{Config, MoeConfig};
use super::pass::{Buffers, Guess, Machine};
use super::weights::{Loader, Matrix};
use super::{ModelError, PassError};
use crate::moe::{Fetch, LayerParts, Losses, Pick, Ready};
use crate::ops;
use crate::ops::matmul::{OutRows, Product, matmul};
use std::iter::zip;
use std::ops::Range;

/// Pairs of a token and an expert whose gate and up are computed together: a block of 512 tokens with 8 experts each has 4096, whose
/// gate and up would take 32 MiB of the OLMoE shape's budget.
pub(super) const SOME_PAIRS: usize = 1024;

/// What the next layer's experts are guessed from.
#[derive(Clone, Copy)]
pub struct Next<'a> {
    /// Its norm before the feed-forward network. (n_embd)
    pub norm: &'a [f32],
    /// The norm's epsilon.
    pub eps: f32,
    /// Its feed-forward network.
    pub ffn: &'a Ffn,
}

/// Tokens of a long block that the next layer's experts are guessed from.
const GUESS_TOKENS: usize = 64;

/// How gate and up become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// silu(gate) * up.
    Swiglu,
    /// gpt-oss's clamped variant.
    SwigluOai,
}

impl Activation {
    /// Combines a row of gate with a row of up, into gate.
    fn apply(self, gate: &mut [f32], up: &[f32]) {
        match self {
            Activation::Swiglu => ops::swiglu(gate, up),
            Activation::SwigluOai => ops::swiglu_oai(gate, up, 1.702, 7.0),
        }
    }
}

/// The second half of a layer.
pub enum Ffn {
    /// One network for every token.
    Dense(DenseFfn),
    /// Experts chosen by a router, perhaps beside shared ones.
    Moe(Box<MoeFfn>),
}

/// gate, up and down.
pub struct DenseFfn {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    n_ff: usize,
}

/// A layer's router, and what its experts have besides their matrices.
pub struct MoeFfn {
    router: Matrix,
    router_bias: Option<Vec<f32>>,
    /// Added to probabilities for choosing only. (n_expert)
    choice_bias: Option<Vec<f32>>,
    /// The experts' biases: gate and up (n_expert, n_ff_exp), down (n_expert, n_embd).
    biases: Option<[Vec<f32>; 3]>,
    shared: Option<SharedExpert>,
    activation: Activation,
    config: MoeConfig,
    parts: LayerParts,
}

/// Experts that every token uses, one network in the file; some models scale it by a gate of its own.
pub struct SharedExpert {
    ffn: DenseFfn,
    /// (n_embd)
    gate: Option<Vec<f32>>,
}

impl DenseFfn {
    /// Declares `blk.N.ffn_{gate,up,down}{suffix}.weight`.
    pub fn load(
        l: &mut Loader<'_>,
        layer: usize,
        suffix: &str,
        n_embd: usize,
        n_ff: usize,
    ) -> Result<Self, ModelError> {
        let mut matrix =
            |part: &str, n_cols, n_rows| l.matrix(&format!("blk.{layer}.ffn_{part}{suffix}.weight"), n_cols, n_rows);
        Ok(DenseFfn {
            gate: matrix("gate", n_embd, n_ff)?,
            up: matrix("up", n_embd, n_ff)?,
            down: matrix("down", n_ff, n_embd)?,
            n_ff,
        })
    }

    /// Reads `b.acts`, writes `b.o`.
    fn forward(&self, m: &Machine<'_>, b: &mut Buffers, n_tokens: usize) {
        b.gate.resize(n_tokens * self.n_ff);
        b.up.resize(n_tokens * self.n_ff);
        b.o.resize(n_tokens * self.down.n_rows);
        m.matmul(&b.acts, &b.rows[..n_tokens], &mut [(&self.gate, &mut b.gate), (&self.up, &mut b.up)]);
        let (n, up) = (self.n_ff, &b.up);
        m.each_row(&mut b.gate, n, &|t, row| Activation::Swiglu.apply(row, &up[t * n..(t + 1) * n]));
        m.activate(&mut b.inner, &b.gate, self.n_ff, &[&self.down]);
        m.matmul(&b.inner, &b.rows[..n_tokens], &mut [(&self.down, &mut b.o)]);
    }
}

impl MoeFfn {
    /// Declares a layer's router and experts.
    pub fn load(
        l: &mut Loader<'_>,
        c: &Config,
        moe: &MoeConfig,
        layer: usize,
        o: &MoeOptions,
    ) -> Result<Self, ModelError> {
        let (n_embd, n_expert, n_ff) = (c.n_embd, moe.router.n_expert, moe.n_ff_exp);
        let name = |part: &str| format!("blk.{layer}.{part}");
        let biases = if o.expert_biases {
            let mut bias = |part: &str, n| l.vector(&format!("blk.{layer}.ffn_{part}_exps.bias"), &[n, n_expert]);
            Some([bias("gate", n_ff)?, bias("up", n_ff)?, bias("down", n_embd)?])
        } else {
            None
        };
        let shared = match o.n_ff_shared {
            0 => None,
            n => Some(SharedExpert {
                ffn: DenseFfn::load(l, layer, "_shexp", n_embd, n)?,
                gate: if o.shared_gate { Some(l.vector(&name("ffn_gate_inp_shexp.weight"), &[n_embd])?) } else { None },
            }),
        };
        Ok(MoeFfn {
            router: l.matrix(&name("ffn_gate_inp.weight"), n_embd, n_expert)?,
            router_bias: if o.router_bias { Some(l.vector(&name("ffn_gate_inp.bias"), &[n_expert])?) } else { None },
            choice_bias: l.optional_vector(&name("exp_probs_b.bias"), &[n_expert])?,
            biases,
            shared,
            activation: o.activation,
            config: moe.clone(),
            parts: l.experts(layer, n_embd, n_ff, n_expert)?,
        })
    }

    /// The experts' matrices in the file.
    pub fn parts(&self) -> LayerParts {
        self.parts
    }

    /// Reads `b.h`, writes `b.o`.
    fn forward(
        &self,
        m: &Machine<'_>,
        b: &mut Buffers,
        layer: usize,
        n_tokens: usize,
        next: Option<Next<'_>>,
    ) -> Result<(), PassError> {
        let n_embd = self.router.n_cols;
        let mut kinds = vec![self.router.format.act, self.parts[0].format.act, self.parts[1].format.act];
        if let Some(s) = &self.shared {
            kinds.extend([s.ffn.gate.format.act, s.ffn.up.format.act]);
        }
        let Buffers { acts, h, .. } = b;
        m.activate_as(acts, h, n_embd, &kinds);
        let picks = self.route(m, b, layer, n_tokens);
        let groups = Groups::new(&picks, self.config.router.n_expert, self.config.router.n_expert_used);
        // Missing experts begin to be read here, while the rest of the layer is computed.
        let fetch = m.experts.map(|store| store.fetch(layer, &groups.wanted));
        if let (Some(store), Some(Next { norm, eps, ffn: Ffn::Moe(next) })) = (m.experts, next)
            && store.wants_ahead(n_tokens)
        {
            store.ahead(layer + 1, &next.likely(m, b, norm, eps, n_tokens));
        }
        match &self.shared {
            Some(s) => {
                s.ffn.forward(m, b, n_tokens);
                if let Some(gate) = &s.gate {
                    let h = &b.h;
                    m.each_row(&mut b.o, n_embd, &|t, row| {
                        let mut weight = [ops::dot(&h[t * n_embd..(t + 1) * n_embd], gate)];
                        ops::sigmoid(&mut weight);
                        ops::scale(row, weight[0]);
                    });
                }
            }
            None => b.o.zero(n_tokens * n_embd),
        }
        match fetch {
            Some(fetch) => self.experts(m, b, fetch, &groups, &picks),
            None => Ok(()),
        }
    }

    /// The experts that this layer's router would pick for the residual stream as an earlier layer sees it, the most wanted first:
    /// a guess (after Eliseev and Mazur 2023). `norm` and `eps` are this layer's.
    fn likely(&self, m: &Machine<'_>, b: &mut Buffers, norm: &[f32], eps: f32, n_tokens: usize) -> Vec<u32> {
        let (r, n_embd) = (&self.config.router, self.router.n_cols);
        let Buffers { x, guess: Guess { h, acts, scores }, rows, .. } = b;
        let step = n_tokens.div_ceil(GUESS_TOKENS);
        let n = n_tokens.div_ceil(step);
        h.resize(n * n_embd);
        m.each_row(h, n_embd, &|i, row| ops::rms_norm(&x[i * step * n_embd..][..n_embd], norm, eps, row));
        scores.resize(n * r.n_expert);
        m.activate(acts, h, n_embd, &[&self.router]);
        m.matmul(acts, &rows[..n], &mut [(&self.router, &mut *scores)]);
        let mut picks = vec![Pick::default(); r.n_expert_used];
        let mut weights = vec![0.0; r.n_expert];
        for scores in scores.chunks_mut(r.n_expert) {
            self.pick(scores, &mut picks);
            picks.iter().for_each(|p| weights[p.expert as usize] += p.weight);
        }
        let mut likely: Vec<u32> = (0..r.n_expert as u32).filter(|&e| weights[e as usize] > 0.0).collect();
        likely.sort_by(|&a, &b| f32::total_cmp(&weights[b as usize], &weights[a as usize]));
        likely
    }

    /// A token's experts by its scores, best first.
    fn pick(&self, scores: &mut [f32], picks: &mut [Pick]) {
        if let Some(bias) = &self.router_bias {
            ops::add(scores, bias);
        }
        self.config.router.route(scores, self.choice_bias.as_deref(), picks);
    }

    /// Each token's experts, (n_tokens, n_expert_used), best first.
    fn route(&self, m: &Machine<'_>, b: &mut Buffers, layer: usize, n_tokens: usize) -> Vec<Pick> {
        let r = &self.config.router;
        b.scores.resize(n_tokens * r.n_expert);
        m.matmul(&b.acts, &b.rows[..n_tokens], &mut [(&self.router, &mut b.scores)]);
        let mut picks = vec![Pick::default(); n_tokens * r.n_expert_used];
        for (scores, picks) in b.scores.chunks_mut(r.n_expert).zip(picks.chunks_mut(r.n_expert_used)) {
            self.pick(scores, picks);
        }
        if let Some(store) = m.experts.filter(|_| self.config.n_left_out > 0) {
            let left_out = (n_tokens * self.config.n_left_out) as u64;
            store.count_losses(Losses { left_out, ..Losses::default() });
        }
        if let Some(store) = m.experts.filter(|_| !m.lossy.is_off()) {
            let at_hand = store.at_hand(layer);
            for (scores, picks) in b.scores.chunks(r.n_expert).zip(picks.chunks_mut(r.n_expert_used)) {
                store.count_losses(m.lossy.apply(r, scores, &at_hand, picks));
            }
        }
        m.recorder.inspect(|r| r.routed(layer, &picks, m.experts));
        picks
    }

    /// Adds the experts' weighted outputs to `b.o`. Each expert is fetched once for all tokens of the block; the
    /// partial results are summed in the order of the router's ranks, whatever the order of arrival.
    fn experts(
        &self,
        m: &Machine<'_>,
        b: &mut Buffers,
        mut fetch: Fetch<'_>,
        groups: &Groups,
        picks: &[Pick],
    ) -> Result<(), PassError> {
        let used = self.config.router.n_expert_used;
        let n_embd = self.router.n_cols;
        b.partial.resize(picks.len() * n_embd);
        while let Some(mut rest) = fetch.next(m.stop)? {
            while !rest.is_empty() {
                m.go_on()?;
                let (now, later) = rest.split_at(groups.some_of(rest));
                self.compute(m, b, groups, now);
                rest = later;
            }
        }
        let partial = &b.partial;
        m.each_row(&mut b.o, n_embd, &|t, row| {
            for rank in (0..used).filter(|rank| !picks[t * used + rank].is_dropped()) {
                let pair = groups.pair_of[t * used + rank] as usize;
                let weight = picks[t * used + rank].weight;
                let y = &partial[pair * n_embd..(pair + 1) * n_embd];
                match &self.biases {
                    Some([_, _, bias]) => {
                        let e = picks[t * used + rank].expert as usize;
                        let bias = &bias[e * n_embd..(e + 1) * n_embd];
                        row.iter_mut().zip(y.iter().zip(bias)).for_each(|(o, (y, b))| *o += weight * (y + b));
                    }
                    None => row.iter_mut().zip(y).for_each(|(o, y)| *o += weight * y),
                }
            }
        });
        Ok(())
    }

    /// Computes experts that are at hand, for all tokens that want them, into their rows of `b.partial`.
    fn compute(&self, m: &Machine<'_>, b: &mut Buffers, groups: &Groups, ready: &[Ready<'_>]) {
        let (n_ff, n_embd) = (self.config.n_ff_exp, self.router.n_cols);
        let Buffers { gate, up, partial, acts, inner, .. } = b;
        // Each expert's pairs, and their rows of gate and up, which are in use here only.
        let pairs: Vec<Range<usize>> = ready.iter().map(|r| groups.pairs(r.expert)).collect();
        let mut n_rows = 0;
        let rows: Vec<Range<usize>> = pairs
            .iter()
            .map(|p| {
                n_rows += p.len();
                n_rows - p.len()..n_rows
            })
            .collect();
        gate.resize(n_rows * n_ff);
        up.resize(n_rows * n_ff);
        let outs = split_rows(gate, n_ff, &rows).into_iter().zip(split_rows(up, n_ff, &rows));
        let mut products: Vec<Product<'_>> = zip(ready, zip(&pairs, outs))
            .flat_map(|(r, (pairs, (gate, up)))| {
                let product = |w, out| Product::new(w, acts, &groups.token_of[pairs.clone()], OutRows::new(out, n_ff));
                [product(r.gate, gate), product(r.up, up)]
            })
            .collect();
        matmul(m.team, &mut products);
        // Biases, activation, and the quantised input of down, row by row.
        inner.reset(n_rows, n_ff, &[self.parts[2].format.act]);
        m.team.each_row_of_two((gate, n_ff), (up, n_ff), &|row, gate, up| {
            if let Some([bias_gate, bias_up, _]) = &self.biases {
                let e = ready[rows.partition_point(|r| r.end <= row)].expert as usize;
                ops::add(gate, &bias_gate[e * n_ff..(e + 1) * n_ff]);
                ops::add(up, &bias_up[e * n_ff..(e + 1) * n_ff]);
            }
            self.activation.apply(gate, up);
            inner.put(row, gate);
        });
        let outs = split_rows(partial, n_embd, &pairs);
        let mut products: Vec<Product<'_>> = zip(ready, zip(rows, outs))
            .map(|(r, (rows, out))| Product::new(r.down, inner, &groups.row[rows], OutRows::new(out, n_embd)))
            .collect();
        matmul(m.team, &mut products);
    }
}

/// The parts of `x` that hold these rows, which rise.
fn split_rows<'a>(mut x: &'a mut [f32], width: usize, ranges: &[Range<usize>]) -> Vec<&'a mut [f32]> {
    let mut at = 0;
    ranges
        .iter()
        .map(|r| {
            let (part, rest) = std::mem::take(&mut x)[(r.start - at) * width..].split_at_mut(r.len() * width);
            (x, at) = (rest, r.end);
            part
        })
        .collect()
}

/// What a layer's experts have besides the usual matrices.
#[derive(Clone, Copy, Debug)]
pub struct MoeOptions {
    /// A bias on the router's scores.
    pub router_bias: bool,
    /// Biases on the experts' matrices.
    pub expert_biases: bool,
    /// Width of the shared experts together; 0 for none.
    pub n_ff_shared: usize,
    /// Whether the shared experts have a gate.
    pub shared_gate: bool,
    /// How gate and up become one.
    pub activation: Activation,
}

impl MoeOptions {
    /// Experts and nothing else.
    pub const PLAIN: MoeOptions = MoeOptions {
        router_bias: false,
        expert_biases: false,
        n_ff_shared: 0,
        shared_gate: false,
        activation: Activation::Swiglu,
    };
}

/// The block regrouped by expert: a pair is a token with one of its experts; an expert's pairs stand together.
struct Groups {
    /// Each pair's token.
    token_of: Vec<u32>,
    /// 0, 1, 2 …
    row: Vec<u32>,
    /// Where each expert's pairs begin. (n_expert + 1)
    starts: Vec<u32>,
    /// The pair of each (token, rank), but for those that were dropped.
    pair_of: Vec<u32>,
    /// Experts with the number of tokens that want them, the most wanted first.
    wanted: Vec<(u32, u32)>,
}

impl Groups {
    fn new(picks: &[Pick], n_expert: usize, used: usize) -> Self {
        let mut starts = vec![0u32; n_expert + 1];
        picks.iter().filter(|p| !p.is_dropped()).for_each(|p| starts[p.expert as usize + 1] += 1);
        let mut wanted: Vec<(u32, u32)> =
            (0..n_expert).filter(|&e| starts[e + 1] > 0).map(|e| (e as u32, starts[e + 1])).collect();
        wanted.sort_by_key(|w| std::cmp::Reverse(w.1));
        for e in 0..n_expert {
            starts[e + 1] += starts[e];
        }
        let mut next = starts.clone();
        let mut token_of = vec![0; starts[n_expert] as usize];
        let pair_of = picks
            .iter()
            .enumerate()
            .map(|(i, p)| {
                if p.is_dropped() {
                    return u32::MAX;
                }
                let pair = next[p.expert as usize];
                next[p.expert as usize] += 1;
                token_of[pair as usize] = (i / used) as u32;
                pair
            })
            .collect();
        Groups { token_of, row: (0..picks.len() as u32).collect(), starts, pair_of, wanted }
    }

    /// How many of these experts should be computed together: those of [`SOME_PAIRS`], or one.
    fn some_of(&self, ready: &[Ready<'_>]) -> usize {
        let mut pairs = 0;
        let fit = ready.iter().take_while(|r| {
            pairs += self.pairs(r.expert).len();
            pairs <= SOME_PAIRS
        });
        fit.count().max(1)
    }

    fn pairs(&self, expert: u32) -> Range<usize> {
        self.starts[expert as usize] as usize..self.starts[expert as usize + 1] as usize
    }
}

impl Ffn {
    /// The width of what it computes for every token: all of a dense network, shared experts; 0 for none.
    pub fn dense_width(&self) -> usize {
        match self {
            Ffn::Dense(f) => f.n_ff,
            Ffn::Moe(f) => f.shared.as_ref().map_or(0, |s| s.ffn.n_ff),
        }
    }

    /// Reads `b.h` (n_tokens, n_embd), writes `b.o`. The experts of `next` are read ahead.
    pub fn forward(
        &self,
        m: &Machine<'_>,
        b: &mut Buffers,
        layer: usize,
        n_tokens: usize,
        next: Option<Next<'_>>,
    ) -> Result<(), PassError> {
        match self {
            Ffn::Dense(f) => {
                let Buffers { acts, h, .. } = b;
                m.activate(acts, h, f.gate.n_cols, &[&f.gate, &f.up]);
                f.forward(m, b, n_tokens);
                Ok(())
            }
            Ffn::Moe(f) => f.forward(m, b, layer, n_tokens, next),
        }
    }
}
