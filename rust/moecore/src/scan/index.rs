//! `*.safetensors.index.json`: which file holds which tensor. Read for the file list, never trusted for sizes.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::header::{Inventory, names};

/// Longest index that is read. DeepSeek-V3's is 9 MB.
pub const MAX_INDEX_LEN: u64 = 64 << 20;

/// A parsed index.
#[derive(Debug, Default)]
pub struct Index {
    /// The names, as tensors without shape: an index knows no more.
    names: Inventory,
    files: BTreeSet<String>,
}

impl Index {
    /// Parses an index; the error names `file`.
    pub fn parse(json: &[u8], file: &str) -> Result<Self> {
        let mut index = Self::default();
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        Document(&mut index).deserialize(&mut deserializer).and_then(|()| deserializer.end()).map_err(|source| {
            let message = "not a safetensors index (an object with a weight_map of strings); download it again";
            Error::new(ErrorKind::InvalidConfig, message).with_file(file).with_source(source)
        })?;
        Ok(index)
    }

    /// The files it names, each checked to stay in the index's folder.
    pub fn files(&self, file: &str) -> Result<Vec<String>> {
        let checked = |name: &String| check_name(name).map(|()| name.clone()).map_err(|error| error.with_file(file));
        self.files.iter().map(checked).collect()
    }

    /// How the index and the headers differ, as warnings.
    #[must_use]
    pub fn compare(&self, inventory: &Inventory, file: &str) -> Vec<String> {
        let told = |(names, count): (Vec<String>, usize), what: &str| {
            names.first().map(|first| format!("{file}: {count} tensors {what} (such as {first})"))
        };
        let absent = told(self.names.names_missing_from(inventory, 1), "are in no header");
        let unlisted = told(inventory.names_missing_from(&self.names, 1), "of the headers are not listed");
        absent.into_iter().chain(unlisted).collect()
    }
}

/// The whole file: an object of which only `weight_map` matters.
struct Document<'a>(&'a mut Index);

/// `weight_map`: tensor names to file names. A tensor costs no allocation.
struct WeightMap<'a>(&'a mut Index);

impl<'de> DeserializeSeed<'de> for Document<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> DeserializeSeed<'de> for WeightMap<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Document<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut found = false;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            if key == "weight_map" {
                map.next_value_seed(WeightMap(self.0))?;
                found = true;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if found { Ok(()) } else { Err(A::Error::missing_field("weight_map")) }
    }
}

impl<'de> Visitor<'de> for WeightMap<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensor and file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut pattern = String::new();
        while let Some((tensor, file)) = map.next_entry::<Text<'de>, Text<'de>>()? {
            let indices = names::collapse(&tensor.0, &mut pattern);
            self.0.names.add(&pattern, &[], Dtype::U8, indices);
            if !self.0.files.contains(&*file.0) {
                self.0.files.insert(file.0.into_owned());
            }
        }
        Ok(())
    }
}

/// A string that is borrowed from the JSON where it holds no escapes.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

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
