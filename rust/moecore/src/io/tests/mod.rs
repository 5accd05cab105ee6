//! What every engine must do, on real files and on files that fail when the test says so.

#![expect(unsafe_code, reason = "destinations are raw memory")]

mod engines;
mod fake;
mod faults;
mod order;
mod plan;
mod property;
mod script;

use std::path::Path;

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::experts::{Range, SourceFile};
use crate::io::{Choice, Destination, Done, ReadEngine, ReadJob, ReadOptions, open};

/// What memory holds that nobody wrote.
const UNTOUCHED: u8 = 0xA5;

/// Memory for a row at a chosen distance from a page border.
struct Row {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Row {
    fn new(bytes: usize, misalignment: usize) -> Self {
        let memory = vec![UNTOUCHED; bytes + 2 * 4096];
        let start = memory.as_ptr().align_offset(4096) + misalignment % 4096;
        Self { memory, start, bytes }
    }

    /// To be used once at a time; the row must outlive the job.
    fn destination(&mut self) -> Destination {
        let memory = &mut self.memory[self.start..self.start + self.bytes];
        // SAFETY: tests look at the row only after the job's `Done`, and keep it longer than the engine.
        unsafe { Destination::new(memory.as_mut_ptr(), memory.len()) }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.bytes]
    }

    /// The row that these ranges make of these files; what is outside of them stays as it was.
    fn assert_holds(&self, ranges: &[Range], files: &[Vec<u8>]) {
        let mut expected = vec![UNTOUCHED; self.memory.len()];
        for range in ranges {
            let [offset, bytes, at] =
                [range.offset, range.bytes, range.at].map(|number| usize::try_from(number).expect("small"));
            let place = self.start + at;
            expected[place..place + bytes].copy_from_slice(&files[range.file as usize][offset..offset + bytes]);
        }
        assert!(self.memory == expected, "wrong bytes for {ranges:?}");
    }
}

/// Bytes in which no two pages are the same.
fn content(bytes: usize, seed: u32) -> Vec<u8> {
    (0..bytes as u64).map(|at| crate::io::fake_byte(seed, at)).collect()
}

fn written(folder: &Path, name: &str, bytes: &[u8]) -> SourceFile {
    let path = folder.join(name);
    std::fs::write(&path, bytes).expect("writes");
    SourceFile::of(path).expect("is there")
}

/// Each engine on these files, direct and buffered. Where there is no `io_uring`, threads run twice.
fn engines(files: &[SourceFile]) -> Vec<(Box<dyn ReadEngine>, Receiver<Done>)> {
    let mut engines = Vec::new();
    for engine in [Choice::Threads, Choice::Uring] {
        for direct in [true, false] {
            let (sender, receiver) = unbounded();
            let options = ReadOptions { engine, direct, threads: 3, piece_bytes: 64 << 10 };
            engines.push((open(files, &options, sender).expect("opens"), receiver));
        }
    }
    engines
}

fn range(file: u32, offset: u64, bytes: u64, at: u64) -> Range {
    Range { file, offset, bytes, at }
}

fn job(tag: u64, ranges: &[Range], row: &mut Row) -> ReadJob {
    ReadJob { tag, ranges: ranges.to_vec(), into: row.destination() }
}

fn channel() -> (Sender<Done>, Receiver<Done>) {
    unbounded()
}

/// The next completion; a lost one fails the test.
fn next(receiver: &Receiver<Done>) -> Done {
    receiver.recv_timeout(std::time::Duration::from_secs(60)).expect("a job was lost")
}
