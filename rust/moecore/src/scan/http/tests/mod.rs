//! Fetches against a local server that misbehaves on demand.

mod files;
mod headers;
mod lies;
mod pauses;
mod redirects;
mod retries;
mod server;
mod shards;

use std::time::Duration;

use server::Server;

use super::{Cancel, Client, ClientOptions, Cost, HeaderBytes, Origin, SizeHint};
use crate::Result;

/// What the tests put in `Authorization`; no message may hold it.
const TOKEN: &str = "hf_t0psecret";

fn options() -> ClientOptions {
    ClientOptions { backoff_base: Duration::from_millis(4), ..ClientOptions::default() }
}

fn client() -> Client {
    Client::new(options()).unwrap()
}

fn origin(server: &Server) -> Origin {
    Origin::new(&server.url(""), Some(TOKEN)).unwrap()
}

/// Fetches the header of the server's `/f` with a hint of its own.
async fn header(client: &Client, server: &Server) -> Result<HeaderBytes> {
    header_with(client, server, &SizeHint::new(0), &Cancel::new()).await
}

async fn header_with(client: &Client, server: &Server, hint: &SizeHint, cancel: &Cancel) -> Result<HeaderBytes> {
    let cost = Cost::new();
    let result = client.header(&origin(server), &server.url("/f"), "f.safetensors", hint, cancel, &cost).await;
    match &result {
        Ok(got) => {
            assert_eq!((u64::from(got.requests), got.bytes), (cost.requests(), cost.bytes()));
        }
        Err(error) => {
            assert_eq!(error.file(), Some("f.safetensors"), "{error}");
            assert!(!format!("{error} {error:?}").contains(TOKEN), "{error}");
        }
    }
    result
}

/// A file whose header takes `total` bytes, length prefix included, and `data` bytes after it.
fn file(total: usize, data: usize) -> Vec<u8> {
    let mut bytes = ((total - 8) as u64).to_le_bytes().to_vec();
    bytes.extend((8..total).map(|at| b'a' + u8::try_from(at % 26).unwrap()));
    bytes.resize(total + data, 0);
    bytes
}
