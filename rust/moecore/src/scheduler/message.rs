//! What callers and the scheduler thread say to each other.

use std::sync::Arc;

use crossbeam_channel::Sender;

use super::rows::Rows;
use crate::error::{Error, ErrorKind};
use crate::experts::ExpertId;
use crate::telemetry::Phase;

/// One call of one layer: the distinct experts that its tokens are routed to.
#[derive(Debug, Clone)]
pub struct Call {
    /// Position of the layer in the store.
    pub layer: u32,
    /// Whether many tokens pass at once.
    pub phase: Phase,
    /// Distinct experts by dense id.
    pub experts: Vec<ExpertId>,
    /// How many tokens each of them gets.
    pub tokens: Vec<u32>,
}

/// Slots, in the order in which their experts were asked for.
pub(super) type Slots = Vec<u32>;

/// What happened to a request. Errors go to several callers, so they are shared.
pub(super) type Answer<T> = Result<T, SharedError>;

/// An [`Error`] that several callers get.
#[derive(Debug, Clone)]
pub(super) struct SharedError(Arc<Error>);

impl SharedError {
    /// The same error once more.
    pub(super) fn to_error(&self) -> Error {
        let error = &*self.0;
        let mut copy = Error::new(error.kind(), error.message());
        if let Some(file) = error.file() {
            copy = copy.with_file(file);
        }
        if let Some(tensor) = error.tensor() {
            copy = copy.with_tensor(tensor);
        }
        match std::error::Error::source(error) {
            Some(source) => copy.with_source(Cause(source.to_string())),
            None => copy,
        }
    }
}

impl From<Error> for SharedError {
    fn from(error: Error) -> Self {
        Self(Arc::new(error))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Cause(String);

/// Which slots a stream may use at once.
#[derive(Debug)]
pub(super) struct StreamPlan {
    /// Identifies the stream.
    pub(super) stream: u64,
    /// Experts that are resident or on their way into slots of the cache, and those slots.
    pub(super) cached: Vec<(ExpertId, u32)>,
    /// Experts that have to pass through the ring.
    pub(super) streamed: Vec<ExpertId>,
}

/// What a caller asks for.
#[derive(Debug)]
pub(super) enum Message {
    /// These were used and all of them were resident: the policy wants to know.
    Used(Call),
    /// Make all of them resident, hold them, and say where they are.
    Demand(Call, Sender<Answer<Rows>>),
    /// The slots of a demand are not needed any more.
    Release(Slots),
    /// Bring these where there is room, when the disk has nothing better to do.
    Prefetch(Vec<ExpertId>),
    /// Begin to stream a layer: take the ring, hold what is resident, fill free slots.
    Stream(Call, Sender<Answer<StreamPlan>>),
    /// Say when the cached experts of a stream are all there.
    StreamReady(u64, Sender<Answer<Rows>>),
    /// Read experts into the slots of the ring beside them.
    Fill(u64, Vec<(ExpertId, u32)>, Sender<Answer<Rows>>),
    /// Give back the ring and what a stream held.
    StreamEnd(u64),
    /// A slot for an expert whose bytes the caller brings.
    Reserve(ExpertId, Sender<Answer<Slots>>),
    /// The caller has brought them.
    Brought(ExpertId),
    /// End the thread.
    Close,
}

/// The fault that ended the scheduler thread, for whoever calls next.
pub(super) fn stopped() -> Error {
    Error::new(ErrorKind::Device, "the expert scheduler has stopped; load the model again")
}
