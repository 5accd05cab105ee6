//! The book: what every sequence of calls must leave true, and single rules.

use proptest::collection::vec;
use proptest::prelude::*;

use crate::residency::{NoSlot, Placement, PolicyKind, PrefetchCount, Residency};

const LAYERS: [u32; 3] = [5, 4, 6];
const EXPERTS: u32 = 15;
const SLOTS: u32 = 6;

/// What a scheduler may ask of the book.
#[derive(Debug, Clone, Copy)]
enum Step {
    Tick,
    Need(u32),
    Protected(u32, u32),
    Hold(u32),
    Release(u32),
    Filling(u32, bool),
    Free(u32),
    Withdraw(u32),
    Prefetch(u32),
    Prepare(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Tick),
        8 => (0..EXPERTS).prop_map(Step::Need),
        3 => ((0..EXPERTS), (0..SLOTS)).prop_map(|(e, slot)| Step::Protected(e, slot)),
        1 => (0..SLOTS).prop_map(Step::Hold),
        2 => (0..SLOTS).prop_map(Step::Release),
        2 => ((0..SLOTS), any::<bool>()).prop_map(|(slot, on)| Step::Filling(slot, on)),
        1 => (0..SLOTS).prop_map(Step::Free),
        1 => (0..SLOTS).prop_map(Step::Withdraw),
        2 => (0..EXPERTS).prop_map(Step::Prefetch),
        2 => (0..8_usize).prop_map(Step::Prepare),
    ];
    vec(step, 1..200)
}

/// The book with what it should say, kept in the plainest way.
struct Checked {
    book: Residency,
    pinned: Vec<u32>,
    experts: [Option<u32>; SLOTS as usize],
    withdrawn: [bool; SLOTS as usize],
    prefetched: Vec<u32>,
    useful: u64,
    wasted: u64,
}

impl Checked {
    fn in_use(&self, slot: u32) -> bool {
        self.book.holds(slot) > 0 || self.book.is_filling(slot)
    }

    fn left(&mut self, e: Option<u32>) {
        let before = self.prefetched.len();
        self.prefetched.retain(|&other| Some(other) != e);
        self.wasted += u64::from(self.prefetched.len() < before);
    }

    fn place(&mut self, e: u32, protect: impl Fn(u32) -> bool) {
        if self.book.slot_of(e).is_some() {
            return;
        }
        let open = |slot: u32| {
            let pinned = self.experts[slot as usize].is_some_and(|e| self.pinned.contains(&e));
            self.experts[slot as usize].is_some() && !self.in_use(slot) && !protect(slot) && !pinned
        };
        let open: Vec<u32> = (0..SLOTS).filter(|&slot| open(slot)).collect();
        let empty = |slot: &u32| self.experts[*slot as usize].is_none() && !self.withdrawn[*slot as usize];
        let empty: Vec<u32> = (0..SLOTS).filter(empty).collect();
        match self.book.place(e, protect) {
            Ok(Placement { slot, evicted: None }) => {
                assert!(empty.contains(&slot));
                self.experts[slot as usize] = Some(e);
            }
            Ok(Placement { slot, evicted }) => {
                assert!(empty.is_empty(), "free slots first");
                assert!(open.contains(&slot), "slot {slot} was not to be evicted");
                assert_eq!(self.experts[slot as usize], evicted);
                self.left(evicted);
                self.experts[slot as usize] = Some(e);
            }
            Err(NoSlot) => assert!(empty.is_empty() && open.is_empty(), "there was a slot"),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Tick => self.book.tick(),
            Step::Need(e) => {
                self.book.used(e, 1);
                let first = self.prefetched.contains(&e);
                assert_eq!(self.book.take_prefetched(e), first);
                self.prefetched.retain(|&other| other != e);
                self.useful += u64::from(first);
                self.place(e, |_| false);
            }
            Step::Protected(e, slot) => self.place(e, |other| other <= slot),
            Step::Hold(slot) if self.experts[slot as usize].is_some() => self.book.hold(slot),
            Step::Release(slot) if self.book.holds(slot) > 0 => self.book.release(slot),
            Step::Filling(slot, on) if !on || self.experts[slot as usize].is_some() => self.book.set_filling(slot, on),
            Step::Free(slot) if !self.in_use(slot) => {
                let e = self.book.free(slot);
                assert_eq!(e, self.experts[slot as usize].take());
                self.withdrawn[slot as usize] = false;
                self.left(e);
            }
            Step::Withdraw(slot) => match self.book.withdraw(slot) {
                Err(NoSlot) => assert!(self.in_use(slot)),
                Ok(e) => {
                    assert!(!self.in_use(slot));
                    assert_eq!(e, self.experts[slot as usize].take());
                    self.withdrawn[slot as usize] = true;
                    self.left(e);
                }
            },
            Step::Prefetch(e) => {
                self.place(e, |_| false);
                if self.book.slot_of(e).is_some() && !self.prefetched.contains(&e) {
                    self.book.mark_prefetched(e);
                    self.prefetched.push(e);
                }
            }
            Step::Prepare(n) => self.book.prepare_victims(n),
            Step::Hold(_) | Step::Release(_) | Step::Filling(..) | Step::Free(_) => {}
        }
    }

    fn check(&self) {
        for slot in 0..SLOTS {
            assert_eq!(self.book.expert_in(slot), self.experts[slot as usize]);
        }
        for e in 0..EXPERTS {
            let slots = (0..SLOTS).filter(|&slot| self.experts[slot as usize] == Some(e));
            assert_eq!(self.book.slot_of(e), slots.clone().next());
            assert!(slots.count() <= 1, "expert {e} in two slots");
        }
        let of_layer = |layer| self.experts.iter().flatten().filter(|&&e| self.book.uses(e).layer == layer).count();
        let occupancy: Vec<u32> = (0..3).map(|layer| self.book.occupancy(layer)).collect();
        assert_eq!(occupancy.iter().map(|&n| n as usize).collect::<Vec<_>>(), (0..3).map(of_layer).collect::<Vec<_>>());
        assert_eq!(self.book.resident(), occupancy.iter().sum::<u32>());
        let (useful, wasted) = (self.useful, self.wasted);
        let waiting = self.prefetched.len() as u64;
        assert_eq!(self.book.prefetch(), PrefetchCount { useful, wasted, waiting });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 300 }, ..ProptestConfig::default() })]

    #[test]
    fn the_book_is_right_after_every_step(policy in 0..PolicyKind::ALL.len(), pins in 0..4_u32, steps in steps()) {
        let mut book = Residency::new(&LAYERS, SLOTS, PolicyKind::ALL[policy]);
        let pinned = if book.policy() == PolicyKind::Pinned { (0..pins).collect() } else { vec![] };
        for &e in &pinned {
            book.pin(e);
        }
        let mut checked = Checked {
            book, pinned, experts: [None; SLOTS as usize], withdrawn: [false; SLOTS as usize], prefetched: vec![],
            useful: 0, wasted: 0,
        };
        for step in steps {
            checked.step(step);
            checked.check();
        }
    }

    /// A preparation of all slots, and nothing since, changes no choice. (Shares of layers count the expert that comes,
    /// which a preparation does not know: `ema` may choose otherwise.)
    #[test]
    fn what_is_prepared_is_what_a_search_would_find(policy in 0..PolicyKind::ALL.len(), uses in vec(0..EXPERTS, 20..60)) {
        let policy = PolicyKind::ALL[policy];
        prop_assume!(policy != PolicyKind::Ema);
        let run = |prepare: bool| {
            let mut book = Residency::new(&LAYERS, SLOTS, policy);
            let mut placed = vec![];
            for &e in &uses {
                book.tick();
                book.used(e, 1);
                if book.slot_of(e).is_none() {
                    if prepare {
                        book.prepare_victims(SLOTS as usize);
                    }
                    placed.push(book.place(e, |_| false).expect("a slot"));
                }
            }
            placed
        };
        prop_assert_eq!(run(false), run(true));
    }
}

/// A book with experts 0 to 5 in slots 0 to 5, used in this order.
fn full(policy: PolicyKind) -> Residency {
    let mut book = Residency::new(&LAYERS, SLOTS, policy);
    for e in 0..SLOTS {
        book.tick();
        book.used(e, 1);
        assert_eq!(book.place(e, |_| false), Ok(Placement { slot: e, evicted: None }));
    }
    book
}

#[test]
fn a_choice_made_ahead_is_checked_again() {
    let mut book = full(PolicyKind::Lru);
    book.prepare_victims(4);
    book.tick();
    book.used(0, 1);
    book.hold(1);
    book.set_filling(2, true);
    let evicted = |book: &mut Residency, e, protect: u32| book.place(e, |slot| slot == protect).map(|p| p.evicted);
    assert_eq!(evicted(&mut book, 10, 3), Ok(Some(4)), "used, held, filling, protected; then one beyond the list");
    book.release(1);
    assert_eq!(evicted(&mut book, 11, 3), Ok(Some(1)), "kept on the list while it was held");
    assert_eq!(evicted(&mut book, 12, 99), Ok(Some(3)));
}

#[test]
fn when_every_slot_is_in_use_the_error_says_what_to_do() {
    let mut book = full(PolicyKind::default());
    (0..SLOTS).for_each(|slot| book.hold(slot));
    let error = book.place(9, |_| false).unwrap_err();
    assert!(error.to_string().contains("more slots"), "{error}");
    book.release(3);
    assert_eq!(book.place(9, |_| false), Ok(Placement { slot: 3, evicted: Some(3) }));
}

#[test]
fn the_ring_comes_and_goes() {
    let mut book = full(PolicyKind::default());
    assert_eq!((book.withdraw(4), book.withdraw(5)), (Ok(Some(4)), Ok(Some(5))));
    assert_eq!(book.resident(), 4);
    assert_ne!(book.place(9, |_| false).map(|placement| placement.slot >= 4), Ok(true), "not given while away");
    assert_eq!((book.free(4), book.free(5)), (None, None));
    let slots = [10, 11].map(|e| book.place(e, |_| false).expect("free again").slot);
    assert_eq!(slots, [5, 4]);
    assert_eq!(book.free(5), Some(10));
    assert_eq!(book.free(5), None, "freed twice is free once");
    assert_eq!(book.place(10, |_| false), Ok(Placement { slot: 5, evicted: None }));
}

#[test]
fn dense_ids_count_over_layers_of_different_sizes() {
    let book = Residency::new(&LAYERS, SLOTS, PolicyKind::default());
    assert_eq!([(0, 0), (1, 0), (2, 5)].map(|(layer, expert)| book.id(layer, expert)), [0, 5, 14]);
    assert_eq!((book.uses(4).layer, book.uses(5).layer), (0, 1));
}

#[test]
#[should_panic(expected = "slot 0 is in use")]
fn a_slot_with_bytes_on_their_way_is_not_free() {
    let mut book = full(PolicyKind::default());
    book.set_filling(0, true);
    book.free(0);
}
