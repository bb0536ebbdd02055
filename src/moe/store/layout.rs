//! The sizes of a store: what an expert is in the file, and what its slot is in memory. Pure arithmetic.

use crate::cpu::Pages;
use crate::cpu::direct::BLOCK;
use crate::ops::matmul::MAX_LANES;
use crate::quant::Format;

/// A slot's parts begin at multiples of this, a cache line.
const LINE: usize = 64;
/// What is read at once: a lane's buffer is one huge page with what surrounds the bytes, see [`super::lanes`]. Tests have small experts.
const PIECE: usize = if cfg!(test) { 512 } else { (2 << 20) - 2 * BLOCK };
/// Rows of a piece are a multiple of this, whole groups of every instruction set.
const PIECE_ROWS: usize = MAX_LANES;

/// One matrix of every expert of a layer: expert e is `n_bytes` at `offset + e * stride`.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The tensor's index in the model.
    pub tensor: usize,
    /// Where expert 0 begins in the tensor.
    pub offset: u64,
    /// From one expert to the next.
    pub stride: u64,
    /// Bytes of one expert's matrix.
    pub n_bytes: usize,
    /// Its number format.
    pub format: &'static Format,
    /// Output width.
    pub n_rows: usize,
    /// Input width.
    pub n_cols: usize,
}

impl Part {
    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.n_bytes / self.n_rows.max(1)
    }

    /// Rows that are read at once.
    pub fn piece_rows(&self) -> usize {
        (PIECE / self.row_bytes().max(1) / PIECE_ROWS * PIECE_ROWS).max(PIECE_ROWS).min(self.n_rows)
    }
}

/// The experts of a layer: gate, up, down.
pub type LayerParts = [Part; 3];

/// Parts of an expert.
pub(super) const N_PARTS: usize = 3;

/// Room for `n_bytes` that are read directly: the blocks of the file that they lie in, wherever they begin.
pub fn room_for(n_bytes: usize) -> usize {
    n_bytes.next_multiple_of(BLOCK) + BLOCK
}

/// Slots of one size.
#[derive(Clone, Debug)]
pub(super) struct Class {
    pub slot_bytes: usize,
    /// Where each part begins in a slot, and the end of the last.
    pub starts: [usize; N_PARTS + 1],
    /// Experts of all layers of this class: the most slots that it can use.
    pub n_experts: usize,
    /// Index of the first slot, and its place in the arena, where there's room for all experts.
    pub first_slot: usize,
    pub base: usize,
}

/// The sizes of a store, before it is made: what the planner and the budget need.
#[derive(Clone, Debug)]
pub struct StoreLayout {
    /// A layer's parts and its class; `None` for a dense layer.
    pub(super) layers: Vec<Option<(LayerParts, usize)>>,
    pub(super) classes: Vec<Class>,
    /// Experts of a layer.
    pub n_expert: usize,
}

impl StoreLayout {
    /// Sizes for these layers (`None` for a dense one), each with `n_expert` experts.
    pub fn new(layers: Vec<Option<LayerParts>>, n_expert: usize) -> Self {
        let mut classes: Vec<Class> = Vec::new();
        let layers = layers
            .into_iter()
            .map(|parts| parts.map(|parts| (parts, class_of(&mut classes, &parts, n_expert))))
            .collect();
        let (mut first_slot, mut base) = (0, 0);
        for c in &mut classes {
            (c.first_slot, c.base) = (first_slot, base);
            first_slot += c.n_experts;
            base += c.n_experts * c.slot_bytes;
        }
        StoreLayout { layers, classes, n_expert }
    }

    /// Bytes of slots for every expert.
    pub fn bytes_for_all(&self) -> u64 {
        self.classes.iter().map(|c| (c.n_experts * c.slot_bytes) as u64).sum()
    }

    /// Bytes of the fewest slots that work: `at_once` experts of each class.
    pub fn bytes_for_least(&self, at_once: usize) -> u64 {
        self.classes.iter().map(|c| (at_once.min(c.n_experts) * c.slot_bytes) as u64).sum()
    }

    /// Experts of all layers.
    pub fn n_experts(&self) -> usize {
        self.classes.iter().map(|c| c.n_experts).sum()
    }

    /// Slots of each class within `bytes`: the same share of its experts for each, and one at least.
    pub(super) fn divide(&self, bytes: u64) -> Vec<usize> {
        let all = u128::from(self.bytes_for_all().max(1));
        let share = |c: &Class| (c.n_experts as u128 * u128::from(bytes) / all) as usize;
        self.classes.iter().map(|c| share(c).clamp(1, c.n_experts)).collect()
    }

    /// Every expert of every layer has a number of its own.
    pub(super) fn key(&self, layer: usize, expert: u32) -> u32 {
        layer as u32 * self.n_expert as u32 + expert
    }

    /// The layer and the expert of a key.
    pub(super) fn layer_and_expert(&self, key: u32) -> (usize, u32) {
        (key as usize / self.n_expert, key % self.n_expert as u32)
    }

    /// The class of a key's slots.
    pub(super) fn class_of_key(&self, key: u32) -> usize {
        self.layers[key as usize / self.n_expert].as_ref().map_or(0, |l| l.1)
    }

    /// The class of a slot.
    pub(super) fn class_of_slot(&self, slot: u32) -> usize {
        self.classes.iter().rposition(|c| c.first_slot <= slot as usize).unwrap_or(0)
    }

    /// Bytes of an expert in the file.
    pub(super) fn expert_bytes(&self, key: u32) -> u64 {
        let parts = self.layers[key as usize / self.n_expert].as_ref();
        parts.map_or(0, |l| l.0.iter().map(|p| p.n_bytes as u64).sum())
    }

    /// Bytes of a part of an expert in the file.
    pub(super) fn part_bytes(&self, key: u32, part: usize) -> u64 {
        let parts = self.layers[key as usize / self.n_expert].as_ref();
        parts.map_or(0, |l| l.0[part].n_bytes as u64)
    }

    /// Room for the largest piece of an expert that is read at once.
    pub(super) fn room_for_piece(&self) -> usize {
        let parts = self.layers.iter().flatten().flat_map(|l| &l.0);
        parts.map(|p| room_for(p.piece_rows() * p.row_bytes())).max().unwrap_or(0)
    }

    /// Where a slot lies in the arena.
    pub(super) fn slot(&self, slot: u32) -> std::ops::Range<usize> {
        let at = self.part_of_slot(slot, 0).start;
        at..at + self.classes[self.class_of_slot(slot)].slot_bytes
    }

    /// Where a part of a slot lies in the arena.
    pub(super) fn part_of_slot(&self, slot: u32, part: usize) -> std::ops::Range<usize> {
        let class = &self.classes[self.class_of_slot(slot)];
        let at = class.base + (slot as usize - class.first_slot) * class.slot_bytes;
        at + class.starts[part]..at + class.starts[part + 1]
    }
}

/// The class of slots for these parts, which is made if there is none yet.
fn class_of(classes: &mut Vec<Class>, parts: &LayerParts, n_expert: usize) -> usize {
    let room = parts.map(|p| p.n_bytes.next_multiple_of(LINE));
    let starts = [0, room[0], room[0] + room[1], room[0] + room[1] + room[2]];
    let class = classes.iter().position(|c| c.starts == starts).unwrap_or_else(|| {
        // Whole pages, of 16 or 64 KiB on some systems: a slot that is given up gives its memory back and no neighbour's.
        let slot_bytes = starts[N_PARTS].next_multiple_of(Pages::page_bytes());
        classes.push(Class { slot_bytes, starts, n_experts: 0, first_slot: 0, base: 0 });
        classes.len() - 1
    });
    classes[class].n_experts += n_expert;
    class
}
