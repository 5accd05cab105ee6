//! Which engine runs.

use std::sync::Arc;

use crossbeam_channel::Sender;

use crate::error::Result;
use crate::io::disk::Disk;
use crate::io::threads::Threads;
use crate::io::{Done, ReadEngine, ReadOptions};

#[cfg(not(all(target_os = "linux", feature = "uring")))]
pub(super) fn start(disks: &Arc<[Disk]>, options: &ReadOptions, done: Sender<Done>) -> Result<Box<dyn ReadEngine>> {
    Ok(Box::new(Threads::start(Arc::clone(disks), options, done)?))
}

#[cfg(all(target_os = "linux", feature = "uring"))]
pub(super) fn start(disks: &Arc<[Disk]>, options: &ReadOptions, done: Sender<Done>) -> Result<Box<dyn ReadEngine>> {
    use crate::io::Choice;
    use crate::io::uring::Uring;
    let uring = match options.engine {
        Choice::Threads => false,
        Choice::Uring => true,
        Choice::Auto => race::uring_wins(disks, options),
    };
    if uring && let Some(engine) = Uring::start(Arc::clone(disks), options, done.clone()) {
        return Ok(Box::new(engine));
    }
    Ok(Box::new(Threads::start(Arc::clone(disks), options, done)?))
}

/// A short race on the files themselves: which engine is faster depends on drive, file system and kernel.
#[cfg(all(target_os = "linux", feature = "uring"))]
#[expect(unsafe_code, reason = "the race reads into memory of its own")]
mod race {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use crate::experts::Range;
    use crate::io::disk::Disk;
    use crate::io::source::Source;
    use crate::io::threads::Threads;
    use crate::io::uring::Uring;
    use crate::io::{Destination, ReadEngine, ReadJob, ReadOptions, Urgency};

    /// Rows in a heat, at places all over a file.
    const ROWS: u64 = 12;
    const ROW_BYTES: u64 = 4 << 20;
    /// Heats per engine. The best counts, as others may use the disk meanwhile.
    const HEATS: usize = 3;
    /// Fewer bytes are read before any engine is settled in.
    const WORTH_A_RACE: u64 = 1 << 30;
    /// A disk that takes longer for a heat (1.7 GB/s) is the limit itself, and more of a race would hold up the load.
    const SLOW: Duration = Duration::from_millis(30);
    /// Threads are the better-known engine: the other must be faster by a margin that noise does not make.
    const MARGIN: f64 = 0.85;

    pub(super) fn uring_wins(disks: &Arc<[Disk]>, options: &ReadOptions) -> bool {
        let largest = disks.iter().enumerate().max_by_key(|(_, disk)| disk.bytes());
        let Some((number, disk)) = largest.filter(|(_, disk)| disk.bytes() >= WORTH_A_RACE) else { return false };
        // In the page cache, whoever comes second wins.
        if disk.direct().is_none() {
            return false;
        }
        let mut memory = vec![0u8; usize::try_from(ROWS * ROW_BYTES).unwrap_or_default()];
        // After the memory, so that they end before it does.
        let (sender, receiver) = crossbeam_channel::unbounded();
        let Some(uring) = Uring::start(Arc::clone(disks), options, sender.clone()) else { return false };
        let Ok(threads) = Threads::start(Arc::clone(disks), options, sender) else { return false };
        let stride = (disk.bytes() - ROW_BYTES) / (2 * HEATS as u64 * ROWS + 1);
        let mut next = 0;
        let mut heat = |engine: &dyn ReadEngine| {
            let start = Instant::now();
            for row in memory.chunks_exact_mut(usize::try_from(ROW_BYTES).unwrap_or(1)) {
                next += 1;
                let file = u32::try_from(number).unwrap_or(u32::MAX);
                let ranges = vec![Range { file, offset: next * stride, bytes: ROW_BYTES, at: 0 }];
                // SAFETY: `memory` outlives both engines' jobs: each heat ends when all of its `Done` have come.
                let into = unsafe { Destination::new(row.as_mut_ptr(), row.len()) };
                engine.submit(ReadJob { tag: 0, ranges, into }, Urgency::Demand);
            }
            // All of them, also after one that failed.
            let fine = (0..ROWS).filter(|_| receiver.recv().is_ok_and(|done| done.result.is_ok())).count();
            (fine as u64 == ROWS).then(|| start.elapsed())
        };
        let mut best = [Duration::MAX; 2];
        for _ in 0..HEATS {
            for (engine, best) in [&threads as &dyn ReadEngine, &uring].into_iter().zip(&mut best) {
                match heat(engine) {
                    Some(time) if time < SLOW => *best = time.min(*best),
                    // A fault is for the job that meets it again to report.
                    _ => return false,
                }
            }
        }
        best[1].as_secs_f64() < best[0].as_secs_f64() * MARGIN
    }
}
