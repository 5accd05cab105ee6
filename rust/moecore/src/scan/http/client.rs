//! The front door: the public calls.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use tokio::sync::Semaphore;

use super::cost::Totals;
use super::fetch::Fetch;
use super::gate::{Gates, host_of};
use super::shared::{ClientOptions, Shared};
use super::{Cancel, Cost, Counters, HeaderBytes, Origin, SizeHint};
use crate::{Error, ErrorKind, Result};

/// Fetches the first bytes of files. One per process: it owns the connections, the limit on requests in flight, and the
/// pauses that hosts ask for. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Client(Arc<Shared>);

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

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", &self.0.options).field("counters", &self.counters()).finish()
    }
}
