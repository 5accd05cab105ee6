//! Counters that are always on: relaxed additions, read when somebody asks.
//!
//! One *lookup* is one distinct expert in one call of one layer, however many tokens ask for it. It ends as a *hit*
//! (resident when it was needed), as *late* (on its way when it was needed) or as a *miss*. Late arrivals are no hits.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a call is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Many tokens at once: nearly every expert is needed.
    Prefill,
    /// A token of each sequence.
    Decode,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of one layer in one phase.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }

        /// [`Counters`] as they were at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// What the counters say now.
            #[must_use]
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }

            fn reset(&self) {
                $(self.$name.store(0, Ordering::Relaxed);)*
            }
        }

        impl Snapshot {
            /// Names and values, in the order of the declaration.
            #[must_use]
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Calls of the layer.
    calls,
    /// Distinct experts over all calls.
    lookups,
    /// Experts that were resident when they were needed.
    hits,
    /// Experts that were on their way when they were needed.
    late,
    /// Experts that had to be asked for when they were needed.
    misses,
    /// Experts that gave up their slot.
    evictions,
    /// Bytes moved because a call needed them.
    demand_bytes,
    /// Bytes moved before a call needed them.
    prefetch_bytes,
    /// Prefetched bytes that were evicted before any call needed them.
    wasted_bytes,
    /// Nanoseconds for which calls waited for experts.
    stall_ns,
}

/// The counters of a model.
#[derive(Debug)]
pub struct Telemetry {
    layers: Vec<[Counters; 2]>,
    /// Tokens routed to each expert, by dense id.
    utilisation: Vec<AtomicU64>,
}

impl Telemetry {
    /// Counters for `layers` layers with `experts` experts in all.
    #[must_use]
    pub fn new(layers: usize, experts: usize) -> Self {
        Self {
            layers: (0..layers).map(|_| Default::default()).collect(),
            utilisation: (0..experts).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The counters of a layer in a phase.
    #[must_use]
    pub fn of(&self, layer: u32, phase: Phase) -> &Counters {
        &self.layers[layer as usize][phase as usize]
    }

    /// Counts `tokens` that were routed to an expert.
    pub fn routed(&self, expert: u32, tokens: u64) {
        add(&self.utilisation[expert as usize], tokens);
    }

    /// Prefill and decode counters of every layer.
    #[must_use]
    pub fn snapshot(&self) -> Vec<[Snapshot; 2]> {
        self.layers.iter().map(|[prefill, decode]| [prefill.snapshot(), decode.snapshot()]).collect()
    }

    /// Tokens routed to each expert, by dense id.
    #[must_use]
    pub fn utilisation(&self) -> Vec<u64> {
        self.utilisation.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// Sets every counter to zero.
    pub fn reset(&self) {
        self.layers.iter().flatten().for_each(Counters::reset);
        self.utilisation.iter().for_each(|count| count.store(0, Ordering::Relaxed));
    }
}

/// Adds to a counter. Relaxed: a counter orders nothing.
pub fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::{Phase, Snapshot, Telemetry, add};

    #[test]
    fn phases_and_layers_are_counted_apart_and_reset_together() {
        let telemetry = Telemetry::new(2, 3);
        add(&telemetry.of(1, Phase::Decode).hits, 3);
        add(&telemetry.of(1, Phase::Prefill).demand_bytes, 5);
        telemetry.routed(2, 7);
        let layers = telemetry.snapshot();
        assert_eq!(layers[0], [Snapshot::default(); 2]);
        assert_eq!((layers[1][0].demand_bytes, layers[1][1].hits), (5, 3));
        assert!(layers[1][1].fields().contains(&("hits", 3)));
        assert_eq!(telemetry.utilisation(), [0, 0, 7]);
        telemetry.reset();
        assert_eq!(telemetry.snapshot()[1], [Snapshot::default(); 2]);
        assert_eq!(telemetry.utilisation(), [0, 0, 0]);
    }
}
