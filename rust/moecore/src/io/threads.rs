//! The engine that is always there: threads that wait for `pread`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::Sender;

use crate::error::{Error, ErrorKind, Result};
use crate::io::flight::{Job, panicked};
use crate::io::queue::{Queue, Work};
use crate::io::source::{self, Source};
use crate::io::transfer::{Bounce, Transfer};
use crate::io::{Done, ReadEngine, ReadJob, ReadOptions, Urgency};

#[derive(Debug)]
pub(super) struct Threads<S> {
    crew: Arc<Crew<S>>,
    done: Sender<Done>,
    workers: Vec<JoinHandle<()>>,
}

/// What the threads share.
#[derive(Debug)]
struct Crew<S> {
    files: Arc<[S]>,
    queue: Queue,
    piece_bytes: u64,
}

impl<S: Source> Threads<S> {
    pub(super) fn start(files: Arc<[S]>, options: &ReadOptions, done: Sender<Done>) -> Result<Self> {
        let queue = Queue::new(options.threads - options.threads / 4);
        let crew = Arc::new(Crew { files, queue, piece_bytes: options.piece_bytes });
        // Dropped on failure, which ends the threads that did start.
        let mut engine = Self { crew, done, workers: Vec::with_capacity(options.threads) };
        for number in 0..options.threads {
            let crew = Arc::clone(&engine.crew);
            let thread = std::thread::Builder::new().name(format!("moecore-read-{number}"));
            let worker = thread.spawn(move || crew.work()).map_err(|source| {
                Error::new(ErrorKind::Io, "cannot start a reading thread; ask for fewer threads").with_source(source)
            })?;
            engine.workers.push(worker);
        }
        Ok(engine)
    }
}

impl<S: Source> Crew<S> {
    /// The life of a thread.
    fn work(&self) {
        let mut bounce = Bounce::default();
        while let Some((work, urgency)) = self.queue.take() {
            let flight = Arc::clone(work.flight());
            // A panic would otherwise end the thread and leave the engine with one fewer.
            match catch_unwind(AssertUnwindSafe(|| self.take_up(work, urgency, &mut bounce))) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => flight.fail(error),
                Err(panic) => flight.fail(panicked(&*panic)),
            }
            drop(flight);
            self.queue.finished(urgency);
        }
    }

    fn take_up(&self, work: Work, urgency: Urgency, bounce: &mut Bounce) -> Result<()> {
        let piece = match work {
            Work::Piece(piece) => piece,
            Work::Job(job) => {
                let mut pieces = job.pieces(&self.files, self.piece_bytes)?.into_iter();
                let Some(first) = pieces.next() else { return Ok(()) };
                if pieces.len() > 0 {
                    self.queue.push_pieces(pieces, urgency);
                }
                first
            }
        };
        if piece.flight.has_failed() {
            return Ok(());
        }
        let file = &self.files[piece.file as usize];
        let mut transfer = Transfer::new(piece);
        while let Some((offset, memory)) = transfer.next(file, bounce) {
            let outcome = file.read_at(memory, offset);
            transfer.advance(file, bounce, outcome)?;
        }
        // Once more: a file that is written while it is read gives bytes of both.
        file.verify()?;
        transfer.piece().flight.landed();
        Ok(())
    }
}

impl<S: Source> ReadEngine for Threads<S> {
    fn submit(&self, job: ReadJob, urgency: Urgency) {
        self.crew.queue.push(Job::new(job, self.done.clone()), urgency);
    }

    fn name(&self) -> &'static str {
        source::name(&self.crew.files, ["threads-direct", "threads-mixed", "threads-buffered"])
    }
}

impl<S> Drop for Threads<S> {
    fn drop(&mut self) {
        self.crew.queue.close();
        for worker in self.workers.drain(..) {
            // Its panics are caught.
            let _ = worker.join();
        }
    }
}
