//! Victims chosen ahead of need, so that a miss does not wait for a look at every slot.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::book::Slot;
use super::policy::Use;

/// A choice of the past, and what it rested on.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    score: f32,
    slot: u32,
    expert: u32,
    last: u64,
}

/// Best victim first; of equals the lowest slot, as a search finds it.
impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(self.slot.cmp(&other.slot))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

/// Candidates, best victim last.
#[derive(Debug, Default)]
pub(super) struct Prepared(Vec<Candidate>);

impl Prepared {
    /// Keeps the `n` lowest of the scored slots; infinite scores are no candidates.
    pub(super) fn choose(&mut self, n: usize, scored: impl Iterator<Item = (f32, u32)>, slots: &[Slot], uses: &[Use]) {
        self.0.clear();
        // The worst of the best so far is on top: nearly all slots cost one comparison.
        let mut best = BinaryHeap::from(std::mem::take(&mut self.0));
        for (score, slot) in scored.filter(|(score, _)| score.is_finite()) {
            let candidate = |expert: u32| Candidate { score, slot, expert, last: uses[expert as usize].last };
            if best.len() < n {
                best.push(candidate(slots[slot as usize].expert));
            } else if let Some(mut worst) = best.peek_mut()
                && score < worst.score
            {
                *worst = candidate(slots[slot as usize].expert);
            }
        }
        self.0 = best.into_sorted_vec();
        self.0.reverse();
    }

    /// The best candidate that still stands and that `fits` now. Candidates that were used since are dropped, those
    /// that do not fit are kept for another time.
    pub(super) fn take(&mut self, slots: &[Slot], uses: &[Use], fits: impl Fn(u32) -> bool) -> Option<u32> {
        let mut at = self.0.len();
        while at > 0 {
            at -= 1;
            let Candidate { slot, expert, last, .. } = self.0[at];
            if slots[slot as usize].expert != expert || uses[expert as usize].last != last {
                self.0.remove(at);
            } else if fits(slot) {
                self.0.remove(at);
                return Some(slot);
            }
        }
        None
    }
}
