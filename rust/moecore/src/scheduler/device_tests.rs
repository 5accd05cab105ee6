use std::collections::HashMap;

use proptest::prelude::*;

use super::super::decisions::{Decisions, DeviceCall, Order, Step};
use super::super::tests::{Rig, plain};
use super::{DeviceScheduler, Place};
use crate::ErrorKind;
use crate::io::Fault;
use crate::scheduler::{Call, Ring};
use crate::telemetry::Phase;

/// What the device knows: its slot table, changed by orders only.
struct Device {
    scheduler: DeviceScheduler,
    table: HashMap<u32, u32>,
    seq: u64,
}

impl Device {
    fn new(rig: &Rig, slots: u32) -> Self {
        let (store, rows) = (rig.store.clone(), rig.shared_scheduler());
        let policy = "lfru".parse().unwrap();
        let made = DeviceScheduler::new(store, slots, policy, rows, rig.memory.clone(), rig.telemetry.clone());
        Self { scheduler: made.unwrap(), table: HashMap::new(), seq: 0 }
    }

    /// One call of layer 0, as the kernel runs it.
    fn call(&mut self, rig: &Rig, used: &[u32]) -> crate::Result<usize> {
        let missing: Vec<u32> = used.iter().copied().filter(|expert| !self.table.contains_key(expert)).collect();
        self.seq += 1;
        let pairs = u32::try_from(used.len()).unwrap();
        let call = DeviceCall { seq: self.seq, layer: 0, phase: 1, pairs, used, missing: &missing };
        let mut orders = Vec::new();
        self.scheduler.call(&call, &mut orders)?;
        for &Order { step, evicted } in &orders {
            if let Some(gone) = evicted {
                assert!(!used.contains(&gone), "the call uses expert {gone}");
                assert!(self.table.remove(&gone).is_some(), "expert {gone} was not there");
            }
            let Step::Fetch { expert, slot, source } = step else { panic!("nothing was prefetched") };
            rig.check_at(expert, source);
            assert!(self.table.values().all(|&taken| taken != slot), "slot {slot} is taken");
            self.table.insert(expert, slot);
        }
        assert!(used.iter().all(|expert| self.table.contains_key(expert)));
        if !orders.is_empty() {
            self.scheduler.idle();
        }
        Ok(orders.len())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_call_finds_its_experts_and_no_slot_is_taken_twice(
        slots in 4_u32..12,
        host in 6_u32..16,
        calls in prop::collection::vec(prop::collection::btree_set(0_u32..16, 1..5), 1..60),
    ) {
        let rig = Rig::new(host, 16, plain);
        let mut device = Device::new(&rig, slots);
        for used in calls {
            let used: Vec<u32> = used.into_iter().collect();
            device.call(&rig, &used).unwrap();
            prop_assert!(device.table.len() <= slots as usize);
        }
        let seen = rig.telemetry.of(0, Phase::Decode).snapshot();
        prop_assert!(seen.hits + seen.misses >= device.seq);
    }
}

#[test]
fn a_failed_read_changes_nothing_and_can_be_tried_again() {
    let rig = Rig::new(8, 8, |reads| {
        reads.script(2, Fault::Eio);
        reads
    });
    let mut device = Device::new(&rig, 4);
    device.call(&rig, &[0, 1]).unwrap();
    assert_eq!(device.call(&rig, &[1, 2]).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(device.call(&rig, &[1, 2]).unwrap(), 1);
}

#[test]
fn more_experts_than_slots_are_an_error_with_the_smallest_budget() {
    let rig = Rig::new(8, 8, plain);
    let mut device = Device::new(&rig, 2);
    let error = device.call(&rig, &[0, 1, 2]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Budget);
    assert!(error.to_string().contains(&(3 * rig.store.slot_bytes()).to_string()), "{error}");
}

#[test]
fn a_prefill_borrows_the_ring_and_fills_free_slots_by_shares() {
    let rig = Rig::new(8, 8, plain);
    let mut device = Device::new(&rig, 6);
    let scheduler = device.scheduler.clone();
    assert_eq!(scheduler.ring(), Ring { first: 4, chunk: 1, halves: 2 });
    for expert in 0..6 {
        device.call(&rig, &[expert]).unwrap();
    }
    let mut evicted = scheduler.begin_prefill();
    evicted.sort_unstable();
    assert_eq!(evicted, [4, 5], "what was in the ring's slots");
    assert!(scheduler.begin_prefill().is_empty());
    let call = Call { layer: 0, phase: Phase::Prefill, experts: vec![0, 4, 7], tokens: vec![3, 2, 1] };
    assert_eq!(scheduler.prefill(&call), [Place::Slot(0), Place::Below, Place::Below]);
    assert!(scheduler.admit(&[7]).is_empty(), "every slot of the cache is taken");
    assert!(scheduler.end_prefill());
    assert!(!scheduler.end_prefill());
    for expert in &evicted {
        device.table.remove(expert);
    }
    assert_eq!(device.call(&rig, &[4, 5]).unwrap(), 2);

    let fresh = Device::new(&rig, 6).scheduler;
    assert!(fresh.begin_prefill().is_empty());
    let admitted = fresh.admit(&[3, 1, 2, 0]);
    assert_eq!(admitted, [(3, 0), (1, 1)], "half of the four slots is one layer's share");
    // Their bytes are not there yet: a copy from their slots would bring what lay there before.
    assert_eq!(fresh.places(&[3, 1]), [Place::Below, Place::Below]);
    fresh.settle(&[3]);
    assert_eq!(fresh.places(&[3, 1]), [Place::Slot(0), Place::Below]);
}
