//! One pause per host, shared by everybody who talks to it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::Url;
use tokio::time::Instant;

use super::retry::random_unit;

/// A host can close its gate for this long at most, whatever it writes.
const LONGEST_PAUSE: Duration = Duration::from_secs(24 * 3600);

/// Those who waited for the same pause start over this much time, not all in the same instant.
const SPREAD: Duration = Duration::from_millis(100);

/// When each host may be asked again. Hosts that never asked for a pause have no entry.
#[derive(Debug, Default)]
pub(super) struct Gates(Mutex<HashMap<String, Instant>>);

impl Gates {
    /// Closes the host's gate for `pause` from now, unless it is already closed for longer.
    pub(super) fn pause(&self, host: &str, pause: Duration, paused_ms: &AtomicU64) {
        let now = Instant::now();
        let until = now + pause.min(LONGEST_PAUSE);
        let mut gates = self.lock();
        let open = gates.get(host).map_or(now, |&open| open.max(now));
        if until > open {
            let added = u64::try_from((until - open).as_millis()).unwrap_or(u64::MAX);
            paused_ms.fetch_add(added, Relaxed);
            gates.insert(host.to_owned(), until);
        }
    }

    /// How long the host's gate stays closed.
    pub(super) fn remaining(&self, host: &str) -> Duration {
        let mut gates = self.lock();
        let Some(until) = gates.get(host) else { return Duration::ZERO };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            gates.remove(host);
        }
        left
    }

    /// Waits until the host's gate is open. `Err`: it stays closed for this long, which is more than `max_pause`.
    pub(super) async fn wait(&self, host: &str, max_pause: Duration) -> Result<(), Duration> {
        loop {
            let left = self.remaining(host);
            if left.is_zero() {
                return Ok(());
            }
            if left > max_pause {
                return Err(left);
            }
            tokio::time::sleep(left + SPREAD.mul_f64(random_unit())).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        // A panic elsewhere leaves the map whole: each change is one insert or remove.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key of a URL's gate: scheme, host and port.
pub(super) fn host_of(url: &Url) -> String {
    url.origin().ascii_serialization()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pauses_extend_and_never_shrink() {
        let (gates, paused) = (Gates::default(), AtomicU64::new(0));
        for ms in [200, 80, 300] {
            gates.pause("a", Duration::from_millis(ms), &paused);
        }
        let left = gates.remaining("a");
        assert!(left > Duration::from_millis(250) && left <= Duration::from_millis(300), "{left:?}");
        assert_eq!(gates.remaining("b"), Duration::ZERO);
        let paused = paused.load(Relaxed);
        assert!((290..=305).contains(&paused), "overlapping pauses count once: {paused}");

        let start = Instant::now();
        gates.wait("b", Duration::ZERO).await.unwrap();
        assert!(start.elapsed() < Duration::from_millis(50));
        gates.wait("a", Duration::from_secs(60)).await.unwrap();
        assert!(start.elapsed() + Duration::from_millis(20) >= left);
        assert!(gates.lock().is_empty(), "an open gate leaves nothing behind");
    }

    #[tokio::test]
    async fn too_long_a_pause_is_not_waited_for() {
        let (gates, paused) = (Gates::default(), AtomicU64::new(0));
        gates.pause("a", Duration::MAX, &paused);
        let left = gates.wait("a", Duration::from_secs(330)).await.unwrap_err();
        assert!(left <= LONGEST_PAUSE && left > LONGEST_PAUSE / 2);
    }
}
