//! What all fetches of a client share: options, connections, gates, totals.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::cost::Totals;
use super::gate::Gates;
use super::limits;

/// How a [`Client`] behaves. `ClientOptions::default()` suits a hub on the internet.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Requests in flight at once, over all hosts.
    pub connections: usize,
    /// How long a connection may take to come up, TLS included.
    pub connect_timeout: Duration,
    /// How long an answer or the next piece of its body may take to arrive.
    pub read_timeout: Duration,
    /// Failed attempts of one fetch that are made again.
    pub retries: u32,
    /// The wait before the first retry; it doubles from one to the next.
    pub backoff_base: Duration,
    /// The longest pause that a host may ask for and get. Longer ones end the fetch with `RateLimited`.
    pub max_pause: Duration,
    /// The `User-Agent` of every request.
    pub user_agent: String,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            connections: 64,
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
            retries: 5,
            backoff_base: Duration::from_millis(500),
            // The hub's quotas are for windows of 5 minutes.
            max_pause: Duration::from_secs(330),
            user_agent: concat!("moecore/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// What all fetches of a client share.
pub(super) struct Shared {
    pub(super) http: reqwest::Client,
    pub(super) in_flight: Semaphore,
    pub(super) gates: Gates,
    pub(super) totals: Totals,
    pub(super) options: ClientOptions,
}

impl Shared {
    /// Closes the host's gate if its answer asks for it. Returns whether it did.
    pub(super) fn note<'a>(&self, host: &str, status: u16, header: impl Fn(&str) -> Option<&'a str>) -> bool {
        if status == 429 {
            self.totals.rate_limited.fetch_add(1, Relaxed);
        }
        let pause = limits::pause_of(status, header);
        if let Some(pause) = pause {
            self.pause(host, pause);
        }
        pause.is_some()
    }

    /// Closes the host's gate.
    pub(super) fn pause(&self, host: &str, pause: Duration) {
        self.gates.pause(host, pause, &self.totals.paused_ms);
    }
}
