//! The second engine: one thread that keeps many reads in an `io_uring`.
//!
//! Worth it where a drive takes more reads at once than threads are wanted. Containers often forbid it.

#![expect(unsafe_code, reason = "the kernel reads into memory behind our back")]

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::Sender;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::error::Result;
use crate::io::disk::Disk;
use crate::io::flight::{Flight, Job, panicked};
use crate::io::queue::{Queue, Work};
use crate::io::source::{self, Source};
use crate::io::transfer::{Bounce, Transfer};
use crate::io::{Done, ReadEngine, ReadJob, ReadOptions, Urgency};

/// Reads in flight. With the largest pieces that are usual, 4 MiB each, their buffers take 64 MiB.
const DEPTH: u32 = 16;

/// `user_data` of the read that waits for `submit`.
const WAKE: u64 = u64::MAX;

#[derive(Debug)]
pub(super) struct Uring {
    shared: Arc<Shared>,
    done: Sender<Done>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    files: Arc<[Disk]>,
    queue: Queue,
    piece_bytes: u64,
    wake: OwnedFd,
}

impl Uring {
    /// `None` where the kernel has no `io_uring` for us.
    pub(super) fn start(files: Arc<[Disk]>, options: &ReadOptions, done: Sender<Done>) -> Option<Self> {
        let ring = probe()?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC).ok()?;
        let queue = Queue::new((DEPTH - DEPTH / 4) as usize);
        let shared = Arc::new(Shared { files, queue, piece_bytes: options.piece_bytes, wake });
        let thread = std::thread::Builder::new().name("moecore-uring".to_owned());
        let mut worker = Worker::new(ring, Arc::clone(&shared));
        let worker = thread.spawn(move || worker.run()).ok()?;
        Some(Self { shared, done, worker: Some(worker) })
    }
}

/// A ring that has carried one entry there and back: some sandboxes let rings be made and forbid their use.
fn probe() -> Option<IoUring> {
    let mut ring = IoUring::new(2 * DEPTH).ok()?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).ok()?;
    if !probe.is_supported(opcode::Read::CODE) {
        return None;
    }
    // SAFETY: a no-op uses no memory.
    unsafe { ring.submission().push(&opcode::Nop::new().build()).ok()? };
    ring.submit_and_wait(1).ok()?;
    ring.completion().next().filter(|entry| entry.result() >= 0).map(|_| ())?;
    Some(ring)
}

impl Shared {
    fn wake(&self) {
        // Fails only when 2^64 wakes are pending.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl ReadEngine for Uring {
    fn submit(&self, job: ReadJob, urgency: Urgency) {
        self.shared.queue.push(Job::new(job, self.done.clone()), urgency);
        self.shared.wake();
    }

    fn name(&self) -> &'static str {
        source::name(&self.shared.files, ["io_uring-direct", "io_uring-mixed", "io_uring-buffered"])
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.shared.queue.close();
        self.shared.wake();
        if let Some(worker) = self.worker.take() {
            // Its panics are caught.
            let _ = worker.join();
        }
    }
}

/// The thread that owns the ring. A read in flight belongs to the kernel: its memory is neither touched nor freed
/// before its completion has come.
struct Worker {
    ring: IoUring,
    shared: Arc<Shared>,
    slots: Vec<Slot>,
    /// Entries that the kernel has and has not answered.
    in_flight: usize,
    /// Where the read of the wake counter goes.
    woken: Box<u64>,
}

/// A place for one read, and the buffer that goes with it.
#[derive(Default)]
struct Slot {
    bounce: Bounce,
    reading: Option<(Transfer, Urgency)>,
}

impl Worker {
    fn new(ring: IoUring, shared: Arc<Shared>) -> Self {
        let slots = (0..DEPTH).map(|_| Slot::default()).collect();
        Self { ring, shared, slots, in_flight: 0, woken: Box::new(0) }
    }

    /// The life of the thread: until the queue is closed and everything has been answered.
    fn run(&mut self) {
        self.listen();
        loop {
            self.fill();
            if self.shared.queue.is_closed() && self.slots.iter().all(|slot| slot.reading.is_none()) {
                break;
            }
            self.await_one();
            while let Some(entry) = self.next_completion() {
                self.in_flight -= 1;
                if entry.0 == WAKE {
                    self.listen();
                } else {
                    self.complete(usize::try_from(entry.0).expect("a slot"), entry.1);
                }
            }
        }
    }

    fn next_completion(&mut self) -> Option<(u64, i32)> {
        self.ring.completion().next().map(|entry| (entry.user_data(), entry.result()))
    }

    /// Sends what is queued in the ring and waits for at least one completion.
    fn await_one(&self) {
        if self.ring.submit_and_wait(1).is_err() {
            // Interrupted, or the kernel is short of memory: completions come all the same.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Reads the wake counter, which completes at the next `submit`.
    fn listen(&mut self) {
        let wake = types::Fd(self.shared.wake.as_raw_fd());
        let entry = opcode::Read::new(wake, std::ptr::from_mut(&mut *self.woken).cast(), 8).build().user_data(WAKE);
        // SAFETY: `woken` is boxed and outlives the read: `drop` waits for everything in flight.
        unsafe { self.push(&entry) };
    }

    /// # Safety
    /// The memory that `entry` names must stay valid until its completion has been taken.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's.
        let pushed = unsafe { self.ring.submission().push(entry) };
        // Twice as many entries as slots, and each slot has one at most.
        pushed.expect("room in the ring");
        self.in_flight += 1;
    }

    /// Gives queued work to free slots, the most urgent first.
    fn fill(&mut self) {
        while let Some(slot) = self.slots.iter().position(|slot| slot.reading.is_none()) {
            let Some((work, urgency)) = self.shared.queue.try_take() else { return };
            let shared = Arc::clone(&self.shared);
            let taken = guarded(&Arc::clone(work.flight()), || shared.take_up(work, urgency));
            match taken.flatten() {
                Some(transfer) => {
                    self.slots[slot].reading = Some((transfer, urgency));
                    self.go_on(slot);
                }
                None => self.shared.queue.finished(urgency),
            }
        }
    }

    /// Sends the next read of a slot, or ends its piece.
    fn go_on(&mut self, number: usize) {
        let slot = &mut self.slots[number];
        let Some((transfer, urgency)) = &mut slot.reading else { return };
        let (urgency, file) = (*urgency, &self.shared.files[transfer.piece().file as usize]);
        let entry = transfer.next(file, &mut slot.bounce).map(|(offset, memory)| read(file, offset, memory, number));
        if let Some(entry) = entry {
            // SAFETY: the memory is the slot's buffer, or a window of the piece in the slot, which keeps its job's
            // `Done` from being sent. Both stay as they are until `complete` is called with this read's completion.
            unsafe { self.push(&entry) };
        } else {
            // Once more: a file that is written while it is read gives bytes of both.
            match file.verify() {
                Ok(()) => transfer.piece().flight.landed(),
                Err(error) => transfer.piece().flight.fail(error),
            }
            slot.reading = None;
            self.shared.queue.finished(urgency);
        }
    }

    /// Takes the completion of a slot's read.
    fn complete(&mut self, number: usize, result: i32) {
        let slot = &mut self.slots[number];
        let Some((transfer, urgency)) = &mut slot.reading else { return };
        let urgency = *urgency;
        let flight = Arc::clone(&transfer.piece().flight);
        let file = &self.shared.files[transfer.piece().file as usize];
        let outcome = usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result));
        let bounce = &mut slot.bounce;
        if guarded(&flight, || transfer.advance(file, bounce, outcome)).is_some() {
            self.go_on(number);
        } else {
            slot.reading = None;
            self.shared.queue.finished(urgency);
        }
    }
}

impl Drop for Worker {
    /// Takes back everything that the kernel has, which at an orderly end is the read of the wake counter.
    fn drop(&mut self) {
        self.shared.wake();
        while self.in_flight > 0 {
            self.await_one();
            while self.next_completion().is_some() {
                self.in_flight -= 1;
            }
        }
    }
}

impl Shared {
    /// What is to be read next for this work, if anything.
    fn take_up(&self, work: Work, urgency: Urgency) -> Result<Option<Transfer>> {
        let piece = match work {
            Work::Piece(piece) => piece,
            Work::Job(job) => {
                let mut pieces = job.pieces(&self.files, self.piece_bytes)?.into_iter();
                let Some(first) = pieces.next() else { return Ok(None) };
                self.queue.push_pieces(pieces, urgency);
                first
            }
        };
        Ok((!piece.flight.has_failed()).then(|| Transfer::new(piece)))
    }
}

/// Runs a step of a job; its error or panic is the job's.
fn guarded<T>(flight: &Flight, step: impl FnOnce() -> Result<T>) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(Ok(value)) => return Some(value),
        Ok(Err(error)) => flight.fail(error),
        Err(panic) => flight.fail(panicked(&*panic)),
    }
    None
}

fn read(file: &Disk, offset: u64, memory: &mut [MaybeUninit<u8>], slot: usize) -> squeue::Entry {
    let file = types::Fd(file.as_fd().as_raw_fd());
    let bytes = u32::try_from(memory.len()).expect("pieces are limited");
    opcode::Read::new(file, memory.as_mut_ptr().cast(), bytes).offset(offset).build().user_data(slot as u64)
}
