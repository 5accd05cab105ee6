//! The fake keeps the contract of the engines that it stands for.

use super::{Row, channel, content, job, next, range};
use crate::error::ErrorKind;
use crate::io::{FakeReads, Fault, ReadEngine, Urgency};

#[test]
fn its_files_are_a_function_of_file_and_offset() {
    let (sender, receiver) = channel();
    let fake = FakeReads::new(&[10_000, 10_000], sender);
    let ranges = [range(1, 5000, 100, 0), range(0, 0, 50, 100)];
    let mut row = Row::new(150, 0);
    fake.submit(job(5, &ranges, &mut row), Urgency::Demand);
    let done = next(&receiver);
    assert_eq!((done.tag, done.result.is_ok(), done.bytes), (5, true, 150));
    row.assert_holds(&ranges, &[content(10_000, 0), content(10_000, 1)]);
    fake.submit(job(6, &[range(0, 9_999, 2, 0)], &mut row), Urgency::Demand);
    assert_eq!(next(&receiver).result.expect_err("after its end").kind(), ErrorKind::Io);
    assert_eq!(fake.name(), "fake");
}

#[test]
fn scripted_faults_happen_to_their_jobs() {
    let (sender, receiver) = channel();
    let fake = FakeReads::new(&[100], sender);
    let mut rows: Vec<Row> = (0..6).map(|_| Row::new(10, 0)).collect();
    let faults = [Fault::Eio, Fault::ShortRead, Fault::Panic, Fault::Duplicate, Fault::Delay, Fault::Never];
    for (number, (fault, row)) in faults.into_iter().zip(&mut rows).enumerate() {
        fake.script(number, fault);
        fake.submit(job(number as u64, &[range(0, 0, 10, 0)], row), Urgency::Demand);
    }
    for (tag, text) in [(0, "cannot be read at byte 5"), (1, "ends at byte 5"), (2, "panicked")] {
        let done = next(&receiver);
        let error = done.result.expect_err("scripted");
        assert_eq!((done.tag, error.kind(), done.bytes), (tag, ErrorKind::Io, 0));
        assert!(error.to_string().contains(text), "{error}");
    }
    for _ in 0..2 {
        let done = next(&receiver);
        assert_eq!((done.tag, done.result.is_ok(), done.bytes), (3, true, 10));
    }
    assert!(receiver.is_empty());
    assert!(fake.release(4) && !fake.release(4) && !fake.release(5) && !fake.release(0));
    assert_eq!(next(&receiver).tag, 4);
    assert!(receiver.is_empty());
    drop(fake);
    let done = next(&receiver);
    assert_eq!((done.tag, done.result.expect_err("never").kind()), (5, ErrorKind::Cancelled));
}

#[test]
fn stepped_jobs_end_one_by_one_demand_first() {
    let (sender, receiver) = channel();
    let fake = FakeReads::new(&[100], sender).stepped();
    let mut rows: Vec<Row> = (0..4).map(|_| Row::new(10, 0)).collect();
    let urgencies = [Urgency::Prefetch, Urgency::Demand, Urgency::Prefetch, Urgency::Demand];
    for ((row, urgency), tag) in rows.iter_mut().zip(urgencies).zip(10..) {
        fake.submit(job(tag, &[range(0, 0, 10, 0)], row), urgency);
    }
    assert!(receiver.is_empty());
    for tag in [11, 13, 10] {
        assert!(fake.step());
        assert_eq!(next(&receiver).tag, tag);
    }
    assert_eq!(fake.order(), (10..).zip(urgencies).collect::<Vec<_>>()[..]);
    drop(fake);
    assert_eq!(next(&receiver).result.expect_err("waits").kind(), ErrorKind::Cancelled);
}
