//! Faults of disks, on scripted files.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::{Row, channel, content, job, next, range};
use crate::error::{Error, ErrorKind};
use crate::experts::Range;
use crate::io::source::Alignment;
use crate::io::tests::script::{Outcome, Script};
use crate::io::threads::Threads;
use crate::io::{ReadEngine, ReadOptions, Urgency};

const DIRECT: Option<Alignment> = Some(Alignment { block: 4096, memory: 512 });

/// Reads one row from a script and says how it ended.
fn read(file: &Arc<Script>, ranges: &[Range], misalignment: usize) -> Result<(), Error> {
    let (sender, receiver) = channel();
    let mut row = Row::new(300_000, misalignment);
    let options = ReadOptions { threads: 2, piece_bytes: 64 << 10, ..ReadOptions::default() };
    let engine = Threads::start(Arc::new([Arc::clone(file)]), &options, sender).expect("starts");
    engine.submit(job(7, ranges, &mut row), Urgency::Demand);
    let done = next(&receiver);
    drop(engine);
    assert!(receiver.try_recv().is_err(), "one completion");
    assert_eq!(done.tag, 7);
    assert_eq!(done.bytes, if done.result.is_ok() { ranges.iter().map(|range| range.bytes).sum() } else { 0 });
    if done.result.is_ok() {
        row.assert_holds(ranges, std::slice::from_ref(&file.bytes));
    }
    done.result
}

fn script(direct: Option<Alignment>, outcomes: &[Outcome]) -> Arc<Script> {
    Arc::new(Script::new(content(300_000, 3), direct).with(outcomes))
}

const UNALIGNED: [Range; 1] = [Range { file: 0, offset: 4097, bytes: 20_000, at: 11 }];
const ALIGNED: [Range; 1] = [Range { file: 0, offset: 4096, bytes: 40_960, at: 0 }];

#[test]
fn interrupted_and_short_reads_go_on() {
    for direct in [None, DIRECT] {
        for ranges in [&UNALIGNED, &ALIGNED] {
            let outcomes = [Outcome::Fails(Errno::INTR), Outcome::Short(4096), Outcome::Fails(Errno::INTR)];
            read(&script(direct, &outcomes), ranges, 0).expect("reads");
        }
    }
    // Buffered reads may stop anywhere.
    read(&script(None, &[Outcome::Short(1), Outcome::Short(4095)]), &UNALIGNED, 0).expect("reads");
}

#[test]
fn refused_direct_reads_are_repeated_buffered() {
    for errno in [Errno::INVAL, Errno::OPNOTSUPP] {
        for ranges in [&UNALIGNED, &ALIGNED] {
            let file = script(DIRECT, &[Outcome::Short(8192), Outcome::Fails(errno)]);
            read(&file, ranges, 0).expect("reads");
            assert!(!file.direct.load(Ordering::Relaxed));
        }
    }
    // Without a way out it is an error, not a loop.
    let error = read(&script(None, &[Outcome::Fails(Errno::INVAL)]), &UNALIGNED, 0).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[test]
fn everything_aligned_goes_straight_to_its_place() {
    // One read of exactly the range; and the bounce reads whole blocks.
    for (ranges, misalignment, first) in [(&ALIGNED, 512, 4096), (&UNALIGNED, 0, 4096), (&ALIGNED, 8, 4096)] {
        let file = script(DIRECT, &[]);
        read(&file, ranges, misalignment).expect("reads");
        assert_eq!(file.order(), [first]);
    }
}

#[test]
fn a_failing_disk_is_reported_with_file_and_place() {
    for direct in [None, DIRECT] {
        let error = read(&script(direct, &[Outcome::Fails(Errno::IO)]), &ALIGNED, 0).expect_err("fails");
        assert_eq!((error.kind(), error.file()), (ErrorKind::Io, Some("scripted.safetensors")));
        assert!(error.to_string().contains("cannot be read at byte 4096; check the disk"), "{error}");
        assert!(std::error::Error::source(&error).is_some());
    }
}

#[test]
fn a_file_that_ends_early_is_reported_with_file_and_place() {
    for direct in [None, DIRECT] {
        for (end, ranges) in [(10_000, UNALIGNED), (8192, UNALIGNED), (10_000, ALIGNED), (4096, ALIGNED), (0, ALIGNED)]
        {
            let mut file = Script::new(content(end, 3), direct);
            // Cut short after its length was looked at.
            file.claimed = 300_000;
            let error = read(&Arc::new(file), &ranges, 0).expect_err("ends");
            assert_eq!((error.kind(), error.file()), (ErrorKind::Io, Some("scripted.safetensors")));
            let end = if end == 0 { 4096 } else { end };
            assert!(error.to_string().contains(&format!("ends at byte {end}, inside an expert")), "{error}");
        }
    }
}

#[test]
fn a_panic_is_an_error_and_the_engine_goes_on() {
    let file = script(None, &[Outcome::Panics, Outcome::Panics]);
    let (sender, receiver) = channel();
    let mut rows = [Row::new(300_000, 0), Row::new(300_000, 0), Row::new(300_000, 0)];
    let options = ReadOptions { threads: 1, piece_bytes: 64 << 10, ..ReadOptions::default() };
    let engine = Threads::start(Arc::new([Arc::clone(&file)]), &options, sender).expect("starts");
    // Several pieces; the others are let go unread.
    let long = [range(0, 0, 300_000, 0)];
    for (row, tag) in rows.iter_mut().zip(0..) {
        engine.submit(job(tag, &long, row), Urgency::Prefetch);
    }
    for tag in [0, 1] {
        let done = next(&receiver);
        let error = done.result.expect_err("panicked");
        assert_eq!((done.tag, error.kind()), (tag, ErrorKind::Io));
        assert!(error.to_string().contains("a read panicked (scripted panic)"), "{error}");
    }
    next(&receiver).result.expect("reads");
    rows[2].assert_holds(&long, std::slice::from_ref(&file.bytes));
    assert_eq!(file.order().len(), 2 + 5);
}

#[test]
fn what_was_read_is_released_once() {
    let file = script(None, &[]);
    read(&file, &[range(0, 0, 100_000, 0), range(0, 200_000, 5, 100_000)], 0).expect("reads");
    assert_eq!(file.released.load(Ordering::Relaxed), 100_005);
}
