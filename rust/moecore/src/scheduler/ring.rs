//! The worker's part in streams: who has the ring, and when it is anybody's again.

use crossbeam_channel::Sender;

use super::message::{Answer, Call, Message, SharedError, Slots, StreamPlan};
use super::rows::Rows;
use super::worker::{Fill, Outcome, QUIET_POLL, Request, Worker};
use crate::experts::ExpertId;
use crate::io::Urgency;
use crate::telemetry::add;

/// The stream that has the ring.
pub(super) struct StreamState {
    pub(super) number: u64,
    pub(super) held: Slots,
    /// Reads into slots of the cache that the first wave waits for.
    pub(super) cached: Vec<u64>,
    pub(super) failed: Option<SharedError>,
    /// Whether the caller is gone and the ring waits for its last reads.
    pub(super) ending: bool,
}

impl Worker {
    pub(super) fn begin_stream(&mut self, call: Call, reply: Sender<Answer<StreamPlan>>) -> Outcome {
        let ring_is_held = self.ring.slots().any(|slot| self.is_busy(slot));
        if self.stream.is_some() || ring_is_held {
            return Outcome::Parked(Message::Stream(call, reply));
        }
        self.ring_is_taken = true;
        let mut quiet_at = None;
        for slot in self.ring.slots() {
            let wasted = self.book.prefetch().wasted;
            let evicted = self.book.withdraw(slot).expect("the ring is not held");
            let wasted = self.book.prefetch().wasted > wasted;
            quiet_at = evicted.map(|expert| self.evict(expert, wasted, call.phase)).or(quiet_at);
        }
        // Readers leave within one layer's compute, and the ring is wanted whole.
        while quiet_at.is_some_and(|epoch| !self.writer.is_quiet(epoch)) {
            std::thread::sleep(QUIET_POLL);
        }
        self.streams += 1;
        let mut stream =
            StreamState { number: self.streams, held: Vec::new(), cached: Vec::new(), failed: None, ending: false };
        let mut plan = StreamPlan { stream: self.streams, cached: Vec::new(), streamed: Vec::new() };
        let counters = self.telemetry.clone();
        let counters = counters.of(call.layer, call.phase);
        add(&counters.lookups, call.experts.len() as u64);
        self.used(&call);
        for &expert in &call.experts {
            let slot = if let Some(slot) = self.book.slot_of(expert) {
                let on_its_way = self.coming.get(&expert).copied();
                add(if on_its_way.is_some() { &counters.late } else { &counters.hits }, 1);
                stream.cached.extend(on_its_way);
                Some(slot)
            } else {
                add(&counters.misses, 1);
                add(&counters.demand_bytes, self.store.row_bytes(expert));
                let room = self.has_room(call.layer);
                let slot = room.then(|| self.bring(expert, Urgency::Demand, None, call.phase)).flatten();
                stream.cached.extend(slot.map(|_| self.tags));
                slot
            };
            if let Some(slot) = slot {
                self.hold(slot);
                stream.held.push(slot);
                plan.cached.push((expert, slot));
            } else {
                plan.streamed.push(expert);
            }
        }
        self.stream = Some(stream);
        if reply.send(Ok(plan)).is_err() {
            self.end_stream(self.streams);
        }
        Outcome::Started
    }

    pub(super) fn stream_ready(&mut self, number: u64, reply: Sender<Answer<Rows>>) {
        let Some(stream) = self.stream.as_ref().filter(|stream| stream.number == number) else { return };
        let (tags, slots, failed) = (stream.cached.clone(), stream.held.clone(), stream.failed.clone());
        self.wait_for(&tags, slots, failed, reply);
    }

    pub(super) fn fill_ring(&mut self, number: u64, fill: &[(ExpertId, u32)], reply: Sender<Answer<Rows>>) {
        if self.stream.as_ref().is_none_or(|stream| stream.number != number) {
            return;
        }
        let tags: Vec<u64> = fill
            .iter()
            .map(|&(expert, slot)| {
                let fill = Fill { expert, slot, urgency: Urgency::Demand, transient: true, waiters: Vec::new() };
                self.start(fill, None)
            })
            .collect();
        let slots = fill.iter().map(|&(_, slot)| slot).collect();
        self.wait_for(&tags, slots, None, reply);
    }

    /// Answers when the reads that are still under way are over.
    pub(super) fn wait_for(
        &mut self,
        tags: &[u64],
        slots: Slots,
        failed: Option<SharedError>,
        reply: Sender<Answer<Rows>>,
    ) {
        let number = self.number();
        let mut request = Request { left: 0, slots, reply, failed, holds: false };
        for tag in tags {
            if let Some(fill) = self.fills.get_mut(tag) {
                fill.waiters.push(number);
                request.left += 1;
            }
        }
        self.settle(number, request);
    }

    pub(super) fn end_stream(&mut self, number: u64) {
        let Some(stream) = self.stream.as_mut().filter(|stream| stream.number == number) else { return };
        stream.ending = true;
        for slot in std::mem::take(&mut stream.held) {
            self.release(slot);
        }
        self.free_ring();
    }

    /// Reads that a stream left behind still write to the ring: only after them is it anybody's again.
    pub(super) fn free_ring(&mut self) {
        let ending = self.stream.as_ref().is_some_and(|stream| stream.ending);
        if ending && !self.fills.values().any(|fill| fill.transient) {
            self.stream = None;
            self.ring_is_taken = false;
            for slot in self.ring.slots() {
                self.book.free(slot);
            }
        }
    }

    /// Whether a stream may fill a free slot: no layer takes more than its share, or the first would take all.
    pub(super) fn has_room(&self, layer: u32) -> bool {
        let layers = u32::try_from(self.store.layers().len()).unwrap_or(u32::MAX);
        self.book.resident() < self.in_use() && self.book.occupancy(layer) < self.in_use().div_ceil(layers)
    }
}
