//! What parsing fills: names, shapes, rows; and where it stands when a rule fails.

use std::collections::BTreeMap;
use std::fmt;

use serde::de;

use super::{Row, Span, invalid, quoted};
use crate::error::Error;

/// What to do about a header that says wrong things in proper JSON.
const REWRITE: &str = "the file is damaged or was written wrongly; download it again or save it anew";

/// A parsed header, rows in file order, not yet checked against each other.
#[derive(Default)]
pub(super) struct Parsed {
    pub(super) names: String,
    pub(super) shapes: Vec<u64>,
    pub(super) rows: Vec<Row>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) metadata_seen: bool,
    pub(super) place: Place,
    fault: Option<Error>,
}

/// Where the parser stands, for errors.
#[derive(Default, Clone, Copy)]
pub(super) enum Place {
    #[default]
    Top,
    Metadata,
    Tensor(Span),
}

impl Parsed {
    /// Room for a header of `len` bytes as they usually are: 125 bytes a tensor, half of them the name. Rarer
    /// headers only grow once or twice more.
    pub(super) fn with_room_for(len: usize) -> Self {
        let rows = len / 110;
        Self {
            names: String::with_capacity(len / 2),
            shapes: Vec::with_capacity(2 * rows),
            rows: Vec::with_capacity(rows),
            ..Self::default()
        }
    }

    /// Notes which rule failed; serde gets a placeholder.
    pub(super) fn fail<E: de::Error>(&mut self, message: impl fmt::Display) -> E {
        self.fault = Some(invalid(format!("{message}; {REWRITE}")));
        E::custom("see `fault`")
    }

    /// The error of the crate for an error of serde.
    pub(super) fn explain(mut self, error: &serde_json::Error) -> Error {
        let fault = self.fault.take().unwrap_or_else(|| {
            let part = if matches!(self.place, Place::Metadata) { "`__metadata__` is" } else { "the header is" };
            let text = quoted(&error.to_string());
            match error.classify() {
                serde_json::error::Category::Data => invalid(format!("{part} invalid: {text}; {REWRITE}")),
                _ => invalid(format!(
                    "{part} not valid JSON: {text}; the file is damaged or not a safetensors file; download it again"
                )),
            }
        });
        match self.place {
            Place::Tensor(name) => fault.with_tensor(quoted(name.of(&self.names))),
            Place::Top | Place::Metadata => fault,
        }
    }
}

/// A position in the arena or the pool. Both are shorter than the header, whose length is checked.
pub(super) fn position(len: usize) -> u32 {
    u32::try_from(len).expect("a header has at most 100 MB")
}
