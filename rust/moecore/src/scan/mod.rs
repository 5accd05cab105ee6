//! Where header bytes come from: local files and hub ranges.
//!
//! ```text
//! file list -> select (which files are the model) -> headers, many at once -> Checkpoint
//!                                                       ^ http (hub)  ^ files (local)  ^ cache (both runs before)
//! ```
//!
//! The hub's commit and file list come from the caller, who knows tokens and endpoints. This room never writes a
//! file outside its cache folder and never reads one outside the target's folder.

pub mod cache;
pub mod http;
pub mod hub;
pub mod index;
pub mod local;
pub mod select;

use crate::error::Error;
use crate::header::Inventory;

/// Longest `config.json` that is read. Real ones are under 200 kB.
pub const MAX_CONFIG_LEN: u64 = 8 << 20;

/// What was read of a checkpoint: everything that a report is made of.
#[derive(Debug, Default)]
pub struct Checkpoint {
    /// All tensors.
    pub inventory: Inventory,
    /// `config.json` (or `params.json`), when there is one.
    pub config: Option<Vec<u8>>,
    /// `hf_quant_config.json`, when there is one.
    pub quant_config: Option<Vec<u8>>,
    /// Files whose headers are in `inventory`.
    pub files: Vec<String>,
    /// Bytes of the headers in `inventory`.
    pub header_bytes: u64,
    /// Files that could not be read.
    pub failures: Vec<Error>,
    /// What the reader should know.
    pub warnings: Vec<String>,
}
