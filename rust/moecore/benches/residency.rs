//! Lookups and evictions of the residency room.
//!
//! `cargo bench -p moecore --bench residency`. Lookups: one call of 8 experts, and one token of 58 such calls, under a
//! lease, beside a pin by compare-and-swap for each expert and a locked hash map. Evictions: `place` with and without
//! victims prepared ahead, and the preparation itself, on a full book of a model of 58 layers of 256 experts.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use moecore::residency::{PolicyKind, Residency, SlotTable};

const LAYERS: u32 = 58;
const EXPERTS: u32 = 256;
const TOP_K: u32 = 8;

/// The experts of a layer's call: spread over the layer, and all resident.
fn call(layer: u32) -> impl Iterator<Item = u32> {
    (0..TOP_K).map(move |k| layer * EXPERTS + (k * 37 + layer * 11) % EXPERTS)
}

fn pin(word: &AtomicU64) -> u64 {
    let mut now = word.load(Ordering::Acquire);
    while let Err(other) = word.compare_exchange_weak(now, now + 1, Ordering::AcqRel, Ordering::Acquire) {
        now = other;
    }
    now >> 16
}

fn lookup(c: &mut Criterion) {
    let experts = LAYERS * EXPERTS;
    let (table, mut writer) = SlotTable::new(experts);
    for e in 0..experts {
        writer.publish(e, e);
    }
    let words: Vec<AtomicU64> = (0..experts).map(|e| AtomicU64::new(u64::from(e) << 16)).collect();
    let map = Mutex::new((0..experts).map(|e| (e, e)).collect::<HashMap<_, _>>());

    let mut group = c.benchmark_group("lookup");
    for (name, layers) in [("call_of_8", 1), ("token_of_58_calls", LAYERS)] {
        let token = || (0..layers).map(black_box);
        group.bench_function(BenchmarkId::new("lease_a_call", name), |b| {
            b.iter(|| {
                for layer in token() {
                    let lease = table.begin().expect("a lane");
                    for e in call(layer) {
                        black_box(lease.slot_of(e));
                    }
                }
            });
        });
        group.bench_function(BenchmarkId::new("lease_a_token", name), |b| {
            b.iter(|| {
                let lease = table.begin().expect("a lane");
                for layer in token() {
                    for e in call(layer) {
                        black_box(lease.slot_of(e));
                    }
                }
            });
        });
        group.bench_function(BenchmarkId::new("pin_an_expert", name), |b| {
            b.iter(|| {
                for layer in token() {
                    for e in call(layer) {
                        black_box(pin(&words[e as usize]));
                    }
                    for e in call(layer) {
                        words[e as usize].fetch_sub(1, Ordering::Release);
                    }
                }
            });
        });
        group.bench_function(BenchmarkId::new("mutex_hash_map", name), |b| {
            b.iter(|| {
                for layer in token() {
                    for e in call(layer) {
                        black_box(map.lock().expect("no poison").get(&e).copied());
                    }
                }
            });
        });
    }
}

/// A full book after some tokens of uneven use, in the middle of a token.
fn full(slots: u32, policy: PolicyKind) -> Residency {
    let mut book = Residency::new(&[EXPERTS; LAYERS as usize], slots, policy);
    for token in 0..64_u32 {
        for layer in 0..LAYERS {
            book.tick();
            for k in 0..TOP_K {
                let spread = (token * 7 + k * 13 + layer) % EXPERTS;
                let e = layer * EXPERTS + if k < 4 { spread % 16 } else { spread };
                book.used(e, 1);
                if book.slot_of(e).is_none() {
                    book.place(e, |_| false).expect("a slot");
                }
            }
        }
    }
    for e in 0..LAYERS * EXPERTS {
        if book.slot_of(e).is_none() && book.resident() < slots {
            book.place(e, |_| false).expect("a free slot");
        }
    }
    book
}

/// An expert that is not resident, of the next layer that lacks one.
fn absent(book: &Residency, layer: &mut u32) -> u32 {
    loop {
        *layer = (*layer + 1) % LAYERS;
        if let Some(e) = (*layer * EXPERTS..(*layer + 1) * EXPERTS).find(|&e| book.slot_of(e).is_none()) {
            return e;
        }
    }
}

/// Time in `place` alone, after what `before` does to the book.
fn time(times: u64, book: &mut Residency, before: impl Fn(&mut Residency)) -> Duration {
    let (mut layer, mut spent) = (0, Duration::ZERO);
    for _ in 0..times {
        before(book);
        let e = absent(book, &mut layer);
        let start = Instant::now();
        let placement = book.place(black_box(e), |_| false);
        spent += start.elapsed();
        placement.expect("a slot");
    }
    spent
}

fn place(c: &mut Criterion) {
    let mut group = c.benchmark_group("place");
    for policy in [PolicyKind::Cyclic, PolicyKind::Lfru, PolicyKind::Ema] {
        for slots in [384, 1536, 3072, 6144] {
            let id = |what: &str| BenchmarkId::new(format!("{policy}_{what}"), slots);
            let mut book = full(slots, policy);
            group.bench_function(id("searched"), |b| b.iter_custom(|times| time(times, &mut book, |_| ())));
            group.bench_function(id("prepared"), |b| {
                b.iter_custom(|times| time(times, &mut book, |book| book.prepare_victims(16)));
            });
            group.bench_function(id("preparation_of_16"), |b| b.iter(|| book.prepare_victims(16)));
        }
    }
}

fn bookkeeping(c: &mut Criterion) {
    let mut book = full(1536, PolicyKind::default());
    let mut layer = 0;
    c.bench_function("note_call_of_8", |b| {
        b.iter(|| {
            layer = (layer + 1) % LAYERS;
            book.tick();
            for e in call(layer) {
                book.used(e, 1);
                black_box(book.slot_of(e));
            }
        });
    });
}

criterion_group!(benches, lookup, place, bookkeeping);
criterion_main!(benches);
