//! What is tried again, how often, and what it says in the end.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use super::super::{Cancel, Client, ClientOptions, Cost, Origin, SizeHint};
use super::server::{Reply, Server};
use super::{client, file, header, header_with, options};
use crate::ErrorKind;

/// Answers the first `bad.len()` requests with `bad`, then with the file.
fn flaky(bad: Vec<Reply>) -> (Server, Vec<u8>) {
    let bytes = file(80_000, 10);
    let json = bytes[8..80_000].to_vec();
    let server = Server::start(move |seen| match bad.get(seen.number) {
        Some(reply) => reply.clone(),
        None => Reply::file(seen, &bytes),
    });
    (server, json)
}

#[tokio::test]
async fn what_passes_is_tried_again() {
    let bytes = file(80_000, 10);
    let start = Reply::new(206).header("content-range", "bytes 0-65535/80010").body(&bytes[..65_536]);
    for bad in [
        vec![Reply::hang_up()],
        vec![start.clone().cut(30_000)],
        vec![start.clone().cut(0)],
        // Whole as far as Content-Length goes, but less than Content-Range promised.
        vec![Reply::new(206).header("content-range", "bytes 0-65535/80010").body(&bytes[..65_000])],
        // The tail breaks off: what was there before it is kept.
        vec![
            start,
            Reply::new(206).header("content-range", "bytes 65536-79999/80010").body(&bytes[65_536..80_000]).cut(99),
        ],
        vec![Reply::new(500), Reply::new(502)],
        vec![Reply::new(408), Reply::new(503), Reply::new(504), Reply::new(500), Reply::hang_up()],
    ] {
        let text = format!("{bad:.60?}");
        let count = bad.len() as u64;
        let (server, json) = flaky(bad);
        let client = client();
        let got = header(&client, &server).await.unwrap();
        assert!(got.json == json, "{text}");
        assert_eq!(got.requests as usize, server.seen().len(), "{text}");
        let ranges = server.ranges();
        let last: Vec<_> = ranges.iter().rev().take(1).collect();
        assert_eq!(last, [&(65_536, 79_999)], "{text}");
        let retries = client.counters().retries;
        assert!(0 < retries && retries <= count, "{retries} retries: {text}");
    }
}

#[tokio::test]
async fn failures_without_end() {
    let server = Server::start(|_| Reply::new(500));
    let client = client();
    let error = header(&client, &server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network);
    assert!(error.to_string().contains("HTTP 500") && error.to_string().contains("after 6 tries"), "{error}");
    assert_eq!(server.seen().len(), 6, "one attempt and five retries");
    assert_eq!(client.counters().retries, 5);

    let server = Server::start(|_| Reply::hang_up());
    let error = header(&client, &server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network, "{error}");
    assert_eq!(server.seen().len(), 6);
}

#[tokio::test]
async fn nobody_listens() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    let origin = Origin::new(&url, None).unwrap();
    let (hint, cancel, cost) = (SizeHint::new(0), Cancel::new(), Cost::new());
    let error = client().header(&origin, &url, "f", &hint, &cancel, &cost).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network);
    assert!(error.to_string().contains("no connection to http://127.0.0.1"), "{error}");
    assert_eq!(cost.requests(), 6);
}

#[tokio::test]
async fn tls_without_a_certificate_is_an_error_and_no_panic() {
    let server = Server::start(|_| Reply::new(200));
    let url = server.url("/f").replace("http://", "https://");
    let origin = Origin::new(&url, None).unwrap();
    let (hint, cancel, cost) = (SizeHint::new(0), Cancel::new(), Cost::new());
    let client = Client::new(ClientOptions { retries: 0, ..options() }).unwrap();
    let error = client.header(&origin, &url, "f", &hint, &cancel, &cost).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network, "{error}");
}

#[tokio::test]
async fn silence_is_a_timeout() {
    let server = Server::start(|_| Reply::new(500).wait(Duration::from_secs(3)));
    let quick = ClientOptions { read_timeout: Duration::from_millis(60), retries: 1, ..options() };
    let start = Instant::now();
    let error = header(&Client::new(quick).unwrap(), &server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network);
    assert!(error.to_string().contains("did not answer in time"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_body_that_drips_is_given_up() {
    let drip = Duration::from_millis(40);
    let body = file(1_000, 0);
    let server = Server::start(move |seen| Reply::file(seen, &body).drip(drip));
    let quick = ClientOptions { read_timeout: 2 * drip, retries: 0, ..options() };
    let start = Instant::now();
    let error = header(&Client::new(quick).unwrap(), &server).await.unwrap_err();
    assert!(error.to_string().contains("too slowly"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn no_more_requests_in_flight_than_allowed() {
    let body = file(1_000, 0);
    let server = Server::start(move |seen| Reply::file(seen, &body).wait(Duration::from_millis(15)));
    let client = Client::new(ClientOptions { connections: 3, ..options() }).unwrap();
    let (hint, cancel) = (SizeHint::new(0), Cancel::new());
    let fetch = || header_with(&client, &server, &hint, &cancel);
    let three = || async { tokio::try_join!(fetch(), fetch(), fetch()) };
    tokio::try_join!(three(), three(), three(), three()).unwrap();
    assert_eq!(server.seen().len(), 12);
    assert_eq!(server.most_at_once(), 3);
}

#[tokio::test]
async fn a_cancel_drops_a_request_that_hangs() {
    let server = Server::start(|_| Reply::new(500).wait(Duration::from_secs(20)));
    let (hint, cancel, client) = (SizeHint::new(0), Cancel::new(), client());
    let start = Instant::now();
    let stop = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        cancel.clone().cancel();
    };
    let (result, ()) = tokio::join!(header_with(&client, &server, &hint, &cancel), stop);
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(start.elapsed() < Duration::from_secs(2));
    let again = header_with(&client, &server, &hint, &cancel).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Cancelled, "a cancel is for good");
    assert_eq!(server.seen().len(), 1);
}
