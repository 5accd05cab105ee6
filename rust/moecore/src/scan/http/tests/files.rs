//! Small files as a whole.

use super::super::{Cancel, Client, Cost};
use super::server::{Reply, Server};
use super::{client, origin};
use crate::{ErrorKind, Result};

async fn small(client: &Client, server: &Server, cap: u64) -> Result<Option<Vec<u8>>> {
    let (cancel, cost) = (Cancel::new(), Cost::new());
    client.small_file(&origin(server), &server.url("/config.json"), "config.json", cap, &cancel, &cost).await
}

#[tokio::test]
async fn up_to_the_cap() {
    let server = Server::start(|_| Reply::new(200).body(b"{\"a\": 1}"));
    assert_eq!(small(&client(), &server, 8).await.unwrap().unwrap(), b"{\"a\": 1}");
    assert_eq!(server.seen()[0].header("range"), None);
    assert!(server.seen()[0].header("authorization").is_some());
    let error = small(&client(), &server, 7).await.unwrap_err();
    assert_eq!((error.kind(), error.file()), (ErrorKind::InvalidConfig, Some("config.json")), "{error}");

    let server = Server::start(|_| Reply::new(200).body(&b" ".repeat(100_000)).announce(None));
    assert_eq!(small(&client(), &server, 100_000).await.unwrap().unwrap().len(), 100_000);
    assert_eq!(small(&client(), &server, 99_999).await.unwrap_err().kind(), ErrorKind::InvalidConfig);
    let server = Server::start(|_| Reply::new(200));
    assert_eq!(small(&client(), &server, 10).await.unwrap(), Some(vec![]));
}

#[tokio::test]
async fn a_missing_file_is_none_and_a_missing_repo_an_error() {
    let server = Server::start(|_| Reply::new(404));
    assert_eq!(small(&client(), &server, 10).await.unwrap(), None);
    let server = Server::start(|_| Reply::new(404).header("x-error-code", "EntryNotFound"));
    assert_eq!(small(&client(), &server, 10).await.unwrap(), None);
    for code in ["RepoNotFound", "RevisionNotFound"] {
        let server = Server::start(move |_| Reply::new(404).header("x-error-code", code));
        assert_eq!(small(&client(), &server, 10).await.unwrap_err().kind(), ErrorKind::NotFound);
    }
    let server = Server::start(|_| Reply::new(403));
    assert_eq!(small(&client(), &server, 10).await.unwrap_err().kind(), ErrorKind::AccessDenied);
}

#[tokio::test]
async fn broken_bodies_are_tried_again() {
    let server = Server::start(|seen| match seen.number {
        0 => Reply::hang_up(),
        1 => Reply::new(200).body(b"{\"a\": 1}").cut(3),
        _ => Reply::new(200).body(b"{\"a\": 1}"),
    });
    assert_eq!(small(&client(), &server, 100).await.unwrap().unwrap(), b"{\"a\": 1}");
}

#[tokio::test]
async fn what_was_not_asked_for_is_refused() {
    for reply in [
        Reply::new(206).header("content-range", "bytes 0-1/9").body(b"{}"),
        Reply::new(200).header("content-encoding", "gzip").body(b"{}"),
        Reply::new(416),
    ] {
        let server = Server::start(move |_| reply.clone());
        assert_eq!(small(&client(), &server, 10).await.unwrap_err().kind(), ErrorKind::Protocol);
    }
}
