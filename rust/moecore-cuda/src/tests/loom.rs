//! Records and answers in every interleaving that loom explores:
//! `RUSTFLAGS="--cfg moecore_loom" cargo test -p moecore-cuda --release --lib tests::loom`.
//!
//! A row is loom's `UnsafeCell`: loom itself reports a copy that the host's write does not happen before. Records have
//! two places, an answer holds one order, and a list two, so that all is used again soon.
#![expect(unsafe_code, reason = "cells that loom watches")]

use std::collections::BTreeSet;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::thread;

use super::fake_gpu::FakeGpu;
use crate::layout::{MAILBOX_BYTES, NOTHING, RawOrder};
use crate::mailbox::{Look, Mailbox, Record};
use crate::sync::Words;

/// A row without any synchronisation of its own.
struct Row(UnsafeCell<u32>);

// SAFETY: the point of the models: the answer must order all accesses, and loom reports those that it does not.
unsafe impl Sync for Row {}
// SAFETY: as above.
unsafe impl Send for Row {}

impl Row {
    fn write(&self, value: u32) {
        // SAFETY: loom checks that nobody else accesses the cell.
        self.0.with_mut(|bytes| unsafe { *bytes = value });
    }

    fn read(&self) -> u32 {
        // SAFETY: loom checks that nobody writes the cell.
        self.0.with(|bytes| unsafe { *bytes })
    }
}

fn model(run: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(run);
}

fn mailbox() -> Arc<Mailbox> {
    Arc::new(Mailbox::new(Words::zeros(MAILBOX_BYTES / 8)))
}

fn order(expert: u32) -> RawOrder {
    RawOrder { source: u64::from(expert) << 32 | 16, slot: expert, expert, evicted: NOTHING, reserved: [0; 3] }
}

/// A GPU that gives up instead of waiting for ever, so that models end.
fn gpu(mailbox: &Arc<Mailbox>, seq: u32) -> FakeGpu {
    let mut gpu = FakeGpu::new(Arc::clone(mailbox), 4, 4);
    (gpu.seq, gpu.patience) = (seq, 3);
    gpu
}

#[test]
fn a_record_is_whole_or_not_there() {
    model(|| {
        let mailbox = mailbox();
        let gpu = gpu(&mailbox, 1);
        let publishing = thread::spawn(move || gpu.publish(&BTreeSet::from([0, 3]), &BTreeSet::from([3])));
        let mut record = Record::default();
        if mailbox.look(1, &mut record) == Look::Record {
            assert_eq!((record.experts, &record.used[..], &record.missing[..]), (4, &[0, 3][..], &[3][..]));
        }
        publishing.join().unwrap();
        assert_eq!(mailbox.look(1, &mut record), Look::Record);
    });
}

#[test]
fn an_overwritten_record_is_not_mixed_with_its_successor() {
    model(|| {
        let mailbox = mailbox();
        let mut gpu = gpu(&mailbox, 1);
        gpu.publish(&BTreeSet::from([0]), &BTreeSet::new());
        let publishing = thread::spawn(move || {
            gpu.seq = 3;
            gpu.publish(&BTreeSet::from([1, 2]), &BTreeSet::from([1, 2]));
        });
        let mut record = Record::default();
        match mailbox.look(1, &mut record) {
            Look::Record => assert_eq!((&record.used[..], &record.missing[..]), (&[0][..], &[][..])),
            Look::Overwritten => {}
            Look::Nothing => panic!("it has been there"),
        }
        publishing.join().unwrap();
        assert_eq!(mailbox.look(1, &mut record), Look::Overwritten);
        assert_eq!(mailbox.look(3, &mut record), Look::Record);
        assert_eq!((&record.used[..], &record.missing[..]), (&[1, 2][..], &[1, 2][..]));
    });
}

/// The host writes rows, then answers with them; the GPU copies what it is told to.
fn answered(experts: &'static [u32]) {
    model(move || {
        let mailbox = mailbox();
        let rows: Arc<Vec<Row>> = Arc::new((0..4).map(|_| Row(UnsafeCell::new(u32::MAX))).collect());
        let gpu = gpu(&mailbox, 1);
        let waiting = thread::spawn({
            let rows = Arc::clone(&rows);
            move || {
                if let Ok(orders) = gpu.hear() {
                    assert_eq!(orders, experts.iter().map(|&expert| order(expert)).collect::<Vec<_>>());
                    for order in orders {
                        assert_eq!(rows[order.expert as usize].read(), order.expert);
                    }
                }
            }
        });
        for &expert in experts {
            rows[expert as usize].write(expert);
        }
        mailbox.answer(1, &experts.iter().map(|&expert| order(expert)).collect::<Vec<_>>());
        waiting.join().unwrap();
    });
}

#[test]
fn a_short_answer_brings_its_orders_and_rows() {
    answered(&[2]);
}

#[test]
fn a_long_answer_brings_its_orders_and_rows() {
    answered(&[2, 3]);
}

#[test]
fn a_late_answer_is_not_taken_for_the_next() {
    model(|| {
        let mailbox = mailbox();
        let gpu = gpu(&mailbox, 2);
        let answering = thread::spawn({
            let mailbox = Arc::clone(&mailbox);
            move || {
                mailbox.answer(1, &[order(1)]);
                mailbox.answer(2, &[order(2)]);
            }
        });
        if let Ok(orders) = gpu.hear() {
            assert_eq!(orders, [order(2)]);
        }
        answering.join().unwrap();
        assert_eq!(gpu.hear(), Ok(vec![order(2)]));
    });
}
