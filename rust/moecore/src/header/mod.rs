//! Bytes to [`Header`]: a strict parser of safetensors headers.
//!
//! A safetensors file is an 8-byte little-endian length `n`, then `n` bytes of JSON, then the data section. The JSON
//! maps tensor names to `{"dtype", "shape", "data_offsets"}`, and the tensors must cover the data section without gap
//! or overlap.
//!
//! [`Header::parse`] accepts what the `safetensors` crate 0.8 accepts, with these exceptions, all of them refusals:
//! - a tensor name that occurs twice (the crate silently keeps the last one),
//! - more than [`MAX_RANK`] dimensions or [`MAX_TENSORS`] tensors, more than [`MAX_METADATA`] metadata entries,
//! - data that would end past the 64-bit range of file offsets,
//! - two encodings that only the crate's derived code knows: an entry as a list (`["F32",[1],[0,4]]`) and a dtype as a
//!   map (`{"F32":null}`). The format's text allows neither and no writer produces them.

mod check;
mod entry;
pub mod inventory;
mod length;
pub mod names;
mod parse;
mod parsed;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};

pub use inventory::Inventory;
pub use length::{MAX_HEADER_LEN_LOCAL, MAX_HEADER_LEN_REMOTE, PREFIX_LEN, header_len};

/// Most dimensions of one tensor.
pub const MAX_RANK: usize = 8;

/// Most tensors in one file: some twenty times the largest header known.
pub const MAX_TENSORS: usize = 1 << 20;

/// Most entries of `__metadata__`.
pub const MAX_METADATA: usize = 1 << 16;

/// The checked header of one safetensors file.
///
/// Names lie in one string and shapes in one pool, so a header of 45,000 tensors takes a handful of allocations.
#[derive(Debug, Clone)]
pub struct Header {
    names: String,
    shapes: Vec<u64>,
    /// In offset order.
    rows: Vec<Row>,
    by_name: check::NameIndex,
    metadata: Vec<(String, String)>,
    json_len: u64,
    data_len: u64,
}

/// One tensor of a [`Header`].
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// The name, unique in its file.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, at most [`MAX_RANK`]. A scalar has none.
    pub shape: &'a [u64],
    /// Begin and end (exclusive) in the data section, in bytes. The data section begins at byte `8 + header_len`.
    pub offsets: (u64, u64),
}

/// A tensor as the header stores it. Positions fit `u32` because no header is longer than [`MAX_HEADER_LEN_LOCAL`].
#[derive(Debug, Clone, Copy)]
struct Row {
    name: Span,
    shape_start: u32,
    rank: u8,
    dtype: Dtype,
    offsets: (u64, u64),
}

/// A piece of the string of names.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: u32,
    len: u32,
}

impl Span {
    fn of(self, names: &str) -> &str {
        &names[self.start as usize..][..self.len as usize]
    }
}

impl Row {
    fn shape(self, shapes: &[u64]) -> &[u64] {
        &shapes[self.shape_start as usize..][..usize::from(self.rank)]
    }
}

impl Header {
    /// Parses and checks a header.
    ///
    /// `json` is exactly the `n` bytes after the length prefix. `file_len` is the length of the whole file, which
    /// `8 + n + data` must equal; `None` skips only that check. `file` is named in errors.
    pub fn parse(json: &[u8], file_len: Option<u64>, file: &str) -> Result<Self> {
        length::check_json_len(json.len() as u64)
            .and_then(|()| parse::parse(json))
            .and_then(|parsed| check::check(parsed, json.len() as u64, file_len))
            .map_err(|error| error.with_file(file))
    }

    /// Reads and parses the header of a local file. Reads the first `8 + n` bytes only.
    pub fn read(path: &Path) -> Result<Self> {
        let file = path.display().to_string();
        let io_error = |error: std::io::Error| {
            let (kind, message) = match error.kind() {
                std::io::ErrorKind::NotFound => (ErrorKind::NotFound, "no such file; check the path"),
                std::io::ErrorKind::UnexpectedEof => {
                    (ErrorKind::Io, "the file got shorter while it was read; wait until it is written and try again")
                }
                _ => (ErrorKind::Io, "cannot read the file; check the path and its permissions"),
            };
            Error::new(kind, message).with_file(file.as_str()).with_source(error)
        };

        // Asked before opening: opening a named pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(io_error)?.is_file() {
            let message = "not a regular file; name a .safetensors file";
            return Err(Error::new(ErrorKind::Io, message).with_file(file));
        }
        let mut reader = File::open(path).map_err(io_error)?;
        let file_len = reader.metadata().map_err(io_error)?.len();
        length::check_file_len(file_len).map_err(|error| error.with_file(file.as_str()))?;

        let mut prefix = [0; 8];
        reader.read_exact(&mut prefix).map_err(io_error)?;
        let len = header_len(prefix, MAX_HEADER_LEN_LOCAL, Some(file_len), &file)?;
        let mut json = Vec::new();
        reader.take(len).read_to_end(&mut json).map_err(io_error)?;
        if json.len() as u64 != len {
            return Err(io_error(std::io::ErrorKind::UnexpectedEof.into()));
        }
        Self::parse(&json, Some(file_len), &file)
    }

    /// How many tensors the file has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether the file has no tensor at all, which is legal.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The tensors in the order of their data. Tensors without elements share an offset with the next one.
    #[must_use]
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.rows.iter().map(|&row| self.tensor(row))
    }

    /// The tensor of this name: a binary search, `O(log n)`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let row = self.by_name.find(name, &self.rows, &self.names)?;
        Some(self.tensor(self.rows[row]))
    }

    /// The entries of `__metadata__`, sorted by key. Of a key that occurs twice, the last value.
    #[must_use]
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// Length `n` of the JSON, without the 8 bytes of the prefix.
    #[must_use]
    pub fn header_len(&self) -> u64 {
        self.json_len
    }

    /// Length of the data section, which begins at byte `8 + header_len`.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    fn tensor(&self, row: Row) -> Tensor<'_> {
        Tensor {
            name: row.name.of(&self.names),
            dtype: row.dtype,
            shape: row.shape(&self.shapes),
            offsets: row.offsets,
        }
    }
}

impl Tensor<'_> {
    /// How many elements: the product of the shape, 1 for a scalar.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// How many bytes of the file.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.offsets.1 - self.offsets.0
    }
}

/// An error of kind [`ErrorKind::InvalidHeader`]; the public functions add the file.
fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidHeader, message)
}

/// `text` as an error may quote it: foreign text of any length must not flood or steer a terminal.
fn quoted(text: &str) -> String {
    const LONGEST: usize = 256;
    let mut shown = String::new();
    for c in text.chars() {
        if shown.len() >= LONGEST {
            shown.push_str("...");
            break;
        }
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}
