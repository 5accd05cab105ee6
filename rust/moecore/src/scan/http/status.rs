//! What a status means, and what the user can do about it.

use reqwest::StatusCode;
use reqwest::header::HeaderMap;

use crate::{Error, ErrorKind};

/// Whether the same request may succeed later.
pub(super) fn is_transient(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

/// Whether storage says this of a signed URL that is no longer valid.
pub(super) fn is_expired(status: StatusCode) -> bool {
    matches!(status.as_u16(), 401 | 403 | 404 | 410)
}

/// The redirects of a GET; 300 and 304 are none.
pub(super) fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// A header's value as text.
pub(super) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether the hub says that the file alone is missing: the repo and the revision exist.
pub(super) fn only_file_missing(status: StatusCode, headers: &HeaderMap) -> bool {
    let repo_missing = matches!(text(headers, "x-error-code"), Some("RepoNotFound" | "RevisionNotFound"));
    status == StatusCode::NOT_FOUND && !repo_missing
}

/// The error of an answer that no retry changes. The hub tells the reason in `X-Error-Code`.
pub(super) fn refusal(status: StatusCode, headers: &HeaderMap, host: &str, with_token: bool) -> Error {
    use ErrorKind::{AccessDenied, NotFound, Protocol};
    let token = if with_token {
        "check that the account of HF_TOKEN may read it"
    } else {
        "set HF_TOKEN if it is private or gated"
    };
    let (kind, message) = match (text(headers, "x-error-code").unwrap_or_default(), status.as_u16()) {
        ("GatedRepo", _) => (
            AccessDenied,
            "the repo is gated: accept its licence on the model page, then set HF_TOKEN to a token of that account"
                .into(),
        ),
        ("DisabledRepo", _) => (AccessDenied, format!("{host} has disabled this repo")),
        // A private repo looks like a missing one to those who may not see it.
        ("RepoNotFound", _) => (NotFound, format!("{host} shows no such repo: check its name; {token}")),
        ("RevisionNotFound", _) => (NotFound, "the repo has no such revision: check the branch, tag or commit".into()),
        ("EntryNotFound", _) => (NotFound, "the repo has no such file at this revision".into()),
        (_, 401 | 403) if with_token => (
            AccessDenied,
            format!(
                "{host} refuses access (HTTP {}): check that HF_TOKEN is valid, and accept the licence on the model page with its account",
                status.as_u16()
            ),
        ),
        (_, 401 | 403) => (
            AccessDenied,
            format!(
                "{host} refuses access (HTTP {}): accept the licence on the model page and set HF_TOKEN",
                status.as_u16()
            ),
        ),
        (_, 404 | 410) => (
            NotFound,
            format!("{host} has no such file (HTTP {}): check repo, revision and file name", status.as_u16()),
        ),
        (_, code) => (Protocol, format!("{host} answers with HTTP {code}, which no retry can be expected to change")),
    };
    Error::new(kind, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(status: u16, code: Option<&'static str>) -> ErrorKind {
        let mut headers = HeaderMap::new();
        if let Some(code) = code {
            headers.insert("x-error-code", code.parse().unwrap());
        }
        refusal(StatusCode::from_u16(status).unwrap(), &headers, "https://hub.co", false).kind()
    }

    #[test]
    fn kinds() {
        use ErrorKind::{AccessDenied, NotFound, Protocol};
        assert_eq!(kind(401, None), AccessDenied);
        assert_eq!(kind(403, None), AccessDenied);
        assert_eq!(kind(403, Some("GatedRepo")), AccessDenied);
        assert_eq!(kind(403, Some("DisabledRepo")), AccessDenied);
        assert_eq!(kind(401, Some("RepoNotFound")), NotFound);
        assert_eq!(kind(404, Some("RevisionNotFound")), NotFound);
        assert_eq!(kind(404, Some("EntryNotFound")), NotFound);
        assert_eq!(kind(404, None), NotFound);
        assert_eq!(kind(410, None), NotFound);
        assert_eq!(kind(400, None), Protocol);
        assert_eq!(kind(501, Some("Surprise")), Protocol);
    }
}
