//! Readers and the writer at full speed, with slots that show when they were overwritten too early.

use std::array;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

use crate::residency::{Lease, SlotTable, Writer};

const EXPERTS: u32 = 64;
const SLOTS: usize = 12;
const READERS: u32 = 3;
const LEASES: u32 = if cfg!(miri) { 20 } else { 2_000 };
const POISON: u64 = u64::MAX;

/// Bytes of a slot. Atomic so that a fault is a wrong value and not undefined behaviour.
type Slot = [AtomicU64; 16];

fn fill(slot: &Slot, value: u64) {
    for word in slot {
        word.store(value, Ordering::Relaxed);
    }
}

fn check(slots: &[Slot], found: &[(u32, u32)]) {
    for &(e, slot) in found {
        for word in &slots[slot as usize] {
            assert_eq!(word.load(Ordering::Relaxed), u64::from(e), "bytes of expert {e} in slot {slot}");
        }
    }
}

/// A small generator: the choices only have to differ.
fn random(state: &mut u64) -> u32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    u32::try_from(*state >> 33).expect("31 bits")
}

/// Looks eight experts up, and reads those that are there at once and after others had time to run.
fn call(lease: &Lease<'_>, slots: &[Slot], state: &mut u64) -> usize {
    let experts: [u32; 8] = array::from_fn(|_| random(state) % EXPERTS);
    let found: Vec<_> = experts.iter().filter_map(|&e| lease.slot_of(e).map(|slot| (e, slot))).collect();
    check(slots, &found);
    thread::yield_now();
    check(slots, &found);
    found.len()
}

/// Puts experts into slots, each time after poison, until no reader is left. Returns the number of evictions.
fn churn(writer: &mut Writer, slots: &[Slot], readers: &AtomicU32) -> u64 {
    let (mut state, mut evictions) = (0x9e37_79b9_7f4a_7c15, 0);
    let mut residents: [Option<u32>; SLOTS] = [None; SLOTS];
    while readers.load(Ordering::Relaxed) > 0 {
        let slot = random(&mut state) % u32::try_from(SLOTS).expect("small");
        let at = slot as usize;
        if let Some(e) = residents[at].take() {
            let epoch = writer.retire(e);
            while !writer.is_quiet(epoch) {
                thread::yield_now();
            }
            fill(&slots[at], POISON);
            evictions += 1;
        }
        let e = random(&mut state) % EXPERTS;
        if !residents.contains(&Some(e)) {
            fill(&slots[at], u64::from(e));
            writer.publish(e, slot);
            residents[at] = Some(e);
        }
    }
    evictions
}

/// Ends the writer also when a reader's check fails.
struct End<'a>(&'a AtomicU32);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[test]
fn no_reader_sees_poison_or_another_expert() {
    // With three readers and two lanes, some are turned away.
    let (table, mut writer) = SlotTable::with_lanes(EXPERTS, 2);
    let slots: [Slot; SLOTS] = array::from_fn(|_| array::from_fn(|_| AtomicU64::new(POISON)));
    let running = AtomicU32::new(READERS);

    let read = |seed: u64| {
        let _end = End(&running);
        let (mut state, mut hits, mut leases) = (seed, 0, 0);
        while leases < LEASES {
            if let Some(lease) = table.begin() {
                hits += call(&lease, &slots, &mut state);
                leases += 1;
            } else {
                thread::yield_now();
            }
        }
        hits
    };
    thread::scope(|scope| {
        let readers = [1, 2, 3].map(|seed| scope.spawn(move || read(0x5851_f42d_4c95_7f2d_u64.wrapping_mul(seed))));
        let evictions = churn(&mut writer, &slots, &running);
        let hits = readers.map(|reader| reader.join().expect("no fault"));
        // A stress that finds nothing proves nothing.
        assert!(evictions > 0 && hits.iter().all(|&hits| hits > 0), "{evictions} evictions, {hits:?} hits");
    });
}
