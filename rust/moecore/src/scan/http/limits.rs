//! What a host's answer says about the next request: `Retry-After` and the draft header `RateLimit`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long the host asks everybody to wait; `None` when it asks for nothing.
///
/// `header` gives a header's value by its lower-case name. The longest of the waits that apply counts:
/// * `Retry-After` (seconds or a date) of a 429 or 503;
/// * `RateLimit: "api";r=0;t=55` of any answer: nothing remains for 55 seconds. A 429 waits for `t` whatever `r` says.
pub(super) fn pause_of<'a>(status: u16, header: impl Fn(&str) -> Option<&'a str>) -> Option<Duration> {
    let asked = if matches!(status, 429 | 503) {
        header("retry-after").and_then(|value| retry_after(value, header("date")))
    } else {
        None
    };
    let quota = header("ratelimit").and_then(|value| rate_limit(value, status == 429));
    asked.max(quota)
}

/// `Retry-After`: seconds, or a date that counts from the answer's own `Date`, so that wrong clocks do not matter.
fn retry_after(value: &str, date: Option<&str>) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let now = match date.and_then(http_date) {
        Some(now) => now,
        None => SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs(),
    };
    Some(Duration::from_secs(http_date(value)?.saturating_sub(now)))
}

/// `RateLimit`: a list of `"policy";r=<remaining>;t=<seconds to reset>`. The longest reset of the spent policies
/// (`r=0`), or of all of them when none is marked as spent and `refused` says that one must be.
fn rate_limit(value: &str, refused: bool) -> Option<Duration> {
    let (mut spent, mut any) = (None, None);
    for item in value.split(',') {
        let parameter = |name: &str| -> Option<u64> {
            item.split(';').find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('=')?.trim().parse().ok())
        };
        let Some(reset) = parameter("t").map(Duration::from_secs) else { continue };
        any = any.max(Some(reset));
        if parameter("r") == Some(0) {
            spent = spent.max(Some(reset));
        }
    }
    if refused { spent.or(any) } else { spent }
}

/// Seconds since 1970 of the date format that HTTP asks senders to use: `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(value: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut parts = value.trim().split_once(", ")?.1.split(' ');
    let day: u64 = parts.next()?.parse().ok()?;
    let name = parts.next()?;
    let month = MONTHS.iter().position(|&month| month == name)? as u64;
    let year: u64 = parts.next()?.parse().ok()?;
    let mut clock = parts.next()?.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let in_range = (1..=31).contains(&day) && (1970..=9999).contains(&year) && hour < 24 && minute < 60 && second <= 60;
    if parts.next() != Some("GMT") || clock.next().is_some() || !in_range {
        return None;
    }
    // Years that begin in March put the leap day last: days before month m are (153 m + 2) / 5.
    let (year, month) = if month < 2 { (year - 1, month + 10) } else { (year, month - 2) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    Some((days.checked_sub(719_468)?) * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause(status: u16, headers: &[(&str, &'static str)]) -> Option<u64> {
        pause_of(status, |name| headers.iter().find(|(key, _)| *key == name).map(|&(_, value)| value))
            .map(|pause| pause.as_secs())
    }

    #[test]
    fn dates() {
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(http_date("Thu, 29 Feb 2024 12:00:00 GMT"), Some(1_709_208_000));
        assert_eq!(http_date("Sat, 28 Nov 2026 23:59:59 GMT"), Some(1_795_910_399));
        for bad in
            ["", "soon", "Sun, 06 Nov 1994 08:49:37", "Sun, 06 Foo 1994 08:49:37 GMT", "Sun, 06 Nov 1994 25:49:37 GMT"]
        {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn retry_after_counts_for_429_and_503() {
        assert_eq!(pause(429, &[("retry-after", "7")]), Some(7));
        assert_eq!(pause(503, &[("retry-after", " 7 ")]), Some(7));
        assert_eq!(pause(200, &[("retry-after", "7")]), None);
        assert_eq!(pause(429, &[("retry-after", "-1")]), None);
        assert_eq!(pause(429, &[]), None);
        let date = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(pause(429, &[("retry-after", "Sun, 06 Nov 1994 08:50:37 GMT"), date]), Some(60));
        assert_eq!(pause(429, &[("retry-after", "Sun, 06 Nov 1994 08:49:07 GMT"), date]), Some(0));
        assert_eq!(pause(429, &[("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")]), Some(0), "by the local clock");
    }

    #[test]
    fn rate_limit_counts_when_nothing_remains() {
        assert_eq!(pause(200, &[("ratelimit", "\"api\";r=0;t=55")]), Some(55));
        assert_eq!(pause(200, &[("ratelimit", "\"api\";r=1;t=55")]), None);
        assert_eq!(pause(429, &[("ratelimit", "\"api\";r=1;t=55")]), Some(55));
        assert_eq!(pause(429, &[("ratelimit", "\"api\" ; r=0; t=5, \"resolvers\";r=9;t=200")]), Some(5));
        assert_eq!(pause(200, &[("ratelimit", "\"a\";t=5;r=0,\"b\";r=0;t=9")]), Some(9));
        assert_eq!(pause(429, &[("ratelimit", "\"api\";r=0;t=55"), ("retry-after", "60")]), Some(60));
        for junk in ["", ";;;,,,=", "\"api\";r=0", "\"api\";r=0;t=-4", "r=0;t=99999999999999999999999"] {
            assert_eq!(pause(429, &[("ratelimit", junk)]), None, "{junk}");
        }
    }
}
