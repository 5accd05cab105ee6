//! The slot table in one thread; also run under miri.

use crate::residency::{Found, LANES, SlotTable};

#[test]
fn an_expert_is_found_from_publication_to_retirement() {
    let (table, mut writer) = SlotTable::new(4);
    let look = |e| table.begin().expect("a lane").slot_of(e);
    assert_eq!(look(2), None);
    writer.publish(2, u32::MAX);
    writer.publish(3, 0);
    assert_eq!((look(2), look(3), look(1)), (Some(u32::MAX), Some(0), None));
    writer.retire(2);
    assert_eq!((look(2), look(3)), (None, Some(0)));
    assert_eq!((table.experts(), writer.table().experts()), (4, 4));
}

#[test]
fn a_generation_tells_that_an_expert_has_moved() {
    let (table, mut writer) = SlotTable::new(1);
    let find = || table.begin().expect("a lane").find(0);
    assert_eq!(find(), None);
    writer.publish(0, 7);
    assert_eq!(find(), Some(Found { slot: 7, generation: 1 }));
    writer.retire(0);
    writer.publish(0, 7);
    assert_eq!(find(), Some(Found { slot: 7, generation: 3 }));
}

#[test]
fn a_retirement_waits_for_older_leases_only() {
    let (table, mut writer) = SlotTable::new(2);
    writer.publish(0, 0);
    writer.publish(1, 1);
    let old = table.begin().expect("a lane");
    let first = writer.retire(0);
    let young = table.begin().expect("a lane");
    assert!(!writer.is_quiet(first));
    let second = writer.retire(1);
    assert!(first < second);
    drop(old);
    assert!(writer.is_quiet(first), "the younger lease cannot have found the expert");
    assert!(!writer.is_quiet(second), "the younger lease can have found this one");
    drop(young);
    assert!(writer.is_quiet(second) && writer.is_quiet(first));
    let _later = table.begin().expect("a lane");
    assert!(writer.is_quiet(second), "quiet for good");
}

#[test]
fn an_owned_lease_is_a_lease_that_keeps_the_table() {
    let (table, mut writer) = SlotTable::new(1);
    writer.publish(0, 5);
    let lease = table.begin_owned().expect("a lane");
    let epoch = writer.retire(0);
    assert!(!writer.is_quiet(epoch));
    writer.publish(0, 6);
    drop(table);
    assert_eq!(lease.slot_of(0), Some(6));
    drop(lease);
    assert!(writer.is_quiet(epoch));
}

#[test]
fn with_all_lanes_taken_there_is_no_lease_until_one_ends() {
    let (table, _writer) = SlotTable::new(1);
    let mut leases: Vec<_> = (0..LANES).map(|_| table.begin().expect("a lane")).collect();
    assert!(table.begin().is_none());
    leases.pop();
    assert!(table.begin().is_some());
}

#[test]
#[should_panic(expected = "expert 0 is resident: retire it first")]
fn an_expert_has_one_slot() {
    let (_table, mut writer) = SlotTable::new(1);
    writer.publish(0, 0);
    writer.publish(0, 1);
}

#[test]
#[should_panic(expected = "expert 0 is not resident")]
fn only_residents_retire() {
    SlotTable::new(1).1.retire(0);
}
