//! Counters as Python gets them.

use std::collections::BTreeMap;

use moecore::telemetry::{Snapshot, Telemetry};

/// Counters by name.
type Named = BTreeMap<&'static str, u64>;

/// Prefill and decode counters of each layer, and tokens routed to each expert by dense id.
pub type Stats = (Vec<(Named, Named)>, Vec<u64>);

/// What the counters say now.
pub fn stats(telemetry: &Telemetry) -> Stats {
    let named = |snapshot: Snapshot| snapshot.fields().into_iter().collect::<Named>();
    let layers = telemetry.snapshot().into_iter().map(|[prefill, decode]| (named(prefill), named(decode)));
    (layers.collect(), telemetry.utilisation())
}
