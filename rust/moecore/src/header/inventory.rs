//! The tensors of a checkpoint in 20 bytes each: what a report needs of a header, and what the header cache stores.

use std::borrow::Borrow;
use std::hash::{BuildHasher, Hash};

use hashbrown::{DefaultHashBuilder, HashSet, HashTable};

use crate::dtype::Dtype;
use crate::header::Header;
use crate::header::names::{self, Indices};

/// One tensor: its pattern and shape by number, its dtype, its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Number of the name's pattern.
    pub pattern: u32,
    /// Number of the shape.
    pub shape: u32,
    /// Element type.
    pub dtype: Dtype,
    /// The numbers of the name.
    pub indices: Indices,
}

/// Tensors with interned patterns and shapes.
#[derive(Debug, Default)]
pub struct Inventory {
    patterns: Interner<String>,
    shapes: Interner<Vec<u64>>,
    rows: Vec<Row>,
}

/// Values by number and numbers by value. The table holds numbers only: a value lies once in memory.
#[derive(Debug)]
struct Interner<T> {
    values: Vec<T>,
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { values: Vec::new(), numbers: HashTable::new(), hasher: DefaultHashBuilder::default() }
    }
}

impl<T: Hash + Eq> Interner<T> {
    fn find<Q>(&self, value: &Q) -> Option<u32>
    where
        T: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let hash = self.hasher.hash_one(value);
        self.numbers.find(hash, |&number| self.values[number as usize].borrow() == value).copied()
    }

    fn number<Q>(&mut self, value: &Q) -> u32
    where
        T: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = T> + ?Sized,
    {
        if let Some(number) = self.find(value) {
            return number;
        }
        let number = u32::try_from(self.values.len()).expect("header limits keep tensor counts below 2^32");
        self.values.push(value.to_owned());
        let (values, hasher) = (&self.values, &self.hasher);
        let rehash = |&number: &u32| hasher.hash_one(values[number as usize].borrow());
        self.numbers.insert_unique(hasher.hash_one(value), number, rehash);
        number
    }
}

impl PartialEq for Inventory {
    fn eq(&self, other: &Self) -> bool {
        (&self.patterns.values, &self.shapes.values, &self.rows)
            == (&other.patterns.values, &other.shapes.values, &other.rows)
    }
}

impl Inventory {
    /// Adds all tensors of a header.
    pub fn add_header(&mut self, header: &Header) {
        self.rows.reserve(header.len());
        let mut pattern = String::new();
        for tensor in header.tensors() {
            let indices = names::collapse(tensor.name, &mut pattern);
            self.add(&pattern, tensor.shape, tensor.dtype, indices);
        }
    }

    /// Adds all tensors of another inventory.
    pub fn merge(&mut self, other: &Inventory) {
        let patterns: Vec<u32> =
            other.patterns.values.iter().map(|value| self.patterns.number(value.as_str())).collect();
        let shapes: Vec<u32> = other.shapes.values.iter().map(|value| self.shapes.number(value.as_slice())).collect();
        self.rows.extend(other.rows.iter().map(|row| Row {
            pattern: patterns[row.pattern as usize],
            shape: shapes[row.shape as usize],
            ..*row
        }));
    }

    /// Adds one tensor.
    pub fn add(&mut self, pattern: &str, shape: &[u64], dtype: Dtype, indices: Indices) {
        let pattern = self.patterns.number(pattern);
        let shape = self.shapes.number(shape);
        self.rows.push(Row { pattern, shape, dtype, indices });
    }

    /// All tensors, in the order they were added.
    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Distinct name patterns, by number.
    #[must_use]
    pub fn patterns(&self) -> &[String] {
        &self.patterns.values
    }

    /// Distinct shapes, by number.
    #[must_use]
    pub fn shapes(&self) -> &[Vec<u64>] {
        &self.shapes.values
    }

    /// The shape of a row.
    #[must_use]
    pub fn shape(&self, row: &Row) -> &[u64] {
        &self.shapes.values[row.shape as usize]
    }

    /// Stored elements of a row. Headers guarantee that the product fits.
    #[must_use]
    pub fn elements(&self, row: &Row) -> u64 {
        self.shape(row).iter().product()
    }

    /// Bytes of a row. Headers guarantee that they are whole and fit.
    #[must_use]
    pub fn bytes(&self, row: &Row) -> u64 {
        row.dtype.bytes_of(self.elements(row)).unwrap_or(u64::MAX)
    }

    /// The tensor's name.
    #[must_use]
    pub fn name(&self, row: &Row) -> String {
        names::expand(&self.patterns.values[row.pattern as usize], row.indices)
    }

    /// Names that `other` lacks, at most `limit` of them in order, and how many there are.
    #[must_use]
    pub fn names_missing_from(&self, other: &Inventory, limit: usize) -> (Vec<String>, usize) {
        let mut known: Vec<u128> = other.rows.iter().map(|row| key(row.pattern, row.indices)).collect();
        known.sort_unstable();
        let numbers: Vec<Option<u32>> =
            self.patterns.values.iter().map(|pattern| other.patterns.find(pattern.as_str())).collect();
        let is_known = |row: &&Row| {
            numbers[row.pattern as usize].is_some_and(|number| known.binary_search(&key(number, row.indices)).is_ok())
        };
        let mut missing: Vec<&Row> = self.rows.iter().filter(|row| !is_known(row)).collect();
        missing.sort_unstable_by_key(|row| (row.pattern, row.indices));
        (missing.iter().take(limit).map(|row| self.name(row)).collect(), missing.len())
    }

    /// Names that more than one file holds, at most `limit` of them, and how many there are.
    #[must_use]
    pub fn duplicates(&self, limit: usize) -> (Vec<String>, usize) {
        let mut keys: Vec<u128> = self.rows.iter().map(|row| key(row.pattern, row.indices)).collect();
        keys.sort_unstable();
        let mut repeated: Vec<u128> = keys.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect();
        repeated.dedup();
        let shown: HashSet<u128> = repeated.iter().copied().take(limit).collect();
        let mut names: Vec<String> = Vec::new();
        for row in self.rows.iter().filter(|row| !shown.is_empty() && shown.contains(&key(row.pattern, row.indices))) {
            let name = self.name(row);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        (names, repeated.len())
    }
}

/// A name as one number, which sorts faster than its parts.
fn key(pattern: u32, indices: Indices) -> u128 {
    indices.iter().fold(u128::from(pattern), |key, &index| key << 16 | u128::from(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inventory(names: &[&str]) -> Inventory {
        let mut inventory = Inventory::default();
        let mut pattern = String::new();
        for name in names {
            let indices = names::collapse(name, &mut pattern);
            inventory.add(&pattern, &[2, 3], Dtype::BF16, indices);
        }
        inventory
    }

    #[test]
    fn merging_keeps_names_and_shares_patterns() {
        let mut all = inventory(&["layers.0.w", "norm"]);
        all.merge(&inventory(&["norm2", "layers.1.w"]));
        assert_eq!(all.patterns().len(), 3);
        let names: Vec<_> = all.rows().iter().map(|row| all.name(row)).collect();
        assert_eq!(names, ["layers.0.w", "norm", "norm2", "layers.1.w"]);
        assert_eq!(all.bytes(&all.rows()[0]), 12);
    }

    #[test]
    fn missing_names_are_told() {
        let all = inventory(&["layers.0.w", "layers.1.w", "norm", "odd"]);
        let (names, count) = all.names_missing_from(&inventory(&["norm", "layers.1.w", "more"]), 1);
        assert_eq!((names, count), (vec!["layers.0.w".to_owned()], 2));
        assert_eq!(all.names_missing_from(&all, 5), (vec![], 0));
    }

    #[test]
    fn duplicates_are_named_once_and_counted() {
        let all = inventory(&["layers.0.w", "layers.0.w", "layers.0.w", "layers.1.w", "n", "n"]);
        let (shown, count) = all.duplicates(1);
        assert_eq!((shown.len(), count), (1, 2));
        assert_eq!(inventory(&["a.1", "a.2"]).duplicates(3), (vec![], 0));
    }
}
