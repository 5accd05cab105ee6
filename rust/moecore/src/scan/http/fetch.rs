//! One logical GET: permits, gates, hops, retries. What is read from the answer is in `read_header` and `read_file`.

use std::ops::RangeInclusive;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderValue, RANGE};
use reqwest::{Method, Request, Response, StatusCode, Url};
use tokio::sync::SemaphorePermit;

use super::gate::host_of;
use super::retry::{self, Failure};
use super::shared::Shared;
use super::{Cost, Origin, SizeHint, redirect, status};
use crate::{Error, ErrorKind, Result};

/// The body of a redirect or an error is read up to here, so that its HTTP/1.1 connection can be used again.
const DRAIN: u64 = 16 * 1024;
/// A body that arrives slower than this many bytes a second is given up, even if each piece comes in time.
const SLOWEST: u64 = 8 * 1024;

/// Which bytes to ask for.
pub(super) enum Ask<'a> {
    /// The first ones, as many as the hint says when the request goes out.
    First(&'a SizeHint),
    /// Exactly these.
    Range(RangeInclusive<u64>),
    /// All of them.
    Whole,
}

impl Ask<'_> {
    fn range(&self) -> Option<RangeInclusive<u64>> {
        match self {
            Self::First(hint) => Some(0..=hint.first_range() - 1),
            Self::Range(range) => Some(range.clone()),
            Self::Whole => None,
        }
    }
}

/// An answer whose body was not read yet. It counts as in flight until it is dropped.
pub(super) struct Answer<'a> {
    pub(super) response: Response,
    pub(super) asked: Option<RangeInclusive<u64>>,
    /// Bytes that arrived after the ones that were wanted.
    pub(super) surplus: u64,
    host: String,
    _permit: SemaphorePermit<'a>,
}

impl Answer<'_> {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        status::text(self.response.headers(), name)
    }

    /// Refuses what would have to be unpacked: its length says nothing about the file's.
    pub(super) fn check_plain(&self) -> Result<()> {
        match self.header("content-encoding").map(str::trim) {
            None | Some("identity" | "") => Ok(()),
            Some(coding) => {
                let coding = coding.escape_debug();
                Err(self.protocol(format!("a body with Content-Encoding `{coding}`, which was not asked for")))
            }
        }
    }

    pub(super) fn protocol(&self, what: impl std::fmt::Display) -> Error {
        let advice = "check HF_ENDPOINT and the proxy settings";
        Error::new(ErrorKind::Protocol, format!("{} sent {what}; {advice}", self.host))
    }

    pub(super) fn broken(&self, what: &str) -> Failure {
        Failure::Transient { what: format!("{} {what}", self.host), limited: false }
    }
}

/// One fetch: where it goes, what it may still try, and what it cost.
pub(super) struct Fetch<'a> {
    shared: &'a Shared,
    origin: &'a Origin,
    cost: &'a Cost,
    pub(super) file: &'a str,
    url: Url,
    /// Where the redirects of `url` led, once an answer came from there.
    resolved: Option<Url>,
    resolved_again: bool,
    retries: u32,
    pub(super) requests: u32,
    pub(super) bytes: u64,
}

impl<'a> Fetch<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        origin: &'a Origin,
        url: &str,
        file: &'a str,
        cost: &'a Cost,
    ) -> Result<Self> {
        let url = Url::parse(url).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let url = url.filter(|url| !redirect::has_credentials(url)).ok_or_else(|| {
            Error::new(ErrorKind::InvalidTarget, "not an http or https URL without user name and password")
                .with_file(file)
        })?;
        let (resolved, resolved_again, retries, requests, bytes) = (None, false, 0, 0, 0);
        Ok(Self { shared, origin, cost, file, url, resolved, resolved_again, retries, requests, bytes })
    }

    /// One attempt: follows redirects to an answer that has something to read (200, 206, 416).
    pub(super) async fn attempt(&mut self, ask: &Ask<'_>) -> Result<Answer<'a>, Failure> {
        let mut known = self.resolved.is_some();
        let mut url = self.resolved.clone().unwrap_or_else(|| self.url.clone());
        for _ in 0..=redirect::MAX_REDIRECTS {
            let answer = self.send(&url, ask).await?;
            let (code, headers) = (answer.status(), answer.response.headers());
            if status::is_redirect(code) {
                url = redirect::target(&url, status::text(headers, "location"))?;
                known = false;
                self.shared.totals.redirects.fetch_add(1, Relaxed);
                self.drain(answer).await;
                continue;
            }
            if matches!(code.as_u16(), 200 | 206 | 416) {
                if url != self.url {
                    self.resolved = Some(url);
                }
                return Ok(answer);
            }
            if status::is_transient(code) {
                let limited = code == StatusCode::TOO_MANY_REQUESTS || headers.contains_key("retry-after");
                let what = format!("{} answers with HTTP {}", answer.host, code.as_u16());
                self.drain(answer).await;
                return Err(Failure::Transient { what, limited });
            }
            // Signed URLs expire: of two hosts only the hub knows whether the file may be read.
            if status::is_expired(code) && !self.resolved_again && (known || !self.origin.owns(&url)) {
                self.drain(answer).await;
                return Err(Failure::Expired);
            }
            let error = status::refusal(code, headers, &answer.host, self.origin.has_token());
            let missing = status::only_file_missing(code, headers);
            self.drain(answer).await;
            return Err(if missing { Failure::Missing(error) } else { Failure::Fatal(error) });
        }
        let error = Error::new(
            ErrorKind::Protocol,
            format!("more than {} redirects in a row; check HF_ENDPOINT", redirect::MAX_REDIRECTS),
        );
        Err(error.into())
    }

    /// Sends one request as soon as the host's gate is open and there is room for it.
    async fn send(&mut self, url: &Url, ask: &Ask<'_>) -> Result<Answer<'a>, Failure> {
        let host = host_of(url);
        let permit = self.enter(&host).await?;
        let asked = ask.range();

        let mut request = Request::new(Method::GET, url.clone());
        let headers = request.headers_mut();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(range) = &asked {
            let range = format!("bytes={}-{}", range.start(), range.end());
            headers.insert(RANGE, HeaderValue::from_str(&range).expect("digits and signs"));
        }
        if let Some(token) = self.origin.authorization_for(url) {
            headers.insert(AUTHORIZATION, token.clone());
        }

        self.requests += 1;
        self.cost.add_request();
        self.shared.totals.cost.add_request();
        let response =
            self.shared.http.execute(request).await.map_err(|error| Failure::from_transport(error, &host))?;
        let code = response.status().as_u16();
        let headers = response.headers();
        let noted = self.shared.note(&host, code, |name| status::text(headers, name));
        if code == 429 && !noted {
            // The host says "too many" but not for how long: everybody backs off, not only this fetch.
            self.shared.pause(&host, retry::backoff(self.shared.options.backoff_base, self.retries));
        }
        Ok(Answer { response, asked, surplus: 0, host, _permit: permit })
    }

    /// Waits for the host's gate and for room among the requests in flight.
    async fn enter(&self, host: &str) -> Result<SemaphorePermit<'a>> {
        loop {
            // No permit is held while the gate is closed: one host's pause leaves the others their room.
            self.shared.gates.wait(host, self.shared.options.max_pause).await.map_err(|left| {
                let seconds = left.as_secs_f64().ceil();
                let advice = "try again then, or set HF_TOKEN for a larger quota";
                Error::new(ErrorKind::RateLimited, format!("{host} asks to wait for {seconds} s; {advice}"))
            })?;
            let permit = self.shared.in_flight.acquire().await.expect("the semaphore is never closed");
            if self.shared.gates.remaining(host).is_zero() {
                return Ok(permit);
            }
        }
    }

    /// Appends the body's next piece to `buf`, which grows to `limit` at most. `false` at the end of the body.
    pub(super) async fn append(
        &mut self,
        answer: &mut Answer<'_>,
        buf: &mut Vec<u8>,
        limit: u64,
    ) -> Result<bool, Failure> {
        let chunk = answer.response.chunk().await.map_err(|error| Failure::from_transport(error, &answer.host))?;
        let Some(chunk) = chunk else { return Ok(false) };
        let len = chunk.len() as u64;
        self.bytes += len;
        self.cost.add_bytes(len);
        self.shared.totals.cost.add_bytes(len);
        let room = usize::try_from(limit.saturating_sub(buf.len() as u64)).unwrap_or(usize::MAX);
        let taken = chunk.len().min(room);
        buf.extend_from_slice(&chunk[..taken]);
        answer.surplus += len - taken as u64;
        Ok(true)
    }

    /// How long a body of `len` bytes may take in all.
    pub(super) fn deadline(&self, len: u64) -> Duration {
        self.shared.options.read_timeout.saturating_mul(2).saturating_add(Duration::from_secs(len / SLOWEST))
    }

    /// Reads a body that nobody wants, if it is short. What fails here fails nothing else.
    async fn drain(&mut self, mut answer: Answer<'_>) {
        if answer.response.content_length().is_some_and(|len| len > DRAIN) {
            return;
        }
        let mut nothing = Vec::new();
        let read = async {
            while answer.surplus <= DRAIN && matches!(self.append(&mut answer, &mut nothing, 0).await, Ok(true)) {}
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), read).await;
    }

    /// Prepares the next attempt after a failed one: waits, or returns the error to give up with.
    pub(super) async fn recover(&mut self, failure: Failure) -> Result<()> {
        match failure {
            Failure::Fatal(error) | Failure::Missing(error) => Err(error.with_file(self.file)),
            Failure::Expired => {
                self.resolved = None;
                self.resolved_again = true;
                Ok(())
            }
            Failure::Transient { what, limited } => {
                let options = &self.shared.options;
                if self.retries >= options.retries {
                    return Err(retry::exhausted(&what, limited, self.retries + 1).with_file(self.file));
                }
                let wait = retry::backoff(options.backoff_base, self.retries);
                self.retries += 1;
                self.shared.totals.retries.fetch_add(1, Relaxed);
                // The storage host that failed may not be the one that the hub would choose now.
                self.resolved = None;
                tokio::time::sleep(wait).await;
                Ok(())
            }
        }
    }
}
