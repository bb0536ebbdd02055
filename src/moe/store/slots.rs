//! Which expert lives in which slot. Pure: no files, no threads, no clocks.
//!
//! A slot is free, loading, or resident. A resident slot that nobody computes with is idle, and idle slots are kept in the
//! policy's order, so that the next to leave is found at once. A slot that the budget doesn't cover is parked.

use super::layout::{N_PARTS, StoreLayout};
use crate::moe::policy::Policy;
use std::collections::BTreeSet;

/// Where an expert is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Absent,
    Loading(u32),
    Resident(u32),
}

#[derive(Clone, Copy, Default)]
struct Slot {
    owner: Option<u32>,
    /// Those that compute with it.
    pins: u32,
    /// Parts still to be read.
    missing: u8,
    /// A part couldn't be read.
    failed: bool,
    /// It was read ahead, and nobody has asked for it yet.
    ahead: bool,
    /// It was asked for, and nobody has computed with it since: it can't leave.
    wanted: bool,
    /// It will probably be asked for soon: others leave first.
    guarded: bool,
    /// Its place in the order, while it is idle.
    rank: Option<u64>,
}

impl Slot {
    fn is_idle(&self) -> bool {
        self.owner.is_some() && self.missing == 0 && self.pins == 0 && !self.wanted && !self.guarded
    }
}

/// What the end of a part's read meant for its expert.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PartEnd {
    /// Other parts are still being read.
    More,
    /// The expert is resident.
    Resident,
    /// A part failed and the others have ended: the expert is absent, its slot free.
    Failed,
}

/// What left a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Evicted {
    /// The expert.
    pub key: u32,
    /// It had been read ahead and was never asked for.
    pub wasted: bool,
}

/// The slots and their experts.
pub(super) struct Slots {
    layout: StoreLayout,
    places: Vec<Place>,
    slots: Vec<Slot>,
    /// By class.
    free: Vec<Vec<u32>>,
    parked: Vec<Vec<u32>>,
    /// By layer, the coldest first.
    idle: Vec<BTreeSet<(u64, u32)>>,
    guarded: Vec<u32>,
    n_absent: usize,
    policy: Box<dyn Policy>,
    now: u64,
}

/// A number that sorts as the float does.
fn sortable(rank: f64) -> u64 {
    let bits = rank.to_bits();
    if bits >> 63 == 1 { !bits } else { bits | 1 << 63 }
}

impl Slots {
    /// All slots free, `n_slots` of each class; the rest parked.
    pub fn new(layout: StoreLayout, n_slots: &[usize], policy: Box<dyn Policy>) -> Self {
        let n_classes = layout.classes.len();
        let mut s = Slots {
            places: vec![Place::Absent; layout.layers.len() * layout.n_expert],
            slots: vec![Slot::default(); layout.n_experts()],
            free: vec![Vec::new(); n_classes],
            parked: layout
                .classes
                .iter()
                .map(|c| (c.first_slot as u32..(c.first_slot + c.n_experts) as u32).rev().collect())
                .collect(),
            idle: vec![BTreeSet::new(); layout.layers.len()],
            guarded: Vec::new(),
            n_absent: layout.n_experts(),
            policy,
            now: 0,
            layout,
        };
        for (class, &n) in n_slots.iter().enumerate() {
            while s.grow(class, n).is_some() {}
            // The first slots first, so that those in use lie together.
            s.free[class].sort_unstable_by_key(|slot| std::cmp::Reverse(*slot));
        }
        s
    }

    /// So many tokens are coming.
    pub fn advance(&mut self, n_tokens: u64) {
        self.now += n_tokens;
    }

    /// Where an expert is.
    pub fn place(&self, key: u32) -> Place {
        self.places[key as usize]
    }

    /// Experts that aren't resident or on their way.
    pub fn n_absent(&self) -> usize {
        self.n_absent
    }

    /// `n` tokens want an expert, which stays if it's there until it is pinned or [`Slots::spare`]d. True if it had been
    /// read ahead for this.
    pub fn want(&mut self, key: u32, n: u32) -> bool {
        self.policy.used(key as usize, n, self.now);
        let mut changed = Vec::new();
        self.policy.each_changed(&mut |key| changed.push(key as u32));
        for key in changed {
            if let Place::Resident(slot) = self.place(key)
                && self.slots[slot as usize].rank.is_some()
            {
                self.leave_order(slot);
                self.enter_order(slot);
            }
        }
        let (Place::Resident(slot) | Place::Loading(slot)) = self.place(key) else { return false };
        self.leave_order(slot);
        self.slots[slot as usize].wanted = true;
        std::mem::take(&mut self.slots[slot as usize].ahead)
    }

    /// Nobody is going to compute with an expert that was wanted.
    pub fn spare(&mut self, key: u32) {
        let (Place::Resident(slot) | Place::Loading(slot)) = self.place(key) else { return };
        self.slots[slot as usize].wanted = false;
        self.enter_order(slot);
    }

    /// Somebody computes with a resident slot.
    pub fn pin(&mut self, slot: u32) {
        self.leave_order(slot);
        self.slots[slot as usize].wanted = false;
        self.slots[slot as usize].pins += 1;
    }

    /// Somebody doesn't any more.
    pub fn unpin(&mut self, slot: u32) {
        self.slots[slot as usize].pins -= 1;
        self.enter_order(slot);
    }

    /// Keeps an expert, if it is resident, while others can leave: until [`Slots::unguard`].
    pub fn guard(&mut self, key: u32) {
        let Place::Resident(slot) = self.place(key) else { return };
        if !self.slots[slot as usize].guarded {
            self.leave_order(slot);
            self.slots[slot as usize].guarded = true;
            self.guarded.push(slot);
        }
    }

    /// Guards nobody any more.
    pub fn unguard(&mut self) {
        for slot in std::mem::take(&mut self.guarded) {
            self.slots[slot as usize].guarded = false;
            self.enter_order(slot);
        }
    }

    /// A slot for an expert that is wanted: a free one, or the one whose expert the policy would rather lose; the guarded ones
    /// last. `None` if all are loading, wanted or computed with.
    pub fn take(&mut self, key: u32) -> Option<(u32, Option<Evicted>)> {
        self.take_ahead(key).or_else(|| {
            self.unguard();
            self.take_ahead(key)
        })
    }

    /// As [`Slots::take`], but guarded experts stay.
    pub fn take_ahead(&mut self, key: u32) -> Option<(u32, Option<Evicted>)> {
        let class = self.layout.class_of_key(key);
        if let Some(slot) = self.free[class].pop() {
            return Some((slot, None));
        }
        let slot = self.coldest(class)?;
        Some((slot, self.evict(slot)))
    }

    /// The idle slot of a class whose expert deserves it least.
    fn coldest(&self, class: usize) -> Option<u32> {
        let of_class = |layer: &usize| self.layout.layers[*layer].as_ref().is_some_and(|l| l.1 == class);
        let first = |layer: usize| {
            let slot = self.idle[layer].first()?.1;
            let key = self.slots[slot as usize].owner?;
            Some((self.policy.rank(key as usize) + self.policy.layer_rank(layer), slot))
        };
        let firsts = (0..self.idle.len()).filter(of_class).filter_map(first);
        firsts.min_by(|a, b| a.0.total_cmp(&b.0)).map(|c| c.1)
    }

    /// Whether a slot of a class is free.
    pub fn has_free(&self, class: usize) -> bool {
        !self.free[class].is_empty()
    }

    /// As [`Slots::take`], but nobody leaves for it.
    pub fn take_free(&mut self, key: u32) -> Option<u32> {
        self.free[self.layout.class_of_key(key)].pop()
    }

    /// The parts of an expert begin to be read into a slot that was taken for it, because it's wanted or ahead of that.
    pub fn begin(&mut self, key: u32, slot: u32, ahead: bool) {
        let missing = N_PARTS as u8;
        self.slots[slot as usize] = Slot { owner: Some(key), missing, ahead, wanted: !ahead, ..Slot::default() };
        self.places[key as usize] = Place::Loading(slot);
        self.n_absent -= 1;
    }

    /// A part of a slot has been read, or couldn't be.
    pub fn end_part(&mut self, slot: u32, ok: bool) -> PartEnd {
        let s = &mut self.slots[slot as usize];
        s.failed |= !ok;
        s.missing -= 1;
        if s.missing > 0 {
            return PartEnd::More;
        }
        let Some(key) = s.owner else { return PartEnd::Failed };
        if s.failed {
            *s = Slot::default();
            self.places[key as usize] = Place::Absent;
            self.n_absent += 1;
            self.free[self.layout.class_of_slot(slot)].push(slot);
            return PartEnd::Failed;
        }
        self.places[key as usize] = Place::Resident(slot);
        if s.ahead {
            self.guard(key);
        }
        self.enter_order(slot);
        PartEnd::Resident
    }

    /// Gives a class one more slot, if it has fewer than `n`.
    pub fn grow(&mut self, class: usize, n: usize) -> Option<u32> {
        let slot = if self.n_active(class) < n { self.parked[class].pop()? } else { return None };
        self.free[class].push(slot);
        Some(slot)
    }

    /// Takes a slot from a class that has more than `n`; `Ok(None)` if it hasn't, `Err` if all are loading or computed with.
    #[allow(clippy::result_unit_err)]
    pub fn shrink(&mut self, class: usize, n: usize) -> Result<Option<(u32, Option<Evicted>)>, ()> {
        if self.n_active(class) <= n {
            return Ok(None);
        }
        let (slot, evicted) = match self.free[class].pop() {
            Some(slot) => (slot, None),
            None => {
                if self.coldest(class).is_none() {
                    self.unguard();
                }
                let slot = self.coldest(class).ok_or(())?;
                (slot, self.evict(slot))
            }
        };
        self.parked[class].push(slot);
        Ok(Some((slot, evicted)))
    }

    /// Slots of a class that the budget covers.
    pub fn n_active(&self, class: usize) -> usize {
        self.layout.classes[class].n_experts - self.parked[class].len()
    }

    /// Slots that the budget covers.
    pub fn n_slots(&self) -> usize {
        (0..self.parked.len()).map(|c| self.n_active(c)).sum()
    }

    /// Whether every expert has a slot: nobody ever leaves.
    pub fn is_whole(&self) -> bool {
        self.parked.iter().all(Vec::is_empty)
    }

    fn evict(&mut self, slot: u32) -> Option<Evicted> {
        self.leave_order(slot);
        let s = std::mem::take(&mut self.slots[slot as usize]);
        let key = s.owner?;
        self.places[key as usize] = Place::Absent;
        self.n_absent += 1;
        Some(Evicted { key, wasted: s.ahead })
    }

    fn leave_order(&mut self, slot: u32) {
        let s = &mut self.slots[slot as usize];
        if let (Some(rank), Some(key)) = (s.rank.take(), s.owner) {
            self.idle[self.layout.layer_and_expert(key).0].remove(&(rank, slot));
        }
    }

    /// Puts a slot into the order if it's idle.
    fn enter_order(&mut self, slot: u32) {
        let s = &mut self.slots[slot as usize];
        let Some(key) = s.owner.filter(|_| s.is_idle() && s.rank.is_none()) else { return };
        let rank = sortable(self.policy.rank(key as usize));
        s.rank = Some(rank);
        self.idle[self.layout.layer_and_expert(key).0].insert((rank, slot));
    }

    /// Whether each expert has one place and each slot one state: what tests call after every step.
    #[cfg(test)]
    pub fn check(&self) {
        for (key, place) in self.places.iter().enumerate() {
            if let Place::Loading(slot) | Place::Resident(slot) = *place {
                let s = &self.slots[slot as usize];
                assert_eq!(s.owner, Some(key as u32));
                assert_eq!(s.missing == 0, *place == Place::Resident(slot));
            }
        }
        let absent = self.places.iter().filter(|p| **p == Place::Absent).count();
        assert_eq!(absent - (self.places.len() - self.slots.len()), self.n_absent);
        let mut seen = vec![0; self.slots.len()];
        let outside = self.free.iter().chain(&self.parked).flatten();
        outside.for_each(|&slot| {
            assert!(self.slots[slot as usize].owner.is_none());
            seen[slot as usize] += 1;
        });
        for (slot, s) in self.slots.iter().enumerate() {
            let owned = usize::from(s.owner.is_some());
            assert_eq!(seen[slot] + owned, 1, "slot {slot} is free, parked or somebody's");
            assert_eq!(s.is_idle(), s.rank.is_some(), "slot {slot} is in the order while it's idle");
            let now = s.owner.map(|key| sortable(self.policy.rank(key as usize)));
            assert!(s.rank.is_none() || s.rank == now, "slot {slot} stands where it should have stood before");
            assert!(s.pins == 0 || s.missing == 0, "slot {slot} is computed with while it's loading");
        }
        assert_eq!(
            self.idle.iter().map(BTreeSet::len).sum::<usize>(),
            self.slots.iter().filter(|s| s.rank.is_some()).count()
        );
    }
}
