//! The bytes of a cache entry: a magic word, the payload's checksum, the payload.
//!
//! Tensors are written by (pattern, shape, dtype), their numbers as differences from the tensor before. The experts of
//! a layer then take two or three bytes each: DeepSeek-V3's 12 MB of headers become some 250 kB.

use crate::dtype::Dtype;
use crate::header::Inventory;
use crate::header::inventory::Row;
use crate::header::names::Indices;

/// Number of this format. Entries of other formats lie in other folders.
pub const VERSION: u32 = 2;

const MAGIC: &[u8; 8] = b"moecore\x02";

/// What the cache keeps of a commit.
#[derive(Debug, Default, PartialEq)]
pub struct Entry {
    /// Files whose headers are in `inventory`.
    pub files: Vec<String>,
    /// Their tensors.
    pub inventory: Inventory,
    /// Bytes of their headers.
    pub header_bytes: u64,
    /// `config.json`.
    pub config: Option<Vec<u8>>,
    /// `hf_quant_config.json`.
    pub quant_config: Option<Vec<u8>>,
    /// Nothing is missing: the commit needs no further request.
    pub complete: bool,
    /// What selecting the files had to say.
    pub warnings: Vec<String>,
}

/// FNV-1a, 64 bit: enough to tell a damaged file, and the same on every platform and version.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Entry {
    /// The entry as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Writer(Vec::new());
        payload.number(u64::from(self.complete));
        payload.number(self.header_bytes);
        payload.texts(&self.files);
        payload.texts(&self.warnings);
        for blob in [&self.config, &self.quant_config] {
            payload.number(u64::from(blob.is_some()));
            payload.bytes(blob.as_deref().unwrap_or_default());
        }
        payload.inventory(&self.inventory);
        let mut bytes = MAGIC.to_vec();
        bytes.extend(checksum(&payload.0).to_le_bytes());
        bytes.extend(payload.0);
        bytes
    }

    /// The entry in `bytes`, unless they are damaged.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(MAGIC)?;
        let (sum, payload) = rest.split_first_chunk::<8>()?;
        if checksum(payload) != u64::from_le_bytes(*sum) {
            return None;
        }
        let mut reader = Reader(payload);
        let mut entry = Self { complete: reader.number()? == 1, ..Self::default() };
        entry.header_bytes = reader.number()?;
        entry.files = reader.texts()?;
        entry.warnings = reader.texts()?;
        reader.blob(&mut entry.config)?;
        reader.blob(&mut entry.quant_config)?;
        entry.inventory = reader.inventory()?;
        Some(entry)
    }
}

struct Writer(Vec<u8>);

impl Writer {
    /// LEB128.
    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.0.push((value & 0x7f) as u8);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn texts(&mut self, texts: &[String]) {
        self.number(texts.len() as u64);
        for text in texts {
            self.bytes(text.as_bytes());
        }
    }

    fn inventory(&mut self, inventory: &Inventory) {
        self.texts(inventory.patterns());
        self.number(inventory.shapes().len() as u64);
        for shape in inventory.shapes() {
            self.number(shape.len() as u64);
            for &dimension in shape {
                self.number(dimension);
            }
        }
        let mut rows: Vec<&Row> = inventory.rows().iter().collect();
        let kind = |row: &Row| (row.pattern, row.shape, row.dtype);
        rows.sort_unstable_by_key(|row| (kind(row), row.indices));
        for run in rows.chunk_by(|a, b| kind(a) == kind(b)) {
            self.number(run.len() as u64);
            self.number(u64::from(run[0].pattern));
            self.number(u64::from(run[0].shape));
            self.0.push(run[0].dtype as u8);
            let mut before: Indices = [0; 4];
            let used = inventory.patterns()[run[0].pattern as usize].matches("{}").count();
            for row in run {
                for (now, then) in row.indices.iter().zip(before).take(used) {
                    self.number(zigzag(i64::from(*now) - i64::from(then)));
                }
                before = row.indices;
            }
        }
        self.number(0);
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// A count of things that take a byte at least, so that no damage can ask for endless memory.
    fn count(&mut self) -> Option<usize> {
        usize::try_from(self.number()?).ok().filter(|&count| count <= self.0.len())
    }

    fn bytes(&mut self) -> Option<Vec<u8>> {
        let length = self.count()?;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes.to_vec())
    }

    /// A blob that may be absent.
    fn blob(&mut self, place: &mut Option<Vec<u8>>) -> Option<()> {
        let present = self.number()? == 1;
        let bytes = self.bytes()?;
        *place = present.then_some(bytes);
        Some(())
    }

    fn texts(&mut self) -> Option<Vec<String>> {
        let count = self.count()?;
        (0..count).map(|_| String::from_utf8(self.bytes()?).ok()).collect()
    }

    fn inventory(&mut self) -> Option<Inventory> {
        let patterns = self.texts()?;
        let shape_count = self.count()?;
        let shapes: Vec<Vec<u64>> = (0..shape_count)
            .map(|_| {
                let rank = self.count()?;
                (0..rank).map(|_| self.number()).collect()
            })
            .collect::<Option<_>>()?;
        let mut inventory = Inventory::default();
        loop {
            let run = usize::try_from(self.number()?).ok()?;
            if run == 0 {
                return Some(inventory);
            }
            let pattern = patterns.get(usize::try_from(self.number()?).ok()?)?;
            let shape = shapes.get(usize::try_from(self.number()?).ok()?)?;
            let dtype = Dtype::from_code(self.byte()?)?;
            let used = pattern.matches("{}").count();
            let mut indices: Indices = [0; 4];
            for _ in 0..run {
                for index in indices.iter_mut().take(used) {
                    *index = u16::try_from(i64::from(*index) + unzigzag(self.number()?)).ok()?;
                }
                inventory.add(pattern, shape, dtype, indices);
            }
        }
    }
}

/// Small differences of either sign as small numbers.
fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_undoes_encoding(
            rows in prop::collection::vec((0..4usize, prop::collection::vec(any::<u64>(), 0..3), 0..22u8, any::<[u16; 4]>()), 0..40),
            config in prop::option::of(prop::collection::vec(any::<u8>(), 0..9)),
        ) {
            let mut entry = Entry { config, complete: true, header_bytes: 7, ..Entry::default() };
            for (pattern, shape, dtype, mut indices) in rows {
                indices[pattern..].fill(0);
                let name = format!("p{}", ".{}".repeat(pattern));
                entry.inventory.add(&name, &shape, Dtype::from_code(dtype).unwrap(), indices);
            }
            let back = Entry::decode(&entry.encode()).unwrap();
            // Rows come back in another order; everything else as it was.
            let names = |inventory: &Inventory| {
                let mut names: Vec<_> = inventory
                    .rows()
                    .iter()
                    .map(|row| (inventory.name(row), inventory.shape(row).to_vec(), row.dtype))
                    .collect();
                names.sort();
                names
            };
            prop_assert_eq!(names(&back.inventory), names(&entry.inventory));
            prop_assert_eq!((back.config, back.complete, back.header_bytes), (entry.config, true, 7));
        }

        #[test]
        fn damage_is_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut whole = MAGIC.to_vec();
            whole.extend(checksum(&bytes).to_le_bytes());
            whole.extend(bytes);
            let _ = Entry::decode(&whole);
        }
    }
}
