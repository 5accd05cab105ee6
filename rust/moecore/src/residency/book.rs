//! The residency book: what lies where, who is in use, what goes next. Kept by one writer, without atomics.

use super::policy::{self, Context, PolicyKind, Use};
use super::prepared::Prepared;

/// No expert, no slot.
const NONE: u32 = u32::MAX;

/// What the book knows about a slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub(super) expert: u32,
    holds: u32,
    filling: bool,
    withdrawn: bool,
}

/// A slot for an expert, and the expert that had to leave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// The slot.
    pub slot: u32,
    /// The expert that was in it.
    pub evicted: Option<u32>,
}

/// Each slot is held, being filled, protected, withdrawn or pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no expert slot can be given up now: each is in use; give the model more slots or end some holds")]
pub struct NoSlot;

/// What became of prefetched experts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefetchCount {
    /// Used before they were evicted.
    pub useful: u64,
    /// Evicted unused.
    pub wasted: u64,
    /// Resident and not used yet.
    pub waiting: u64,
}

/// The book of one device's slots.
///
/// It describes what the writer has decided, not what has happened: a slot is given to the new expert at once, while
/// the old one's readers and the new one's bytes are the business of the slot table and of
/// [`set_filling`](Self::set_filling).
#[derive(Debug)]
pub struct Residency {
    policy: PolicyKind,
    first: Vec<u32>,
    uses: Vec<Use>,
    slot_of: Vec<u32>,
    prefetched: Vec<bool>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    occupancy: Vec<u32>,
    prepared: Prepared,
    prefetch: PrefetchCount,
    /// Calls so far.
    now: u64,
    running: u32,
    /// Uses in the last whole token and in the running one.
    cycle_uses: [u64; 2],
}

impl Residency {
    /// A book in which all slots are free.
    ///
    /// # Panics
    /// When the model has 2^32 experts or more.
    #[must_use]
    pub fn new(experts_per_layer: &[u32], slots: u32, policy: PolicyKind) -> Self {
        let mut first = Vec::with_capacity(experts_per_layer.len());
        let mut uses = Vec::new();
        for (layer, &experts) in (0u32..).zip(experts_per_layer) {
            first.push(u32::try_from(uses.len()).expect("fewer than 2^32 experts"));
            uses.extend((0..experts).map(|_| Use { layer, ..Use::default() }));
        }
        Self {
            policy,
            first,
            slot_of: vec![NONE; uses.len()],
            prefetched: vec![false; uses.len()],
            uses,
            slots: vec![Slot { expert: NONE, holds: 0, filling: false, withdrawn: false }; slots as usize],
            // The lowest slot is given first.
            free: (0..slots).rev().collect(),
            occupancy: vec![0; experts_per_layer.len()],
            prepared: Prepared::default(),
            prefetch: PrefetchCount::default(),
            now: 0,
            running: 0,
            cycle_uses: [0; 2],
        }
    }

    /// The policy that chooses victims.
    #[must_use]
    pub fn policy(&self) -> PolicyKind {
        self.policy
    }

    /// The dense id of an expert.
    #[must_use]
    pub fn id(&self, layer: u32, expert: u32) -> u32 {
        self.first[layer as usize] + expert
    }

    /// The slot of a resident expert.
    #[must_use]
    pub fn slot_of(&self, e: u32) -> Option<u32> {
        some(self.slot_of[e as usize])
    }

    /// The expert in a slot.
    #[must_use]
    pub fn expert_in(&self, slot: u32) -> Option<u32> {
        some(self.slots[slot as usize].expert)
    }

    /// The record of an expert's uses.
    #[must_use]
    pub fn uses(&self, e: u32) -> &Use {
        &self.uses[e as usize]
    }

    /// Number of resident experts.
    #[must_use]
    pub fn resident(&self) -> u32 {
        self.occupancy.iter().sum()
    }

    /// Number of slots that experts of a layer hold.
    #[must_use]
    pub fn occupancy(&self, layer: u32) -> u32 {
        self.occupancy[layer as usize]
    }

    /// Begins a call: one forward of one layer's experts.
    pub fn tick(&mut self) {
        if self.now.is_multiple_of(self.occupancy.len().max(1) as u64) {
            self.cycle_uses = [self.cycle_uses[1], 0];
        }
        self.now += 1;
    }

    /// Notes that the running call uses an expert for `tokens` tokens. Once for each expert of a call.
    pub fn used(&mut self, e: u32, tokens: u64) {
        let layers = self.occupancy.len() as f32;
        let record = &mut self.uses[e as usize];
        *record = record.again(self.now, layers, tokens);
        self.running = record.layer;
        self.cycle_uses[1] += 1;
    }

    /// Keeps an expert from eviction under the policy `pinned`. It is placed like any other when it is first needed.
    pub fn pin(&mut self, e: u32) {
        self.uses[e as usize].pinned = true;
    }

    /// Gives an expert a slot: a free one, else that of the victim which the policy chooses among the slots that are
    /// not held, not being filled and not protected.
    ///
    /// # Panics
    /// When the expert is resident.
    pub fn place(&mut self, e: u32, protect: impl Fn(u32) -> bool) -> Result<Placement, NoSlot> {
        assert!(self.slot_of[e as usize] == NONE, "expert {e} is resident");
        let layer = self.uses[e as usize].layer;
        let (slot, evicted) = if let Some(slot) = self.free.pop() {
            (slot, None)
        } else {
            let slot = self.take_prepared(layer, &protect).or_else(|| self.search(layer, &protect)).ok_or(NoSlot)?;
            (slot, self.clear(slot))
        };
        self.slots[slot as usize].expert = e;
        self.slot_of[e as usize] = slot;
        self.occupancy[layer as usize] += 1;
        Ok(Placement { slot, evicted })
    }

    /// Chooses the `n` best victims ahead, so that [`place`](Self::place) needs no look at every slot. To be called
    /// when nobody waits. `place` checks each choice again, and searches by itself when none is left.
    pub fn prepare_victims(&mut self, n: usize) {
        let mut prepared = std::mem::take(&mut self.prepared);
        prepared.choose(n, self.scored(None), &self.slots, &self.uses);
        self.prepared = prepared;
    }

    /// Keeps a slot's expert in place until as many [`release`](Self::release)s.
    ///
    /// # Panics
    /// When the slot is empty.
    pub fn hold(&mut self, slot: u32) {
        let slot = &mut self.slots[slot as usize];
        assert!(slot.expert != NONE, "an empty slot cannot be held");
        slot.holds += 1;
    }

    /// Ends one [`hold`](Self::hold).
    ///
    /// # Panics
    /// When the slot is not held.
    pub fn release(&mut self, slot: u32) {
        let holds = &mut self.slots[slot as usize].holds;
        *holds = holds.checked_sub(1).expect("a release without a hold");
    }

    /// Number of holds on a slot.
    #[must_use]
    pub fn holds(&self, slot: u32) -> u32 {
        self.slots[slot as usize].holds
    }

    /// Says whether bytes are on their way into a slot; until they are there, its expert is not evicted.
    pub fn set_filling(&mut self, slot: u32, filling: bool) {
        self.slots[slot as usize].filling = filling;
    }

    /// Whether bytes are on their way into a slot.
    #[must_use]
    pub fn is_filling(&self, slot: u32) -> bool {
        self.slots[slot as usize].filling
    }

    /// Makes a slot free and returns the expert that was in it. Also ends a [`withdrawal`](Self::withdraw).
    ///
    /// # Panics
    /// When the slot is held or being filled.
    pub fn free(&mut self, slot: u32) -> Option<u32> {
        let state = self.slots[slot as usize];
        assert!(state.holds == 0 && !state.filling, "slot {slot} is in use");
        let evicted = self.clear(slot);
        if evicted.is_some() || state.withdrawn {
            self.slots[slot as usize].withdrawn = false;
            self.free.push(slot);
        }
        evicted
    }

    /// Takes a slot out of use and returns the expert that was in it; [`free`](Self::free) gives it back.
    ///
    /// Fails when the slot is held or being filled.
    pub fn withdraw(&mut self, slot: u32) -> Result<Option<u32>, NoSlot> {
        let state = self.slots[slot as usize];
        if state.holds > 0 || state.filling {
            return Err(NoSlot);
        }
        let evicted = self.clear(slot);
        self.free.retain(|&free| free != slot);
        self.slots[slot as usize].withdrawn = true;
        Ok(evicted)
    }

    /// Notes that a resident expert was brought by prefetch.
    ///
    /// # Panics
    /// When the expert is not resident.
    pub fn mark_prefetched(&mut self, e: u32) {
        assert!(self.slot_of[e as usize] != NONE, "expert {e} is not resident");
        if !std::mem::replace(&mut self.prefetched[e as usize], true) {
            self.prefetch.waiting += 1;
        }
    }

    /// Whether this is the first use of a prefetched expert; counts it as useful.
    pub fn take_prefetched(&mut self, e: u32) -> bool {
        let first = std::mem::take(&mut self.prefetched[e as usize]);
        self.prefetch.useful += u64::from(first);
        self.prefetch.waiting -= u64::from(first);
        first
    }

    /// What became of prefetched experts so far.
    #[must_use]
    pub fn prefetch(&self) -> PrefetchCount {
        self.prefetch
    }

    /// Empties a slot, without making it free.
    fn clear(&mut self, slot: u32) -> Option<u32> {
        let e = some(std::mem::replace(&mut self.slots[slot as usize].expert, NONE))?;
        self.slot_of[e as usize] = NONE;
        self.occupancy[self.uses[e as usize].layer as usize] -= 1;
        let wasted = u64::from(std::mem::take(&mut self.prefetched[e as usize]));
        self.prefetch.wasted += wasted;
        self.prefetch.waiting -= wasted;
        Some(e)
    }

    fn take_prepared(&mut self, layer: u32, protect: &impl Fn(u32) -> bool) -> Option<u32> {
        let mut prepared = std::mem::take(&mut self.prepared);
        let context = self.context(Some(layer));
        let fits = |slot: u32| {
            let Slot { expert, holds, filling, .. } = self.slots[slot as usize];
            let in_turn = self.policy != PolicyKind::Ema || policy::crowded(self.uses[expert as usize].layer, &context);
            holds == 0 && !filling && in_turn && !protect(slot)
        };
        let slot = prepared.take(&self.slots, &self.uses, fits);
        self.prepared = prepared;
        slot
    }

    fn search(&self, layer: u32, protect: &impl Fn(u32) -> bool) -> Option<u32> {
        let open = self.scored(Some(layer)).filter(|(score, slot)| score.is_finite() && !protect(*slot));
        open.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, slot)| slot)
    }

    /// Scores of all slots whose expert may leave as far as the book knows.
    fn scored(&self, incoming: Option<u32>) -> impl Iterator<Item = (f32, u32)> {
        let context = self.context(incoming);
        (0u32..).zip(&self.slots).filter(|(_, slot)| slot.expert != NONE && slot.holds == 0 && !slot.filling).map(
            move |(at, slot)| (policy::score(self.policy, &self.uses[slot.expert as usize], self.now, &context), at),
        )
    }

    fn context(&self, incoming: Option<u32>) -> Context<'_> {
        let layers = self.occupancy.len() as f32;
        Context {
            layers,
            running: self.running,
            flooded: self.cycle_uses[0].max(self.cycle_uses[1]) > self.slots.len() as u64,
            occupancy: &self.occupancy,
            share: self.slots.len() as f32 / layers,
            incoming,
        }
    }
}

fn some(value: u32) -> Option<u32> {
    (value != NONE).then_some(value)
}
