//! Random expert reads against what the disk gives to one aligned sequential read of as many bytes.
//!
//! `cargo bench -p moecore --bench reads`. A row is 9 MiB in three parts of 3 MiB at odd offsets, as in a checkpoint
//! with gate, up and down apart. The file (2 GiB, in `MOECORE_BENCH_DIR` or the system's temporary folder) is read past
//! the page cache, which has been told to forget it before; only the buffered engine fills the cache and profits from
//! it. The disk's rate and ours are measured in turns, as other users of the disk come and go: compare the ratios.

#![expect(unsafe_code, reason = "destinations are raw memory")]

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use crossbeam_channel::{Receiver, unbounded};
use moecore::experts::{Range, SourceFile};
use moecore::io::{Choice, Destination, Done, ReadEngine, ReadJob, ReadOptions, Urgency, open};

const FILE_BYTES: u64 = 2 << 30;
const PART_BYTES: u64 = 3 << 20;
const ROW: usize = 9 << 20;
const ROW_BYTES: u64 = ROW as u64;
/// Rows asked for at once: the top 8 of one layer.
const ROWS: usize = 8;
const ROUNDS: usize = 7;

/// Removes the file at the end of the bench.
struct BigFile(PathBuf);

impl BigFile {
    fn new() -> Self {
        let folder = std::env::var_os("MOECORE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let file = Self(folder.join(format!("moecore-bench-{}.bin", std::process::id())));
        let mut writer = File::create(&file.0).expect("a folder for 2 GiB; set MOECORE_BENCH_DIR");
        let mut state = 1u64;
        // No compressing or deduplicating disk may get off lightly.
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 24).to_le_bytes()
        };
        for _ in 0..FILE_BYTES >> 20 {
            let block: Vec<u8> = (0..1 << 17).flat_map(|_| noise()).collect();
            writer.write_all(&block).expect("space for 2 GiB");
        }
        writer.sync_all().expect("syncs");
        // Clean pages can be dropped, now that they have been written.
        let _ = rustix::fs::fadvise(&writer, 0, None, rustix::fs::Advice::DontNeed);
        file
    }
}

impl Drop for BigFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Random places: another row at each call.
struct Places(u64);

impl Places {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 20) % below
    }

    /// Three parts anywhere, at offsets that are multiples of 8 as in safetensors files, hardly ever of a page.
    fn row(&mut self) -> Vec<Range> {
        let mut part = |at| {
            let offset = self.next((FILE_BYTES - PART_BYTES) / 8) * 8;
            Range { file: 0, offset, bytes: PART_BYTES, at }
        };
        vec![part(0), part(PART_BYTES), part(2 * PART_BYTES)]
    }
}

/// Memory for `ROWS` rows.
struct Slots(Vec<u8>);

impl Slots {
    fn new() -> Self {
        // Written once: a page fault is not a read.
        Self(vec![1; ROWS * ROW])
    }

    /// Reads rows at random places and waits for all.
    fn read(&mut self, engine: &dyn ReadEngine, done: &Receiver<Done>, places: &mut Places, rows: usize) -> Duration {
        let start = Instant::now();
        for (tag, slot) in (0..).zip(self.0.chunks_exact_mut(ROW).take(rows)) {
            // SAFETY: every `Done` is awaited below, before the slots are touched again.
            let into = unsafe { Destination::new(slot.as_mut_ptr(), slot.len()) };
            engine.submit(ReadJob { tag, ranges: places.row(), into }, Urgency::Demand);
        }
        let fine = (0..rows).filter(|_| done.recv().is_ok_and(|done| done.result.is_ok())).count();
        assert_eq!(fine, rows);
        start.elapsed()
    }
}

/// One read of consecutive bytes with everything aligned, a few MiB a call: what the disk gives.
fn sequential(path: &Path, memory: &mut [u8], from: u64) -> Duration {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT;
    let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).expect("a file system with direct reads");
    let aligned = memory.as_ptr().align_offset(4096);
    let whole = (memory.len() - aligned) / 4096 * 4096;
    let mut memory = &mut memory[aligned..aligned + whole];
    let mut offset = from / 4096 * 4096;
    let start = Instant::now();
    while !memory.is_empty() {
        let call = memory.len().min(16 << 20);
        let read = rustix::io::pread(&file, &mut memory[..call], offset).expect("reads");
        memory = &mut memory[read..];
        offset += read as u64;
    }
    start.elapsed()
}

fn engine(file: &SourceFile, options: &ReadOptions) -> (Box<dyn ReadEngine>, Receiver<Done>) {
    let (sender, receiver) = unbounded();
    (open(std::slice::from_ref(file), options, sender).expect("opens"), receiver)
}

fn variants() -> Vec<(String, ReadOptions)> {
    let threads = ReadOptions { engine: Choice::Threads, ..ReadOptions::default() };
    let uring = ReadOptions { engine: Choice::Uring, ..ReadOptions::default() };
    vec![
        ("8 threads".to_owned(), threads.clone()),
        ("8 threads, 1 MiB pieces".to_owned(), ReadOptions { piece_bytes: 1 << 20, ..threads.clone() }),
        ("16 threads".to_owned(), ReadOptions { threads: 16, ..threads.clone() }),
        ("2 threads".to_owned(), ReadOptions { threads: 2, ..threads.clone() }),
        ("ring".to_owned(), uring.clone()),
        ("ring, 1 MiB pieces".to_owned(), ReadOptions { piece_bytes: 1 << 20, ..uring }),
        ("buffered".to_owned(), ReadOptions { direct: false, ..threads }),
        ("chosen".to_owned(), ReadOptions::default()),
    ]
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}

/// The table: each round is the ceiling and then every engine, and the ratio is taken within the round.
fn table(file: &SourceFile) {
    let mut slots = Slots::new();
    let mut places = Places(7);
    let engines: Vec<_> = variants().iter().map(|(name, options)| (name.clone(), engine(file, options))).collect();
    let bytes = ROWS as u64 * ROW_BYTES;
    let (mut ceilings, mut times) = (Vec::new(), vec![(Vec::new(), Vec::new(), Vec::new()); engines.len()]);
    for _ in 0..ROUNDS {
        let from = places.next(FILE_BYTES - bytes);
        let ceiling = sequential(&file.path, &mut slots.0, from);
        ceilings.push(ceiling);
        for ((_, (engine, done)), (all, one, ratios)) in engines.iter().zip(&mut times) {
            let time = slots.read(engine.as_ref(), done, &mut places, ROWS);
            all.push(time);
            ratios.push(ceiling.as_secs_f64() / time.as_secs_f64());
            one.push(slots.read(engine.as_ref(), done, &mut places, 1));
        }
    }
    println!("\n{} rows of {} MiB, median of {ROUNDS} rounds", ROWS, ROW_BYTES >> 20);
    println!("| engine | is | GB/s, {ROWS} rows | of the ceiling | ms, one row |");
    println!("|---|---|---|---|---|");
    println!("| ceiling: one aligned sequential read | | {:.2} | 1 | |", rate(bytes, median(ceilings)));
    for ((name, (engine, _)), (all, one, mut ratios)) in engines.iter().zip(times) {
        ratios.sort_unstable_by(f64::total_cmp);
        let (all, one) = (rate(bytes, median(all)), median(one).as_secs_f64() * 1e3);
        println!("| {name} | {} | {all:.2} | {:.2} | {one:.1} |", engine.name(), ratios[ROUNDS / 2]);
    }
    println!();
}

fn reads(c: &mut Criterion) {
    let big = BigFile::new();
    let file = SourceFile::of(big.0.clone()).expect("is there");
    table(&file);
    let mut slots = Slots::new();
    let mut places = Places(11);
    let mut group = c.benchmark_group("reads");
    group.sample_size(10).measurement_time(Duration::from_secs(3)).throughput(Throughput::Bytes(ROW_BYTES));
    for (name, options) in [
        ("row_threads", ReadOptions { engine: Choice::Threads, ..ReadOptions::default() }),
        ("row_ring", ReadOptions { engine: Choice::Uring, ..ReadOptions::default() }),
    ] {
        let (engine, done) = engine(&file, &options);
        group.bench_function(name, |b| b.iter(|| black_box(slots.read(engine.as_ref(), &done, &mut places, 1))));
    }
    group.finish();
}

criterion_group!(benches, reads);
criterion_main!(benches);
