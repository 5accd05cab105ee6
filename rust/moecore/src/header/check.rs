//! The rules between rows: unique names, and data that the tensors cover exactly.

use std::fmt::Display;

use super::length::PREFIX_LEN;
use super::parsed::Parsed;
use super::{Header, Row, invalid, quoted};
use crate::error::Result;

/// What to do about tensors and bytes that do not agree.
const REWRITE: &str = "the file is damaged or was written wrongly; download it again or save it anew";

/// Brings the rows into offset order and checks every rule that needs more than one row or the file's length.
pub(super) fn check(parsed: Parsed, json_len: u64, file_len: Option<u64>) -> Result<Header> {
    let Parsed { mut names, mut shapes, mut rows, metadata, .. } = parsed;
    // Nearly every writer emits the entries in the order of their data.
    if !rows.is_sorted_by_key(|row| row.offsets) {
        rows.sort_by_key(|row| row.offsets);
    }
    let by_name = NameIndex::new(&rows, &names)?;
    let data_len = check_cover(&rows, &names, &shapes)?;
    check_file_end(json_len, data_len, file_len)?;
    names.shrink_to_fit();
    shapes.shrink_to_fit();
    rows.shrink_to_fit();
    Ok(Header { names, shapes, rows, by_name, metadata: metadata.into_iter().collect(), json_len, data_len })
}

/// Refuses holes, overlaps and spans that do not match shape and dtype. Returns where the last tensor ends.
fn check_cover(rows: &[Row], names: &str, shapes: &[u64]) -> Result<u64> {
    let mut covered = 0;
    for row in rows {
        let fail =
            |fault: &dyn Display| Err(invalid(format!("{fault}; {REWRITE}")).with_tensor(quoted(row.name.of(names))));
        let (begin, end) = row.offsets;
        if begin > end {
            return fail(&format_args!("data begins at {begin}, after its end {end}"));
        }
        if begin > covered {
            return fail(&format_args!("data begins at {begin}, which leaves a hole after byte {covered}"));
        }
        if begin < covered {
            return fail(&format_args!("data begins at {begin}, which overlaps data up to byte {covered}"));
        }
        let shape = row.shape(shapes);
        let Some(elements) = shape.iter().try_fold(1, |product: u64, &dimension| product.checked_mul(dimension)) else {
            return fail(&format_args!("shape {shape:?} has more elements than 64 bits can count"));
        };
        let Some(bytes) = row.dtype.bytes_of(elements) else {
            return fail(&format_args!(
                "{elements} elements of {} overflow 64 bits or do not fill whole bytes",
                row.dtype
            ));
        };
        if end - begin != bytes {
            let span = end - begin;
            return fail(&format_args!("shape {shape:?} of {} takes {bytes} bytes but has {span}", row.dtype));
        }
        covered = end;
    }
    Ok(covered)
}

/// Refuses a file that ends before or after the last tensor.
fn check_file_end(json_len: u64, data_len: u64, file_len: Option<u64>) -> Result<()> {
    let Some(end) = data_len.checked_add(PREFIX_LEN + json_len) else {
        return Err(invalid(format!("the data would take {data_len} bytes, which no file can have; {REWRITE}")));
    };
    match file_len {
        Some(file_len) if end > file_len => Err(invalid(format!(
            "the last tensor ends at byte {end} but the file has {file_len}; the file is truncated; download it again"
        ))),
        Some(file_len) if end < file_len => Err(invalid(format!(
            "{} bytes follow the last tensor, which ends at byte {end}; {REWRITE}",
            file_len - end
        ))),
        _ => Ok(()),
    }
}

/// Rows by name: a hash in the upper and a row number in the lower half of each number, sorted by hash, then name.
///
/// One sort of integers finds duplicates and later serves lookups, for 8 bytes a tensor. Names made to collide cost
/// string comparisons, never more than `O(n log n)` of them.
#[derive(Debug, Clone)]
pub(super) struct NameIndex(Vec<u64>);

impl NameIndex {
    /// The index, or the error of a name that occurs twice.
    fn new(rows: &[Row], names: &str) -> Result<Self> {
        let name = |entry: u64| rows[row_of(entry)].name.of(names);
        let mut entries: Vec<u64> =
            (0u64..).zip(rows).map(|(number, row)| hash(row.name.of(names)) << 32 | number).collect();
        entries.sort_unstable();
        for run in entries.chunk_by_mut(|&a, &b| a >> 32 == b >> 32) {
            if run.len() == 1 {
                continue;
            }
            run.sort_unstable_by(|&a, &b| name(a).cmp(name(b)));
            if let Some(pair) = run.windows(2).find(|pair| name(pair[0]) == name(pair[1])) {
                let name = quoted(name(pair[0]));
                return Err(invalid(format!("the name occurs twice; {REWRITE}")).with_tensor(name));
            }
        }
        Ok(Self(entries))
    }

    /// The row of this name.
    pub(super) fn find(&self, name: &str, rows: &[Row], names: &str) -> Option<usize> {
        let wanted = hash(name);
        let order =
            |&entry: &u64| (entry >> 32).cmp(&wanted).then_with(|| rows[row_of(entry)].name.of(names).cmp(name));
        self.0.binary_search_by(order).ok().map(|found| row_of(self.0[found]))
    }
}

/// The row number of an index entry.
#[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
fn row_of(entry: u64) -> usize {
    entry as u32 as usize
}

/// 32 bits that differ for most names, from 8 bytes at a time.
fn hash(name: &str) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 over the golden ratio
    let (words, rest) = name.as_bytes().as_chunks::<8>();
    let mut tail = [0; 8];
    tail[..rest.len()].copy_from_slice(rest);
    let mut state = name.len() as u64;
    for &word in words.iter().chain([&tail]) {
        state = (state.rotate_left(29) ^ u64::from_le_bytes(word)).wrapping_mul(ODD);
    }
    state >> 32
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::Span;
    use super::*;
    use crate::dtype::Dtype;

    fn index(list: &[&str]) -> (Result<NameIndex>, Vec<Row>, String) {
        let mut names = String::new();
        let row = |name: &&str| {
            let start = u32::try_from(names.len()).unwrap();
            names.push_str(name);
            let name = Span { start, len: u32::try_from(name.len()).unwrap() };
            Row { name, shape_start: 0, rank: 0, dtype: Dtype::U8, offsets: (0, 0) }
        };
        let rows: Vec<_> = list.iter().map(row).collect();
        (NameIndex::new(&rows, &names), rows, names)
    }

    /// Two names with one hash, found by trying. The numbers are scattered because the hash keeps near ones apart.
    fn colliding() -> (String, String) {
        let mut seen = HashMap::new();
        (0..1u64 << 20)
            .map(|i| format!("{:x}", i.wrapping_mul(0xd134_2543_de82_ef95).rotate_left(32)))
            .find_map(|name| seen.insert(hash(&name), name.clone()).map(|other| (other, name)))
            .expect("a 32-bit hash of a million names collides")
    }

    #[test]
    fn names_of_one_hash_are_told_apart() {
        let (a, b) = colliding();
        for list in [[a.as_str(), "x", b.as_str()], [b.as_str(), "x", a.as_str()]] {
            let (index, rows, names) = index(&list);
            let index = index.unwrap();
            for (row, name) in list.iter().enumerate() {
                assert_eq!(index.find(name, &rows, &names), Some(row));
            }
        }
        let (alone, rows, names) = index(&[a.as_str()]);
        assert_eq!(alone.unwrap().find(&b, &rows, &names), None);
    }

    #[test]
    fn a_name_of_the_same_hash_between_them_hides_no_duplicates() {
        let (a, b) = colliding();
        for list in [[&a, &b, &a], [&b, &a, &b], [&a, &a, &b]] {
            let list = list.map(String::as_str);
            assert!(index(&list).0.is_err());
        }
    }
}
