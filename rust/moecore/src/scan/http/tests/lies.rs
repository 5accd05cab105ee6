//! Servers and files that contradict themselves.

use super::server::{Reply, Server};
use super::{client, file, header};
use crate::ErrorKind::{self, AccessDenied, InvalidHeader, NotFound, Protocol};

async fn kind(reply: Reply) -> (ErrorKind, usize) {
    let server = Server::start(move |_| reply.clone());
    let error = header(&client(), &server).await.unwrap_err();
    (error.kind(), server.seen().len())
}

#[tokio::test]
async fn wrong_content_ranges() {
    let body = file(2_000, 0);
    for range in ["bytes 8-2007/9000", "bytes 0-1999/1000", "bytes 0-99999/100000", "bytes 0-1999", "nonsense"] {
        let reply = Reply::new(206).header("content-range", range).body(&body);
        assert_eq!(kind(reply).await, (Protocol, 1), "{range}");
    }
    assert_eq!(kind(Reply::new(206).body(&body)).await, (Protocol, 1));
    let too_long = Reply::new(206).header("content-range", "bytes 0-999/2000").body(&body);
    assert_eq!(kind(too_long).await, (Protocol, 1));
}

#[tokio::test]
async fn a_file_shorter_than_its_header_claims() {
    let body = file(90_000, 0);
    let server = Server::start(move |seen| Reply::file(seen, &body[..80_000]));
    let error = header(&client(), &server).await.unwrap_err();
    assert_eq!(error.kind(), InvalidHeader, "{error}");
    assert_eq!(server.seen().len(), 1, "the tail is not asked for");
}

#[tokio::test]
async fn huge_claims() {
    for claim in [100_000_000_u64, 1 << 40, u64::MAX] {
        let body = [claim.to_le_bytes().as_slice(), &[b' '; 100]].concat();
        for total in ["*".to_owned(), "108".to_owned(), u64::MAX.to_string()] {
            let reply = Reply::new(206).header("content-range", &format!("bytes 0-107/{total}")).body(&body);
            assert_eq!(kind(reply).await, (InvalidHeader, 1), "{claim} in {total}");
        }
        assert_eq!(kind(Reply::new(200).body(&body)).await, (InvalidHeader, 1));
        assert_eq!(kind(Reply::new(200).body(&body).announce(Some(1 << 50))).await, (InvalidHeader, 1));
    }
}

#[tokio::test]
async fn files_without_room_for_a_header() {
    assert_eq!(kind(Reply::new(416).header("content-range", "bytes */0")).await, (InvalidHeader, 1));
    assert_eq!(kind(Reply::new(416)).await, (InvalidHeader, 1));
    assert_eq!(kind(Reply::new(200)).await, (InvalidHeader, 1));
    let tiny = Reply::new(206).header("content-range", "bytes 0-4/5").body(b"12345");
    assert_eq!(kind(tiny).await, (InvalidHeader, 1));
    assert_eq!(kind(Reply::new(416).header("content-range", "bytes */5000")).await, (Protocol, 1));
}

#[tokio::test]
async fn a_file_that_ends_before_the_tail() {
    let body = file(90_000, 10);
    let server = Server::start(move |seen| match seen.number {
        0 => Reply::file(seen, &body),
        _ => Reply::file(seen, &body[..100]),
    });
    let error = header(&client(), &server).await.unwrap_err();
    assert_eq!(error.kind(), Protocol, "{error}");
}

#[tokio::test]
async fn a_file_that_changes_between_two_ranges() {
    let (old, new) = (file(90_000, 10), file(90_000, 20));
    let server = Server::start(move |seen| Reply::file(seen, if seen.number == 0 { &old } else { &new }));
    let error = header(&client(), &server).await.unwrap_err();
    assert_eq!(error.kind(), Protocol, "{error}");
}

#[tokio::test]
async fn compressed_bodies() {
    let body = file(2_000, 0);
    let reply = Reply::new(206).header("content-range", "bytes 0-1999/2000").body(&body);
    assert_eq!(kind(reply.clone().header("content-encoding", "gzip")).await, (Protocol, 1));
    assert_eq!(kind(Reply::new(200).header("content-encoding", "br").body(&body)).await, (Protocol, 1));
    let server = Server::start(move |_| reply.clone().header("content-encoding", "identity"));
    assert!(header(&client(), &server).await.is_ok());
}

#[tokio::test]
async fn refusals_are_not_retried() {
    assert_eq!(kind(Reply::new(404)).await, (NotFound, 1));
    assert_eq!(kind(Reply::new(404).header("x-error-code", "EntryNotFound")).await, (NotFound, 1));
    assert_eq!(kind(Reply::new(401).header("x-error-code", "RepoNotFound")).await, (NotFound, 1));
    assert_eq!(kind(Reply::new(401)).await, (AccessDenied, 1));
    assert_eq!(kind(Reply::new(403).header("x-error-code", "GatedRepo")).await, (AccessDenied, 1));
    assert_eq!(kind(Reply::new(400)).await, (Protocol, 1));
    assert_eq!(kind(Reply::new(304)).await, (Protocol, 1));

    let server = Server::start(|_| Reply::new(403).header("x-error-code", "GatedRepo"));
    let text = header(&client(), &server).await.unwrap_err().to_string();
    assert!(text.contains("accept its licence") && text.contains("HF_TOKEN"), "{text}");
}

#[tokio::test]
async fn an_answer_that_is_no_http() {
    let server = Server::start(|_| Reply::new(200).header("content-length", "x"));
    assert!(header(&client(), &server).await.is_err());
}
