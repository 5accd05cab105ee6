//! JSON to rows in a single pass: no value tree, no allocation per tensor.
//!
//! serde's own errors can carry text only. So a rule that fails here leaves its error in [`Parsed::fault`] and hands
//! serde a placeholder.

use std::fmt;

use serde::Deserializer as _;
use serde::de::{self, DeserializeSeed, MapAccess, Visitor};

use super::entry::EntrySeed;
use super::parsed::{Parsed, Place, position};
use super::{MAX_METADATA, MAX_TENSORS, Span, invalid};
use crate::error::Result;

/// Parses the JSON of a header.
pub(super) fn parse(json: &[u8]) -> Result<Parsed> {
    let text = std::str::from_utf8(json).map_err(|error| {
        invalid("the header is not UTF-8; the file is damaged or not a safetensors file; download it again")
            .with_source(error)
    })?;
    let mut parsed = Parsed::with_room_for(text.len());
    let mut deserializer = serde_json::Deserializer::from_str(text);
    match deserializer.deserialize_map(HeaderVisitor(&mut parsed)).and_then(|()| deserializer.end()) {
        Ok(()) => Ok(parsed),
        Err(error) => Err(parsed.explain(&error)),
    }
}

/// The whole header: names to entries, and `__metadata__`.
struct HeaderVisitor<'a>(&'a mut Parsed);

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let parsed = self.0;
        while let Some(place) = map.next_key_seed(KeySeed(parsed))? {
            parsed.place = place;
            match place {
                Place::Tensor(name) => {
                    if parsed.rows.len() == MAX_TENSORS {
                        return Err(parsed.fail(format_args!("the header has more than {MAX_TENSORS} tensors")));
                    }
                    let row = map.next_value_seed(EntrySeed { parsed, name })?;
                    parsed.rows.push(row);
                }
                Place::Metadata | Place::Top => {
                    if std::mem::replace(&mut parsed.metadata_seen, true) {
                        return Err(parsed.fail("`__metadata__` occurs twice"));
                    }
                    map.next_value_seed(MetadataSeed(parsed))?;
                }
            }
            parsed.place = Place::Top;
        }
        Ok(())
    }
}

/// A key of the header: a name goes into the arena.
struct KeySeed<'a>(&'a mut Parsed);

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Place;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Place, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Place;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor name")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<Place, E> {
        if key == "__metadata__" {
            return Ok(Place::Metadata);
        }
        let start = position(self.0.names.len());
        self.0.names.push_str(key);
        Ok(Place::Tensor(Span { start, len: position(key.len()) }))
    }
}

/// `__metadata__`: null, or strings to strings.
struct MetadataSeed<'a>(&'a mut Parsed);

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("null or an object of strings")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((key, value)) = map.next_entry()? {
            if self.0.metadata.len() == MAX_METADATA {
                return Err(self.0.fail(format_args!("`__metadata__` has more than {MAX_METADATA} entries")));
            }
            self.0.metadata.insert(key, value);
        }
        Ok(())
    }
}
