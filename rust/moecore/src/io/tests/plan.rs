//! The cutting of rows, on its own.

use super::range;
use crate::error::ErrorKind;
use crate::experts::Range;
use crate::io::plan::{Span, check, spans};
use crate::io::tests::script::Script;

const MIB: u64 = 1 << 20;

fn sizes(spans: &[Span]) -> Vec<u64> {
    spans.iter().map(|span| span.end - span.begin).collect()
}

#[test]
fn ranges_side_by_side_are_one_read() {
    // In the file: down, gate, up; in the row: gate, up, down.
    let ranges = vec![range(0, 300, 100, 0), range(0, 400, 100, 100), range(0, 100, 200, 200)];
    let whole = Span { file: 0, begin: 100, end: 500, parts: vec![range(0, 100, 200, 200), range(0, 300, 200, 0)] };
    assert_eq!(spans(ranges, 4 * MIB, 4096), [whole]);
}

#[test]
fn blocks_that_two_ranges_share_are_read_once_and_distant_ranges_apart() {
    assert_eq!(spans(vec![range(0, 0, 10, 0), range(0, 4000, 10, 10)], MIB, 4096).len(), 1);
    assert_eq!(spans(vec![range(0, 0, 10, 0), range(0, 40_000, 10, 10)], MIB, 4096).len(), 2);
    assert_eq!(spans(vec![range(0, 0, 10, 0), range(1, 10, 10, 10)], MIB, 4096).len(), 2);
}

#[test]
fn long_runs_are_cut_evenly_at_block_borders() {
    assert_eq!(sizes(&spans(vec![range(0, 0, 9 * MIB, 0)], 4 * MIB, 4096)), [3 * MIB; 3]);
    // One byte more than two pieces: not a piece for that byte.
    let cut = spans(vec![range(0, 1, 8 * MIB, 0)], 4 * MIB, 4096);
    assert_eq!(cut.len(), 3);
    assert!(sizes(&cut).iter().all(|&size| size > 2 * MIB && size <= 4 * MIB), "{:?}", sizes(&cut));
    assert!(cut[1..].iter().all(|span| span.begin.is_multiple_of(4096)));
    assert_eq!(cut.iter().flat_map(|span| &span.parts).map(|part| part.bytes).sum::<u64>(), 8 * MIB);
}

#[test]
fn nothing_is_planned_for_empty_ranges() {
    assert_eq!(spans(vec![range(0, 7, 0, 3)], MIB, 4096), []);
}

#[test]
fn bad_ranges_are_refused_before_anything_is_read() {
    let files = [std::sync::Arc::new(Script::new(vec![0; 100], None))];
    let refused = |ranges: &[Range]| {
        let error = check(ranges, &files, 50).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Io);
        error.to_string()
    };
    assert!(refused(&[range(1, 0, 1, 0)]).contains("names file 1 of 1"));
    assert!(refused(&[range(0, 60, 41, 0)]).starts_with("scripted.safetensors: 41 bytes at 60 are wanted of 100"));
    assert!(refused(&[range(0, u64::MAX, 2, 0)]).contains("are wanted of 100"));
    assert!(refused(&[range(0, 0, 20, 31)]).contains("20 bytes for place 31 do not fit into 50"));
    assert!(refused(&[range(0, 0, 20, u64::MAX)]).contains("do not fit into 50"));
    assert!(refused(&[range(0, 0, 20, 10), range(0, 50, 11, 0)]).contains("share the bytes from 10"));
    assert_eq!(check(&[range(0, 0, 20, 10), range(0, 0, 0, 15), range(0, 50, 10, 0)], &files, 50).expect("fine"), 30);
}
