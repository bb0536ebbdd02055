//! Where the keys and values of a block lie.
//!
//! A block holds [`KV_BLOCK`] positions of every layer. For each layer and each of its heads there is one piece:
//!
//! | part | shape | |
//! |---|---|---|
//! | keys | `(head_dim_k, 64)` | transposed: a lane is a position, so scores need no horizontal sums |
//! | key scales | `(ceil(head_dim_k / 32), 64)` f16 | only Q8_0 |
//! | values | `(64, dv_pad)` | `dv_pad`: `head_dim_v` up to a multiple of 16, the rest stays 0 |
//! | value scales | `(64, ceil(dv_pad / 32))` f16 | only Q8_0 |
//!
//! Each part begins at a multiple of 64 bytes.

use super::{KV_BLOCK, KvLayer, KvType};
use crate::cpu::simd::LANES;

/// Values that share a scale in [`KvType::Q8_0`].
pub const GROUP: usize = 32;

/// The sizes of a pool's blocks.
#[derive(Clone, Debug)]
pub struct Layout {
    pub type_k: KvType,
    pub type_v: KvType,
    pub layers: Vec<LayerLayout>,
    pub block_bytes: usize,
}

/// Offsets in bytes: `start` from the block's beginning, the others from the head's piece.
#[derive(Clone, Copy, Debug)]
pub struct LayerLayout {
    pub shape: KvLayer,
    /// `head_dim_v` rounded up to whole [`LANES`].
    pub dv_pad: usize,
    pub start: usize,
    pub head_bytes: usize,
    pub k_scale: usize,
    pub v: usize,
    pub v_scale: usize,
}

impl Layout {
    /// `None` if the sizes overflow.
    pub fn new(layers: &[KvLayer], type_k: KvType, type_v: KvType) -> Option<Self> {
        let mut start = 0usize;
        let mut out = Vec::with_capacity(layers.len());
        for &shape in layers {
            let dv_pad = shape.head_dim_v.checked_next_multiple_of(LANES)?;
            let k_scale = part(type_k.bytes(), shape.head_dim_k)?;
            let v = k_scale.checked_add(scales(type_k, shape.head_dim_k)?)?;
            let v_scale = v.checked_add(part(type_v.bytes(), dv_pad)?)?;
            let head_bytes = v_scale.checked_add(scales(type_v, dv_pad)?)?;
            out.push(LayerLayout { shape, dv_pad, start, head_bytes, k_scale, v, v_scale });
            start = start.checked_add(head_bytes.checked_mul(shape.n_head_kv)?)?;
        }
        Some(Layout { type_k, type_v, layers: out, block_bytes: start })
    }

    /// Bytes of one position of a block when it's saved: no padding, no scales that aren't there.
    pub fn position_bytes(&self) -> usize {
        let row = |t: KvType, n: usize| t.bytes() * n + if t == KvType::Q8_0 { 2 * n.div_ceil(GROUP) } else { 0 };
        let head = |l: &LayerLayout| row(self.type_k, l.shape.head_dim_k) + row(self.type_v, l.dv_pad);
        self.layers.iter().map(|l| l.shape.n_head_kv * head(l)).sum()
    }
}

/// Bytes of 64 rows of `n` elements.
fn part(bytes: usize, n: usize) -> Option<usize> {
    n.checked_mul(bytes * KV_BLOCK)
}

/// Bytes of the scales of 64 rows of `n` elements.
fn scales(t: KvType, n: usize) -> Option<usize> {
    if t == KvType::Q8_0 { n.div_ceil(GROUP).checked_mul(2 * KV_BLOCK) } else { Some(0) }
}

/// One head's piece of a block.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    pub layout: &'a Layout,
    pub layer: &'a LayerLayout,
    pub k: *mut u8,
    pub k_scale: *mut u16,
    pub v: *mut u8,
    pub v_scale: *mut u16,
}

/// A run of bytes of a tile: those of `n` positions from the block's first.
pub struct Run {
    pub ptr: *mut u8,
    pub len: usize,
}

impl Tile<'_> {
    /// The parts of the tile that hold its first `n` positions, in the order in which they are saved.
    pub fn runs(&self, n: usize) -> impl Iterator<Item = Run> {
        let (l, tile) = (self.layer, *self);
        let (bytes_k, bytes_v) = (self.layout.type_k.bytes(), self.layout.type_v.bytes());
        let groups = |t, n: usize| if t == KvType::Q8_0 { n.div_ceil(GROUP) } else { 0 };
        let k = (0..l.shape.head_dim_k)
            .map(move |d| Run { ptr: tile.k.wrapping_add(d * KV_BLOCK * bytes_k), len: n * bytes_k });
        let k_scale = (0..groups(self.layout.type_k, l.shape.head_dim_k))
            .map(move |g| Run { ptr: tile.k_scale.wrapping_add(g * KV_BLOCK).cast(), len: 2 * n });
        let v = Run { ptr: self.v, len: n * l.dv_pad * bytes_v };
        let v_scale = Run { ptr: self.v_scale.cast(), len: 2 * n * groups(self.layout.type_v, l.dv_pad) };
        k.chain(k_scale).chain([v, v_scale])
    }
}
