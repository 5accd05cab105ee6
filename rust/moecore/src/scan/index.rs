//! `*.safetensors.index.json`: which file holds which tensor. Read for the file list, never trusted for sizes.

use std::collections::{BTreeSet, HashMap, HashSet};

use serde::Deserialize;

use crate::error::{Error, ErrorKind, Result};
use crate::header::Inventory;

/// Longest index that is read. DeepSeek-V3's is 9 MB.
pub const MAX_INDEX_LEN: u64 = 64 << 20;

/// A parsed index.
#[derive(Debug, Deserialize)]
pub struct Index {
    weight_map: HashMap<String, String>,
}

impl Index {
    /// Parses an index; the error names `file`.
    pub fn parse(json: &[u8], file: &str) -> Result<Self> {
        serde_json::from_slice(json).map_err(|source| {
            let message = "not a safetensors index (an object with a weight_map of strings); download it again";
            Error::new(ErrorKind::InvalidConfig, message).with_file(file).with_source(source)
        })
    }

    /// The files it names, each checked to stay in the index's folder.
    pub fn files(&self, file: &str) -> Result<Vec<String>> {
        let names: BTreeSet<&String> = self.weight_map.values().collect();
        names
            .into_iter()
            .map(|name| check_name(name).map(|()| name.clone()).map_err(|error| error.with_file(file)))
            .collect()
    }

    /// How the index and the headers differ, as warnings.
    #[must_use]
    pub fn compare(&self, inventory: &Inventory, file: &str) -> Vec<String> {
        let names: HashSet<String> = inventory.rows().iter().map(|row| inventory.name(row)).collect();
        let absent: Vec<&String> = self.weight_map.keys().filter(|name| !names.contains(*name)).collect();
        let unlisted: Vec<&String> = names.iter().filter(|name| !self.weight_map.contains_key(*name)).collect();
        let mut warnings = Vec::new();
        let mut report = |names: Vec<&String>, what: &str| {
            if let Some(first) = names.iter().min() {
                warnings.push(format!("{file}: {} tensors {what} (such as {first})", names.len()));
            }
        };
        report(absent, "are in no header");
        report(unlisted, "of the headers are not listed");
        warnings
    }
}

/// Refuses names that could leave their folder or their repo, or change the meaning of a URL.
pub fn check_name(name: &str) -> Result<()> {
    let bad_part = |part: &str| part.is_empty() || part == "." || part == "..";
    let lower = name.to_ascii_lowercase();
    let unsafe_name = name.len() > 255
        || name.split('/').any(bad_part)
        || name.contains(['\\', '\0', '?', '#', ':'])
        || ["%2f", "%5c", "%2e", "%00"].iter().any(|code| lower.contains(code));
    if unsafe_name {
        let shown: String = name.chars().take(80).collect();
        let message = format!("refuses the file name {shown:?}: it could leave its folder; do not trust this repo");
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    #[test]
    fn names_stay_in_their_folder() {
        for name in ["model.safetensors", "a/b-1.safetensors", "..x", "x%20y"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        let long = "x".repeat(256);
        for name in
            ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "c:\\x", "a\0", "a?b", "a#b", "%2e%2e/x", &long]
        {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn differences_are_told_both_ways() {
        let index = Index::parse(br#"{"weight_map":{"a":"f","b":"f"}}"#, "i.json").unwrap();
        let mut inventory = Inventory::default();
        inventory.add("b", &[1], Dtype::F32, [0; 4]);
        inventory.add("c", &[1], Dtype::F32, [0; 4]);
        let warnings = index.compare(&inventory, "i.json");
        assert_eq!(warnings.len(), 2);
        assert!(warnings[0].contains("such as a") && warnings[1].contains("such as c"), "{warnings:?}");
        assert!(Index::parse(br#"{"weight_map":{"a":1}}"#, "i.json").is_err());
    }
}
