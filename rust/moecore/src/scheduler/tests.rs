#![expect(unsafe_code, reason = "rows are read through their addresses")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::{Call, HostScheduler, Ring, Rows, Unfinished, Waited, Wave};
use crate::device::{HostDevice, HostMemory};
use crate::experts::{ExpertLayer, ExpertStore, Range, SourceFile};
use crate::io::{FakeReads, Fault, ReadEngine, ReadJob, Urgency, fake_byte};
use crate::telemetry::{Phase, Snapshot, Telemetry};
use crate::{ErrorKind, Result};

const ROW: u64 = 5000;
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(20);

/// Slots that free themselves.
#[derive(Debug)]
pub(super) struct Memory {
    device: HostDevice,
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: rows are those of the inner device, whose memory lives as long as `self`.
unsafe impl HostMemory for Memory {
    fn rows(&self) -> u32 {
        self.device.rows()
    }
    fn row_bytes(&self) -> usize {
        self.device.row_bytes()
    }
    fn row(&self, row: u32) -> NonNull<u8> {
        self.device.row(row)
    }
}

// SAFETY: only addresses are kept.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `memory`.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

fn memory(slots: u32, slot_bytes: u64) -> Arc<Memory> {
    let bytes = u64::from(slots.max(1)) * slot_bytes;
    let layout = Layout::from_size_align(usize::try_from(bytes).unwrap(), 4096).unwrap();
    // SAFETY: the layout has a size.
    let base = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
    // SAFETY: freed when `Memory` is dropped.
    let device = unsafe { HostDevice::new(base, u64::from(slots) * slot_bytes, slot_bytes) }.unwrap();
    Arc::new(Memory { device, base, layout })
}

/// Two layers of experts, each of them two ranges of the fake file.
fn store(experts: u32) -> Arc<ExpertStore> {
    let file = SourceFile { path: "fake-0".into(), bytes: 1 << 30, modified: SystemTime::UNIX_EPOCH };
    let layer = |number: u64| {
        let rows = (0..u64::from(experts)).map(|expert| {
            let offset = (number * u64::from(experts) + expert) * ROW + 77;
            let half = ROW / 2;
            vec![
                Range { file: 0, offset, bytes: half, at: 0 },
                Range { file: 0, offset: offset + half, bytes: half, at: half },
            ]
        });
        ExpertLayer::new(format!("layers.{number}.experts"), ROW, 2, &rows.collect::<Vec<_>>())
    };
    Arc::new(ExpertStore::new(vec![file], vec![layer(0), layer(1)]).unwrap())
}

pub(super) struct Rig {
    scheduler: Arc<HostScheduler>,
    reads: Arc<FakeReads>,
    pub(super) memory: Arc<Memory>,
    pub(super) store: Arc<ExpertStore>,
    pub(super) telemetry: Arc<Telemetry>,
}

impl ReadEngine for Arc<FakeReads> {
    fn submit(&self, job: ReadJob, urgency: Urgency) {
        (**self).submit(job, urgency);
    }
    fn name(&self) -> &'static str {
        (**self).name()
    }
}

impl Rig {
    pub(super) fn new(slots: u32, experts: u32, prepare: impl FnOnce(FakeReads) -> FakeReads + 'static) -> Self {
        let store = store(experts);
        let memory = memory(slots, store.slot_bytes());
        let telemetry = Arc::new(Telemetry::new(2, store.experts() as usize));
        // The engine is made where the scheduler opens it, and looked at from here.
        let (keep, kept) = std::sync::mpsc::channel();
        let open = Box::new(move |done| {
            let reads = Arc::new(prepare(FakeReads::new(&[1 << 30], done)));
            keep.send(reads.clone()).unwrap();
            Ok(Box::new(reads) as Box<dyn ReadEngine>)
        });
        let policy = "lfru".parse().unwrap();
        let scheduler = HostScheduler::start(store.clone(), memory.clone(), policy, telemetry.clone(), open).unwrap();
        let scheduler = Arc::new(scheduler);
        Self { scheduler, reads: kept.recv().unwrap(), memory, store, telemetry }
    }

    fn acquire(&self, experts: &[u32]) -> Result<Rows> {
        match self.scheduler.acquire(call(experts))?.wait(LONG) {
            Ok(rows) => Ok(rows),
            Err(Unfinished::Failed(error)) => Err(error),
            Err(Unfinished::Waiting(_)) => panic!("nobody answered"),
        }
    }

    pub(super) fn shared_scheduler(&self) -> Arc<HostScheduler> {
        self.scheduler.clone()
    }

    /// The row at an address is that of an expert.
    pub(super) fn check_at(&self, expert: u32, address: u64) {
        let slot = (0..self.memory.rows()).find(|&row| self.memory.row(row).as_ptr() as u64 == address);
        self.check(&[expert], &[slot.expect("the address of a row")]);
    }

    fn check(&self, experts: &[u32], slots: &[u32]) {
        assert_eq!(experts.len(), slots.len());
        for (&expert, &slot) in experts.iter().zip(slots) {
            // SAFETY: the slot is held by the caller, so nobody writes to it.
            let row = unsafe { std::slice::from_raw_parts(self.memory.row(slot).as_ptr(), 5000) };
            let wanted = |at: u64| fake_byte(0, u64::from(expert) * ROW + 77 + at);
            let wrong = row.iter().zip(0..).find(|&(&byte, at)| byte != wanted(at));
            assert_eq!(wrong, None, "expert {expert} in slot {slot}");
        }
    }

    fn decode(&self) -> Snapshot {
        self.telemetry.of(0, Phase::Decode).snapshot()
    }
}

fn call(experts: &[u32]) -> Call {
    Call { layer: 0, phase: Phase::Decode, experts: experts.to_vec(), tokens: vec![1; experts.len()] }
}

pub(super) fn plain(reads: FakeReads) -> FakeReads {
    reads
}

fn scripted(faults: &'static [(usize, Fault)]) -> impl FnOnce(FakeReads) -> FakeReads {
    move |reads| {
        for &(job, fault) in faults {
            reads.script(job, fault);
        }
        reads
    }
}

fn waves(stream: &mut super::Stream) -> Vec<Wave> {
    std::iter::from_fn(|| match stream.next(LONG) {
        Ok(wave) => wave,
        Err(error) => panic!("{error:?}"),
    })
    .collect()
}

#[test]
fn missing_experts_come_and_stay() {
    let rig = Rig::new(4, 8, plain);
    let rows = rig.acquire(&[3, 5]).unwrap();
    rig.check(&[3, 5], rows.slots());
    drop(rows);
    let rows = rig.acquire(&[5, 3]).unwrap();
    rig.check(&[5, 3], rows.slots());
    let seen = rig.decode();
    assert_eq!((seen.calls, seen.lookups, seen.hits, seen.misses), (2, 4, 2, 2));
    assert_eq!((seen.demand_bytes, seen.evictions), (2 * ROW, 0));
    assert_eq!(rig.reads.order().len(), 2);
    assert_eq!(rig.telemetry.utilisation()[3], 2);
    assert_eq!(rig.scheduler.resident(), 2);
}

#[test]
fn what_is_held_is_not_evicted_and_waits_are_served_in_order() {
    let rig = Rig::new(4, 8, plain);
    let held = rig.acquire(&[0, 1, 2]).unwrap();
    // One slot is free, two are needed: waits, and does not take that one slot meanwhile.
    let pending = rig.scheduler.acquire(call(&[3, 4])).unwrap();
    let Err(Unfinished::Waiting(pending)) = pending.wait(SHORT) else { panic!("nothing was free") };
    let later = rig.scheduler.acquire(call(&[5])).unwrap();
    let Err(Unfinished::Waiting(later)) = later.wait(SHORT) else { panic!("it may not pass those who wait") };
    rig.check(&[0, 1, 2], held.slots());
    drop(held);
    let rows = pending.wait(LONG).unwrap();
    rig.check(&[3, 4], rows.slots());
    let last = later.wait(LONG).unwrap();
    rig.check(&[5], last.slots());
    rig.check(&[3, 4], rows.slots());
}

#[test]
fn a_call_that_can_never_fit_is_an_error_with_the_smallest_budget() {
    let rig = Rig::new(2, 8, plain);
    let error = rig.scheduler.acquire(call(&[1, 2, 3])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Budget);
    assert!(error.to_string().contains(&format!("{} bytes", 3 * rig.store.slot_bytes())), "{error}");
    let none = HostScheduler::start(
        rig.store.clone(),
        memory(0, 8192),
        "lru".parse().unwrap(),
        rig.telemetry.clone(),
        Box::new(|_| panic!("no reads without slots")),
    );
    assert_eq!(none.unwrap_err().kind(), ErrorKind::Budget);
}

#[test]
fn a_stream_brings_every_expert_once_and_leaves_the_cache_alone() {
    let rig = Rig::new(32, 40, plain); // a ring of 2 x 2
    assert_eq!(rig.scheduler.ring(), Ring { first: 28, chunk: 2, halves: 2 });
    drop(rig.acquire(&(0..28).collect::<Vec<_>>()).unwrap());
    let everything: Vec<u32> = (0..40).collect();
    let mut stream = rig.scheduler.stream(Call { phase: Phase::Prefill, ..call(&everything) }).unwrap();
    let mut seen = Vec::new();
    while let Some(wave) = stream.next(LONG).unwrap() {
        std::thread::sleep(Duration::from_millis(2)); // reads of the next wave run meanwhile
        rig.check(&wave.experts, &wave.slots);
        seen.extend(wave.experts);
    }
    seen.sort_unstable();
    assert_eq!(seen, everything);
    let prefill = rig.telemetry.of(0, Phase::Prefill).snapshot();
    assert_eq!((prefill.lookups, prefill.hits, prefill.misses, prefill.evictions), (40, 28, 12, 0));
    assert_eq!(prefill.demand_bytes, 12 * ROW);
    // The cache is as it was, and the ring is free for decoding.
    let before = rig.reads.order().len();
    drop(rig.acquire(&(0..28).collect::<Vec<_>>()).unwrap());
    assert_eq!(rig.reads.order().len(), before);
    drop(rig.acquire(&(0..32).collect::<Vec<_>>()).unwrap());
    assert_eq!(rig.scheduler.resident(), 32);
}

#[test]
fn a_stream_fills_free_slots_with_the_busiest_experts() {
    let rig = Rig::new(6, 8, plain); // a ring of 2 x 1, so 4 slots are free, 2 for each layer
    let tokens = vec![1, 8, 2, 7, 3, 6, 4, 5];
    let mut stream = rig.scheduler.stream(Call { tokens, ..call(&[0, 1, 2, 3, 4, 5, 6, 7]) }).unwrap();
    let all = waves(&mut stream);
    assert_eq!(all[0].experts, [1, 3]);
    assert_eq!(all.len(), 7);
    let before = rig.reads.order().len();
    drop(rig.acquire(&[1, 3]).unwrap());
    assert_eq!(rig.reads.order().len(), before);
}

#[test]
fn one_slot_is_enough_to_stream() {
    let rig = Rig::new(1, 8, plain);
    assert_eq!(rig.scheduler.ring(), Ring { first: 0, chunk: 1, halves: 1 });
    let mut stream = rig.scheduler.stream(call(&[4, 2, 7])).unwrap();
    let mut seen = 0;
    while let Some(wave) = stream.next(LONG).unwrap() {
        std::thread::sleep(Duration::from_millis(2));
        rig.check(&wave.experts, &wave.slots);
        seen += 1;
    }
    assert_eq!(seen, 3);
    rig.check(&[6], rig.acquire(&[6]).unwrap().slots());
}

#[test]
fn a_stream_that_is_given_up_frees_the_ring_when_its_reads_are_over() {
    let rig = Rig::new(4, 8, FakeReads::stepped);
    let mut stream = rig.scheduler.stream(call(&[0, 1, 2, 3, 4, 5])).unwrap();
    let Err(Waited::NotYet) = stream.next(SHORT) else { panic!("no read has ended") };
    drop(stream);
    let pending = rig.scheduler.acquire(call(&[6, 7])).unwrap();
    let Err(Unfinished::Waiting(pending)) = pending.wait(SHORT) else { panic!("all slots are being written") };
    while rig.reads.step() {}
    std::thread::sleep(SHORT);
    while rig.reads.step() {}
    rig.check(&[6, 7], pending.wait(LONG).unwrap().slots());
}

#[test]
fn a_failed_read_names_its_expert_and_can_be_tried_again() {
    for fault in [Fault::Eio, Fault::ShortRead, Fault::Panic] {
        let rig = Rig::new(4, 8, move |reads| {
            reads.script(1, fault);
            reads
        });
        let error = rig.acquire(&[2, 5, 6]).unwrap_err();
        assert!(error.to_string().contains("layers.0.experts, expert 5"), "{error}");
        let rows = rig.acquire(&[5, 6, 2, 1]).unwrap();
        rig.check(&[5, 6, 2, 1], rows.slots());
        drop(rows);
        assert_eq!(rig.decode().misses, 5, "the two good ones stayed");
    }
}

#[test]
fn a_failed_read_ends_a_stream_in_either_kind_of_slot() {
    for job in [0, 3] {
        let rig = Rig::new(6, 8, move |reads| {
            reads.script(job, Fault::Eio);
            reads
        });
        let mut stream = rig.scheduler.stream(call(&[0, 1, 2, 3, 4, 5, 6, 7])).unwrap();
        let failed = loop {
            match stream.next(LONG) {
                Ok(Some(wave)) => rig.check(&wave.experts, &wave.slots),
                Ok(None) => panic!("job {job} failed unseen"),
                Err(Waited::Failed(error)) => break error,
                Err(Waited::NotYet) => panic!("nobody answered"),
            }
        };
        assert_eq!(failed.kind(), ErrorKind::Io);
        drop(stream);
        rig.check(&[0, 1, 2, 3, 4, 5], rig.acquire(&[0, 1, 2, 3, 4, 5]).unwrap().slots());
    }
}

#[test]
fn completions_that_come_twice_are_harmless() {
    let rig = Rig::new(2, 8, scripted(&[(0, Fault::Duplicate), (1, Fault::Duplicate)]));
    for expert in 0..6 {
        rig.check(&[expert], rig.acquire(&[expert]).unwrap().slots());
    }
}

#[test]
fn a_caller_who_gives_up_holds_nothing() {
    let rig = Rig::new(2, 8, scripted(&[(0, Fault::Delay)]));
    let pending = rig.scheduler.acquire(call(&[0, 1])).unwrap();
    let Err(Unfinished::Waiting(pending)) = pending.wait(SHORT) else { panic!("its read is held up") };
    drop(pending);
    while !rig.reads.release(0) {}
    rig.check(&[2, 3], rig.acquire(&[2, 3]).unwrap().slots());
}

#[test]
fn prefetched_experts_are_hits_late_ones_are_not_and_unused_ones_are_waste() {
    let rig = Rig::new(4, 8, scripted(&[(2, Fault::Delay)]));
    rig.scheduler.prefetch(vec![1, 2, 3, 99]).unwrap();
    while rig.scheduler.resident() < 2 {}
    let pending = rig.scheduler.acquire(call(&[1, 3])).unwrap();
    let Err(Unfinished::Waiting(pending)) = pending.wait(SHORT) else { panic!("expert 3 is held up") };
    while !rig.reads.release(2) {}
    rig.check(&[1, 3], pending.wait(LONG).unwrap().slots());
    let seen = rig.decode();
    assert_eq!((seen.hits, seen.late, seen.misses), (1, 1, 0));
    assert_eq!((seen.prefetch_bytes, seen.wasted_bytes), (3 * ROW, 0));
    drop(rig.acquire(&[4, 5, 6, 7]).unwrap());
    assert_eq!(rig.decode().wasted_bytes, ROW, "expert 2 was never used");
}

#[test]
fn closing_ends_those_who_wait() {
    let rig = Rig::new(2, 8, scripted(&[(0, Fault::Never)]));
    let pending = rig.scheduler.acquire(call(&[0])).unwrap();
    let Rig { scheduler, .. } = rig;
    drop(scheduler);
    let Err(Unfinished::Failed(error)) = pending.wait(LONG) else { panic!("it was closed") };
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

#[test]
fn an_expert_without_a_file_is_put_once_and_stays() {
    let rig = Rig::new(3, 8, plain);
    let write = |slot: u32| {
        // SAFETY: the slot is reserved for this caller.
        let row = unsafe { std::slice::from_raw_parts_mut(rig.memory.row(slot).as_ptr(), 5000) };
        row.iter_mut().zip(0..ROW).for_each(|(byte, at)| *byte = fake_byte(0, 5 * ROW + 77 + at));
    };
    rig.scheduler.put(5, write).unwrap();
    rig.check(&[5], rig.acquire(&[5]).unwrap().slots());
    assert!(rig.reads.order().is_empty());
    assert_eq!(rig.scheduler.put(5, |_| panic!("it is there")).unwrap_err().kind(), ErrorKind::Budget);
}

/// Memory with a fault that no engine expects.
#[derive(Debug)]
struct Broken(Arc<Memory>);

// SAFETY: rows are those of the inner memory, or there is no row at all.
unsafe impl HostMemory for Broken {
    fn rows(&self) -> u32 {
        self.0.rows()
    }
    fn row_bytes(&self) -> usize {
        self.0.row_bytes()
    }
    fn row(&self, row: u32) -> NonNull<u8> {
        assert!(row != 1, "scripted: there is no row 1");
        self.0.row(row)
    }
}

#[test]
fn a_scheduler_that_panics_is_an_error_for_everybody() {
    let rig = Rig::new(4, 8, plain);
    let broken = Arc::new(Broken(memory(4, rig.store.slot_bytes())));
    let open = Box::new(|done| Ok(Box::new(FakeReads::new(&[1 << 30], done)) as Box<dyn ReadEngine>));
    let policy = "lru".parse().unwrap();
    let scheduler = HostScheduler::start(rig.store.clone(), broken, policy, rig.telemetry.clone(), open).unwrap();
    for _ in 0..3 {
        let error = match scheduler.acquire(call(&[0, 1])) {
            Ok(pending) => match pending.wait(LONG) {
                Err(Unfinished::Failed(error)) => error,
                other => panic!("{other:?}"),
            },
            Err(error) => error,
        };
        assert!(matches!(error.kind(), ErrorKind::Device | ErrorKind::Cancelled), "{error}");
    }
}

/// Slots that are overwritten while somebody holds them show another expert's bytes.
#[test]
fn threads_never_see_a_slot_that_was_reused_too_early() {
    let rig = Rig::new(7, 16, plain);
    let rounds = 400;
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let rig = &rig;
            scope.spawn(move || {
                let mut state = thread + 1;
                let mut random = |below: u32| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    u32::try_from(state >> 33).unwrap() % below
                };
                for round in 0..rounds {
                    let first = random(16);
                    let experts: Vec<u32> = (0..=random(2)).map(|more| (first + 5 * more) % 16).collect();
                    if round % 16 == 15 {
                        let mut stream = rig.scheduler.stream(call(&experts)).unwrap();
                        while let Some(wave) = stream.next(LONG).unwrap() {
                            rig.check(&wave.experts, &wave.slots);
                        }
                        continue;
                    }
                    let rows = rig.acquire(&experts).unwrap();
                    for _ in 0..3 {
                        rig.check(&experts, rows.slots());
                        std::thread::yield_now();
                    }
                }
            });
        }
    });
    let seen = rig.decode();
    assert_eq!(seen.lookups, seen.hits + seen.late + seen.misses);
    assert!(seen.evictions > 100 && seen.hits > 100, "{seen:?}");
}
