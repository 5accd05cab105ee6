//! Where a redirect may lead, and who may see the token.

use reqwest::Url;

use crate::{Error, ErrorKind, Result};

/// A fetch follows at most this many redirects in a row.
pub(super) const MAX_REDIRECTS: u32 = 5;

/// The URL that `location` names, seen from `from`. Relative locations are allowed; leaving TLS is not.
pub(super) fn target(from: &Url, location: Option<&str>) -> Result<Url> {
    let refuse = |why: &str| Error::new(ErrorKind::Protocol, format!("redirect refused: {why}"));
    let location = location.ok_or_else(|| refuse("the answer has no Location that can be read"))?;
    let mut to = from.join(location).map_err(|error| refuse(&format!("its Location is not a URL ({error})")))?;
    if !matches!(to.scheme(), "http" | "https") {
        return Err(refuse("it leaves HTTP"));
    }
    if from.scheme() == "https" && to.scheme() == "http" {
        return Err(refuse("it leads from https to http, where anybody on the way can read and change the answer"));
    }
    if has_credentials(&to) {
        return Err(refuse("its Location carries a user name or password"));
    }
    to.set_fragment(None);
    Ok(to)
}

/// Same scheme, host and port: the only place where the token may go.
pub(super) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host_str().is_some()
        && a.host_str() == b.host_str()
        && a.port_or_known_default() == b.port_or_known_default()
}

/// A URL's own user name and password: the HTTP stack would send them as `Authorization`.
pub(super) fn has_credentials(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follow(from: &str, location: &str) -> Result<String> {
        target(&Url::parse(from).unwrap(), Some(location)).map(Into::into)
    }

    #[test]
    fn relative_and_absolute_locations() {
        let from = "https://hub.co/org/m/resolve/main/a.safetensors";
        assert_eq!(follow(from, "/new/m/a").unwrap(), "https://hub.co/new/m/a");
        assert_eq!(follow(from, "b").unwrap(), "https://hub.co/org/m/resolve/main/b");
        assert_eq!(follow(from, "//cdn.co/x?sig=1#f").unwrap(), "https://cdn.co/x?sig=1");
        assert_eq!(follow("http://hub.co/a", "https://hub.co/a").unwrap(), "https://hub.co/a");
    }

    #[test]
    fn what_is_refused() {
        for (from, location) in [
            ("https://hub.co/a", "http://hub.co/a"),
            ("https://hub.co/a", "http://cdn.co/a"),
            ("https://hub.co/a", "file:///etc/passwd"),
            ("http://hub.co/a", "ftp://hub.co/a"),
            ("http://hub.co/a", "http://user:secret@hub.co/a"),
            ("http://hub.co/a", "http://user@hub.co/a"),
            ("http://hub.co/a", "http://"),
        ] {
            assert_eq!(follow(from, location).unwrap_err().kind(), ErrorKind::Protocol, "{from} -> {location}");
        }
        let url = Url::parse("https://hub.co").unwrap();
        assert_eq!(target(&url, None).unwrap_err().kind(), ErrorKind::Protocol);
    }

    #[test]
    fn origins() {
        let same = |a: &str, b: &str| same_origin(&Url::parse(a).unwrap(), &Url::parse(b).unwrap());
        assert!(same("https://hub.co/a", "https://HUB.co:443/b"));
        assert!(same("http://127.0.0.1:80/", "http://127.0.0.1/"));
        assert!(!same("https://hub.co/a", "http://hub.co/a"));
        assert!(!same("https://hub.co/a", "https://hub.co:8443/a"));
        assert!(!same("https://hub.co/a", "https://cdn.hub.co/a"));
        assert!(!same("https://hub.co/a", "https://hub.co.evil.org/a"));
    }
}
