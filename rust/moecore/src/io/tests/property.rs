//! Whatever the ranges, alignments and destinations: the bytes that `std::fs::read` gives.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Row, channel, content, engines, job, next, range, written};
use crate::experts::Range;
use crate::io::source::Alignment;
use crate::io::tests::script::{Outcome, Script};
use crate::io::threads::Threads;
use crate::io::{ReadEngine, ReadOptions, Urgency};

/// Lengths of the files: ends inside a block, at a block's border, shorter than a block, and empty.
const LENGTHS: [usize; 4] = [333_333, 40 * 4096, 777, 0];

/// Numbers that are often multiples of a block or of a sector.
fn number(limit: u64) -> impl Strategy<Value = u64> {
    (0..=limit, 0u8..4).prop_map(|(number, kind)| match kind {
        0 => number / 4096 * 4096,
        1 => number / 512 * 512,
        _ => number,
    })
}

/// A row: ranges side by side or with gaps, in any order, and the memory for it.
fn row() -> impl Strategy<Value = (Vec<Range>, usize)> {
    let one = (0..LENGTHS.len(), number(400_000), number(200_000), number(9000), any::<bool>());
    let ranges = prop::collection::vec(one, 0..7).prop_map(|wanted| {
        let (mut at, mut last) = (0, (0, 0));
        let mut ranges = Vec::new();
        for (file, offset, bytes, gap, follows) in wanted {
            let (file, offset) = if follows { last } else { (file, offset) };
            let length = LENGTHS[file] as u64;
            let offset = offset.min(length);
            let bytes = bytes.min(length - offset);
            at += if follows { 0 } else { gap };
            ranges.push(range(u32::try_from(file).expect("few"), offset, bytes, at));
            at += bytes;
            last = (file, offset + bytes);
        }
        ranges
    });
    ranges
        .prop_shuffle()
        .prop_flat_map(|ranges| (Just(ranges), (0usize..4096, 0u8..3)))
        .prop_map(|(ranges, (misalignment, kind))| (ranges, if kind == 0 { 0 } else { misalignment / 8 * 8 }))
}

fn room(ranges: &[Range]) -> usize {
    usize::try_from(ranges.iter().map(|range| range.at + range.bytes).max().unwrap_or(0)).expect("small")
}

fn every_engine_reads_what_is_there(folder: &Path) {
    let contents: Vec<Vec<u8>> = LENGTHS.iter().zip(0..).map(|(&length, seed)| content(length, seed)).collect();
    let files: Vec<_> = contents.iter().zip(0..).map(|(bytes, n)| written(folder, &format!("{n}"), bytes)).collect();
    let read: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(&file.path).expect("reads")).collect();
    let engines = engines(&files);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(200));
    let outcome = runner.run(&row(), |(ranges, misalignment)| {
        for (engine, receiver) in &engines {
            let mut row = Row::new(room(&ranges), misalignment);
            engine.submit(job(1, &ranges, &mut row), Urgency::Demand);
            let done = next(receiver);
            prop_assert!(done.result.is_ok(), "{}: {:?}", engine.name(), done.result);
            prop_assert_eq!(done.bytes, ranges.iter().map(|range| range.bytes).sum::<u64>());
            row.assert_holds(&ranges, &read);
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn every_engine_reads_what_is_there_on_disk() {
    // Beside the build's output, which is on a disk; the system's place for temporary files may be in memory.
    let folder = std::env::current_exe().expect("runs").parent().expect("is in a folder").to_owned();
    every_engine_reads_what_is_there(tempfile::tempdir_in(folder).expect("folder").path());
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn every_engine_reads_what_is_there_in_memory_file_systems() {
    // Kernels differ in whether tmpfs takes direct reads.
    if let Ok(folder) = tempfile::tempdir_in("/dev/shm") {
        every_engine_reads_what_is_there(folder.path());
    }
}

/// The same without a kernel: alignments that no disk here has, short reads at every step, and miri can follow.
#[test]
fn scripted_files_read_as_they_are() {
    let contents: Vec<Vec<u8>> = LENGTHS.iter().zip(0..).map(|(&length, seed)| content(length, seed)).collect();
    let config =
        ProptestConfig { cases: if cfg!(miri) { 3 } else { 300 }, failure_persistence: None, ..<_>::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let alignment = prop_oneof![
        Just(None),
        Just(Some(Alignment { block: 512, memory: 4 })),
        Just(Some(Alignment { block: 4096, memory: 512 })),
        Just(Some(Alignment { block: 16384, memory: 4096 })),
    ];
    // Direct reads stop at multiples of their block.
    let shorts = prop::collection::vec(0usize..5, 0..6);
    let outcome = runner.run(&(row(), alignment, shorts), |((ranges, misalignment), alignment, shorts)| {
        let block = alignment.map_or(1000, |alignment| usize::try_from(alignment.block).expect("small"));
        let outcomes: Vec<Outcome> = shorts.iter().map(|blocks| Outcome::Short((blocks + 1) * block)).collect();
        let file = |bytes: &Vec<u8>| Arc::new(Script::new(bytes.clone(), alignment).with(&outcomes));
        let (sender, receiver) = channel();
        let options = ReadOptions { threads: 3, piece_bytes: 64 << 10, ..ReadOptions::default() };
        let engine = Threads::start(contents.iter().map(file).collect(), &options, sender).expect("starts");
        let mut row = Row::new(room(&ranges), misalignment);
        engine.submit(job(1, &ranges, &mut row), Urgency::Prefetch);
        let done = next(&receiver);
        prop_assert!(done.result.is_ok(), "{:?}", done.result);
        row.assert_holds(&ranges, &contents);
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}
