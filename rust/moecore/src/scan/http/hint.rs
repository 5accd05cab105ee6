//! How many bytes to ask for first: learnt from the repo's earlier shards.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};

/// Nothing is known: the first range lies in these bounds. 97 % of the headers of common models are below 100 KB.
const INITIAL: (u64, u64) = (64 * 1024, 128 * 1024);
/// Learnt ranges lie in these bounds.
const LEARNT: (u64, u64) = (16 * 1024, 2 * 1024 * 1024);
/// Longer headers than this count as this long, so that no sum of them overflows.
const LARGEST: u64 = 1 << 40;
/// What a second request is worth in bytes: about one round trip of one connection.
const ROUND_TRIP: u64 = 256 * 1024;
/// Fetches of a repo that may go out before anything is known of it. The rest waits for what they learn: a repo of 61
/// shards with 300 KB headers, all asked at once, would need a second request for every one of them.
const PROBES: usize = 8;
/// So many headers make a sample; fewer can all be small ones by chance.
const ENOUGH: usize = 4;
/// The newest headers that are remembered.
const SAMPLE: usize = 64;
/// Headroom in per cent, for shards of one repo differ by a few names and digits: more while the sample is small, for
/// most of a repo's shards are asked for when only its probes are back.
const HEADROOM: (u64, u64) = (10, 6);
/// From this many headers on, the sample is not small.
const LARGE_SAMPLE: usize = 16;
/// Nobody waits longer than this for what others learn.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// The size of the first range for the shards of one repo, shared by the repo's concurrent fetches.
///
/// A range that is too long wastes bytes on every shard; one that is too short costs a second request on some. The hint
/// keeps the newest header sizes and takes the range that would have cost these the least, counting a second request as
/// 256 KiB. So one shard with a huge header does not make all the others pay, and a fair share of them does.
#[derive(Debug)]
pub struct SizeHint {
    initial: u64,
    next: AtomicU64,
    sample: Mutex<VecDeque<u64>>,
    /// Closed as soon as enough is known.
    probes: Semaphore,
}

impl SizeHint {
    /// A hint for one repo. `initial` is the first range while nothing is known, within 64 to 128 KiB.
    #[must_use]
    pub fn new(initial: u64) -> Self {
        let initial = initial.clamp(INITIAL.0, INITIAL.1);
        Self {
            initial,
            next: AtomicU64::new(initial),
            sample: Mutex::new(VecDeque::with_capacity(SAMPLE)),
            probes: Semaphore::new(PROBES),
        }
    }

    /// How many bytes to ask for first.
    #[must_use]
    pub fn first_range(&self) -> u64 {
        self.next.load(Relaxed)
    }

    /// Learns that a shard's header took `header_total` bytes: the 8 of the length and the JSON.
    pub fn observe(&self, header_total: u64) {
        let mut sample = self.sample.lock().unwrap_or_else(PoisonError::into_inner);
        if sample.len() == SAMPLE {
            sample.pop_front();
        }
        sample.push_back(header_total.min(LARGEST));
        let learnt = cheapest(sample.make_contiguous());
        if sample.len() < ENOUGH {
            self.next.store(learnt.max(self.initial), Relaxed);
        } else {
            self.next.store(learnt, Relaxed);
            self.probes.close();
        }
    }

    /// Waits while others of the same repo find out the size. Hold what it returns until the size is known.
    pub(super) async fn admit(&self) -> Option<SemaphorePermit<'_>> {
        // An error means that enough is known; a timeout, that the probes are slow and waiting longer does not pay.
        tokio::time::timeout(LONGEST_WAIT, self.probes.acquire()).await.ok()?.ok()
    }
}

/// The range that would have cost the headers in `sample` the least.
fn cheapest(sample: &[u64]) -> u64 {
    let cost = |range: u64| -> u64 {
        sample.iter().map(|&total| range + if total > range { ROUND_TRIP + (total - range) } else { 0 }).sum()
    };
    let headroom = if sample.len() < LARGE_SAMPLE { HEADROOM.0 } else { HEADROOM.1 };
    let ranges = sample.iter().map(|&total| padded(total, headroom));
    ranges.min_by_key(|&range| (cost(range), range)).unwrap_or(INITIAL.1)
}

/// A header's size with headroom, in whole KiB and within the bounds.
fn padded(header_total: u64, headroom: u64) -> u64 {
    let total = header_total.min(LEARNT.1);
    (total + total * headroom / 100).next_multiple_of(1024).clamp(LEARNT.0, LEARNT.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes and requests of a repo whose shards are fetched `width` at a time, in the order given.
    fn replay(initial: u64, headers: &[u64], width: usize) -> (u64, usize) {
        let hint = SizeHint::new(initial);
        let (mut bytes, mut requests, mut next) = (0, 0, 0);
        while next < headers.len() {
            let width = if hint.probes.is_closed() { width } else { PROBES };
            let wave = &headers[next..headers.len().min(next + width)];
            let range = hint.first_range();
            for &total in wave {
                bytes += range + total.saturating_sub(range);
                requests += 1 + usize::from(total > range);
            }
            for &total in wave {
                hint.observe(total);
            }
            next += width;
        }
        (bytes, requests)
    }

    #[test]
    fn bounds() {
        assert_eq!(SizeHint::new(0).first_range(), 64 * 1024);
        assert_eq!(SizeHint::new(100_000).first_range(), 100_000);
        assert_eq!(SizeHint::new(u64::MAX).first_range(), 128 * 1024);
        let hint = SizeHint::new(0);
        hint.observe(300_000);
        assert_eq!(hint.first_range(), 330_752, "one large header already raises it");
        let hint = SizeHint::new(0);
        hint.observe(9);
        assert_eq!(hint.first_range(), 64 * 1024, "one small header does not lower it");
        (0..3).for_each(|_| hint.observe(9));
        assert_eq!(hint.first_range(), 16 * 1024);
        (0..SAMPLE).for_each(|_| hint.observe(u64::MAX));
        assert_eq!(hint.first_range(), 2 * 1024 * 1024);
    }

    #[test]
    fn deepseek_v3_stays_near_its_headers() {
        // 163 shards of 11 to 75 KB, 11.9 MB in all.
        let headers: Vec<u64> =
            (0..163).map(|shard| if shard % 40 == 0 { 11_000 } else { 74_200 + shard % 7 * 100 }).collect();
        let needed: u64 = headers.iter().sum();
        for width in [1, 16, 64, 163] {
            let (bytes, requests) = replay(96 * 1024, &headers, width);
            assert_eq!(requests, 163, "no second request");
            assert!(bytes / 163 < 86_000, "{} bytes a shard", bytes / 163);
            assert!((bytes as f64) < 1.2 * needed as f64);
        }
    }

    #[test]
    fn kimi_k2_needs_second_requests_for_the_probes_only() {
        let headers: Vec<u64> = (0..61).map(|shard| 251_000 + shard * 37 % 61 * 820).collect();
        let (bytes, requests) = replay(96 * 1024, &headers, 64);
        assert!(requests <= 61 + 2 * PROBES, "{requests}");
        assert!(bytes < headers.iter().sum::<u64>() * 120 / 100);
    }

    #[test]
    fn one_huge_header_does_not_raise_the_others() {
        let mut headers = vec![20_000; 100];
        headers[10] = 12_000_000;
        let (bytes, requests) = replay(96 * 1024, &headers, 16);
        assert_eq!(requests, 101);
        assert!(bytes < 12_000_000 + 100 * 22_000 + 8 * 100_000, "{bytes}");
    }

    #[test]
    fn a_fair_share_of_large_headers_does() {
        let hint = SizeHint::new(0);
        (0..32).for_each(|shard| hint.observe(if shard % 2 == 0 { 20_000 } else { 120_000 }));
        assert!(hint.first_range() >= 120_000);
    }

    #[tokio::test]
    async fn probes_go_first_and_the_rest_when_enough_is_known() {
        let hint = SizeHint::new(0);
        let mut probes = Vec::new();
        for _ in 0..PROBES {
            probes.push(hint.admit().await.expect("a probe"));
        }
        let blocked = tokio::time::timeout(Duration::from_millis(30), hint.admit()).await;
        assert!(blocked.is_err(), "nothing is known yet");
        let freed = probes.pop();
        drop(freed);
        assert!(hint.admit().await.is_some(), "a probe that failed makes room");
        probes.push(hint.admit().await.expect("the room is free again"));

        let late = async { tokio::time::timeout(Duration::from_secs(1), hint.admit()).await };
        let learn = async { (0..ENOUGH).for_each(|_| hint.observe(50_000)) };
        let (late, ()) = tokio::join!(late, learn);
        assert!(late.expect("let go at once").is_none());
    }
}
