//! A file in memory whose reads do what a test wants.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::io::Errno;

use crate::error::Result;
use crate::io::source::{Alignment, Source};

/// What one read call does.
#[derive(Debug, Clone, Copy)]
pub(super) enum Outcome {
    Short(usize),
    Fails(Errno),
    Panics,
}

/// Direct reads of it panic unless offset, length and memory are aligned, where a kernel would refuse them.
#[derive(Debug)]
pub(super) struct Script {
    pub bytes: Vec<u8>,
    /// What the file says its length is.
    pub claimed: u64,
    pub alignment: Alignment,
    pub direct: AtomicBool,
    /// Read calls do these first, then what they should.
    pub outcomes: Mutex<VecDeque<Outcome>>,
    /// Offsets of the read calls, as they begin.
    pub reads: Mutex<Vec<u64>>,
    /// Each read call waits for one of these, once there is a gate.
    pub gate: Option<Receiver<()>>,
    pub released: AtomicU64,
}

impl Script {
    pub(super) fn new(bytes: Vec<u8>, direct: Option<Alignment>) -> Self {
        Self {
            claimed: bytes.len() as u64,
            bytes,
            alignment: direct.unwrap_or(Alignment { block: 1, memory: 1 }),
            direct: AtomicBool::new(direct.is_some()),
            outcomes: Mutex::default(),
            reads: Mutex::default(),
            gate: None,
            released: AtomicU64::new(0),
        }
    }

    pub(super) fn with(self, outcomes: &[Outcome]) -> Self {
        self.outcomes.lock().expect("not poisoned").extend(outcomes);
        self
    }

    pub(super) fn gated(mut self) -> (Self, Sender<()>) {
        let (sender, receiver) = unbounded();
        self.gate = Some(receiver);
        (self, sender)
    }

    /// Waits until this many read calls have begun.
    pub(super) fn await_reads(&self, count: usize) {
        while self.reads.lock().expect("not poisoned").len() < count {
            std::thread::yield_now();
        }
    }

    pub(super) fn order(&self) -> Vec<u64> {
        self.reads.lock().expect("not poisoned").clone()
    }
}

impl Source for Arc<Script> {
    fn name(&self) -> &'static str {
        "scripted.safetensors"
    }

    fn bytes(&self) -> u64 {
        self.claimed
    }

    fn verify(&self) -> Result<()> {
        Ok(())
    }

    fn direct(&self) -> Option<Alignment> {
        self.direct.load(Ordering::Relaxed).then_some(self.alignment)
    }

    fn leave_direct(&self) {
        self.direct.store(false, Ordering::Relaxed);
    }

    fn read_at(&self, memory: &mut [MaybeUninit<u8>], offset: u64) -> Result<usize, Errno> {
        self.reads.lock().expect("not poisoned").push(offset);
        if let Some(gate) = &self.gate {
            gate.recv().map_err(|_| Errno::IO)?;
        }
        if self.direct().is_some() {
            let Alignment { block, memory: address } = self.alignment;
            assert!(offset.is_multiple_of(block) && (memory.len() as u64).is_multiple_of(block), "unaligned read");
            assert!(memory.as_ptr().addr().is_multiple_of(address), "unaligned memory");
        }
        let outcome = self.outcomes.lock().expect("not poisoned").pop_front();
        let limit = match outcome {
            None => usize::MAX,
            Some(Outcome::Short(bytes)) => bytes,
            Some(Outcome::Fails(errno)) => return Err(errno),
            Some(Outcome::Panics) => panic!("scripted panic"),
        };
        let offset = usize::try_from(offset).expect("small").min(self.bytes.len());
        let read = memory.len().min(self.bytes.len() - offset).min(limit);
        for (to, from) in memory[..read].iter_mut().zip(&self.bytes[offset..]) {
            to.write(*from);
        }
        Ok(read)
    }

    fn release(&self, begin: u64, end: u64) {
        self.released.fetch_add(end - begin, Ordering::Relaxed);
    }
}
