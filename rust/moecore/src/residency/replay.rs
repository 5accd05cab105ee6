//! A policy on a trace of router choices: how often what was asked for was there. Pure, and by the same book that
//! serves the running model.

use std::collections::BinaryHeap;

use super::book::Residency;
use super::policy::{PolicyKind, UnknownPolicy};

/// Name of the optimum in [`replay_named`]; it knows the future, so it is none of [`PolicyKind`].
pub const BELADY: &str = "belady";

/// One forward of one layer's experts: the layer, and its experts that are used, each once.
pub type Call = (u32, Vec<u32>);

/// What a replay may do beside.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The first calls, which fill the slots but are not counted.
    pub warm_up: usize,
    /// Dense ids that the policy `pinned` keeps.
    pub pinned: Vec<u32>,
    /// Victims to prepare after each call, as a running engine does; none: each is searched when it is needed.
    pub prepare: usize,
}

/// Lookups of one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerReplay {
    /// Experts asked for.
    pub lookups: u64,
    /// Those that were resident.
    pub hits: u64,
}

/// Counts of a replay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replay {
    /// Experts asked for.
    pub lookups: u64,
    /// Those that were resident.
    pub hits: u64,
    /// Those that were not.
    pub misses: u64,
    /// Experts that had to leave.
    pub evictions: u64,
    /// Lookups and hits of each layer.
    pub per_layer: Vec<LayerReplay>,
}

/// Why a replay cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// No policy of that name.
    #[error("{0}, belady")]
    Policy(#[from] UnknownPolicy),
    /// A layer or expert that the model does not have.
    #[error(
        "call {call}: expert {expert} of layer {layer} is not in a model of {layers} layers with these expert counts"
    )]
    Outside {
        /// Index of the call.
        call: usize,
        /// The call's layer.
        layer: u32,
        /// The call's expert.
        expert: u32,
        /// Layers of the model.
        layers: usize,
    },
    /// An expert twice in one call.
    #[error("call {call}: expert {expert} is named twice; name each expert of a call once")]
    Twice {
        /// Index of the call.
        call: usize,
        /// The expert.
        expert: u32,
    },
    /// A pinned id that no expert has.
    #[error("pinned id {0} is not an expert of the model; ids count experts over all layers")]
    Pinned(u32),
}

/// Replays a policy of any name, [`BELADY`] included.
pub fn replay_named(
    policy: &str,
    experts_per_layer: &[u32],
    slots: u32,
    calls: &[Call],
    options: &Options,
) -> Result<Replay, ReplayError> {
    if policy == BELADY {
        return belady(experts_per_layer, slots, calls, options.warm_up);
    }
    replay(policy.parse()?, experts_per_layer, slots, calls, options)
}

/// Replays calls one after another from empty slots. Experts of the running call are never evicted; those that find no
/// slot are counted as misses and do not become resident.
pub fn replay(
    policy: PolicyKind,
    experts_per_layer: &[u32],
    slots: u32,
    calls: &[Call],
    options: &Options,
) -> Result<Replay, ReplayError> {
    let first = check(experts_per_layer, calls)?;
    let mut book = Residency::new(experts_per_layer, slots, policy);
    let experts = experts_per_layer.iter().sum::<u32>();
    for &e in &options.pinned {
        if e >= experts {
            return Err(ReplayError::Pinned(e));
        }
        book.pin(e);
    }
    let mut count = Count::new(experts_per_layer.len(), options.warm_up);
    let (mut missed, mut running) = (Vec::new(), vec![false; slots as usize]);
    for (layer, experts) in calls {
        book.tick();
        missed.clear();
        let ids = || experts.iter().map(|expert| first[*layer as usize] + expert);
        for e in ids() {
            book.used(e, 1);
            match book.slot_of(e) {
                Some(slot) => running[slot as usize] = true,
                None => missed.push(e),
            }
        }
        let mut evictions = 0;
        for &e in &missed {
            if let Ok(placement) = book.place(e, |slot| running[slot as usize]) {
                running[placement.slot as usize] = true;
                evictions += u64::from(placement.evicted.is_some());
            }
        }
        for slot in ids().filter_map(|e| book.slot_of(e)) {
            running[slot as usize] = false;
        }
        count.call(*layer, experts.len(), missed.len(), evictions);
        if options.prepare > 0 {
            book.prepare_victims(options.prepare);
        }
    }
    Ok(count.replay)
}

/// Belady's optimum under the same rules: evict what is asked for last, or never again.
pub fn belady(experts_per_layer: &[u32], slots: u32, calls: &[Call], warm_up: usize) -> Result<Replay, ReplayError> {
    let first = check(experts_per_layer, calls)?;
    let experts = experts_per_layer.iter().sum::<u32>() as usize;
    let id = |layer: u32, expert: u32| (first[layer as usize] + expert) as usize;
    // For each lookup, the call that asks for the same expert next.
    let mut next = Vec::with_capacity(calls.len());
    let mut coming = vec![usize::MAX; experts];
    for (at, (layer, experts)) in calls.iter().enumerate().rev() {
        let swap = |&expert: &u32| std::mem::replace(&mut coming[id(*layer, expert)], at);
        next.push(experts.iter().map(swap).collect::<Vec<_>>());
    }
    next.reverse();

    let mut count = Count::new(experts_per_layer.len(), warm_up);
    // Next use of resident experts; an entry of the heap that says otherwise is out of date.
    let mut due: Vec<Option<usize>> = vec![None; experts];
    let (mut heap, mut resident) = (BinaryHeap::new(), 0);
    for ((layer, experts), next) in calls.iter().zip(next) {
        let (mut misses, mut evictions) = (0, 0);
        for (&expert, &then) in experts.iter().zip(&next) {
            // What the running call uses is not yet in the heap again, so it is not evicted.
            if let Some(due) = &mut due[id(*layer, expert)] {
                *due = then;
            }
        }
        for (&expert, &then) in experts.iter().zip(&next) {
            let e = id(*layer, expert);
            if due[e].is_none() {
                misses += 1;
                if resident < slots {
                    resident += 1;
                } else if let Some(victim) = furthest(&mut heap, &due) {
                    due[victim] = None;
                    evictions += 1;
                } else {
                    continue;
                }
                due[e] = Some(then);
            }
        }
        heap.extend(experts.iter().zip(next).filter_map(|(&expert, then)| {
            let e = id(*layer, expert);
            due[e].map(|_| (then, e))
        }));
        count.call(*layer, experts.len(), misses, evictions);
    }
    Ok(count.replay)
}

fn furthest(heap: &mut BinaryHeap<(usize, usize)>, due: &[Option<usize>]) -> Option<usize> {
    loop {
        let (then, e) = heap.pop()?;
        if due[e] == Some(then) {
            return Some(e);
        }
    }
}

/// First dense id of each layer, when all calls are of this model.
fn check(experts_per_layer: &[u32], calls: &[Call]) -> Result<Vec<u32>, ReplayError> {
    let layers = experts_per_layer.len();
    let first: Vec<u32> = experts_per_layer
        .iter()
        .scan(0, |sum, &experts| {
            *sum += experts;
            Some(*sum - experts)
        })
        .collect();
    let mut seen = vec![usize::MAX; experts_per_layer.iter().sum::<u32>() as usize];
    for (call, (layer, experts)) in calls.iter().enumerate() {
        for &expert in experts {
            if experts_per_layer.get(*layer as usize).is_none_or(|&count| expert >= count) {
                return Err(ReplayError::Outside { call, layer: *layer, expert, layers });
            }
            let seen = &mut seen[(first[*layer as usize] + expert) as usize];
            if std::mem::replace(seen, call) == call {
                return Err(ReplayError::Twice { call, expert });
            }
        }
    }
    Ok(first)
}

/// Counts calls after the warm-up.
struct Count {
    replay: Replay,
    skip: usize,
}

impl Count {
    fn new(layers: usize, warm_up: usize) -> Self {
        let per_layer = vec![LayerReplay::default(); layers];
        Self { replay: Replay { per_layer, ..Replay::default() }, skip: warm_up }
    }

    fn call(&mut self, layer: u32, lookups: usize, misses: usize, evictions: u64) {
        if self.skip > 0 {
            self.skip -= 1;
            return;
        }
        let (lookups, misses) = (lookups as u64, misses as u64);
        let Replay { per_layer, .. } = &mut self.replay;
        per_layer[layer as usize].lookups += lookups;
        per_layer[layer as usize].hits += lookups - misses;
        self.replay.lookups += lookups;
        self.replay.hits += lookups - misses;
        self.replay.misses += misses;
        self.replay.evictions += evictions;
    }
}
