//! [`Rows`]: the slots of one call, safe from being overwritten while the guard lives.

use crossbeam_channel::Sender;

use super::message::Message;
use crate::residency::OwnedLease;

/// Slots that hold the experts of a call, in the order in which they were asked for, until it is dropped.
#[derive(Debug)]
pub struct Rows {
    slots: Vec<u32>,
    hold: Hold,
}

/// What keeps the slots from being overwritten.
#[derive(Debug)]
enum Hold {
    /// All were resident: the lease of a reader.
    Lease(#[expect(dead_code, reason = "held for its drop")] OwnedLease),
    /// Some had to be brought: a count in the scheduler's book. An answer that nobody takes out of its channel is dropped
    /// with it, and so gives its slots back.
    Book(Sender<Message>),
    /// They belong to a stream, which holds them itself.
    Stream,
}

impl Rows {
    pub(super) fn leased(slots: Vec<u32>, lease: OwnedLease) -> Self {
        Self { slots, hold: Hold::Lease(lease) }
    }

    pub(super) fn of_stream(slots: Vec<u32>) -> Self {
        Self { slots, hold: Hold::Stream }
    }

    pub(super) fn held(slots: Vec<u32>, inbox: Sender<Message>) -> Self {
        Self { slots, hold: Hold::Book(inbox) }
    }

    /// The slots.
    #[must_use]
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        if let Hold::Book(inbox) = &self.hold {
            // A scheduler that has stopped holds nothing.
            let _ = inbox.send(Message::Release(std::mem::take(&mut self.slots)));
        }
    }
}
