//! Replays: the rules of counting, the optimum, and the guard against flooding.

use std::collections::VecDeque;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::subsequence;

use crate::residency::PolicyKind;
use crate::residency::replay::{Call, Options, Replay, ReplayError, belady, replay, replay_named};

const EXPERTS: u32 = 8;

/// Tokens of a model of three layers of eight experts, two a token.
fn traces() -> impl Strategy<Value = Vec<Call>> {
    let call = || subsequence((0..EXPERTS).collect::<Vec<_>>(), 2);
    vec([call(), call(), call()], 1..40)
        .prop_map(|tokens| tokens.into_iter().flat_map(|calls| (0..).zip(calls)).collect())
}

fn run(policy: PolicyKind, slots: u32, calls: &[Call]) -> Replay {
    replay(policy, &[EXPERTS; 3], slots, calls, &Options::default()).expect("a good trace")
}

/// Hits of plain LRU, in the plainest way.
fn plain_lru(slots: usize, calls: &[Call]) -> u64 {
    let (mut cache, mut hits) = (VecDeque::new(), 0);
    for e in calls.iter().flat_map(|(layer, experts)| experts.iter().map(move |expert| layer * EXPERTS + expert)) {
        if let Some(at) = cache.iter().position(|&other| other == e) {
            cache.remove(at);
            hits += 1;
        } else if cache.len() == slots {
            cache.pop_front();
        }
        cache.push_back(e);
    }
    hits
}

/// The most hits that any choice of victims can have, by trying all.
fn best(slots: usize, calls: &[Call], at: usize, resident: &[u32]) -> u64 {
    let Some((layer, experts)) = calls.get(at) else { return 0 };
    let wanted: Vec<u32> = experts.iter().map(|expert| layer * EXPERTS + expert).collect();
    let hits = wanted.iter().filter(|e| resident.contains(e)).count() as u64;
    let mut after = vec![resident.to_vec()];
    for e in wanted.iter().filter(|e| !resident.contains(e)) {
        after = after.into_iter().flat_map(|resident| with(*e, &resident, &wanted, slots)).collect();
    }
    hits + after.iter().map(|resident| best(slots, calls, at + 1, resident)).max().expect("a way")
}

fn with(e: u32, resident: &[u32], wanted: &[u32], slots: usize) -> Vec<Vec<u32>> {
    let put = |rest: Vec<u32>| rest.into_iter().chain([e]).collect::<Vec<u32>>();
    if resident.len() < slots {
        return vec![put(resident.to_vec())];
    }
    let victims = resident.iter().filter(|victim| !wanted.contains(victim));
    victims.map(|victim| put(resident.iter().copied().filter(|other| other != victim).collect())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 100 }, ..ProptestConfig::default() })]

    #[test]
    fn counts_add_up_and_nothing_beats_the_optimum(calls in traces(), slots in 2..20_u32) {
        let optimum = belady(&[EXPERTS; 3], slots, &calls, 0).expect("a good trace");
        for policy in PolicyKind::ALL {
            let replay = run(policy, slots, &calls);
            prop_assert_eq!(replay.lookups, 2 * calls.len() as u64);
            prop_assert_eq!(replay.hits + replay.misses, replay.lookups);
            prop_assert_eq!(replay.evictions, replay.misses.saturating_sub(u64::from(slots)));
            prop_assert_eq!(replay.per_layer.iter().map(|layer| layer.hits).sum::<u64>(), replay.hits);
            prop_assert!(replay.hits <= optimum.hits, "{} {} > {}", policy, replay.hits, optimum.hits);
        }
    }

    /// With one expert a call; experts of the same call are equally old.
    #[test]
    fn lru_with_room_is_plain_lru(calls in traces(), slots in 3..20_u32) {
        let calls: Vec<Call> = calls.into_iter().map(|(layer, experts)| (layer, vec![experts[0]])).collect();
        prop_assert_eq!(run(PolicyKind::Lru, slots, &calls).hits, plain_lru(slots as usize, &calls));
    }

    #[test]
    fn the_optimum_is_what_trying_everything_finds(calls in traces(), slots in 2..5_u32) {
        let calls = &calls[..calls.len().min(6)];
        let optimum = belady(&[EXPERTS; 3], slots, calls, 0).expect("a good trace");
        prop_assert_eq!(optimum.hits, best(slots as usize, calls, 0, &[]));
    }
}

/// The same two experts of each of three layers, token after token: six experts.
fn cycle() -> Vec<Call> {
    (0..300).map(|call| (call % 3, vec![1, 2])).collect()
}

#[test]
fn with_fewer_slots_than_a_token_needs_no_policy_falls_to_nothing() {
    assert_eq!(plain_lru(5, &cycle()), 0, "the hazard");
    let optimum = belady(&[EXPERTS; 3], 5, &cycle(), 0).expect("a good trace").hits;
    for policy in PolicyKind::ALL {
        let hits = run(policy, 5, &cycle()).hits;
        assert!(hits * 3 > optimum, "{policy}: {hits} of {optimum}");
    }
    assert_eq!(run(PolicyKind::Lru, 6, &cycle()).hits, 600 - 6, "with enough slots it is plain LRU");
}

#[test]
fn the_warm_up_fills_slots_and_is_not_counted() {
    let options = Options { warm_up: 3, ..Options::default() };
    let replay = replay(PolicyKind::Lru, &[EXPERTS; 3], 6, &cycle(), &options).expect("a good trace");
    assert_eq!((replay.lookups, replay.hits, replay.misses, replay.evictions), (594, 594, 0, 0));
    assert_eq!(replay.per_layer[2].lookups, 198);
    assert_eq!(belady(&[EXPERTS; 3], 6, &cycle(), 3).expect("a good trace"), replay);
}

#[test]
fn pinned_experts_stay_from_their_first_use() {
    // Expert 0 of layer 0 once, then everything else in turn, then 0 again.
    let mut calls = vec![(0, vec![0])];
    calls.extend((0..80).map(|i| (i % 3, vec![1 + i % 7])));
    calls.push((0, vec![0]));
    let hits = |pinned: Vec<u32>| {
        let options = Options { warm_up: 81, pinned, ..Options::default() };
        replay(PolicyKind::Pinned, &[EXPERTS; 3], 4, &calls, &options).expect("a good trace").hits
    };
    assert_eq!((hits(vec![]), hits(vec![0])), (0, 1));
}

#[test]
fn a_call_with_more_experts_than_slots_is_served_past_them() {
    let calls = [(0, vec![0, 1, 2]), (0, vec![0, 1, 2])];
    let replay = replay(PolicyKind::Lru, &[EXPERTS], 2, &calls, &Options::default()).expect("a good trace");
    assert_eq!((replay.hits, replay.misses, replay.evictions), (2, 4, 0));
    assert_eq!(belady(&[EXPERTS], 2, &calls, 0), Ok(replay));
}

#[test]
fn a_trace_of_another_model_is_refused() {
    let refused = |calls: &[Call], pinned: Vec<u32>| {
        let options = Options { pinned, ..Options::default() };
        replay_named("lru", &[4, 2], 3, calls, &options).unwrap_err().to_string()
    };
    assert!(refused(&[(0, vec![3]), (1, vec![2])], vec![]).starts_with("call 1: expert 2 of layer 1"));
    assert!(refused(&[(2, vec![0])], vec![]).contains("a model of 2 layers"));
    assert!(refused(&[(0, vec![1, 1])], vec![]).contains("expert 1 is named twice"));
    assert!(refused(&[], vec![6]).contains("pinned id 6"));
    let error = replay_named("best", &[4], 1, &[], &Options::default()).unwrap_err();
    assert!(
        matches!(error, ReplayError::Policy(_)) && error.to_string().ends_with("pinned, cyclic, belady"),
        "{error}"
    );
}
