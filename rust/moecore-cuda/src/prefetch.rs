//! Prefetches: copies by the copy engine, on a stream and a thread of their own. Nobody waits for them. A finished copy
//! is told to the scheduler, which makes it an [`Install`](moecore::scheduler::decisions::Step::Install) when a call
//! needs the expert.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use moecore::{Error, ErrorKind, Result};

use crate::context::Context;
use crate::copy::CopyStream;

/// Copies that are in the stream at a time: enough to keep the link busy, few enough to stop soon.
const IN_FLIGHT: usize = 4;
/// Pause between two looks at running copies.
const LOOK: Duration = Duration::from_micros(20);

/// One row to bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Dense id.
    pub expert: u32,
    /// Slot, which no call uses and no table entry names.
    pub slot: u32,
    /// Address of the row in pinned host memory.
    pub source: u64,
    /// Its length.
    pub bytes: u64,
}

/// What is told of each job: whether the row is in its slot now.
pub type Done = Box<dyn FnMut(Job, Result<()>) + Send>;

/// The thread that brings rows before they are asked for.
#[derive(Debug)]
pub struct Prefetcher {
    inbox: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetcher {
    /// Starts the thread. Slots begin at `arena`; at most `depth` jobs wait.
    ///
    /// # Safety
    /// Slots and rows of all jobs are valid until `done` has told of them.
    #[expect(unsafe_code, reason = "addresses come from outside")]
    pub unsafe fn new(context: &Arc<Context>, arena: u64, slot_bytes: u64, depth: usize, done: Done) -> Result<Self> {
        let copies = CopyStream::new(context, IN_FLIGHT)?;
        let (inbox, jobs) = sync_channel(depth);
        let worker = Worker { copies, jobs, arena, slot_bytes, running: VecDeque::new(), next: 0, done };
        let thread = std::thread::Builder::new()
            .name("moecore-prefetch".to_owned())
            .spawn(move || worker.run())
            .map_err(|error| Error::new(ErrorKind::Device, "no thread for prefetches").with_source(error))?;
        Ok(Self { inbox: Some(inbox), thread: Some(thread) })
    }

    /// Puts a job into the queue. False: the queue is full, or the thread has ended. Never waits.
    #[must_use]
    pub fn submit(&self, job: Job) -> bool {
        match self.inbox.as_ref().map(|inbox| inbox.try_send(job)) {
            Some(Ok(())) => true,
            Some(Err(TrySendError::Full(_) | TrySendError::Disconnected(_))) | None => false,
        }
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        drop(self.inbox.take());
        if let Some(thread) = self.thread.take() {
            // A panic in `done` is its owner's.
            let _ = thread.join();
        }
    }
}

struct Worker {
    copies: CopyStream,
    jobs: Receiver<Job>,
    arena: u64,
    slot_bytes: u64,
    /// Jobs in the stream, oldest first, with their events.
    running: VecDeque<(Job, usize)>,
    next: usize,
    done: Done,
}

impl Worker {
    fn run(mut self) {
        loop {
            self.collect();
            let job = match self.running.len() {
                0 => self.jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                IN_FLIGHT.. => {
                    std::thread::sleep(LOOK);
                    continue;
                }
                _ => self.jobs.recv_timeout(LOOK),
            };
            match job {
                Ok(job) => self.start(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        while !self.running.is_empty() {
            std::thread::sleep(LOOK);
            self.collect();
        }
    }

    fn start(&mut self, job: Job) {
        let event = self.next;
        self.next = (self.next + 1) % IN_FLIGHT;
        let target = self.arena + u64::from(job.slot) * self.slot_bytes;
        // SAFETY: what the owner has promised for all jobs.
        #[expect(unsafe_code, reason = "addresses come from outside")]
        let begun = unsafe { self.copies.fill(target, job.source, job.bytes) }.and_then(|()| self.copies.mark(event));
        match begun {
            Ok(()) => self.running.push_back((job, event)),
            Err(error) => (self.done)(job, Err(error)),
        }
    }

    /// Tells of the copies that are over.
    fn collect(&mut self) {
        while let Some(&(job, event)) = self.running.front() {
            let how = match self.copies.is_done(event) {
                Ok(false) => return,
                Ok(true) => Ok(()),
                Err(error) => Err(error),
            };
            self.running.pop_front();
            (self.done)(job, how);
        }
    }
}
