//! Calls through the answering thread.

use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use moecore::scheduler::decisions::{Decisions, DeviceCall, Order};
use moecore::{Error, ErrorKind, Result};

use super::fake_gpu::FakeGpu;
use crate::answer::{Answering, Layer};
use crate::layout::{
    INLINE_ORDERS, MAILBOX_BYTES, RING_RECORDS, STATUS_CLOSED, STATUS_ERROR, STATUS_MISSING, STATUS_TIMEOUT,
};
use crate::mailbox::{Look, Mailbox, Record};
use crate::sync::Words;

const EXPERTS: u32 = 64;

/// A mailbox in plain memory.
fn mailbox() -> Arc<Mailbox> {
    let memory: Arc<[AtomicU64]> = (0..MAILBOX_BYTES / 8).map(|_| AtomicU64::new(0)).collect();
    let base = NonNull::from(&memory[0]).cast();
    // SAFETY: the words are kept by their owner, and nobody else uses them.
    #[expect(unsafe_code, reason = "the tests' own memory")]
    let words = unsafe { Words::new(base, MAILBOX_BYTES / 8, Box::new(memory)) };
    Arc::new(Mailbox::new(words))
}

/// Row of an expert.
fn row(expert: u32) -> u64 {
    u64::from(expert + 1) << 36 | 0x10
}

type Script = Box<dyn FnMut(&DeviceCall<'_>, &mut Vec<Order>) -> Result<()> + Send>;

/// Decisions by a closure, and what they were asked.
struct Scripted {
    script: Script,
    calls: Sender<(u64, Vec<u32>, Vec<u32>)>,
    idles: Arc<Mutex<u32>>,
}

impl Decisions for Scripted {
    fn call(&mut self, call: &DeviceCall<'_>, orders: &mut Vec<Order>) -> Result<()> {
        let _ = self.calls.send((call.seq, call.used.to_vec(), call.missing.to_vec()));
        (self.script)(call, orders)
    }

    fn idle(&mut self) {
        *self.idles.lock().unwrap() += 1;
    }
}

struct Rig {
    gpu: FakeGpu,
    answering: Answering,
    calls: Receiver<(u64, Vec<u32>, Vec<u32>)>,
    idles: Arc<Mutex<u32>>,
}

fn rig(slots: u32, script: impl FnMut(&DeviceCall<'_>, &mut Vec<Order>) -> Result<()> + Send + 'static) -> Rig {
    let mailbox = mailbox();
    let (sender, calls) = channel();
    let idles = Arc::new(Mutex::new(0));
    let decisions = Scripted { script: Box::new(script), calls: sender, idles: Arc::clone(&idles) };
    let layers = vec![Layer { first: 0, experts: EXPERTS, row_bytes: 4096 }];
    let answering = Answering::start(Arc::clone(&mailbox), layers, slots, Box::new(decisions)).unwrap();
    Rig { gpu: FakeGpu::new(mailbox, EXPERTS as usize, slots as usize), answering, calls, idles }
}

/// First come, first to go.
fn in_turns(slots: u32) -> impl FnMut(&DeviceCall<'_>, &mut Vec<Order>) -> Result<()> + Send + 'static {
    let mut held: Vec<Option<u32>> = vec![None; slots as usize];
    let mut next = 0;
    move |call, orders| {
        for &expert in call.missing {
            while held[next].is_some_and(|old| call.used.contains(&old)) {
                next = (next + 1) % held.len();
            }
            let evicted = held[next].replace(expert);
            orders.push(Order::fetch(expert, u32::try_from(next).unwrap(), row(expert), evicted));
        }
        Ok(())
    }
}

impl Rig {
    /// A call, and whether every slot holds the row of its expert.
    fn checked(&mut self, experts: &[u32]) -> std::result::Result<(), u32> {
        let slots = self.gpu.acquire(experts)?;
        for (&expert, slot) in experts.iter().zip(slots) {
            assert_eq!(self.gpu.slots[slot as usize], row(expert), "expert {expert} in slot {slot}");
        }
        Ok(())
    }

    fn error(&self) -> String {
        self.answering.shared().error().expect("an error")
    }

    /// Waits until the thread has heard of so many calls.
    fn settled(&self, calls: u64) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.answering.shared().stats.snapshot().records < calls {
            assert!(Instant::now() < end, "{:?}", self.answering.shared().stats.snapshot());
            std::thread::yield_now();
        }
    }
}

#[test]
fn many_calls_with_hits_and_misses() {
    let mut rig = rig(10, in_turns(10));
    let mut random = 1_u32;
    for call in 1..=5_000 {
        let experts: Vec<u32> = (0..6)
            .map(|_| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (random >> 24) % EXPERTS
            })
            .collect();
        rig.checked(&experts).unwrap();
        if call == 5_000 {
            // A hit, so that the thread has finished with the call before.
            rig.checked(&experts).unwrap();
        }
    }
    rig.settled(5_001);
    let stats = rig.answering.shared().stats.snapshot();
    assert_eq!((stats.records, stats.dropped), (5_001, 0));
    assert_eq!(stats.fetched_bytes, stats.fetched * 4096);
    assert_eq!(stats.latency.iter().sum::<u64>(), stats.waits);
    assert_eq!(u64::from(*rig.idles.lock().unwrap()), stats.waits, "idle once after each answer with misses");
}

#[test]
fn the_scheduler_hears_of_every_call_in_order() {
    let mut rig = rig(10, in_turns(10));
    rig.checked(&[3, 1, 3]).unwrap();
    rig.checked(&[1]).unwrap();
    rig.checked(&[40, 1]).unwrap();
    rig.settled(3);
    let heard: Vec<_> = rig.calls.try_iter().collect();
    assert_eq!(heard, [(1, vec![1, 3], vec![1, 3]), (2, vec![1], vec![]), (3, vec![1, 40], vec![40])]);
}

#[test]
fn short_and_long_answers() {
    for count in [1, INLINE_ORDERS, INLINE_ORDERS + 1, 60] {
        let mut rig = rig(60, in_turns(60));
        let experts: Vec<u32> = (0..u32::try_from(count).unwrap()).collect();
        rig.checked(&experts).unwrap();
        rig.checked(&[63]).unwrap();
    }
}

#[test]
fn installs_and_retirements_come_after_copies() {
    let mut rig = rig(4, |call, orders| {
        match call.seq {
            1 => orders.push(Order::fetch(5, 0, row(5), None)),
            _ => orders.extend([Order::install(7, 2, None), Order::retire(5), Order::fetch(8, 1, row(8), None)]),
        }
        Ok(())
    });
    rig.checked(&[5]).unwrap();
    rig.gpu.slots[2] = row(7);
    rig.checked(&[7, 8]).unwrap();
    assert_eq!(rig.gpu.table[5], None);
    rig.checked(&[7, 8]).unwrap();
    rig.settled(3);
    let stats = rig.answering.shared().stats.snapshot();
    assert_eq!((stats.fetched, stats.installed), (2, 1));
}

#[test]
fn an_error_is_answered_and_told() {
    let mut in_turns = in_turns(8);
    let mut rig = rig(8, move |call, orders| {
        if call.seq == 2 {
            return Err(Error::new(ErrorKind::Io, "the shard is gone"));
        }
        in_turns(call, orders)
    });
    rig.checked(&[1, 2]).unwrap();
    assert_eq!(rig.checked(&[3]), Err(STATUS_ERROR));
    assert!(rig.error().contains("the shard is gone"));
    assert_eq!(rig.gpu.mailbox.failure(), Some((STATUS_ERROR, 2)));
    // Until it is cleared, no call gets an answer that it could use.
    rig.gpu.error = 0;
    assert_eq!(rig.checked(&[4]), Err(STATUS_ERROR));
    assert!(rig.answering.shared().clear());
    rig.gpu.mailbox.clear_failure();
    rig.gpu.error = 0;
    rig.checked(&[4]).unwrap();
    assert_eq!(rig.answering.shared().error(), None);
    assert_eq!(rig.gpu.mailbox.failure(), None);
}

#[test]
fn a_panic_is_answered_and_final() {
    let mut rig = rig(8, |_, _| panic!("asked to"));
    assert_eq!(rig.checked(&[3]), Err(STATUS_ERROR));
    assert_eq!(rig.error(), "the scheduler broke down: asked to");
    assert!(!rig.answering.shared().clear());
    assert!(rig.answering.shared().error().is_some());
}

#[test]
fn orders_that_make_no_sense_are_errors() {
    let cases: [(&str, Order); 6] = [
        ("names a slot or an expert", Order::fetch(1, 8, row(1), None)),
        ("names a slot or an expert", Order::install(EXPERTS, 0, None)),
        ("an address that no row has", Order::fetch(1, 0, 0, None)),
        ("an address that no row has", Order::fetch(1, 0, 8, None)),
        ("evicts an expert that the call uses", Order::fetch(1, 0, row(1), Some(2))),
        ("evicts an expert that the call uses", Order::retire(EXPERTS)),
    ];
    for (message, order) in cases {
        let mut rig = rig(8, move |_, orders| {
            orders.push(order);
            Ok(())
        });
        assert_eq!(rig.checked(&[1, 2]), Err(STATUS_ERROR));
        assert!(rig.error().contains(message), "{}", rig.error());
    }
}

#[test]
fn an_expert_that_nobody_brings_is_noticed() {
    let mut rig = rig(8, |_, _| Ok(()));
    assert_eq!(rig.checked(&[3]), Err(STATUS_MISSING));
}

#[test]
fn a_late_answer_releases_no_later_call() {
    let (go, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    let mut in_turns = in_turns(8);
    let mut rig = rig(8, move |call, orders| {
        if call.seq == 1 {
            wait.lock().unwrap().recv().unwrap();
        }
        in_turns(call, orders)
    });
    rig.gpu.patience = 100;
    assert_eq!(rig.checked(&[1, 2]), Err(STATUS_TIMEOUT));
    rig.gpu.error = 0;
    // The next call waits while the answer to the one before comes.
    rig.gpu.patience = u32::MAX;
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        go.send(()).unwrap();
    });
    rig.checked(&[3, 4, 5]).unwrap();
    late.join().unwrap();
    rig.checked(&[3, 9]).unwrap();
}

#[test]
fn an_answer_that_never_comes_is_given_up() {
    let (release, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    let mut rig = rig(8, move |_, _| {
        // Not for ever, so that a test that fails ends, too.
        let _ = wait.lock().unwrap().recv_timeout(Duration::from_secs(10));
        Ok(())
    });
    rig.gpu.patience = 1000;
    assert_eq!(rig.checked(&[1]), Err(STATUS_TIMEOUT));
    assert_eq!(rig.gpu.mailbox.failure(), Some((STATUS_TIMEOUT, 1)));
    assert_eq!(rig.checked(&[1]), Err(STATUS_TIMEOUT), "nothing is published any more");
    drop(release);
}

#[test]
fn closing_answers_whoever_waits() {
    let mut rig = rig(8, in_turns(8));
    rig.checked(&[1]).unwrap();
    assert!(rig.answering.stop().is_some());
    assert!(rig.answering.stop().is_none());
    assert_eq!(rig.checked(&[2]), Err(STATUS_CLOSED));
    rig.gpu.error = 0;
    rig.checked(&[1]).unwrap();
    assert_eq!(rig.checked(&[3]), Err(STATUS_CLOSED));
}

#[test]
fn the_scheduler_outlives_its_thread() {
    let told = Arc::new(());
    let kept = Arc::clone(&told);
    let mut rig = rig(8, move |_, _| {
        let _ = &kept;
        Ok(())
    });
    let decisions = rig.answering.stop();
    assert_eq!(Arc::strong_count(&told), 2, "its rows may still be read");
    drop(decisions);
    assert_eq!(Arc::strong_count(&told), 1);
}

#[test]
fn a_lapped_ring_loses_calls_and_nothing_else() {
    let (go, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    let mut in_turns = in_turns(8);
    let mut rig = rig(8, move |call, orders| {
        if call.seq == 2 {
            wait.lock().unwrap().recv().unwrap();
        }
        in_turns(call, orders)
    });
    rig.checked(&[1, 2]).unwrap();
    // The thread is held at a call that nobody waits for, while the GPU runs one and a half times round.
    let calls = RING_RECORDS as u64 * 3 / 2;
    rig.checked(&[2]).unwrap();
    rig.settled(2);
    for _ in 1..calls {
        rig.checked(&[2]).unwrap();
    }
    go.send(()).unwrap();
    rig.checked(&[9]).unwrap();
    let stats = rig.answering.shared().stats.snapshot();
    assert_eq!(stats.records + stats.dropped, calls + 2);
    // The first two were read; of the others up to `calls`, only as many as the ring holds.
    assert!(stats.dropped >= calls - 1 - RING_RECORDS as u64, "{stats:?}");
    let numbers: Vec<u64> = rig.calls.try_iter().map(|(seq, ..)| seq).collect();
    assert!(numbers.is_sorted() && numbers.last() == Some(&(calls + 2)), "lost calls keep their numbers");
}

#[test]
fn a_record_is_read_when_it_is_whole() {
    let gpu = FakeGpu::new(mailbox(), EXPERTS as usize, 1);
    let (used, missing) = (BTreeSet::from([0, 33, 63]), BTreeSet::from([33]));
    let whole = FakeGpu::new(mailbox(), EXPERTS as usize, 1);
    whole.publish(&used, &missing);
    let mut record = Record::default();
    for cell in (0..8).rev() {
        assert_eq!(gpu.mailbox.look(1, &mut record), Look::Nothing, "without cell {cell}");
        let word = whole.mailbox.cell(1, cell).load(std::sync::atomic::Ordering::Relaxed);
        gpu.mailbox.cell(1, cell).store(word, std::sync::atomic::Ordering::Relaxed);
    }
    assert_eq!(gpu.mailbox.look(1, &mut record), Look::Record);
    assert_eq!((record.experts, record.used, record.missing), (EXPERTS, vec![0, 33, 63], vec![33]));
    assert_eq!(gpu.mailbox.look(2, &mut Record::default()), Look::Nothing);
}

#[test]
fn sequence_numbers_wrap_around_zero() {
    let mut rig = FakeGpu::new(mailbox(), EXPERTS as usize, 1);
    rig.seq = u32::MAX;
    rig.publish(&BTreeSet::from([1]), &BTreeSet::new());
    rig.seq = crate::layout::sequence_after(rig.seq);
    assert_eq!(rig.seq, 1);
    rig.publish(&BTreeSet::from([2]), &BTreeSet::new());
    let mut record = Record::default();
    assert_eq!(rig.mailbox.look(u32::MAX, &mut record), Look::Record);
    assert_eq!(rig.mailbox.look(1, &mut record), Look::Record);
    assert_eq!(record.used, [2]);
    // A place whose call is before the wrap is not there yet for one after it.
    rig.seq = u32::MAX - 4;
    rig.publish(&BTreeSet::from([3]), &BTreeSet::new());
    let later = (rig.seq as usize + RING_RECORDS) % (1 << 32);
    assert_eq!(rig.mailbox.look(u32::try_from(later).unwrap(), &mut record), Look::Nothing);
}
