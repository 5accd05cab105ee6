//! What an attempt can end in, and how long to wait before the next one.

use std::error::Error as StdError;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::time::Duration;

use crate::{Error, ErrorKind};

/// No single backoff is longer than this; pauses that a host asks for have their own limit.
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);

/// Why an attempt brought nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another attempt would end the same way.
    Fatal(Error),
    /// The repo has no such file, which is an error only for those who need it.
    Missing(Error),
    /// Another attempt may succeed. `limited`: the host said that there were too many requests.
    Transient { what: String, limited: bool },
    /// A URL that an earlier redirect led to is no longer accepted: ask the hub for a new one.
    Expired,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

impl Failure {
    /// Sorts an error of the HTTP stack. The URL is left out of the text: a signed one is a secret.
    pub(super) fn from_transport(error: reqwest::Error, host: &str) -> Self {
        let error = error.without_url();
        if certificate_refused(&error) {
            return Self::Fatal(Error::new(
                ErrorKind::Network,
                format!(
                    "the certificate of {host} is not accepted ({}); install ca-certificates, or name your own CA file in SSL_CERT_FILE",
                    innermost(&error)
                ),
            ));
        }
        if error.is_builder() {
            let text = innermost(&error);
            return Self::Fatal(Error::new(ErrorKind::InvalidTarget, format!("no request can be made of it: {text}")));
        }
        let what = if error.is_timeout() {
            format!("{host} did not answer in time")
        } else if error.is_connect() {
            format!("no connection to {host} ({})", innermost(&error))
        } else {
            format!("the connection to {host} broke off ({})", innermost(&error))
        };
        Self::Transient { what, limited: false }
    }
}

/// The error to give up with after `tries` attempts.
pub(super) fn exhausted(what: &str, limited: bool, tries: u32) -> Error {
    let times = if tries == 1 { "try" } else { "tries" };
    if limited {
        let advice = "try again later, use fewer connections, or set HF_TOKEN for a larger quota";
        Error::new(ErrorKind::RateLimited, format!("{what}, after {tries} {times}; {advice}"))
    } else {
        let advice = "check the network, HF_ENDPOINT and the proxy settings, or try again later";
        Error::new(ErrorKind::Network, format!("{what}, after {tries} {times}; {advice}"))
    }
}

/// The wait before retry number `retry` (from 0): doubling, and between half and all of that, so that fetches that
/// failed together do not come back together.
pub(super) fn backoff(base: Duration, retry: u32) -> Duration {
    let full = base.saturating_mul(1_u32.checked_shl(retry).unwrap_or(u32::MAX)).min(LONGEST_BACKOFF);
    full.mul_f64(f64::midpoint(1.0, random_unit()))
}

/// A number in 0..1. The standard library's hash keys are random, which is all that jitter needs.
pub(super) fn random_unit() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

/// The last error of the chain: the ones before it only say that a request failed.
fn innermost(error: &reqwest::Error) -> String {
    let mut last: &dyn StdError = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Whether TLS refused the server's certificate: no retry changes that.
fn certificate_refused(error: &(dyn StdError + 'static)) -> bool {
    if let Some(tls) = error.downcast_ref() {
        return matches!(tls, rustls::Error::InvalidCertificate(_));
    }
    // An I/O error gives its payload's source as its own: the payload itself has to be asked for.
    let payload = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    payload.is_some_and(|payload| certificate_refused(payload)) || error.source().is_some_and(certificate_refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_within_its_band() {
        let base = Duration::from_millis(500);
        for retry in 0..5 {
            let full = base * 2_u32.pow(retry);
            let wait = backoff(base, retry);
            assert!(full / 2 <= wait && wait <= full, "{retry}: {wait:?}");
        }
        assert!(backoff(base, 200) <= LONGEST_BACKOFF);
        assert_eq!(backoff(Duration::ZERO, 3), Duration::ZERO);
    }

    #[test]
    fn jitter_is_not_constant() {
        let first = random_unit();
        assert!((0.0..1.0).contains(&first));
        assert!((0..16).any(|_| (random_unit() - first).abs() > 1e-9));
    }

    #[test]
    fn a_refused_certificate_is_found_below_io_errors() {
        let refused = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let nested = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, refused));
        assert!(certificate_refused(&nested));
        assert!(!certificate_refused(&io::Error::other(rustls::Error::HandshakeNotComplete)));
        assert!(!certificate_refused(&io::Error::from(io::ErrorKind::ConnectionReset)));
    }

    #[test]
    fn giving_up_says_what_to_do() {
        let limited = exhausted("HTTP 429 from hub", true, 6);
        assert_eq!(limited.kind(), ErrorKind::RateLimited);
        assert!(limited.to_string().contains("after 6 tries") && limited.to_string().contains("HF_TOKEN"));
        assert_eq!(exhausted("no connection", false, 1).kind(), ErrorKind::Network);
    }
}
