//! The entry of one tensor: `{"dtype", "shape", "data_offsets"}`.

use std::fmt;

use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};

use super::parsed::{Parsed, position};
use super::{MAX_RANK, Row, Span, quoted};
use crate::dtype::Dtype;

/// The entry of one tensor.
pub(super) struct EntrySeed<'a> {
    pub(super) parsed: &'a mut Parsed,
    pub(super) name: Span,
}

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = Row;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Row, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = Row;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `dtype`, `shape` and `data_offsets`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row, A::Error> {
        let Self { parsed, name } = self;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key_seed(FieldSeed)? {
            let twice = match field {
                Field::Dtype => dtype.replace(map.next_value_seed(DtypeSeed(parsed))?).is_some(),
                Field::Shape => shape.replace(map.next_value_seed(ShapeSeed(parsed))?).is_some(),
                Field::Offsets => offsets.replace(map.next_value::<(u64, u64)>()?).is_some(),
                Field::Unknown => {
                    map.next_value_seed(Skip)?;
                    false
                }
            };
            if twice {
                return Err(parsed.fail(format_args!("field `{}` occurs twice", field.name())));
            }
        }
        match (dtype, shape, offsets) {
            (Some(dtype), Some((shape_start, rank)), Some(offsets)) => {
                Ok(Row { name, shape_start, rank, dtype, offsets })
            }
            (None, ..) => Err(parsed.fail("field `dtype` is missing")),
            (_, None, _) => Err(parsed.fail("field `shape` is missing")),
            (.., None) => Err(parsed.fail("field `data_offsets` is missing")),
        }
    }
}

/// A field of an entry.
#[derive(Clone, Copy)]
enum Field {
    Dtype,
    Shape,
    Offsets,
    Unknown,
}

impl Field {
    fn name(self) -> &'static str {
        match self {
            Self::Dtype => "dtype",
            Self::Shape => "shape",
            Self::Offsets => "data_offsets",
            Self::Unknown => "unknown",
        }
    }
}

struct FieldSeed;

impl<'de> DeserializeSeed<'de> for FieldSeed {
    type Value = Field;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Field, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for FieldSeed {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E: de::Error>(self, field: &str) -> Result<Field, E> {
        Ok(match field {
            "dtype" => Field::Dtype,
            "shape" => Field::Shape,
            "data_offsets" => Field::Offsets,
            _ => Field::Unknown,
        })
    }
}

struct DtypeSeed<'a>(&'a mut Parsed);

impl<'de> DeserializeSeed<'de> for DtypeSeed<'_> {
    type Value = Dtype;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Dtype, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for DtypeSeed<'_> {
    type Value = Dtype;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a dtype")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Dtype, E> {
        name.parse().map_err(|_| {
            let name = quoted(name);
            self.0.fail(format_args!("unknown dtype `{name}`, safetensors 0.8 does not define it"))
        })
    }
}

/// A shape goes into the pool; its value is the start there and the rank.
struct ShapeSeed<'a>(&'a mut Parsed);

impl<'de> DeserializeSeed<'de> for ShapeSeed<'_> {
    type Value = (u32, u8);

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(u32, u8), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed<'_> {
    type Value = (u32, u8);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(u32, u8), A::Error> {
        let start = position(self.0.shapes.len());
        let mut rank = 0;
        while let Some(dimension) = seq.next_element()? {
            if usize::from(rank) == MAX_RANK {
                return Err(self.0.fail(format_args!("the shape has more than {MAX_RANK} dimensions")));
            }
            self.0.shapes.push(dimension);
            rank += 1;
        }
        Ok((start, rank))
    }
}

/// Skips the value of an unknown field.
///
/// Not [`de::IgnoredAny`]: `serde_json` then skips without looking at escapes, number ranges and depth, and would accept
/// what the `safetensors` crate refuses.
struct Skip;

impl<'de> DeserializeSeed<'de> for Skip {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Skip {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_entry_seed(Self, Self)?.is_some() {}
        Ok(())
    }
}
