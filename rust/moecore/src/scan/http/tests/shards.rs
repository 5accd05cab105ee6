//! Many shards of one repo at once: what they cost together.

use std::sync::Arc;

use super::super::{Cancel, Client, Cost, Origin, SizeHint};
use super::server::{Reply, Server};
use super::{client, file};

/// Fetches all shards at once, as a scan does, and gives back requests and bytes.
async fn scan(headers: Vec<usize>) -> (u64, u64) {
    let count = headers.len();
    let server = Server::start(move |seen| {
        let shard: usize = seen.path.trim_start_matches('/').parse().unwrap();
        Reply::file(seen, &file(headers[shard], 4_000_000))
    });
    let origin = Origin::new(&server.url(""), None).unwrap();
    let (client, hint, cost): (Client, _, _) = (client(), Arc::new(SizeHint::new(96 * 1024)), Arc::new(Cost::new()));
    let tasks: Vec<_> = (0..count)
        .map(|shard| {
            let (client, origin, url) = (client.clone(), origin.clone(), server.url(&format!("/{shard}")));
            let (hint, cost) = (Arc::clone(&hint), Arc::clone(&cost));
            tokio::spawn(async move { client.header(&origin, &url, "f", &hint, &Cancel::new(), &cost).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    (cost.requests(), cost.bytes())
}

#[tokio::test]
async fn like_deepseek_v3() {
    let headers: Vec<_> =
        (0..163).map(|shard| if shard % 40 == 0 { 11_000 } else { 74_200 + shard % 7 * 100 }).collect();
    let (requests, bytes) = scan(headers).await;
    assert_eq!(requests, 163);
    assert!(bytes / 163 < 88_000, "{} bytes a shard", bytes / 163);
}

#[tokio::test]
async fn like_kimi_k2() {
    let headers: Vec<_> = (0..61).map(|shard| 251_000 + shard * 37 % 61 * 820).collect();
    let needed = headers.iter().sum::<usize>() as u64;
    let (requests, bytes) = scan(headers).await;
    assert!(requests <= 61 + 24, "{requests} requests for 61 shards");
    assert!(bytes < needed * 125 / 100, "{bytes} bytes for {needed}");
}
