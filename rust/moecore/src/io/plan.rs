//! From the ranges of a row to the reads that fetch it. Pure.

use crate::error::{Error, ErrorKind, Result};
use crate::experts::Range;
use crate::io::source::Source;

/// Reads through a bounce buffer begin and end at multiples of this, or of the file's own block where that is larger.
pub(super) const PAGE: u64 = 4096;

/// One contiguous read, and which bytes of it go where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    /// The file.
    pub file: u32,
    /// First byte wanted.
    pub begin: u64,
    /// One past the last byte wanted.
    pub end: u64,
    /// Inside `begin..end`, in order of their offsets. They may leave gaps.
    pub parts: Vec<Range>,
}

/// Checks ranges against their files and the destination's `room`; the sum of their bytes.
pub(super) fn check(ranges: &[Range], files: &[impl Source], room: u64) -> Result<u64> {
    let mut places: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for &Range { file, offset, bytes, at } in ranges {
        let Some(file) = files.get(file as usize) else {
            let message = format!("a range names file {file} of {}; index the model again", files.len());
            return Err(Error::new(ErrorKind::Io, message));
        };
        let refuse = |message: String| Err(Error::new(ErrorKind::Io, message).with_file(file.name()));
        let length = file.bytes();
        if offset.checked_add(bytes).is_none_or(|end| end > length) {
            return refuse(format!("{bytes} bytes at {offset} are wanted of {length}; index the model again"));
        }
        let Some(end) = at.checked_add(bytes).filter(|&end| end <= room) else {
            return refuse(format!("{bytes} bytes for place {at} do not fit into {room}; give the row more memory"));
        };
        if bytes > 0 {
            places.push((at, end));
        }
    }
    // Two threads would write the same memory.
    places.sort_unstable();
    if let Some(pair) = places.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        let message = format!("two ranges of a row share the bytes from {}; index the model again", pair[1].0);
        return Err(Error::new(ErrorKind::Io, message));
    }
    Ok(places.iter().map(|(at, end)| end - at).sum())
}

/// Reads of at most `piece` bytes (and the alignment around them) that cover checked `ranges`.
///
/// Ranges that lie side by side in a file share reads, also where they go to different places. Cuts are at multiples of
/// `align` in the file, so that no block is read twice; pieces of a long run are of one size, so that none comes last.
pub(super) fn spans(mut ranges: Vec<Range>, piece: u64, align: u64) -> Vec<Span> {
    ranges.retain(|range| range.bytes > 0);
    ranges.sort_unstable_by_key(|range| (range.file, range.offset));
    let mut spans = Vec::with_capacity(ranges.len());
    let mut rest = &*ranges;
    while let Some(first) = rest.first() {
        let mut end = first.offset + first.bytes;
        let mut run = 1;
        while let Some(next) = rest.get(run)
            && next.file == first.file
            && next.offset <= end.saturating_add(align)
        {
            end = end.max(next.offset + next.bytes);
            run += 1;
        }
        cut(&rest[..run], first.offset, end, (piece, align), &mut spans);
        rest = &rest[run..];
    }
    spans
}

/// Cuts one run of ranges.
fn cut(run: &[Range], begin: u64, end: u64, (piece, align): (u64, u64), spans: &mut Vec<Span>) {
    let mut from = begin / align * align;
    let pieces = (end - from).div_ceil(piece);
    let stride = (end - from).div_ceil(pieces).next_multiple_of(align);
    while from < end {
        let to = (from + stride).min(end);
        let inside = run.iter().filter(|range| range.offset < to && range.offset + range.bytes > from);
        let mut parts: Vec<Range> = Vec::new();
        for range in inside {
            let start = range.offset.max(from);
            let bytes = (range.offset + range.bytes).min(to) - start;
            let part = Range { file: range.file, offset: start, bytes, at: range.at + (start - range.offset) };
            match parts.last_mut() {
                // Side by side in the file and in the row: one part.
                Some(last) if last.offset + last.bytes == start && last.at + last.bytes == part.at => {
                    last.bytes += bytes;
                }
                _ => parts.push(part),
            }
        }
        // A piece between two ranges holds nothing.
        if let (Some(first), Some(last)) = (parts.first(), parts.iter().map(|part| part.offset + part.bytes).max()) {
            spans.push(Span { file: first.file, begin: first.offset, end: last, parts });
        }
        from = to;
    }
}
