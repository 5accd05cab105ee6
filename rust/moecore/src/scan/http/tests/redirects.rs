//! Redirects: where they may lead, what they may carry, and how signed URLs are used again.

use std::sync::Arc;

use super::server::{Reply, Server};
use super::{TOKEN, client, file, header};
use crate::ErrorKind;

/// A hub that sends everybody to a storage host, and that host.
fn hub_and_storage(total: usize, storage: impl Fn(usize) -> Option<Reply> + Send + Sync + 'static) -> (Server, Server) {
    let bytes = file(total, 100);
    let storage = Server::start(move |seen| storage(seen.number).unwrap_or_else(|| Reply::file(seen, &bytes)));
    let to = storage.url("/blob");
    let hub = Server::start(move |seen| Reply::redirect(&format!("{to}?sig={}", seen.number)));
    (hub, storage)
}

#[tokio::test]
async fn the_token_stays_at_home() {
    let (hub, storage) = hub_and_storage(1_000, |_| None);
    let got = header(&client(), &hub).await.unwrap();
    assert_eq!(got.requests, 2);
    assert_eq!(hub.seen()[0].header("authorization"), Some(format!("Bearer {TOKEN}").as_str()));
    let there = &storage.seen()[0];
    assert_eq!(there.header("authorization"), None);
    assert!(!format!("{there:?}").contains(TOKEN));
    assert_eq!(there.header("range"), Some("bytes=0-65535"));
}

#[tokio::test]
async fn a_relative_redirect_keeps_the_token() {
    let bytes = file(1_000, 0);
    let server = Server::start(move |seen| match seen.path.as_str() {
        "/f" => Reply::redirect("renamed/f?x=1"),
        _ => Reply::file(seen, &bytes),
    });
    header(&client(), &server).await.unwrap();
    let seen = server.seen();
    assert_eq!(seen[1].path, "/renamed/f?x=1");
    assert_eq!(seen[1].header("authorization"), seen[0].header("authorization"));
}

#[tokio::test]
async fn the_token_comes_back_only_to_its_own_host() {
    let bytes = file(1_000, 0);
    let hub = Arc::new(std::sync::OnceLock::<String>::new());
    let back = Arc::clone(&hub);
    let detour = Server::start(move |_| Reply::redirect(back.get().unwrap()));
    let to = detour.url("/x");
    let server = Server::start(move |seen| match seen.path.as_str() {
        "/f" => Reply::redirect(&to),
        _ => Reply::file(seen, &bytes),
    });
    hub.set(server.url("/home")).unwrap();
    header(&client(), &server).await.unwrap();
    assert_eq!(detour.seen()[0].header("authorization"), None);
    assert!(server.seen()[1].header("authorization").is_some());
}

#[tokio::test]
async fn the_tail_comes_from_where_the_start_came_from() {
    let (hub, storage) = hub_and_storage(100_000, |_| None);
    let got = header(&client(), &hub).await.unwrap();
    assert_eq!((got.requests, got.json.len()), (3, 99_992));
    assert_eq!(hub.seen().len(), 1, "resolved once");
    assert_eq!(storage.ranges(), [(0, 65_535), (65_536, 99_999)]);
    assert!(storage.seen().iter().all(|seen| seen.path == "/blob?sig=0"));
}

#[tokio::test]
async fn an_expired_url_is_resolved_again_once() {
    for status in [401, 403, 404, 410] {
        let (hub, storage) = hub_and_storage(100_000, move |number| (number == 1).then(|| Reply::new(status)));
        let client = client();
        let got = header(&client, &hub).await.unwrap();
        assert_eq!((got.requests, got.json.len()), (5, 99_992), "{status}");
        assert_eq!(client.counters().retries, 0);
        let paths: Vec<_> = storage.seen().into_iter().map(|seen| seen.path).collect();
        assert_eq!(paths, ["/blob?sig=0", "/blob?sig=0", "/blob?sig=1"]);
        assert_eq!(storage.ranges()[1..], [(65_536, 99_999), (65_536, 99_999)]);
    }
    let (hub, storage) = hub_and_storage(100_000, |number| (number >= 1).then(|| Reply::new(403)));
    let error = header(&client(), &hub).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AccessDenied);
    assert!(!error.to_string().contains("sig="), "{error}");
    assert_eq!((hub.seen().len(), storage.seen().len()), (2, 3));
}

#[tokio::test]
async fn storage_that_fails_is_asked_for_again_at_the_hub() {
    let (hub, storage) = hub_and_storage(1_000, |number| (number == 0).then(|| Reply::new(500)));
    header(&client(), &hub).await.unwrap();
    assert_eq!((hub.seen().len(), storage.seen().len()), (2, 2));
    let (hub, _storage) = hub_and_storage(1_000, |_| Some(Reply::hang_up()));
    let error = header(&client(), &hub).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network);
    assert!(!error.to_string().contains("sig="), "{error}");
}

#[tokio::test]
async fn redirects_without_end() {
    let server = Server::start(|_| Reply::redirect("/f"));
    let error = header(&client(), &server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    assert_eq!(server.seen().len(), 6, "one request and five redirects");

    let bytes = file(1_000, 0);
    let server = Server::start(move |seen| match seen.number {
        0..5 => Reply::redirect("/f"),
        _ => Reply::file(seen, &bytes),
    });
    header(&client(), &server).await.unwrap();
}

#[tokio::test]
async fn redirects_that_are_refused() {
    for location in ["ftp://127.0.0.1/f", "http://user:pw@127.0.0.1/f", "http://", "file:///etc/passwd"] {
        let server = Server::start(move |_| Reply::redirect(location));
        let error = header(&client(), &server).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{location}: {error}");
        assert_eq!(server.seen().len(), 1, "{location}");
    }
    let server = Server::start(|_| Reply::new(307));
    assert_eq!(header(&client(), &server).await.unwrap_err().kind(), ErrorKind::Protocol);
}
