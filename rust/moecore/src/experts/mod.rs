//! Where the bytes of every routed expert lie, and how they lie in a row.
//!
//! An *expert row* is every parameter of one expert, laid end to end, so that one miss is one copy. Rows of one layer
//! have one layout. Experts of all layers are counted through: the dense [`ExpertId`] of expert `x` of layer `l` is
//! the number of experts in layers before `l`, plus `x`. Tables keyed by it need no hashing.
//!
//! Which parameters an expert has and where they lie in the shards is asked of the model's own conversion mapping, in
//! Python; this room checks the answer and holds it.

use std::path::PathBuf;
use std::time::SystemTime;

use crate::error::{Error, ErrorKind, Result};

/// Slots begin at multiples of this: the page size that direct I/O wants.
pub const SLOT_ALIGNMENT: u64 = 4096;

/// Most experts of all layers together: some twenty times the largest model known.
pub const MAX_EXPERTS: u64 = 1 << 20;

/// The dense number of an expert, counted through all layers.
pub type ExpertId = u32;

/// A file that holds expert bytes, as it was when it was indexed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// When it was last written.
    pub modified: SystemTime,
}

impl SourceFile {
    /// The file as it is now.
    pub fn of(path: PathBuf) -> Result<Self> {
        let metadata = std::fs::metadata(&path).and_then(|metadata| Ok((metadata.len(), metadata.modified()?)));
        let (bytes, modified) = metadata.map_err(|source| {
            let message = "cannot read the file; check the path and its permissions";
            Error::new(ErrorKind::Io, message).with_file(path.display().to_string()).with_source(source)
        })?;
        Ok(Self { path, bytes, modified })
    }
}

/// Bytes of a file and their place in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Position in [`ExpertStore::files`].
    pub file: u32,
    /// First byte in the file.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
    /// First byte in the row.
    pub at: u64,
}

/// The experts of one layer.
#[derive(Debug, Clone)]
pub struct ExpertLayer {
    /// Path of the experts module in the model.
    pub name: String,
    /// How many routed experts.
    pub experts: u32,
    /// Length of a row.
    pub row_bytes: u64,
    /// How many experts a token is routed to.
    pub top_k: u32,
    /// The ranges of expert `x` are `ranges[ends[x - 1]..ends[x]]`.
    ends: Vec<u32>,
    ranges: Vec<Range>,
}

impl ExpertLayer {
    /// A layer from the ranges of each of its experts. An expert without ranges has no file behind it.
    #[must_use]
    pub fn new(name: String, row_bytes: u64, top_k: u32, experts: &[Vec<Range>]) -> Self {
        let ranges: Vec<Range> = experts.iter().flatten().copied().collect();
        let ends = experts.iter().scan(0, |end, ranges| {
            *end += u32::try_from(ranges.len()).unwrap_or(u32::MAX);
            Some(*end)
        });
        let ends: Vec<u32> = ends.collect();
        Self { name, experts: u32::try_from(experts.len()).unwrap_or(u32::MAX), row_bytes, top_k, ends, ranges }
    }

    fn ranges(&self, expert: u32) -> &[Range] {
        let start = expert.checked_sub(1).map_or(0, |before| self.ends[before as usize]);
        &self.ranges[start as usize..self.ends[expert as usize] as usize]
    }

    fn check(&self, files: &[SourceFile]) -> Result<()> {
        for expert in 0..self.experts {
            let mut covered = 0;
            for range in self.ranges(expert) {
                let fits = files
                    .get(range.file as usize)
                    .is_some_and(|file| range.offset.checked_add(range.bytes).is_some_and(|end| end <= file.bytes));
                // Parts begin at aligned offsets: a range may begin a little after the one before, never earlier.
                let inside =
                    range.at >= covered && range.at.checked_add(range.bytes).is_some_and(|end| end <= self.row_bytes);
                if !fits || !inside {
                    let message =
                        format!("expert {expert} has bytes outside of its file or row; index the model again");
                    return Err(Error::new(ErrorKind::InvalidConfig, message).with_tensor(&*self.name));
                }
                covered = range.at + range.bytes;
            }
        }
        Ok(())
    }
}

/// Where every expert's bytes lie.
#[derive(Debug, Clone, Default)]
pub struct ExpertStore {
    files: Vec<SourceFile>,
    layers: Vec<ExpertLayer>,
    /// Dense id of each layer's expert 0, then the number of all experts.
    first: Vec<ExpertId>,
    slot_bytes: u64,
}

impl ExpertStore {
    /// A store of `layers` whose ranges point into `files`. Every range is checked against its file and its row.
    pub fn new(files: Vec<SourceFile>, layers: Vec<ExpertLayer>) -> Result<Self> {
        let total: u64 = layers.iter().map(|layer| u64::from(layer.experts)).sum();
        if total == 0 || total > MAX_EXPERTS {
            let message = format!("{total} experts; a store holds 1 to {MAX_EXPERTS}");
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        for layer in &layers {
            layer.check(&files)?;
        }
        let mut first = vec![0];
        for layer in &layers {
            first.push(first[first.len() - 1] + layer.experts);
        }
        let slot_bytes = layers.iter().map(|layer| layer.row_bytes).max().unwrap_or(0).next_multiple_of(SLOT_ALIGNMENT);
        Ok(Self { files, layers, first, slot_bytes })
    }

    /// The files that ranges point into.
    #[must_use]
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// The layers with experts, in the order in which tokens pass them.
    #[must_use]
    pub fn layers(&self) -> &[ExpertLayer] {
        &self.layers
    }

    /// The number of all experts.
    #[must_use]
    pub fn experts(&self) -> u32 {
        self.first[self.layers.len()]
    }

    /// The dense number of an expert, or `None` where there is none.
    #[must_use]
    pub fn id(&self, layer: u32, expert: u32) -> Option<ExpertId> {
        let layer = layer as usize;
        (expert < self.layers.get(layer)?.experts).then(|| self.first[layer] + expert)
    }

    /// Layer and expert of a dense number.
    ///
    /// # Panics
    /// If no expert has this number.
    #[must_use]
    pub fn locate(&self, id: ExpertId) -> (u32, u32) {
        assert!(id < self.experts(), "expert {id} of {}", self.experts());
        let layer = self.first.partition_point(|&first| first <= id) - 1;
        (u32::try_from(layer).unwrap_or(u32::MAX), id - self.first[layer])
    }

    /// The number of experts before `layer`.
    #[must_use]
    pub fn first(&self, layer: u32) -> ExpertId {
        self.first[layer as usize]
    }

    /// Where the bytes of an expert lie, in the order of its row.
    #[must_use]
    pub fn ranges(&self, id: ExpertId) -> &[Range] {
        let (layer, expert) = self.locate(id);
        self.layers[layer as usize].ranges(expert)
    }

    /// Length of the row of an expert.
    #[must_use]
    pub fn row_bytes(&self, id: ExpertId) -> u64 {
        self.layers[self.locate(id).0 as usize].row_bytes
    }

    /// Distance between slots: the longest row, rounded up to [`SLOT_ALIGNMENT`].
    #[must_use]
    pub fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// The most experts that one token needs at once.
    #[must_use]
    pub fn max_top_k(&self) -> u32 {
        self.layers.iter().map(|layer| layer.top_k.min(layer.experts)).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
