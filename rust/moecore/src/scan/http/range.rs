//! `Content-Range` of a 206 and of a 416: what was sent, checked against what was asked for.

use std::ops::RangeInclusive;

/// The bytes that a 206 carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Bytes in the body; at least 1 and at most what was asked for.
    pub(super) len: u64,
    /// Length of the whole file, unless the server does not know it.
    pub(super) file_len: Option<u64>,
}

/// Reads the `Content-Range` of a 206 that answers a request for `asked`.
///
/// A server may send fewer bytes than asked for; it may not begin elsewhere, send more, or name a total that its own
/// range does not fit in. The text says what is wrong.
pub(super) fn part(content_range: Option<&str>, asked: &RangeInclusive<u64>) -> Result<Part, String> {
    let value = content_range.ok_or("no Content-Range in a 206")?;
    let wrong = || format!("Content-Range `{}` answers bytes={}-{}", value.escape_debug(), asked.start(), asked.end());
    let (first, last, file_len) = parse(value).ok_or_else(wrong)?;
    let fits = file_len.is_none_or(|total| last < total);
    if first != *asked.start() || last < first || last > *asked.end() || !fits {
        return Err(wrong());
    }
    Ok(Part { len: last - first + 1, file_len })
}

/// The file length in the `Content-Range: bytes */<length>` of a 416.
pub(super) fn unsatisfied(content_range: Option<&str>) -> Option<u64> {
    number(content_range?.trim().strip_prefix("bytes")?.trim().strip_prefix("*/")?)
}

/// `bytes <first>-<last>/<total or *>`.
fn parse(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let rest = value.trim().strip_prefix("bytes")?;
    let (range, total) = rest.strip_prefix(' ')?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(number(total)?) };
    Some((number(first)?, number(last)?, total))
}

/// Digits only: `u64::from_str` would take a plus sign.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_taken() {
        assert_eq!(part(Some("bytes 0-99/1000"), &(0..=99)), Ok(Part { len: 100, file_len: Some(1000) }));
        assert_eq!(part(Some("bytes 0-4/5"), &(0..=99)), Ok(Part { len: 5, file_len: Some(5) }));
        assert_eq!(part(Some("bytes 100-149/*"), &(100..=149)), Ok(Part { len: 50, file_len: None }));
    }

    #[test]
    fn what_contradicts_is_refused() {
        assert!(part(None, &(0..=99)).is_err());
        for wrong in [
            "bytes 1-99/1000",
            "bytes 0-100/1000",
            "bytes 0-99/99",
            "bytes 0-99/50",
            "bytes 5-4/1000",
            "bytes 0-99",
            "bytes */1000",
            "bytes +0-99/1000",
            "bytes 0-99/-1",
            "bytes 0-18446744073709551616/*",
            "items 0-99/1000",
            "0-99/1000",
            "",
        ] {
            assert!(part(Some(wrong), &(0..=99)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn unsatisfied_ranges_name_the_length() {
        assert_eq!(unsatisfied(Some("bytes */0")), Some(0));
        assert_eq!(unsatisfied(Some("bytes */77")), Some(77));
        assert_eq!(unsatisfied(Some("bytes 0-1/2")), None);
        assert_eq!(unsatisfied(None), None);
    }
}
