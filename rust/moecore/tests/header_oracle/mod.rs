//! The `safetensors` crate as oracle of [`moecore::header`]; the fuzz target includes this file too.
//!
//! Ours accepts => the crate accepts, with equal rows. The crate accepts, and no excuse applies => ours accepts.

use std::collections::HashSet;
use std::fmt;

use moecore::header::{Header, MAX_HEADER_LEN_LOCAL, MAX_METADATA, MAX_RANK, MAX_TENSORS, PREFIX_LEN};
use moecore::{Error, ErrorKind};
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::Value;

/// The name under which the oracle passes every header.
pub const FILE: &str = "oracle.safetensors";

/// Data sections up to this length are really built, for the crate's check of the file's length.
const LONGEST_BUILT: u64 = 1 << 16;

/// What both sides said of one header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Both accept, with equal rows.
    Accepted,
    /// Both refuse.
    Refused,
    /// Ours refuses what the crate accepts, for one of the reasons that [`moecore::header`] lists.
    Stricter,
}

/// Compares both parsers on one header; panics where they disagree without an excuse.
pub fn compare(json: &[u8]) -> Verdict {
    let theirs = serde_json::from_slice::<Metadata>(json);
    match (Header::parse(json, None, FILE), theirs) {
        (Ok(ours), Ok(theirs)) => {
            assert_rows(&ours, &theirs);
            compare_file_lengths(json, &ours);
            Verdict::Accepted
        }
        (Ok(_), Err(error)) => panic!("only ours accepts {}: {error}", json.escape_ascii()),
        (Err(error), Ok(theirs)) => {
            assert_error(&error);
            assert!(is_excused(json, &theirs), "only the crate accepts {}: {error}", json.escape_ascii());
            Verdict::Stricter
        }
        (Err(error), Err(_)) => {
            assert_error(&error);
            Verdict::Refused
        }
    }
}

/// Every error names its file and is of the right kind and form.
pub fn assert_error(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::InvalidHeader, "{error}");
    assert_eq!(error.file(), Some(FILE), "{error}");
    let text = error.to_string();
    assert!(!text.ends_with('.') && text.contains("; ") && !text.contains("fault"), "{text}");
}

fn assert_rows(ours: &Header, theirs: &Metadata) {
    assert_eq!(ours.len(), theirs.tensors().len());
    assert_eq!(ours.data_len(), theirs.data_len() as u64);
    let mut end = 0;
    for tensor in ours.tensors() {
        let info = theirs.info(tensor.name).expect("the crate knows the name too");
        assert_eq!(tensor.dtype.name(), info.dtype.to_string());
        assert_eq!(tensor.dtype.bits(), info.dtype.bitsize() as u64);
        assert!(tensor.shape.iter().copied().eq(info.shape.iter().map(|&dimension| dimension as u64)));
        assert_eq!(tensor.offsets, (info.data_offsets.0 as u64, info.data_offsets.1 as u64));
        assert_eq!(tensor.offsets.0, end, "in offset order");
        end = tensor.offsets.1;
        assert_eq!(Some(tensor.bytes()), tensor.dtype.bytes_of(tensor.elements()));
        assert_eq!(ours.get(tensor.name).expect("found by its own name").offsets, tensor.offsets);
    }
    let metadata = theirs.metadata().clone().unwrap_or_default();
    assert_eq!(ours.metadata().len(), metadata.len());
    assert!(ours.metadata().iter().all(|(key, value)| metadata.get(key) == Some(value)));
}

/// A byte more or less of file is refused by both.
fn compare_file_lengths(json: &[u8], ours: &Header) {
    if ours.data_len() > LONGEST_BUILT {
        return;
    }
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json);
    file.resize(file.len() + usize::try_from(ours.data_len()).expect("small"), 0);
    let exact = file.len();
    file.push(0);
    for len in exact - 1..=exact + 1 {
        let accepted = Header::parse(json, Some(len as u64), FILE).is_ok();
        assert_eq!(accepted, SafeTensors::read_metadata(&file[..len]).is_ok(), "{len} of {exact} bytes");
    }
}

/// Whether one of the documented reasons to be stricter than the crate applies.
fn is_excused(json: &[u8], theirs: &Metadata) -> bool {
    let Pairs(pairs) = serde_json::from_slice(json).expect("the crate has read it");
    let mut names = HashSet::new();
    let end = (theirs.data_len() as u64).checked_add(PREFIX_LEN + json.len() as u64);
    end.is_none()
        || json.len() as u64 > MAX_HEADER_LEN_LOCAL
        || pairs.len() > MAX_TENSORS
        || theirs.metadata().as_ref().is_some_and(|metadata| metadata.len() > MAX_METADATA)
        || pairs.iter().any(|(name, entry)| {
            !names.insert(name)
                || entry.is_array()
                || entry["dtype"].is_object()
                || name != "__metadata__" && entry["shape"].as_array().is_some_and(|shape| shape.len() > MAX_RANK)
        })
}

/// A JSON object with its duplicate keys.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;
        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
    }
}
