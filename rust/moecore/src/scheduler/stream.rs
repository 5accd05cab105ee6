//! [`Stream`]: the experts of one call in waves, through a ring of slots.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use super::message::{Answer, Call, Message, StreamPlan, stopped};
use super::rows::Rows;
use super::{Ring, Shared};
use crate::error::{Error, Result};
use crate::experts::ExpertId;
use crate::telemetry::add;

/// Experts of a call that can be worked on at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wave {
    /// Dense ids.
    pub experts: Vec<ExpertId>,
    /// Where each of them lies.
    pub slots: Vec<u32>,
}

impl Wave {
    /// Waves of the ring are transient, the others lie in slots of the cache.
    fn is_in_ring(&self, ring: Ring) -> bool {
        self.slots.first().is_some_and(|&slot| slot >= ring.first)
    }
}

/// A layer that passes through the ring. Dropping it gives the ring back.
///
/// The reads of the next wave run while the caller works on this one; asking for a wave says that the work on the
/// one before is over.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    call: Call,
    state: State,
    stall: Duration,
}

#[derive(Debug)]
enum State {
    /// The scheduler has not said yet what is resident.
    Planning(Receiver<Answer<StreamPlan>>),
    Running(Running),
    Ended,
}

#[derive(Debug)]
struct Running {
    stream: u64,
    /// Waves that are being read, in order.
    reading: VecDeque<(Wave, Receiver<Answer<Rows>>)>,
    /// Experts that nobody has asked to read yet.
    left: VecDeque<ExpertId>,
    /// Half of the ring that the next read goes to.
    half: u32,
    /// Whether the caller works on a half of the ring.
    working: bool,
}

impl Stream {
    pub(super) fn begin(shared: Arc<Shared>, mut call: Call) -> Result<Self> {
        add(&shared.telemetry.of(call.layer, call.phase).calls, 1);
        for (&expert, &tokens) in call.experts.iter().zip(&call.tokens) {
            shared.telemetry.routed(expert, u64::from(tokens));
        }
        let mut order: Vec<(u32, ExpertId)> = call.tokens.iter().copied().zip(call.experts.iter().copied()).collect();
        order.sort_by_key(|&(tokens, expert)| (std::cmp::Reverse(tokens), expert));
        (call.tokens, call.experts) = order.into_iter().unzip();
        let (reply, answer) = bounded(1);
        shared.send(Message::Stream(call.clone(), reply))?;
        Ok(Self { shared, call, state: State::Planning(answer), stall: Duration::ZERO })
    }

    /// The next wave, `Ok(None)` after the last one, or [`Waited`] where it is not there after `patience`.
    pub fn next(&mut self, patience: Duration) -> Result<Option<Wave>, Waited> {
        let since = Instant::now();
        let wave = self.advance(patience);
        self.stall += since.elapsed();
        wave
    }

    fn advance(&mut self, patience: Duration) -> Result<Option<Wave>, Waited> {
        if let State::Planning(answer) = &self.state {
            let plan = receive(answer, patience)?;
            self.state = State::Running(self.start(plan)?);
        }
        let State::Running(running) = &mut self.state else { return Ok(None) };
        // Asking for a wave says that the work on the one before is over: its half may be written again.
        running.working = false;
        refill(&self.shared, running)?;
        let Some((_, answer)) = running.reading.front() else {
            self.end();
            return Ok(None);
        };
        receive(answer, patience)?;
        let (wave, _) = running.reading.pop_front().expect("there is a front");
        running.working = wave.is_in_ring(self.shared.ring);
        Ok(Some(wave))
    }

    fn start(&self, plan: StreamPlan) -> Result<Running> {
        let mut running = Running {
            stream: plan.stream,
            reading: VecDeque::new(),
            left: plan.streamed.into(),
            half: 0,
            working: false,
        };
        if !plan.cached.is_empty() {
            let (reply, answer) = bounded(1);
            self.shared.send(Message::StreamReady(plan.stream, reply))?;
            let (experts, slots) = plan.cached.into_iter().unzip();
            running.reading.push_back((Wave { experts, slots }, answer));
        }
        refill(&self.shared, &mut running)?;
        Ok(running)
    }

    fn end(&mut self) {
        if let State::Running(running) = std::mem::replace(&mut self.state, State::Ended) {
            let stall = u64::try_from(self.stall.as_nanos()).unwrap_or(u64::MAX);
            add(&self.shared.telemetry.of(self.call.layer, self.call.phase).stall_ns, stall);
            // A scheduler that has stopped holds nothing.
            let _ = self.shared.send(Message::StreamEnd(running.stream));
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let State::Planning(answer) = &self.state {
            // The plan may still come; it must not keep the ring.
            if let Ok(Ok(plan)) = answer.recv_timeout(Duration::from_secs(60)) {
                let _ = self.shared.send(Message::StreamEnd(plan.stream));
            }
        }
        self.end();
    }
}

/// Asks for the next reads, as long as a half of the ring is neither read into nor worked on.
fn refill(shared: &Shared, running: &mut Running) -> Result<()> {
    let Ring { first, chunk, halves } = shared.ring;
    let reading = running.reading.iter().filter(|(wave, _)| wave.is_in_ring(shared.ring)).count();
    let busy = u32::try_from(reading).unwrap_or(u32::MAX) + u32::from(running.working);
    for _ in busy..halves {
        if running.left.is_empty() {
            break;
        }
        let start = first + running.half * chunk;
        let count = running.left.len().min(chunk as usize);
        let experts: Vec<ExpertId> = running.left.drain(..count).collect();
        let slots: Vec<u32> = (start..).take(count).collect();
        let (reply, answer) = bounded(1);
        let fill = experts.iter().copied().zip(slots.iter().copied()).collect();
        shared.send(Message::Fill(running.stream, fill, reply))?;
        running.reading.push_back((Wave { experts, slots }, answer));
        running.half = (running.half + 1) % halves;
    }
    Ok(())
}

/// Why there is no wave to give.
#[derive(Debug)]
pub enum Waited {
    /// It is not there yet; ask again.
    NotYet,
    /// It will not come.
    Failed(Error),
}

impl From<Error> for Waited {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

fn receive<T>(answer: &Receiver<Answer<T>>, patience: Duration) -> Result<T, Waited> {
    match answer.recv_timeout(patience) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Waited::Failed(error.to_error())),
        Err(RecvTimeoutError::Timeout) => Err(Waited::NotYet),
        Err(RecvTimeoutError::Disconnected) => Err(Waited::Failed(stopped())),
    }
}
