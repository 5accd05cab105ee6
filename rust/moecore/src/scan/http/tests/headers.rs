//! Headers from servers that behave, and from those that ignore or shorten ranges.

use std::time::Duration;

use super::server::{Reply, Server};
use super::{client, file, header};
use crate::ErrorKind;

/// The first range of a fresh hint.
const FIRST: usize = 64 * 1024;

fn serve(bytes: Vec<u8>) -> Server {
    Server::start(move |seen| Reply::file(seen, &bytes))
}

#[tokio::test]
async fn one_request_for_a_small_header() {
    let bytes = file(5_000, 100_000);
    let server = serve(bytes.clone());
    let got = header(&client(), &server).await.unwrap();
    assert_eq!(got.json, bytes[8..5_000]);
    assert_eq!((got.file_len, got.requests, got.bytes), (Some(105_000), 1, FIRST as u64));
    let seen = &server.seen()[0];
    assert_eq!(seen.header("range"), Some("bytes=0-65535"));
    assert_eq!(seen.header("accept-encoding"), Some("identity"));
    assert_eq!(seen.header("authorization"), Some("Bearer hf_t0psecret"));
    assert!(seen.header("user-agent").unwrap().starts_with("moecore/"));
    assert_eq!(seen.header("cookie"), None);
    assert_eq!(seen.header("referer"), None);
}

#[tokio::test]
async fn the_second_range_is_the_exact_tail() {
    let bytes = file(300_000, 1_000);
    let server = serve(bytes.clone());
    let got = header(&client(), &server).await.unwrap();
    assert_eq!(got.json, bytes[8..300_000]);
    assert_eq!((got.requests, got.bytes), (2, 300_000));
    assert_eq!(server.ranges(), [(0, FIRST - 1), (FIRST, 299_999)]);
}

#[tokio::test]
async fn off_by_eight() {
    for total in FIRST - 9..=FIRST + 9 {
        let bytes = file(total, 50);
        let server = serve(bytes.clone());
        let got = header(&client(), &server).await.unwrap();
        assert_eq!(got.json, bytes[8..total], "{total}");
        let tail = if total > FIRST { vec![(0, FIRST - 1), (FIRST, total - 1)] } else { vec![(0, FIRST - 1)] };
        assert_eq!(server.ranges(), tail, "{total}");
    }
}

#[tokio::test]
async fn the_file_may_end_with_its_header() {
    let bytes = file(2_000, 0);
    let got = header(&client(), &serve(bytes.clone())).await.unwrap();
    assert_eq!((got.json.as_slice(), got.file_len, got.bytes), (&bytes[8..], Some(2_000), 2_000));
}

#[tokio::test]
async fn a_total_that_the_server_does_not_know_is_none() {
    let bytes = file(2_000, 0);
    let server = Server::start(move |_| Reply::new(206).header("content-range", "bytes 0-1999/*").body(&bytes));
    assert_eq!(header(&client(), &server).await.unwrap().file_len, None);
}

#[tokio::test]
async fn an_ignored_range_is_read_no_further_than_needed() {
    let bytes = file(200_000, 30_000_000);
    let expected = bytes[8..200_000].to_vec();
    let server = Server::start(move |_| Reply::new(200).body(&bytes));
    let got = header(&client(), &server).await.unwrap();
    assert_eq!(got.json, expected);
    assert_eq!((got.file_len, got.requests), (Some(30_200_000), 1));
    assert!(got.bytes < 1_000_000, "{} bytes were read", got.bytes);
}

#[tokio::test]
async fn an_ignored_range_without_content_length() {
    let bytes = file(3_000, 500);
    let whole = bytes.clone();
    let server = Server::start(move |_| Reply::new(200).body(&whole).announce(None));
    let got = header(&client(), &server).await.unwrap();
    assert_eq!((got.json.as_slice(), got.file_len), (&bytes[8..3_000], None));

    let server = Server::start(move |_| Reply::new(200).body(&bytes[..2_000]).announce(None));
    let error = header(&client(), &server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidHeader, "{error}");
}

#[tokio::test]
async fn a_range_ignored_only_the_second_time() {
    let bytes = file(100_000, 10);
    let whole = bytes.clone();
    let server = Server::start(move |seen| match seen.number {
        0 => Reply::file(seen, &whole),
        _ => Reply::new(200).body(&whole),
    });
    assert_eq!(header(&client(), &server).await.unwrap().json, bytes[8..100_000]);
}

#[tokio::test]
async fn shorter_ranges_than_asked_for_are_put_together() {
    let bytes = file(90_000, 10_000);
    let whole = bytes.clone();
    let server = Server::start(move |seen| {
        let (first, last) = seen.range().unwrap();
        let last = last.min(first + 29_999);
        let range = format!("bytes {first}-{last}/{}", whole.len());
        Reply::new(206).header("content-range", &range).body(&whole[first..=last])
    });
    let got = header(&client(), &server).await.unwrap();
    assert_eq!(got.json, bytes[8..90_000]);
    assert_eq!(server.ranges(), [(0, FIRST - 1), (30_000, 89_999), (60_000, 89_999)]);
}

#[tokio::test]
async fn a_header_in_crumbs_is_refused() {
    let bytes = file(1_000, 0);
    let server = Server::start(move |seen| {
        let first = seen.range().unwrap().0;
        let range = format!("bytes {first}-{first}/1000");
        Reply::new(206).header("content-range", &range).body(&bytes[first..=first])
    });
    let error = header(&client(), &server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    assert!(server.seen().len() <= 8);
}

#[tokio::test]
async fn connections_are_used_again() {
    let bytes = file(1_000, 0);
    let server = Server::start(move |seen| match seen.path.as_str() {
        // The redirect's body comes after its head: it has to be waited for.
        "/f" => Reply::redirect("/g").drip(Duration::from_millis(1)),
        _ => Reply::file(seen, &bytes),
    });
    let client = client();
    for _ in 0..10 {
        header(&client, &server).await.unwrap();
    }
    let seen = server.seen();
    assert_eq!(seen.len(), 20);
    assert!(seen.iter().all(|seen| seen.connection == 0));
    let counters = client.counters();
    assert_eq!((counters.requests, counters.redirects, counters.retries), (20, 10, 0));
}
