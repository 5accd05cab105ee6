//! The slot table in every interleaving that loom explores:
//! `RUSTFLAGS="--cfg moecore_loom" cargo test -p moecore --release --lib residency::tests::loom`.
//!
//! Slots are loom's `UnsafeCell`s: loom itself reports a read that a write does not happen before or after. Each model
//! was seen to fail with an ordering or a fence taken away; the documentation of `table` says what each is for.

#![allow(unsafe_code, reason = "cells that loom watches")]

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::model;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use crate::residency::{Epoch, Lease, SlotTable, Writer};

/// Slot bytes without any synchronisation of their own.
struct Slots(Vec<UnsafeCell<u32>>);

// SAFETY: the point of the models: the table must order all accesses, and loom reports those that it does not.
unsafe impl Sync for Slots {}

impl Slots {
    fn new(count: usize) -> Arc<Self> {
        Arc::new(Self((0..count).map(|_| UnsafeCell::new(u32::MAX)).collect()))
    }

    fn write(&self, slot: u32, e: u32) {
        // SAFETY: loom checks that nobody else accesses the cell.
        self.0[slot as usize].with_mut(|bytes| unsafe { *bytes = e });
    }

    fn read(&self, slot: u32) -> u32 {
        // SAFETY: loom checks that nobody writes the cell.
        self.0[slot as usize].with(|bytes| unsafe { *bytes })
    }
}

/// Looks experts up and checks the bytes of those that are there.
fn check(lease: &Lease<'_>, slots: &Slots, experts: u32) {
    for e in 0..experts {
        if let Some(slot) = lease.slot_of(e) {
            assert_eq!(slots.read(slot), e, "bytes of the expert that was looked up");
        }
    }
}

/// Evicts `old` from slot 0 for `new`, if that may be done at once.
fn replace(writer: &mut Writer, slots: &Slots, old: u32, new: u32) -> (Epoch, bool) {
    let epoch = writer.retire(old);
    let quiet = writer.is_quiet(epoch);
    if quiet {
        slots.write(0, new);
        writer.publish(new, 0);
    }
    (epoch, quiet)
}

#[test]
fn a_slot_is_not_overwritten_under_a_lease() {
    model(|| {
        let (table, mut writer) = SlotTable::with_lanes(2, 1);
        let slots = Slots::new(1);
        slots.write(0, 0);
        writer.publish(0, 0);
        let reader = thread::spawn({
            let slots = Arc::clone(&slots);
            move || {
                // Twice, so that the lane is used again.
                for _ in 0..2 {
                    check(&table.begin().expect("the only reader"), &slots, 2);
                }
            }
        });
        let (epoch, _) = replace(&mut writer, &slots, 0, 1);
        reader.join().unwrap();
        assert!(writer.is_quiet(epoch), "no lease is left");
    });
}

#[test]
fn two_retirements_and_a_reader() {
    model(|| {
        let (table, mut writer) = SlotTable::with_lanes(3, 1);
        let slots = Slots::new(1);
        slots.write(0, 0);
        writer.publish(0, 0);
        let reader = thread::spawn({
            let slots = Arc::clone(&slots);
            move || check(&table.begin().expect("the only reader"), &slots, 3)
        });
        if replace(&mut writer, &slots, 0, 1).1 {
            replace(&mut writer, &slots, 1, 2);
        }
        reader.join().unwrap();
    });
}

#[test]
fn readers_that_take_turns_on_one_lane() {
    model(|| {
        let (table, mut writer) = SlotTable::with_lanes(1, 1);
        let slots = Slots::new(1);
        slots.write(0, 0);
        writer.publish(0, 0);
        let readers = [0, 1].map(|_| {
            let (table, slots) = (Arc::clone(&table), Arc::clone(&slots));
            thread::spawn(move || {
                if let Some(lease) = table.begin() {
                    check(&lease, &slots, 1);
                }
            })
        });
        let epoch = writer.retire(0);
        if writer.is_quiet(epoch) {
            slots.write(0, u32::MAX);
        }
        for reader in readers {
            reader.join().unwrap();
        }
        assert!(writer.is_quiet(epoch), "no lease is left");
    });
}

#[test]
fn who_finds_an_expert_sees_its_bytes() {
    model(|| {
        let (table, mut writer) = SlotTable::with_lanes(1, 1);
        let slots = Slots::new(1);
        let reader = thread::spawn({
            let slots = Arc::clone(&slots);
            move || check(&table.begin().expect("the only reader"), &slots, 1)
        });
        slots.write(0, 0);
        writer.publish(0, 0);
        reader.join().unwrap();
    });
}

#[test]
fn a_lane_has_one_lease_at_a_time() {
    model(|| {
        let (table, _writer) = SlotTable::with_lanes(1, 1);
        let alive = Arc::new(AtomicUsize::new(0));
        let take = {
            let alive = Arc::clone(&alive);
            move || {
                let lease = table.begin();
                if lease.is_some() {
                    assert_eq!(alive.fetch_add(1, Ordering::AcqRel), 0, "two leases on one lane");
                    alive.fetch_sub(1, Ordering::AcqRel);
                }
                lease.is_some()
            }
        };
        let other = thread::spawn(take.clone());
        let (mine, theirs) = (take(), other.join().unwrap());
        assert!(mine || theirs, "with a free lane, one of two gets it");
        assert!(take(), "both have ended");
    });
}
