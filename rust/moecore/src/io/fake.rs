//! An engine without files for tests, this crate's and others': that is why it is public.

use std::collections::{BTreeMap, VecDeque};
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam_channel::Sender;
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::io::flight::{Job, panicked};
use crate::io::source::{Alignment, Source};
use crate::io::{Done, ReadEngine, ReadJob, Urgency};

/// The byte that every fake file has at an offset. Pages, files and experts all differ.
#[must_use]
pub fn fake_byte(file: u32, offset: u64) -> u8 {
    // The top bits of a product: each depends on all bits below.
    ((offset ^ u64::from(file) << 40).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

/// What happens to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The disk fails after half of the bytes.
    Eio,
    /// The file ends in the middle.
    ShortRead,
    /// Nothing, before [`FakeReads::release`].
    Delay,
    /// Nothing, as long as the engine lives; dropping it cancels the job.
    Never,
    /// The worker panics.
    Panic,
    /// Two completions, which no engine should send and the receiver should survive.
    Duplicate,
}

/// An engine without files or threads: jobs end inside of `submit`, or one by one at [`FakeReads::step`].
#[derive(Debug)]
pub struct FakeReads {
    files: Vec<FakeFile>,
    done: Sender<Done>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    faults: BTreeMap<usize, Fault>,
    /// Tags and urgencies, as submitted.
    order: Vec<(u64, Urgency)>,
    /// Jobs wait for `step`.
    stepped: bool,
    demand: VecDeque<(usize, Job)>,
    prefetch: VecDeque<(usize, Job)>,
    /// Jobs that wait for `release`, or for ever.
    held: BTreeMap<usize, Job>,
}

impl FakeReads {
    /// An engine over files of these lengths, whose bytes are [`fake_byte`]s.
    #[must_use]
    pub fn new(lengths: &[u64], done: Sender<Done>) -> Self {
        let file = |(number, &bytes)| FakeFile {
            number: u32::try_from(number).unwrap_or(u32::MAX),
            name: format!("fake-{number}"),
            bytes,
        };
        Self { files: lengths.iter().enumerate().map(file).collect(), done, state: Mutex::default() }
    }

    /// Jobs end at [`step`](Self::step) only.
    #[must_use]
    pub fn stepped(self) -> Self {
        self.state().stepped = true;
        self
    }

    /// Lets something happen to the job that is submitted as number `job`, counted from 0.
    pub fn script(&self, job: usize, fault: Fault) {
        self.state().faults.insert(job, fault);
    }

    /// Ends the next waiting job, demand first, and says whether there was one. What was scripted for it happens now.
    pub fn step(&self) -> bool {
        let mut state = self.state();
        let next = state.demand.pop_front();
        let Some((number, job)) = next.or_else(|| state.prefetch.pop_front()) else { return false };
        drop(state);
        self.end(number, job);
        true
    }

    /// Ends a job that [`Fault::Delay`] holds up, and says whether there was one.
    pub fn release(&self, job: usize) -> bool {
        let mut state = self.state();
        if state.faults.get(&job) != Some(&Fault::Delay) {
            return false;
        }
        let Some(held) = state.held.remove(&job) else { return false };
        drop(state);
        self.read(held, None);
        true
    }

    /// The jobs so far, in the order in which they were submitted: tag and urgency.
    #[must_use]
    pub fn order(&self) -> Vec<(u64, Urgency)> {
        self.state().order.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, number: usize, job: Job) {
        let mut state = self.state();
        let fault = state.faults.get(&number).copied();
        if let Some(Fault::Delay | Fault::Never) = fault {
            state.held.insert(number, job);
            return;
        }
        drop(state);
        self.read(job, fault);
    }

    fn read(&self, job: Job, fault: Option<Fault>) {
        let flight = std::sync::Arc::clone(&job.flight);
        if fault == Some(Fault::Duplicate) {
            // The receiver may reuse the memory at once, so both are sent when it is no longer touched.
            let (tag, again) = (flight.tag(), self.done.clone());
            let bytes = self.place(job, None).unwrap_or_default();
            drop(flight);
            let _ = again.send(Done { tag, result: Ok(()), bytes });
            return;
        }
        if fault == Some(Fault::Panic) {
            // What the engines make of it; a real panic here would be the submitter's.
            flight.fail(panicked(&"scripted"));
            return;
        }
        if let Err(error) = self.place(job, fault) {
            flight.fail(error);
        }
    }

    /// Reads all pieces of a job, or half of them.
    fn place(&self, job: Job, fault: Option<Fault>) -> Result<u64> {
        let mut placed = 0;
        for mut piece in job.pieces(&self.files, 1 << 20)? {
            let file = &self.files[piece.file as usize];
            let mut at = piece.begin;
            for part in &mut piece.parts {
                let bytes = part.window.bytes();
                let wanted = if fault.is_some() { bytes / 2 } else { bytes };
                let read = file.read_at(&mut part.window.memory()[..wanted], part.offset);
                debug_assert_eq!(read, Ok(wanted), "checked before");
                placed += bytes as u64;
                at = part.offset + wanted as u64;
            }
            match fault {
                Some(Fault::Eio) => {
                    let message = format!("cannot be read at byte {at}; check the disk");
                    let error = Error::new(ErrorKind::Io, message).with_file(&*file.name);
                    return Err(error.with_source(std::io::Error::from(Errno::IO)));
                }
                Some(_) => {
                    let message = format!("ends at byte {at}, inside an expert; load the model again");
                    return Err(Error::new(ErrorKind::Io, message).with_file(&*file.name));
                }
                None => piece.flight.landed(),
            }
        }
        Ok(placed)
    }
}

/// A file whose bytes are computed.
#[derive(Debug)]
struct FakeFile {
    number: u32,
    name: String,
    bytes: u64,
}

impl Source for FakeFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn verify(&self) -> Result<()> {
        Ok(())
    }

    fn direct(&self) -> Option<Alignment> {
        None
    }

    fn leave_direct(&self) {}

    fn read_at(&self, memory: &mut [MaybeUninit<u8>], offset: u64) -> Result<usize, Errno> {
        let left = usize::try_from(self.bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let read = memory.len().min(left);
        for (byte, at) in memory[..read].iter_mut().zip(offset..) {
            byte.write(fake_byte(self.number, at));
        }
        Ok(read)
    }

    fn release(&self, _begin: u64, _end: u64) {}
}

impl ReadEngine for FakeReads {
    fn submit(&self, job: ReadJob, urgency: Urgency) {
        let mut state = self.state();
        let number = state.order.len();
        state.order.push((job.tag, urgency));
        let job = Job::new(job, self.done.clone());
        if state.stepped {
            let lane = if urgency == Urgency::Demand { &mut state.demand } else { &mut state.prefetch };
            lane.push_back((number, job));
            return;
        }
        drop(state);
        self.end(number, job);
    }

    fn name(&self) -> &'static str {
        "fake"
    }
}
