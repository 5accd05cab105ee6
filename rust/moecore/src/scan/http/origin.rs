//! Where a repo's files are, and the secret that only its own host may see.

use std::fmt;

use reqwest::Url;
use reqwest::header::HeaderValue;

use super::redirect::{has_credentials, same_origin};
use crate::{Error, ErrorKind, Result};

/// A path segment longer than this fits no file system that the repo could have come from.
const MAX_SEGMENT: usize = 255;
/// A whole name longer than this is no file name either.
const MAX_NAME: usize = 1024;

/// An endpoint of a hub, and the token for it.
///
/// The token goes to the endpoint's own scheme, host and port only, and is never printed.
#[derive(Clone)]
pub struct Origin {
    endpoint: Url,
    authorization: Option<HeaderValue>,
}

impl Origin {
    /// An endpoint like `https://huggingface.co` or `http://127.0.0.1:1234/prefix`. An empty token is none.
    pub fn new(endpoint: &str, token: Option<&str>) -> Result<Self> {
        // The endpoint is not repeated in the message: it may carry a password by mistake.
        let refuse = |why: &str| Error::new(ErrorKind::InvalidTarget, format!("endpoint refused: {why}"));
        let mut endpoint = Url::parse(endpoint.trim())
            .map_err(|error| refuse(&format!("{error}; write HF_ENDPOINT like https://huggingface.co")))?;
        if !matches!(endpoint.scheme(), "http" | "https") || endpoint.host_str().is_none() {
            return Err(refuse("it must begin with https:// or http:// and name a host"));
        }
        if has_credentials(&endpoint) {
            return Err(refuse("it carries a user name or password; put the token in HF_TOKEN"));
        }
        if endpoint.query().is_some() || endpoint.fragment().is_some() {
            return Err(refuse("it carries a query or a fragment; leave out everything from `?` or `#` on"));
        }
        let path = endpoint.path().trim_end_matches('/').to_owned();
        endpoint.set_path(&path);
        Ok(Self {
            endpoint,
            authorization: token.map(str::trim).filter(|token| !token.is_empty()).map(bearer).transpose()?,
        })
    }

    /// The URL of a file: `{endpoint}/{org/name}/resolve/{revision}/{file}`, percent-encoded segment by segment.
    ///
    /// Repo and file names come from strangers: names that could lead out of the repo are refused.
    pub fn resolve_url(&self, repo: &str, revision: &str, file: &str) -> Result<String> {
        let bad = |what: &str, name: &str, why: &str| {
            Error::new(ErrorKind::InvalidTarget, format!("{what} `{}` is refused: {why}", name.escape_debug()))
        };
        check_name(repo).map_err(|why| bad("repo", repo, why))?;
        if repo.split('/').count() > 2 {
            return Err(bad("repo", repo, "it must be like `org/name`"));
        }
        check_name(revision).map_err(|why| bad("revision", revision, why))?;
        check_name(file).map_err(|why| bad("file name", file, why))?;

        let mut url = self.endpoint.as_str().trim_end_matches('/').to_owned();
        for segment in repo.split('/') {
            url.push('/');
            encode(segment, &mut url);
        }
        url.push_str("/resolve/");
        // One segment: the hub reads `refs/pr/1` as `refs%2Fpr%2F1`.
        encode(revision, &mut url);
        for segment in file.split('/') {
            url.push('/');
            encode(segment, &mut url);
        }
        Ok(url)
    }

    /// The header that a request to `url` may carry.
    pub(super) fn authorization_for(&self, url: &Url) -> Option<&HeaderValue> {
        self.authorization.as_ref().filter(|_| self.owns(url))
    }

    /// Whether `url` is on the endpoint's own scheme, host and port.
    pub(super) fn owns(&self, url: &Url) -> bool {
        same_origin(&self.endpoint, url)
    }

    /// Whether there is a token.
    pub(super) fn has_token(&self) -> bool {
        self.authorization.is_some()
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = if self.has_token() { "set" } else { "none" };
        f.debug_struct("Origin").field("endpoint", &self.endpoint.as_str()).field("authorization", &token).finish()
    }
}

/// The `Authorization` header, marked so that the HTTP stack does not print or compress it.
fn bearer(token: &str) -> Result<HeaderValue> {
    let refused = "the token has characters that no token has; check HF_TOKEN for line breaks and quotes";
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Error::new(ErrorKind::AccessDenied, refused));
    }
    let mut value =
        HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| Error::new(ErrorKind::AccessDenied, refused))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Refuses names that are not plain relative paths.
fn check_name(name: &str) -> Result<(), &'static str> {
    if name.len() > MAX_NAME {
        return Err("it is too long");
    }
    if name.contains(['\\', '?', '#']) {
        return Err("it holds a backslash, `?` or `#`");
    }
    if name.chars().any(char::is_control) {
        return Err("it holds a control character");
    }
    let lower = name.to_ascii_lowercase();
    // Someone on the way may decode once more than we encode.
    if ["%2f", "%5c", "%2e", "%00", "%25"].iter().any(|trick| lower.contains(trick)) {
        return Err("it holds a percent-encoded separator or dot");
    }
    for segment in name.split('/') {
        match segment {
            "" => return Err("it is empty, absolute or has an empty part"),
            "." | ".." => return Err("it has a part that is `.` or `..`"),
            _ if segment.len() > MAX_SEGMENT => return Err("a part of it is longer than 255 bytes"),
            _ => {}
        }
    }
    Ok(())
}

/// Percent-encodes everything but the characters that mean nothing in a URL.
fn encode(segment: &str, url: &mut String) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            url.push(char::from(byte));
        } else {
            url.extend(['%', char::from(HEX[usize::from(byte >> 4)]), char::from(HEX[usize::from(byte & 15)])]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub() -> Origin {
        Origin::new("https://huggingface.co", None).unwrap()
    }

    #[test]
    fn urls_are_encoded_per_segment() {
        let url = |repo, revision, file| hub().resolve_url(repo, revision, file).unwrap();
        assert_eq!(
            url("org/name", "main", "model-00001-of-00002.safetensors"),
            "https://huggingface.co/org/name/resolve/main/model-00001-of-00002.safetensors"
        );
        assert_eq!(
            url("gpt2", "refs/pr/1", "a/b c.json"),
            "https://huggingface.co/gpt2/resolve/refs%2Fpr%2F1/a/b%20c.json"
        );
        assert_eq!(
            url("o/n", "main", "100%+é&=.json"),
            "https://huggingface.co/o/n/resolve/main/100%25%2B%C3%A9%26%3D.json"
        );
        let mirror = Origin::new(" http://127.0.0.1:1234/hub/v1/ ", None).unwrap();
        assert_eq!(mirror.resolve_url("o/n", "main", "f").unwrap(), "http://127.0.0.1:1234/hub/v1/o/n/resolve/main/f");
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let long = "a".repeat(256);
        let deep = "abcdefg/".repeat(200) + "x";
        let names = [
            "",
            "/etc/passwd",
            "..",
            "../../../../api/whoami-v2",
            "a/../b",
            "a/./b",
            "a//b",
            "a/",
            "a\\b",
            "a\0b",
            "a\nb",
            "a%2fb",
            "a%2F..%2Fb",
            "%2e%2e/b",
            "%252e",
            "a?download=1",
            "a#b",
            "http://evil.org/x",
            &long,
            &deep,
        ];
        for name in names {
            let error = hub().resolve_url("org/name", "main", name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidTarget, "{name}");
            assert!(!error.to_string().contains(['\0', '\n']), "control characters are not printed");
            assert!(hub().resolve_url(name, "main", "f").is_err(), "repo {name}");
            assert!(hub().resolve_url("org/name", name, "f").is_err(), "revision {name}");
        }
        assert!(hub().resolve_url("a/b/c", "main", "f").is_err());
        assert!(hub().resolve_url("org/name", "main", "..model..safetensors").is_ok());
    }

    #[test]
    fn urls_survive_the_url_parser_unchanged() {
        for file in ["a/b.safetensors", "...", "a b", "é/ü.json", "a:b@c", "~x", "%41"] {
            let url = hub().resolve_url("org/name", "refs/pr/1", file).unwrap();
            assert_eq!(Url::parse(&url).unwrap().as_str(), url, "{file}");
        }
    }

    #[test]
    fn endpoints() {
        for bad in [
            "huggingface.co",
            "ftp://hub.co",
            "https://u:s3cret@hub.co",
            "https://hub.co/?a=1",
            "https://hub.co/#x",
            "https://",
            "",
        ] {
            let error = Origin::new(bad, None).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidTarget, "{bad}");
            assert!(!error.to_string().contains("s3cret"));
        }
    }

    #[test]
    fn the_token_is_for_its_own_origin_and_never_printed() {
        let origin = Origin::new("https://hub.co/prefix", Some(" hf_s3cret\n")).unwrap();
        let sees = |url: &str| origin.authorization_for(&Url::parse(url).unwrap()).is_some();
        assert!(sees("https://hub.co/anything") && sees("https://hub.co:443/"));
        assert!(
            !sees("http://hub.co/prefix/")
                && !sees("https://hub.co:444/prefix/")
                && !sees("https://cdn.hub.co/prefix/")
        );
        assert!(!format!("{origin:?}").contains("s3cret"));
        assert!(!format!("{:?}", origin.authorization).contains("s3cret"));
        let error = Origin::new("https://hub.co", Some("hf_s3\ncret")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AccessDenied);
        assert!(!format!("{error} {error:?}").contains("cret"));
        assert!(!Origin::new("https://hub.co", Some("  ")).unwrap().has_token());
    }
}
