//! Two lanes: demand, and prefetch behind it.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::io::Urgency;
use crate::io::flight::{Flight, Job, Piece};

/// What a worker takes up.
#[derive(Debug)]
pub(super) enum Work {
    /// To be cut into pieces.
    Job(Job),
    /// To be read.
    Piece(Piece),
}

impl Work {
    pub(super) fn flight(&self) -> &std::sync::Arc<Flight> {
        match self {
            Self::Job(job) => &job.flight,
            Self::Piece(piece) => &piece.flight,
        }
    }
}

#[derive(Debug, Default)]
struct Lanes {
    demand: VecDeque<Work>,
    prefetch: VecDeque<Work>,
    /// Prefetches taken and not yet finished.
    prefetching: usize,
    closed: bool,
}

/// Work that waits for a worker.
#[derive(Debug)]
pub(super) struct Queue {
    lanes: Mutex<Lanes>,
    changed: Condvar,
    /// How many prefetches may be under way at once: a demand must not find every worker taken.
    prefetch_limit: usize,
}

impl Queue {
    pub(super) fn new(prefetch_limit: usize) -> Self {
        Self { lanes: Mutex::default(), changed: Condvar::new(), prefetch_limit }
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        // Nothing in this file panics with the lanes half changed.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job behind the others of its urgency.
    pub(super) fn push(&self, job: Job, urgency: Urgency) {
        self.lanes().lane(urgency).push_back(Work::Job(job));
        self.changed.notify_one();
    }

    /// Adds the pieces of a job that has been begun before everything of its urgency.
    pub(super) fn push_pieces(&self, pieces: impl DoubleEndedIterator<Item = Piece>, urgency: Urgency) {
        let mut lanes = self.lanes();
        for piece in pieces.rev() {
            lanes.lane(urgency).push_front(Work::Piece(piece));
        }
        drop(lanes);
        self.changed.notify_all();
    }

    /// Waits for work. `None` when the queue is closed and empty. Each work taken must be `finished`.
    pub(super) fn take(&self) -> Option<(Work, Urgency)> {
        let mut lanes = self.lanes();
        loop {
            if let Some(work) = lanes.take(self.prefetch_limit) {
                return Some(work);
            }
            if lanes.closed && lanes.prefetch.is_empty() {
                return None;
            }
            lanes = self.changed.wait(lanes).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// As `take`, without waiting.
    #[cfg(all(target_os = "linux", feature = "uring"))]
    pub(super) fn try_take(&self) -> Option<(Work, Urgency)> {
        self.lanes().take(self.prefetch_limit)
    }

    /// Work that was taken is over.
    pub(super) fn finished(&self, urgency: Urgency) {
        if urgency == Urgency::Prefetch {
            self.lanes().prefetching -= 1;
            self.changed.notify_all();
        }
    }

    /// No more work will come. Jobs that nobody has begun are dropped, which cancels them.
    pub(super) fn close(&self) {
        let mut lanes = self.lanes();
        lanes.closed = true;
        let (demand, prefetch) = (std::mem::take(&mut lanes.demand), std::mem::take(&mut lanes.prefetch));
        let (pieces, jobs): (VecDeque<Work>, VecDeque<Work>) =
            demand.into_iter().chain(prefetch).partition(|work| matches!(work, Work::Piece(_)));
        lanes.demand = pieces;
        drop(lanes);
        self.changed.notify_all();
        // Outside of the lock: a full channel makes this wait.
        drop(jobs);
    }

    #[cfg(all(target_os = "linux", feature = "uring"))]
    pub(super) fn is_closed(&self) -> bool {
        self.lanes().closed
    }
}

impl Lanes {
    fn lane(&mut self, urgency: Urgency) -> &mut VecDeque<Work> {
        match urgency {
            Urgency::Demand => &mut self.demand,
            Urgency::Prefetch => &mut self.prefetch,
        }
    }

    fn take(&mut self, prefetch_limit: usize) -> Option<(Work, Urgency)> {
        if let Some(work) = self.demand.pop_front() {
            return Some((work, Urgency::Demand));
        }
        if self.prefetching >= prefetch_limit {
            return None;
        }
        let work = self.prefetch.pop_front()?;
        self.prefetching += 1;
        Some((work, Urgency::Prefetch))
    }
}
