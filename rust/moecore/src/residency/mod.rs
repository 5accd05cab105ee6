//! Which expert lies in which slot: the table that readers look at, the book that its one writer keeps, the policies
//! that choose what goes, and their replay on traces.
//!
//! - [`SlotTable`], [`Lease`], [`Writer`]: lookups that never wait, and slots that are never overwritten under a reader.
//! - [`Residency`]: the writer's book of slots, uses, holds and prefetches. No atomics.
//! - [`policy`]: scores over plain data, pure functions.
//! - [`replay`]: a policy on a trace of router choices, beside Belady's optimum.
//!
//! An expert is named by its dense id, `first expert of its layer + its number in the layer`; a slot by its index.

mod book;
pub mod policy;
mod prepared;
pub mod replay;
mod sync;
mod table;

#[cfg(test)]
mod tests;

pub use book::{NoSlot, Placement, PrefetchCount, Residency};
pub use policy::PolicyKind;
pub use table::{Epoch, Found, LANES, Lease, OwnedLease, SlotTable, Writer};
