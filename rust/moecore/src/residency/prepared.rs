//! Victims chosen ahead of need, so that a miss does not wait for a look at every slot.

use std::cmp::Ordering;

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

impl Candidate {
    /// Best victim first; of equals the lowest slot, as a search finds it.
    fn order(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(self.slot.cmp(&other.slot))
    }
}

/// Candidates, best victim last.
#[derive(Debug, Default)]
pub(super) struct Prepared(Vec<Candidate>);

impl Prepared {
    /// Keeps the `n` lowest of the scored slots; infinite scores are no candidates.
    pub(super) fn choose(&mut self, n: usize, scored: impl Iterator<Item = (f32, u32)>, slots: &[Slot], uses: &[Use]) {
        let list = &mut self.0;
        list.clear();
        list.extend(scored.filter(|(score, _)| score.is_finite()).map(|(score, slot)| {
            let expert = slots[slot as usize].expert;
            Candidate { score, slot, expert, last: uses[expert as usize].last }
        }));
        if n < list.len() {
            list.select_nth_unstable_by(n, Candidate::order);
            list.truncate(n);
        }
        list.sort_unstable_by(|a, b| b.order(a));
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
