//! Header parsing in bytes of JSON per second: ours, the `safetensors` crate, and a plain JSON tree as yardstick.
//!
//! `cargo bench -p moecore --bench header`. The synthetic headers have the names, dtypes and sizes of DeepSeek-V3
//! shards; ours and the crate check everything, the tree checks nothing.

use std::fmt::Write;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moecore::header::Header;
use safetensors::tensor::Metadata;

/// How the entries lie in the file.
#[derive(Clone, Copy)]
enum Order {
    /// As nearly all writers do it.
    Offsets,
    /// Name order over shuffled data: the sort is needed.
    Mixed,
}

/// A header of `tensors` tensors: expert weights and their scales.
fn header(tensors: u64, order: Order) -> String {
    let mut json = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let sizes = |i: u64| {
        if i.is_multiple_of(2) { ("F8_E4M3", [2048, 7168], 2048 * 7168) } else { ("F32", [16, 56], 4 * 16 * 56) }
    };
    let pair = sizes(0).2 + sizes(1).2;
    let pairs = tensors / 2;
    for i in 0..2 * pairs {
        let (dtype, [rows, columns], bytes) = sizes(i);
        let place = match order {
            Order::Offsets => i / 2,
            Order::Mixed => (i / 2 * 7919) % pairs,
        };
        let begin = place * pair + if i.is_multiple_of(2) { 0 } else { sizes(0).2 };
        let suffix = if i.is_multiple_of(2) { "weight" } else { "weight_scale_inv" };
        let projection = ["down_proj", "gate_proj", "up_proj"][usize::try_from(i / 2 % 3).expect("small")];
        let (layer, expert) = (3 + i / 1536, i / 6 % 256);
        write!(
            json,
            r#","model.layers.{layer}.mlp.experts.{expert}.{projection}.{suffix}":{{"dtype":"{dtype}","shape":[{rows},{columns}],"data_offsets":[{begin},{}]}}"#,
            begin + bytes
        )
        .expect("a string");
    }
    json.push('}');
    json
}

fn parse(c: &mut Criterion) {
    for (name, json) in [
        ("560_tensors", header(560, Order::Offsets)),
        ("45000_tensors", header(45_000, Order::Offsets)),
        ("45000_tensors_out_of_order", header(45_000, Order::Mixed)),
    ] {
        let json = json.as_bytes();
        assert_eq!(Header::parse(json, None, "bench").expect("valid").len() % 10, 0);
        let mut group = c.benchmark_group("header");
        group.throughput(Throughput::Bytes(json.len() as u64));
        group.bench_with_input(BenchmarkId::new("moecore", name), json, |b, json| {
            b.iter(|| Header::parse(black_box(json), None, "bench").expect("valid"));
        });
        group.bench_with_input(BenchmarkId::new("safetensors_crate", name), json, |b, json| {
            b.iter(|| serde_json::from_slice::<Metadata>(black_box(json)).expect("valid"));
        });
        group.bench_with_input(BenchmarkId::new("serde_json_value", name), json, |b, json| {
            b.iter(|| serde_json::from_slice::<serde_json::Value>(black_box(json)).expect("valid"));
        });
        group.finish();
    }
}

fn lookup(c: &mut Criterion) {
    let json = header(45_000, Order::Offsets);
    let header = Header::parse(json.as_bytes(), None, "bench").expect("valid");
    let names: Vec<_> = header.tensors().step_by(97).map(|tensor| tensor.name.to_owned()).collect();
    let mut group = c.benchmark_group("header_get");
    group.throughput(Throughput::Elements(names.len() as u64));
    group.bench_function("45000_tensors", |b| {
        b.iter(|| names.iter().filter_map(|name| header.get(black_box(name))).count());
    });
    group.finish();
}

criterion_group!(benches, parse, lookup);
criterion_main!(benches);
