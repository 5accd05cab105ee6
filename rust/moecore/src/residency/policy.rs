//! Eviction policies: pure functions from the record of an expert's uses to a score. The lowest score is evicted.
//!
//! | name | score |
//! |---|---|
//! | `lru` | least recently used |
//! | `lfu` | decayed number of uses |
//! | `lfru` | decayed number of uses / (1 + calls since the last use) |
//! | `ema` | moving average of use, 0.97 a token; each layer has an equal share of the slots |
//! | `pinned` | a given set stays for good, `lfru` for the rest |
//! | `cyclic` | decayed number of uses / (2 + tokens since the last use) / wait until the layer's next turn |
//!
//! **Why `cyclic`.** Layers take turns, so an expert can be of use only when its layer's turn comes. To keep it until
//! then costs slot time, the *wait*; the gain is one hit with some probability. Gain over cost is the score: of two
//! experts as likely to be asked for, the one whose layer has just passed goes first, since its slot would lie idle for
//! a whole token. Probability is estimated as in LFRU, with ages in tokens, so that an expert has not aged before it
//! had its chance. This also shares out slots among layers by need, with no quota.
//!
//! **Flooding.** Plain LRU gets 0 hits when one token asks for more experts than there are slots, since each is evicted
//! just before its layer's next turn; LFRU fares little better. When [`Context::flooded`] says so, `lru`, `lfru` and
//! `pinned` score as `cyclic` does, which evicts just-passed layers first and so keeps a stable part of the experts.
//! The other policies rank by popularity first and need no such guard.

use std::fmt;
use std::str::FromStr;

/// Half-life of [`Use::count`] in tokens.
const HALF_LIFE: f32 = 64.0;
/// Decay a token of [`Use::ema`].
const EMA_DECAY: f32 = 0.97;

/// Record of an expert's uses. Kept for all experts, resident or not.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Use {
    /// Call of the last use; 0 for none.
    pub last: u64,
    /// Calls that used it, halved every 64 tokens; as of `last`.
    pub count: f32,
    /// Moving average of use, between 0 and 1; as of `last`.
    pub ema: f32,
    /// Tokens routed to it, ever.
    pub tokens: u64,
    /// Its layer.
    pub layer: u32,
    /// Never to be evicted (`pinned` alone heeds it).
    pub pinned: bool,
}

impl Use {
    /// The record after a use in call `now` by `tokens` tokens, in a model of `layers` layers.
    #[must_use]
    pub fn again(self, now: u64, layers: f32, tokens: u64) -> Self {
        let age = age(&self, now, layers);
        Self {
            last: now,
            count: self.count * (-age / HALF_LIFE).exp2() + 1.0,
            ema: self.ema * EMA_DECAY.powf(age) + (1.0 - EMA_DECAY),
            tokens: self.tokens + tokens,
            ..self
        }
    }
}

/// What a score depends on beside the record.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Number of layers: calls a token.
    pub layers: f32,
    /// Layer of the running call.
    pub running: u32,
    /// One token asks for more experts than there are slots.
    pub flooded: bool,
    /// Slots that each layer's experts hold.
    pub occupancy: &'a [u32],
    /// Slots a layer, if each had the same.
    pub share: f32,
    /// Layer of the expert that needs a slot, when known.
    pub incoming: Option<u32>,
}

/// Policies that need no knowledge of the future.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PolicyKind {
    /// Least recently used.
    Lru,
    /// Least frequently used, with decay.
    Lfu,
    /// Frequency over recency.
    Lfru,
    /// Moving average with an equal share of slots for each layer.
    Ema,
    /// A given set stays, LFRU for the rest.
    Pinned,
    /// Frequency over recency over the wait until the layer's next turn.
    #[default]
    Cyclic,
}

impl PolicyKind {
    /// All policies, in the order of the module's table.
    pub const ALL: [Self; 6] = [Self::Lru, Self::Lfu, Self::Lfru, Self::Ema, Self::Pinned, Self::Cyclic];

    /// The name that [`FromStr`] takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::Lfru => "lfru",
            Self::Ema => "ema",
            Self::Pinned => "pinned",
            Self::Cyclic => "cyclic",
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no policy's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown eviction policy `{0}`; choose one of {names}", names = names())]
pub struct UnknownPolicy(pub String);

fn names() -> String {
    PolicyKind::ALL.map(PolicyKind::name).join(", ")
}

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

/// The worth of an expert's residency at call `now`; infinite: never to be evicted.
#[must_use]
pub fn score(kind: PolicyKind, record: &Use, now: u64, context: &Context<'_>) -> f32 {
    let age = age(record, now, context.layers);
    match kind {
        PolicyKind::Pinned if record.pinned => f32::INFINITY,
        PolicyKind::Lru | PolicyKind::Lfru | PolicyKind::Pinned if context.flooded => cyclic(record, age, context),
        PolicyKind::Lru => -age,
        PolicyKind::Lfu => record.count * (-age / HALF_LIFE).exp2(),
        PolicyKind::Lfru | PolicyKind::Pinned => record.count / (1.0 + age * context.layers),
        // Averages lie between 0 and 1: every expert of a crowded layer comes before all others.
        PolicyKind::Ema if crowded(record.layer, context) => record.ema * EMA_DECAY.powf(age) - 2.0,
        PolicyKind::Ema => record.ema * EMA_DECAY.powf(age),
        PolicyKind::Cyclic => cyclic(record, age, context),
    }
}

/// Whether a layer has, or would have with the expert that needs a slot, more than an equal share.
#[must_use]
pub fn crowded(layer: u32, context: &Context<'_>) -> bool {
    let more = u8::from(context.incoming == Some(layer));
    context.occupancy[layer as usize] as f32 + f32::from(more) > context.share
}

fn cyclic(record: &Use, age: f32, context: &Context<'_>) -> f32 {
    // The running layer itself has had its turn: a whole token to wait.
    let calls = if record.layer > context.running {
        (record.layer - context.running) as f32
    } else {
        context.layers - (context.running - record.layer) as f32
    };
    record.count / ((2.0 + age) * calls)
}

/// Tokens since the last use.
fn age(record: &Use, now: u64, layers: f32) -> f32 {
    now.saturating_sub(record.last) as f32 / layers
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: Context<'static> =
        Context { layers: 4.0, running: 1, flooded: false, occupancy: &[2, 2, 2, 2], share: 2.0, incoming: None };

    fn record(last: u64, count: f32, layer: u32) -> Use {
        Use { last, count, ema: count / 10.0, layer, ..Use::default() }
    }

    #[test]
    fn names_are_read_back_and_others_refused() {
        for kind in PolicyKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "LRU".parse::<PolicyKind>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown eviction policy `LRU`; choose one of lru, lfu, lfru, ema, pinned, cyclic"
        );
    }

    #[test]
    fn each_policy_ranks_by_what_its_name_says() {
        // By age, by count, by both.
        let (old_popular, new_rare) = (record(60, 8.0, 0), record(99, 1.0, 0));
        let rank = |kind, a: &Use, b: &Use| score(kind, a, 100, &CONTEXT) < score(kind, b, 100, &CONTEXT);
        assert!(rank(PolicyKind::Lru, &old_popular, &new_rare));
        assert!(rank(PolicyKind::Lfu, &new_rare, &old_popular));
        assert!(rank(PolicyKind::Lfru, &old_popular, &new_rare), "8 / 41 < 1 / 2");
        assert!(rank(PolicyKind::Ema, &new_rare, &old_popular));
        assert!(rank(PolicyKind::Cyclic, &new_rare, &old_popular), "1 / 2.25 < 8 / 12");
    }

    #[test]
    fn a_layer_that_has_passed_goes_before_one_that_comes() {
        // Layer 1 runs, all were used one token ago: (2 + 1) x wait.
        for (layer, wait) in [(0, 3.0), (1, 4.0), (2, 1.0), (3, 2.0)] {
            let score = score(PolicyKind::Cyclic, &record(96, 1.0, layer), 100, &CONTEXT);
            assert!((score - 1.0 / (3.0 * wait)).abs() < 1e-6, "layer {layer}: {score}");
        }
    }

    #[test]
    fn a_layer_above_its_share_gives_first() {
        let at = |layer, incoming| {
            let context = Context { occupancy: &[3, 2, 1, 2], incoming, ..CONTEXT };
            score(PolicyKind::Ema, &record(100, 5.0, layer), 100, &context)
        };
        assert!(at(0, None) < 0.0 && at(1, None) > 0.0);
        assert!(at(1, Some(1)) < 0.0, "with the expert that comes, layer 1 has 3");
        assert!(at(2, Some(2)) > 0.0);
    }

    #[test]
    fn the_pinned_are_beyond_any_score_and_only_for_that_policy() {
        let pinned = Use { pinned: true, ..record(1, 0.0, 0) };
        for flooded in [false, true] {
            let context = Context { flooded, ..CONTEXT };
            assert!(score(PolicyKind::Pinned, &pinned, 100, &context).is_infinite());
            assert!(score(PolicyKind::Lfru, &pinned, 100, &context).is_finite());
        }
    }

    #[test]
    fn records_decay_by_tokens() {
        let (layers, start) = (4.0, record(4, 2.0, 0));
        let later = start.again(4 + 4 * 64, layers, 3);
        assert!((later.count - 2.0).abs() < 1e-6, "half of 2, and 1");
        assert_eq!((later.last, later.tokens), (260, 3));
        let often = (1..2000).fold(Use::default(), |record, token| record.again(4 * token, layers, 1));
        assert!((often.ema - 1.0).abs() < 1e-3, "an expert that is always used");
    }
}
