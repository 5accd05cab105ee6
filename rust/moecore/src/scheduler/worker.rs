//! The scheduler thread: the one place where residency changes.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, select};

use super::Ring;
use super::message::{Answer, Call, Message, SharedError, Slots};
use super::ring::StreamState;
use super::rows::Rows;
use crate::device::HostMemory;
use crate::error::{Error, ErrorKind};
use crate::experts::{ExpertId, ExpertStore};
use crate::io::{Destination, Done, ReadEngine, ReadJob, Urgency};
use crate::residency::{Epoch, Residency, Writer};
use crate::telemetry::{Phase, Telemetry, add};

/// Prefetches that may be under way at one time: enough to keep a disk busy, few enough to let a demand through.
const MAX_PREFETCHES: usize = 8;

/// How often readers are asked whether they have left a slot. They leave within one layer's compute.
pub(super) const QUIET_POLL: Duration = Duration::from_micros(50);

/// State of the thread.
pub(super) struct Worker {
    /// First, so that it goes first: no read may outlive the memory.
    pub(super) engine: Box<dyn ReadEngine>,
    pub(super) store: Arc<ExpertStore>,
    pub(super) memory: Arc<dyn HostMemory>,
    pub(super) book: Residency,
    pub(super) writer: Writer,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) ring: Ring,
    /// Where slots that a caller holds come back to.
    pub(super) inbox: Sender<Message>,
    /// Reads that were asked for, by tag.
    pub(super) fills: HashMap<u64, Fill>,
    /// Tag of the read of each expert that is on its way into the cache.
    pub(super) coming: HashMap<ExpertId, u64>,
    /// Reads whose slot may still be looked at by a reader.
    pub(super) draining: Vec<(Epoch, u64)>,
    /// Requests with reads under way.
    pub(super) requests: HashMap<u64, Request>,
    /// Requests that have to wait for slots, first come first served.
    pub(super) parked: VecDeque<Message>,
    pub(super) prefetching: usize,
    /// Slots that are held or being filled: nobody can have them.
    pub(super) busy: u32,
    /// Calls so far, and the last one that used each slot.
    pub(super) calls: u64,
    pub(super) last_call: Vec<u64>,
    pub(super) stream: Option<StreamState>,
    pub(super) ring_is_taken: bool,
    pub(super) streams: u64,
    pub(super) tags: u64,
}

/// A read of one expert into one slot.
pub(super) struct Fill {
    pub(super) expert: ExpertId,
    pub(super) slot: u32,
    pub(super) urgency: Urgency,
    /// Whether the slot belongs to the ring, where nothing stays.
    pub(super) transient: bool,
    /// Requests that wait for it.
    pub(super) waiters: Vec<u64>,
}

/// A caller who waits for the last of its reads.
pub(super) struct Request {
    pub(super) left: usize,
    pub(super) slots: Slots,
    pub(super) reply: Sender<Answer<Rows>>,
    pub(super) failed: Option<SharedError>,
    /// Whether the slots are held for the caller, who gives them back.
    pub(super) holds: bool,
}

/// What became of a request.
pub(super) enum Outcome {
    Started,
    /// Not enough slots are free at the moment.
    Parked(Message),
}

impl Worker {
    #[expect(clippy::too_many_arguments, reason = "made in one place")]
    pub(super) fn new(
        store: Arc<ExpertStore>,
        memory: Arc<dyn HostMemory>,
        book: Residency,
        writer: Writer,
        engine: Box<dyn ReadEngine>,
        telemetry: Arc<Telemetry>,
        ring: Ring,
        inbox: Sender<Message>,
    ) -> Self {
        let last_call = vec![0; memory.rows() as usize];
        Self {
            engine,
            store,
            memory,
            book,
            writer,
            telemetry,
            ring,
            inbox,
            fills: HashMap::new(),
            coming: HashMap::new(),
            draining: Vec::new(),
            requests: HashMap::new(),
            parked: VecDeque::new(),
            prefetching: 0,
            busy: 0,
            calls: 0,
            last_call,
            stream: None,
            ring_is_taken: false,
            streams: 0,
            tags: 0,
        }
    }

    /// Works until it is told to close. A panic ends the thread; callers find their channels closed.
    pub(super) fn run(mut self, messages: &Receiver<Message>, completions: &Receiver<Done>) {
        loop {
            let patience = if self.draining.is_empty() { Duration::from_secs(3600) } else { QUIET_POLL };
            select! {
                recv(completions) -> done => match done {
                    Ok(done) => self.finished(done),
                    Err(_) => return,
                },
                recv(messages) -> message => match message {
                    Ok(Message::Close) | Err(_) => return,
                    Ok(message) => self.take(message),
                },
                default(patience) => {}
            }
            self.submit_drained();
            self.retry_parked();
        }
    }

    fn take(&mut self, message: Message) {
        // Those who wait for slots were first; only what frees slots may pass them.
        let needs_slots = matches!(message, Message::Demand(..) | Message::Stream(..));
        if needs_slots && !self.parked.is_empty() {
            self.parked.push_back(message);
        } else if let Outcome::Parked(message) = self.handle(message) {
            self.parked.push_back(message);
        }
    }

    fn retry_parked(&mut self) {
        while let Some(message) = self.parked.pop_front() {
            if let Outcome::Parked(message) = self.handle(message) {
                self.parked.push_front(message);
                return;
            }
        }
    }

    fn handle(&mut self, message: Message) -> Outcome {
        match message {
            Message::Used(call) => self.used(&call),
            Message::Demand(call, reply) => return self.demand(call, reply),
            Message::Release(slots) => self.release_all(slots),
            Message::Prefetch(experts) => self.prefetch(&experts),
            Message::Stream(call, reply) => return self.begin_stream(call, reply),
            Message::StreamReady(number, reply) => self.stream_ready(number, reply),
            Message::Fill(number, fill, reply) => self.fill_ring(number, &fill, reply),
            Message::StreamEnd(number) => self.end_stream(number),
            Message::Reserve(expert, reply) => self.reserve(expert, &reply),
            Message::Brought(expert) => self.brought(expert),
            Message::Close => {}
        }
        Outcome::Started
    }

    pub(super) fn used(&mut self, call: &Call) {
        self.book.tick();
        self.calls += 1;
        for (&expert, &tokens) in call.experts.iter().zip(&call.tokens) {
            self.book.used(expert, u64::from(tokens));
            self.book.take_prefetched(expert);
            if let Some(slot) = self.book.slot_of(expert) {
                self.last_call[slot as usize] = self.calls;
            }
        }
    }

    fn demand(&mut self, call: Call, reply: Sender<Answer<Rows>>) -> Outcome {
        let here: Vec<u32> = call.experts.iter().filter_map(|&expert| self.book.slot_of(expert)).collect();
        for &slot in &here {
            self.hold(slot);
        }
        if (self.obtainable() as usize) < call.experts.len() - here.len() {
            self.release_all(here);
            return Outcome::Parked(Message::Demand(call, reply));
        }
        self.used(&call);
        let mut request = Request { left: 0, slots: Vec::new(), reply, failed: None, holds: true };
        let number = self.number();
        let counters = self.telemetry.clone();
        let counters = counters.of(call.layer, call.phase);
        add(&counters.lookups, call.experts.len() as u64);
        for &expert in &call.experts {
            if let Some(slot) = self.book.slot_of(expert) {
                request.slots.push(slot);
                if let Some(fill) = self.coming.get(&expert).and_then(|tag| self.fills.get_mut(tag)) {
                    fill.waiters.push(number);
                    request.left += 1;
                    add(&counters.late, 1);
                } else {
                    add(&counters.hits, 1);
                }
                continue;
            }
            add(&counters.misses, 1);
            add(&counters.demand_bytes, self.store.row_bytes(expert));
            let slot = self.bring(expert, Urgency::Demand, Some(number), call.phase);
            let slot = slot.expect("as many slots were counted as obtainable");
            self.hold(slot);
            request.slots.push(slot);
            request.left += 1;
        }
        self.settle(number, request);
        Outcome::Started
    }

    fn prefetch(&mut self, experts: &[ExpertId]) {
        for &expert in experts {
            let unknown = expert >= self.store.experts();
            if unknown || self.prefetching >= MAX_PREFETCHES || self.book.slot_of(expert).is_some() {
                continue;
            }
            if self.bring(expert, Urgency::Prefetch, None, Phase::Decode).is_some() {
                self.book.mark_prefetched(expert);
                self.prefetching += 1;
                let layer = self.store.locate(expert).0;
                add(&self.telemetry.of(layer, Phase::Decode).prefetch_bytes, self.store.row_bytes(expert));
            }
        }
    }

    fn reserve(&mut self, expert: ExpertId, reply: &Sender<Answer<Slots>>) {
        let refused = |message| SharedError::from(Error::new(ErrorKind::Budget, message));
        let answer = if expert >= self.store.experts() || self.book.slot_of(expert).is_some() {
            Err(refused("this expert is there already, or does not exist"))
        } else if self.book.resident() == self.in_use() {
            Err(refused("no row is free for an expert that has no file; give more host_memory"))
        } else {
            self.book.place(expert, |_| true).map(|at| vec![at.slot]).map_err(|_| refused("no row is free"))
        };
        if let Ok(slots) = &answer {
            self.fill(slots[0], true);
            // Without a file behind it an expert could not come back: it is held for good.
            if self.store.ranges(expert).is_empty() {
                self.hold(slots[0]);
            }
        }
        // A caller that is gone leaves the slot as it is: only its expert is lost, and with it the model.
        let _ = reply.send(answer);
    }

    fn brought(&mut self, expert: ExpertId) {
        if let Some(slot) = self.book.slot_of(expert).filter(|&slot| self.book.is_filling(slot)) {
            self.fill(slot, false);
            self.writer.publish(expert, slot);
        }
    }

    /// Finds a slot for an expert and has it read, once no reader looks at what lay there.
    pub(super) fn bring(
        &mut self,
        expert: ExpertId,
        urgency: Urgency,
        waiter: Option<u64>,
        phase: Phase,
    ) -> Option<u32> {
        // A prefetch must not push out what the last two tokens have used.
        let recent = if urgency == Urgency::Prefetch { 2 * self.store.layers().len() as u64 } else { 0 };
        let (calls, last_call) = (self.calls, &self.last_call);
        let protect = |slot: u32| last_call[slot as usize] + recent > calls;
        let wasted = self.book.prefetch().wasted;
        let placement = self.book.place(expert, protect).ok()?;
        self.last_call[placement.slot as usize] = self.calls;
        let wasted = self.book.prefetch().wasted > wasted;
        let epoch = placement.evicted.map(|evicted| self.evict(evicted, wasted, phase));
        self.fill(placement.slot, true);
        let waiters = waiter.into_iter().collect();
        let tag = self.start(Fill { expert, slot: placement.slot, urgency, transient: false, waiters }, epoch);
        self.coming.insert(expert, tag);
        Some(placement.slot)
    }

    /// Ends an expert's residency: readers find it no more.
    pub(super) fn evict(&mut self, expert: ExpertId, wasted: bool, phase: Phase) -> Epoch {
        let counters = self.telemetry.of(self.store.locate(expert).0, phase);
        add(&counters.evictions, 1);
        if wasted {
            add(&counters.wasted_bytes, self.store.row_bytes(expert));
        }
        self.writer.retire(expert)
    }

    pub(super) fn start(&mut self, fill: Fill, epoch: Option<Epoch>) -> u64 {
        self.tags += 1;
        self.fills.insert(self.tags, fill);
        match epoch {
            Some(epoch) if !self.writer.is_quiet(epoch) => self.draining.push((epoch, self.tags)),
            _ => self.submit(self.tags),
        }
        self.tags
    }

    fn submit(&mut self, tag: u64) {
        let fill = &self.fills[&tag];
        // SAFETY: the slot is ours alone: its former expert is retired and no reader is left (`is_quiet`), it is marked
        // as filling (or part of the ring), so nobody else gets it until `finished` sees this tag; the memory outlives
        // the engine, which `Worker` drops first.
        #[expect(unsafe_code, reason = "reads land in slots")]
        let into = unsafe { Destination::new(self.memory.row(fill.slot).as_ptr(), self.memory.row_bytes()) };
        let job = ReadJob { tag, ranges: self.store.ranges(fill.expert).to_vec(), into };
        self.engine.submit(job, fill.urgency);
    }

    fn submit_drained(&mut self) {
        let mut waiting = std::mem::take(&mut self.draining);
        waiting.retain(|&(epoch, tag)| {
            let quiet = self.writer.is_quiet(epoch);
            if quiet {
                self.submit(tag);
            }
            !quiet
        });
        self.draining = waiting;
    }

    fn finished(&mut self, done: Done) {
        // A completion that comes twice finds nothing.
        let Some(fill) = self.fills.remove(&done.tag) else { return };
        let failure = done.result.err().map(|error| self.explain(&fill, error));
        if !fill.transient {
            self.coming.remove(&fill.expert);
            self.fill(fill.slot, false);
            if failure.is_none() {
                self.writer.publish(fill.expert, fill.slot);
            } else {
                self.give_up(&fill, done.tag);
            }
        }
        if fill.urgency == Urgency::Prefetch {
            self.prefetching -= 1;
        }
        if let (Some(stream), Some(failure)) = (&mut self.stream, &failure)
            && stream.cached.contains(&done.tag)
        {
            stream.failed.get_or_insert_with(|| failure.clone());
        }
        for number in fill.waiters {
            let Some(mut request) = self.requests.remove(&number) else { continue };
            request.left -= 1;
            if let Some(failure) = &failure {
                request.failed.get_or_insert_with(|| failure.clone());
            }
            self.settle(number, request);
        }
        self.free_ring();
    }

    /// Makes the slot of a failed read free: those who wait for it hold it no more, so that nobody finds it.
    fn give_up(&mut self, fill: &Fill, tag: u64) {
        let mut held = 0;
        let mut leave = |slots: &mut Slots| {
            let before = slots.len();
            slots.retain(|&slot| slot != fill.slot);
            held += before - slots.len();
        };
        for number in &fill.waiters {
            if let Some(request) = self.requests.get_mut(number).filter(|request| request.holds) {
                leave(&mut request.slots);
            }
        }
        if let Some(stream) = self.stream.as_mut().filter(|stream| stream.cached.contains(&tag)) {
            leave(&mut stream.held);
        }
        (0..held).for_each(|_| self.release(fill.slot));
        self.book.free(fill.slot);
    }

    /// Answers a request whose last read is over, or keeps it.
    pub(super) fn settle(&mut self, number: u64, request: Request) {
        if request.left > 0 {
            self.requests.insert(number, request);
            return;
        }
        let Request { slots, reply, failed, holds, .. } = request;
        let answer = match failed {
            Some(failure) => {
                if holds {
                    self.release_all(slots);
                }
                Err(failure)
            }
            None if holds => Ok(Rows::held(slots, self.inbox.clone())),
            None => Ok(Rows::of_stream(slots)),
        };
        // A caller that is gone leaves the rows here, and dropping them releases the slots.
        let _ = reply.send(answer);
    }

    fn explain(&self, fill: &Fill, error: Error) -> SharedError {
        let (layer, expert) = self.store.locate(fill.expert);
        let name = &self.store.layers()[layer as usize].name;
        error.with_tensor(format!("{name}, expert {expert}")).into()
    }

    pub(super) fn hold(&mut self, slot: u32) {
        self.busy += u32::from(!self.is_busy(slot));
        self.book.hold(slot);
    }

    pub(super) fn release(&mut self, slot: u32) {
        self.book.release(slot);
        self.busy -= u32::from(!self.is_busy(slot));
    }

    fn release_all(&mut self, slots: Slots) {
        for slot in slots {
            self.release(slot);
        }
    }

    fn fill(&mut self, slot: u32, filling: bool) {
        let before = self.is_busy(slot);
        self.book.set_filling(slot, filling);
        self.busy = self.busy + u32::from(self.is_busy(slot)) - u32::from(before);
    }

    pub(super) fn is_busy(&self, slot: u32) -> bool {
        self.book.holds(slot) > 0 || self.book.is_filling(slot)
    }

    /// Slots that a call can have: free ones, and those of experts that can be evicted.
    fn obtainable(&self) -> u32 {
        self.in_use() - self.busy
    }

    /// Slots of the cache: all of them, or all but the ring while somebody streams.
    pub(super) fn in_use(&self) -> u32 {
        let all = self.memory.rows();
        if self.ring_is_taken { self.ring.first } else { all }
    }

    pub(super) fn number(&mut self) -> u64 {
        self.tags += 1;
        self.tags
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let gone = || Error::new(ErrorKind::Cancelled, "the model was closed while it waited for experts");
        for request in std::mem::take(&mut self.requests).into_values() {
            let _ = request.reply.send(Err(gone().into()));
        }
    }
}
