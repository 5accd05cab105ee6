//! Real engines on real files.

use std::collections::BTreeSet;
use std::fs::File;
use std::time::{Duration, SystemTime};

use super::{Row, channel, content, engines, job, next, range, written};
use crate::error::ErrorKind;
use crate::experts::SourceFile;
use crate::io::disk::Disk;
use crate::io::source::Source;
use crate::io::{Choice, ReadOptions, Urgency, open};

const LENGTH: usize = 300_000;

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn a_deleted_file_stays_readable() {
    let folder = tempfile::tempdir().expect("folder");
    let bytes = content(LENGTH, 1);
    let file = written(folder.path(), "shard", &bytes);
    let engines = engines(std::slice::from_ref(&file));
    std::fs::remove_file(&file.path).expect("removes");
    for (engine, receiver) in engines {
        let mut row = Row::new(LENGTH, 0);
        engine.submit(job(1, &[range(0, 0, LENGTH as u64, 0)], &mut row), Urgency::Demand);
        next(&receiver).result.expect("reads");
        assert_eq!(row.bytes(), bytes);
    }
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn a_changed_file_is_refused() {
    let changes: [fn(&File); 3] = [
        |file| file.set_len(LENGTH as u64 - 1).expect("cuts"),
        |file| file.set_len(LENGTH as u64 + 1).expect("grows"),
        |file| file.set_modified(SystemTime::now() + Duration::from_secs(5)).expect("touches"),
    ];
    for change in changes {
        let folder = tempfile::tempdir().expect("folder");
        let untouched = written(folder.path(), "untouched", &content(LENGTH, 1));
        let file = written(folder.path(), "shard", &content(LENGTH, 1));
        let files = [untouched, file];
        let engines = engines(&files);
        change(&File::options().write(true).open(&files[1].path).expect("opens"));
        for (engine, receiver) in engines {
            let mut row = Row::new(LENGTH, 0);
            engine.submit(job(1, &[range(0, 0, 10, 0), range(1, 0, 10, 10)], &mut row), Urgency::Demand);
            let error = next(&receiver).result.expect_err("changed");
            assert_eq!((error.kind(), error.file()), (ErrorKind::Io, files[1].path.to_str()));
            assert!(error.to_string().contains("changed since it was indexed"), "{error}");
            assert!(error.to_string().contains("load the model again"), "{error}");
            engine.submit(job(2, &[range(0, 0, 10, 0)], &mut row), Urgency::Demand);
            next(&receiver).result.expect("the other file is as it was");
        }
        let error = open(&files, &ReadOptions::default(), channel().0).map(|_| ()).expect_err("changed");
        assert!(error.to_string().contains("changed since it was indexed"), "{error}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn what_cannot_be_opened_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let modified = SystemTime::now();
    for (name, text) in [("absent", "cannot be opened"), (".", "not a regular file")] {
        let file = SourceFile { path: folder.path().join(name), bytes: 1, modified };
        let error = open(&[file], &ReadOptions::default(), channel().0).map(|_| ()).expect_err("not there");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains(text) && error.file().is_some(), "{error}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn ten_thousand_small_jobs() {
    let folder = tempfile::tempdir().expect("folder");
    let bytes = content(LENGTH, 1);
    let file = written(folder.path(), "shard", &bytes);
    for (engine, receiver) in engines(&[file]) {
        let mut rows: Vec<Row> = (0..10_000).map(|_| Row::new(64, 0)).collect();
        let place = |tag: u64| [range(0, tag * 7919 % (LENGTH as u64 - 64), 64, 0)];
        for (row, tag) in rows.iter_mut().zip(0..) {
            let urgency = if tag % 3 == 0 { Urgency::Demand } else { Urgency::Prefetch };
            engine.submit(job(tag, &place(tag), row), urgency);
        }
        let mut tags = BTreeSet::new();
        for _ in 0..10_000 {
            let done = next(&receiver);
            done.result.expect("reads");
            assert!(tags.insert(done.tag), "twice");
        }
        for (row, tag) in rows.iter().zip(0..) {
            row.assert_holds(&place(tag), std::slice::from_ref(&bytes));
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn dropping_an_engine_answers_every_job_once() {
    let folder = tempfile::tempdir().expect("folder");
    let bytes = content(LENGTH, 1);
    let file = written(folder.path(), "shard", &bytes);
    let content = [bytes];
    for (engine, receiver) in engines(&[file]) {
        let all = [range(0, 1, LENGTH as u64 - 1, 0)];
        let mut rows: Vec<Row> = (0..200).map(|_| Row::new(LENGTH, 0)).collect();
        for (row, tag) in rows.iter_mut().zip(0..) {
            engine.submit(job(tag, &all, row), Urgency::Prefetch);
        }
        drop(engine);
        let done: Vec<_> = receiver.iter().collect();
        assert_eq!(done.iter().map(|done| done.tag).collect::<BTreeSet<u64>>(), (0..200).collect());
        assert_eq!(done.len(), 200);
        for done in done {
            match done.result {
                Ok(()) => rows[usize::try_from(done.tag).expect("small")].assert_holds(&all, &content),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled),
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn nothing_to_read_is_done_at_once_and_bad_ranges_are_errors() {
    let folder = tempfile::tempdir().expect("folder");
    let file = written(folder.path(), "shard", &content(LENGTH, 1));
    for (engine, receiver) in engines(&[file]) {
        let mut row = Row::new(100, 0);
        for ranges in [&[][..], &[range(0, 5, 0, 5)]] {
            engine.submit(job(1, ranges, &mut row), Urgency::Demand);
            let done = next(&receiver);
            assert_eq!((done.result.is_ok(), done.bytes), (true, 0));
        }
        for bad in [range(0, 0, 101, 0), range(0, LENGTH as u64 - 1, 2, 0), range(1, 0, 1, 0)] {
            engine.submit(job(1, &[bad], &mut row), Urgency::Demand);
            assert_eq!(next(&receiver).result.expect_err("refused").kind(), ErrorKind::Io);
        }
        row.assert_holds(&[], &[]);
    }
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn a_file_can_leave_direct_reads_after_it_was_opened() {
    let folder = tempfile::tempdir().expect("folder");
    let bytes = content(LENGTH, 1);
    let file = written(folder.path(), "shard", &bytes);
    let disk = Disk::open(&file, true).expect("opens");
    disk.leave_direct();
    assert_eq!(disk.direct(), None);
    let mut memory = [std::mem::MaybeUninit::uninit(); 10];
    assert_eq!(disk.read_at(&mut memory, 3), Ok(10), "an unaligned read");
    disk.release(3, 13);
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn engines_say_which_they_are() {
    let folder = tempfile::tempdir().expect("folder");
    let file = written(folder.path(), "shard", &content(LENGTH, 1));
    let name = |engine, direct| {
        let options = ReadOptions { engine, direct, ..ReadOptions::default() };
        open(std::slice::from_ref(&file), &options, channel().0).expect("opens").name()
    };
    assert_eq!(name(Choice::Threads, false), "threads-buffered");
    // Too small for a race.
    assert_eq!(name(Choice::Auto, false), "threads-buffered");
    assert!(["threads-direct", "threads-buffered"].contains(&name(Choice::Threads, true)));
    // Where the kernel forbids it, threads.
    assert!(["io_uring-buffered", "threads-buffered"].contains(&name(Choice::Uring, false)));
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn files_large_enough_for_a_race_get_an_engine_too() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("shard");
    // A hole: it takes no space and is read at once.
    File::create(&path).and_then(|file| file.set_len((1 << 30) + 5)).expect("makes a hole");
    let (sender, receiver) = channel();
    let engine = open(&[SourceFile::of(path).expect("is there")], &ReadOptions::default(), sender).expect("opens");
    let mut row = Row::new(100, 0);
    engine.submit(job(1, &[range(0, 1 << 30, 5, 0)], &mut row), Urgency::Demand);
    let done = next(&receiver);
    assert_eq!((done.tag, done.result.is_ok(), done.bytes), (1, true, 5), "the race's own jobs are not ours to see");
    assert_eq!(row.bytes()[..6], [0, 0, 0, 0, 0, super::UNTOUCHED]);
    assert!(receiver.is_empty());
}
