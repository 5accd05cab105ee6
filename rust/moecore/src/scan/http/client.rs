//! The front door: options, shared state, the public calls.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use reqwest::Url;
use tokio::sync::Semaphore;

use super::cost::Totals;
use super::fetch::Fetch;
use super::gate::{Gates, host_of};
use super::{Cancel, Cost, Counters, HeaderBytes, Origin, SizeHint, limits};
use crate::{Error, ErrorKind, Result};

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

/// Fetches the first bytes of files. One per process: it owns the connections, the limit on requests in flight, and the
/// pauses that hosts ask for. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Client(Arc<Shared>);

/// What all fetches of a client share.
pub(super) struct Shared {
    pub(super) http: reqwest::Client,
    pub(super) in_flight: Semaphore,
    pub(super) gates: Gates,
    pub(super) totals: Totals,
    pub(super) options: ClientOptions,
}

impl Client {
    /// A client with no connections yet. Proxies and CA files are taken from the environment.
    pub fn new(options: ClientOptions) -> Result<Self> {
        // Without a provider of its own the HTTP stack would panic. An error means that one is installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let connections = options.connections.clamp(1, Semaphore::MAX_PERMITS);
        let http = reqwest::Client::builder()
            .user_agent(options.user_agent.as_str())
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .retry(reqwest::retry::never())
            .connect_timeout(options.connect_timeout)
            .read_timeout(options.read_timeout)
            .pool_max_idle_per_host(connections)
            .build()
            .map_err(|error| {
                let advice = "the HTTP client cannot start; check that ca-certificates is installed (or SSL_CERT_FILE set) and the proxy settings";
                Error::new(ErrorKind::Network, advice).with_source(error)
            })?;
        Ok(Self(Arc::new(Shared {
            http,
            in_flight: Semaphore::new(connections),
            gates: Gates::default(),
            totals: Totals::default(),
            options,
        })))
    }

    /// What was fetched so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.0.totals.read()
    }

    /// The JSON of a safetensors file's header, in one ranged request where `hint` is large enough, else in two.
    ///
    /// `file` names the file in errors. Errors: `InvalidHeader` when the file cannot have such a header, `NotFound`,
    /// `AccessDenied`, `RateLimited`, `Network`, `Protocol`, `Cancelled`.
    pub async fn header(
        &self,
        origin: &Origin,
        url: &str,
        file: &str,
        hint: &SizeHint,
        cancel: &Cancel,
        cost: &Cost,
    ) -> Result<HeaderBytes> {
        let fetch = Fetch::new(&self.0, origin, url, file, cost)?;
        cancel.guard(file, fetch.header(hint)).await
    }

    /// A small file as a whole; `None` when the repo has no such file.
    ///
    /// A file larger than `cap` bytes is an `InvalidConfig` error, and no more than that is read.
    pub async fn small_file(
        &self,
        origin: &Origin,
        url: &str,
        file: &str,
        cap: u64,
        cancel: &Cancel,
        cost: &Cost,
    ) -> Result<Option<Vec<u8>>> {
        let fetch = Fetch::new(&self.0, origin, url, file, cost)?;
        cancel.guard(file, fetch.small_file(cap)).await
    }

    /// How long the URL's host still asks everybody to wait. Zero when it does not, and for what is no URL.
    #[must_use]
    pub fn pause_for(&self, url: &str) -> Duration {
        Url::parse(url).map_or(Duration::ZERO, |url| self.0.gates.remaining(&host_of(&url)))
    }

    /// Takes an answer into account that somebody else got from the URL's host, so that the pause is shared.
    pub fn note_response(&self, url: &str, status: u16, headers: &[(String, String)]) {
        let Ok(url) = Url::parse(url) else { return };
        let header = |name: &str| {
            headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
        };
        self.0.note(&host_of(&url), status, header);
    }
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

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", &self.0.options).field("counters", &self.counters()).finish()
    }
}
