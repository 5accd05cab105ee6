//! What a host asks for holds for everybody who talks to it, and for nobody else.

use std::time::{Duration, Instant};

use super::super::{Cancel, Client, ClientOptions, SizeHint};
use super::server::{Reply, Server};
use super::{client, file, header, header_with, options};
use crate::ErrorKind;

/// Answers the first request with `first`, the others with a file.
fn then_file(first: Reply) -> Server {
    let bytes = file(1_000, 0);
    Server::start(move |seen| if seen.number == 0 { first.clone() } else { Reply::file(seen, &bytes) })
}

#[tokio::test]
async fn a_429_pauses_the_others_too() {
    let server = then_file(Reply::new(429).header("retry-after", "1"));
    let client = client();
    let first = header(&client, &server);
    let second = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(client.pause_for(&server.url("/elsewhere")) > Duration::from_millis(300));
        header(&client, &server).await
    };
    let (first, second) = tokio::join!(first, second);
    assert_eq!((first.unwrap().requests, second.unwrap().requests), (2, 1));
    let seen = server.seen();
    for later in &seen[1..] {
        let waited = later.at - seen[0].at;
        assert!(waited >= Duration::from_millis(950) && waited < Duration::from_secs(4), "{waited:?}");
    }
    assert_eq!(client.pause_for(&server.url("/f")), Duration::ZERO);
    let counters = client.counters();
    assert_eq!((counters.rate_limited, counters.retries), (1, 1));
    assert!((900..=1_000).contains(&counters.paused_ms), "{}", counters.paused_ms);
}

#[tokio::test]
async fn another_host_is_not_paused() {
    let limited = then_file(Reply::new(503).header("retry-after", "1"));
    let free = then_file(Reply::new(500));
    let client = client();
    let start = Instant::now();
    let slow = async { header(&client, &limited).await.map(|_| start.elapsed()) };
    let quick = async { header(&client, &free).await.map(|_| start.elapsed()) };
    let (slow, quick) = tokio::join!(slow, quick);
    assert!(slow.unwrap() >= Duration::from_secs(1));
    assert!(quick.unwrap() < Duration::from_millis(700));
}

#[tokio::test]
async fn a_pause_leaves_others_their_room_in_flight() {
    let limited = then_file(Reply::new(429).header("retry-after", "1").wait(Duration::from_millis(100)));
    let free = then_file(Reply::new(500));
    let client = Client::new(ClientOptions { connections: 1, ..options() }).unwrap();
    let start = Instant::now();
    // The second one passes the open gate and then waits for room, which it gets when the gate is closed.
    let slow = async { tokio::try_join!(header(&client, &limited), header(&client, &limited)).unwrap() };
    let quick = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        header(&client, &free).await.unwrap();
        assert!(start.elapsed() < Duration::from_millis(800), "{:?}", start.elapsed());
    };
    tokio::join!(slow, quick);
    let seen = limited.seen();
    assert_eq!(seen.len(), 3);
    assert!(seen[1].at - seen[0].at >= Duration::from_millis(950), "{:?}", seen[1].at - seen[0].at);
}

#[tokio::test]
async fn the_draft_header_counts_on_a_429() {
    let server = then_file(Reply::new(429).header("RateLimit", "\"api\";r=0;t=1"));
    header(&client(), &server).await.unwrap();
    let seen = server.seen();
    assert!(seen[1].at - seen[0].at >= Duration::from_millis(950));
}

#[tokio::test]
async fn the_draft_header_counts_on_a_200_and_on_a_redirect() {
    let bytes = file(1_000, 0);
    let server = Server::start(move |seen| match seen.number {
        0 => Reply::file(seen, &bytes).header("ratelimit", "\"resolvers\";r=0;t=1"),
        1 => Reply::redirect("/g").header("ratelimit", "\"resolvers\";r=0;t=1, \"api\";r=7;t=99"),
        _ => Reply::file(seen, &bytes),
    });
    let client = client();
    header(&client, &server).await.unwrap();
    assert!(client.pause_for(&server.url("/")) > Duration::from_millis(500));
    header(&client, &server).await.unwrap();
    let seen = server.seen();
    for pair in seen.windows(2) {
        assert!(pair[1].at - pair[0].at >= Duration::from_millis(950));
    }
}

#[tokio::test]
async fn too_long_a_pause_fails_at_once_for_everybody() {
    let server = then_file(Reply::new(429).header("retry-after", "3600"));
    let client = client();
    for _ in 0..2 {
        let start = Instant::now();
        let error = header(&client, &server).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::RateLimited);
        assert!(error.to_string().contains("s;") && error.to_string().contains("HF_TOKEN"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(1));
    }
    assert_eq!(server.seen().len(), 1, "the host is left alone");
}

#[tokio::test]
async fn a_429_without_end() {
    let server = Server::start(|_| Reply::new(429));
    let error = header(&client(), &server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RateLimited, "{error}");
    assert_eq!(server.seen().len(), 6);
    let server = Server::start(|_| Reply::new(503).header("retry-after", "0"));
    let error = header(&client(), &server).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RateLimited, "{error}");
    assert_eq!(server.seen().len(), 6);
}

#[tokio::test]
async fn answers_that_python_got_count() {
    let server = then_file(Reply::new(500));
    let client = client();
    let url = server.url("/api/models/org/name");
    client.note_response("no url", 429, &[("Retry-After".into(), "9".into())]);
    client.note_response(&url, 200, &[("RateLimit".into(), "\"api\";r=3;t=9".into())]);
    assert_eq!(client.pause_for(&url), Duration::ZERO);
    client.note_response(&url, 200, &[("RateLimit".into(), "\"api\";r=0;t=1".into())]);
    assert!(client.pause_for(&url) > Duration::from_millis(800));
    assert_eq!(client.pause_for("no url"), Duration::ZERO);
    let start = Instant::now();
    header(&client, &server).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(950));
}

#[tokio::test]
async fn a_cancel_ends_a_pause() {
    let server = then_file(Reply::new(429).header("retry-after", "60"));
    let (client, hint, cancel) = (client(), SizeHint::new(0), Cancel::new());
    let start = Instant::now();
    let stop = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        cancel.cancel();
    };
    let (result, ()) = tokio::join!(header_with(&client, &server, &hint, &cancel), stop);
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}
