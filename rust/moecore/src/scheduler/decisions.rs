//! What a device asks of the scheduler: where the missing experts of a call go and where their bytes are.
//!
//! The device's answering thread calls [`Decisions::call`] once for each record that the GPU has published, in the
//! order of the calls. While it runs, the GPU may be waiting: it must make no driver call and take no lock that somebody
//! may hold who waits for the GPU.

use crate::error::Result;

/// One forward of one layer's experts, as the GPU has published it.
#[derive(Debug, Clone, Copy)]
pub struct DeviceCall<'a> {
    /// Number of the call, counted from 1.
    pub seq: u64,
    /// The layer.
    pub layer: u32,
    /// What the caller has marked the call with (prefill or decode).
    pub phase: u32,
    /// Pairs of a token and an expert that the call routes.
    pub pairs: u32,
    /// Dense ids of all experts that the call uses, ascending.
    pub used: &'a [u32],
    /// Those of them that the GPU's slot table did not have, ascending. Empty: nobody waits, and orders are ignored.
    pub missing: &'a [u32],
}

/// One thing that the GPU does before the call goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// What to do.
    pub step: Step,
    /// Expert that leaves the GPU's slot table. Never one that the call uses.
    pub evicted: Option<u32>,
}

/// What one [`Order`] does, apart from its eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Copies the expert's row from pinned host memory into a slot, where it is resident from then on.
    ///
    /// The slot is free or held `evicted` until now. Because calls run in stream order, whatever used it is over.
    Fetch {
        /// Dense id.
        expert: u32,
        /// Slot.
        slot: u32,
        /// Address of the row, aligned to 16 bytes. Its bytes stay as they are until the next call has come.
        source: u64,
    },
    /// The expert's bytes are in the slot already, brought by a finished copy: only the table learns of it.
    Install {
        /// Dense id.
        expert: u32,
        /// Slot.
        slot: u32,
    },
    /// Nothing comes: the evicted expert's slot is free from the next call on.
    Retire,
}

impl Order {
    /// Brings `expert` from the row at `source` into `slot`.
    #[must_use]
    pub fn fetch(expert: u32, slot: u32, source: u64, evicted: Option<u32>) -> Self {
        Self { step: Step::Fetch { expert, slot, source }, evicted }
    }

    /// Tells the GPU that `expert` lies in `slot`.
    #[must_use]
    pub fn install(expert: u32, slot: u32, evicted: Option<u32>) -> Self {
        Self { step: Step::Install { expert, slot }, evicted }
    }

    /// Takes `expert` out of the table.
    #[must_use]
    pub fn retire(expert: u32) -> Self {
        Self { step: Step::Retire, evicted: Some(expert) }
    }
}

/// The scheduler, as the answering thread sees it.
pub trait Decisions: Send {
    /// Answers one call: orders for every expert in [`DeviceCall::missing`].
    ///
    /// `orders` comes empty. An error is raised at the caller's next call; the GPU goes on with defined memory.
    fn call(&mut self, call: &DeviceCall<'_>, orders: &mut Vec<Order>) -> Result<()>;

    /// Called after an answer, when nobody waits: the time to prepare the next one.
    fn idle(&mut self) {}
}
