//! Demand before prefetch, and the end of an engine.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Row, channel, content, job, next, range};
use crate::error::ErrorKind;
use crate::experts::Range;
use crate::io::tests::script::Script;
use crate::io::threads::Threads;
use crate::io::{ReadEngine, ReadOptions, Urgency};

const PIECE_LEN: usize = 64 << 10;
const PIECE: u64 = PIECE_LEN as u64;

fn options(threads: usize) -> ReadOptions {
    ReadOptions { threads, piece_bytes: PIECE, ..ReadOptions::default() }
}

/// A page at page `number`.
fn page(number: u64) -> [Range; 1] {
    [range(0, number * 4096, 4096, 0)]
}

#[test]
fn demand_goes_before_prefetch_also_before_the_rest_of_one() {
    let bytes = content(4 << 20, 0);
    let (file, gate) = Script::new(bytes, None).gated();
    let file = Arc::new(file);
    let (sender, receiver) = channel();
    let mut rows: Vec<Row> = (0..5).map(|_| Row::new(3 * PIECE_LEN, 0)).collect();
    let engine = Threads::start(Arc::new([Arc::clone(&file)]), &options(1), sender).expect("starts");
    // Let go before the engine, which would wait for it for ever when an assertion fails.
    let gate = gate;
    let [long, first, second, one, two] = rows.get_disjoint_mut([0, 1, 2, 3, 4]).expect("five");
    // Three pieces, of which the only thread has begun the first.
    engine.submit(job(0, &[range(0, 0, 3 * PIECE, 0)], long), Urgency::Prefetch);
    file.await_reads(1);
    engine.submit(job(1, &page(101), first), Urgency::Prefetch);
    engine.submit(job(2, &page(102), second), Urgency::Prefetch);
    engine.submit(job(3, &page(103), one), Urgency::Demand);
    engine.submit(job(4, &page(104), two), Urgency::Demand);
    (0..7).for_each(|_| gate.send(()).expect("engine runs"));
    let tags: Vec<u64> = (0..5).map(|_| next(&receiver).tag).collect();
    assert_eq!(tags, [3, 4, 0, 1, 2]);
    assert_eq!(file.order(), [0, 103 * 4096, 104 * 4096, PIECE, 2 * PIECE, 101 * 4096, 102 * 4096]);
}

#[test]
fn prefetch_leaves_threads_for_demand() {
    let (file, gate) = Script::new(content(1 << 20, 0), None).gated();
    let file = Arc::new(file);
    let (sender, receiver) = channel();
    let mut rows: Vec<Row> = (0..9).map(|_| Row::new(4096, 0)).collect();
    let engine = Threads::start(Arc::new([Arc::clone(&file)]), &options(4), sender).expect("starts");
    // Let go before the engine, which would wait for it for ever when an assertion fails.
    let gate = gate;
    for (row, tag) in rows[..8].iter_mut().zip(0..) {
        engine.submit(job(tag, &page(tag), row), Urgency::Prefetch);
    }
    file.await_reads(3);
    // The fourth thread has time enough to take a fourth, and may not.
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(file.order().len(), 3);
    engine.submit(job(8, &page(100), &mut rows[8]), Urgency::Demand);
    file.await_reads(4);
    assert_eq!(file.order()[3], 100 * 4096);
    drop(gate);
    let tags: BTreeSet<u64> = (0..9).map(|_| next(&receiver).tag).collect();
    assert_eq!(tags.len(), 9);
}

#[test]
fn dropping_cancels_what_waits_and_finishes_what_runs() {
    let bytes = content(1 << 20, 0);
    let (file, gate) = Script::new(bytes.clone(), None).gated();
    let file = Arc::new(file);
    let (sender, receiver) = channel();
    let mut rows: Vec<Row> = (0..10).map(|_| Row::new(2 * PIECE_LEN, 0)).collect();
    let engine = Threads::start(Arc::new([Arc::clone(&file)]), &options(1), sender).expect("starts");
    // Let go before the engine, which would wait for it for ever when an assertion fails.
    let gate = gate;
    let two_pieces = [range(0, 5, 2 * PIECE - 9, 0)];
    for (row, tag) in rows.iter_mut().zip(0..) {
        let urgency = if tag % 2 == 0 { Urgency::Demand } else { Urgency::Prefetch };
        engine.submit(job(tag, &two_pieces, row), urgency);
        file.await_reads(1);
    }
    let closing = std::thread::spawn(move || drop(engine));
    let cancelled: BTreeSet<u64> = (0..9)
        .map(|_| {
            let done = next(&receiver);
            assert_eq!(done.result.expect_err("cancelled").kind(), ErrorKind::Cancelled);
            assert_eq!(done.bytes, 0);
            done.tag
        })
        .collect();
    assert_eq!(cancelled, (1..10).collect());
    assert!(receiver.is_empty() && !closing.is_finished(), "a job that has been begun is not given up");
    drop((0..2).map(|_| gate.send(())).collect::<Vec<_>>());
    let done = next(&receiver);
    assert_eq!((done.tag, done.bytes), (0, 2 * PIECE - 9));
    done.result.expect("read");
    rows[0].assert_holds(&two_pieces, &[bytes]);
    closing.join().expect("ends");
    assert!(receiver.try_recv().is_err(), "one completion each");
    assert!(receiver.is_empty());
}

#[test]
fn dropping_does_not_need_a_receiver() {
    let (sender, receiver) = channel();
    let mut row = Row::new(4096, 0);
    let file = Arc::new(Script::new(content(8192, 0), None));
    let engine = Threads::start(Arc::new([file]), &options(2), sender).expect("starts");
    drop(receiver);
    engine.submit(job(0, &page(0), &mut row), Urgency::Demand);
    drop(engine);
}
