//! The first bytes of many files on a hub, with as few requests and bytes as the files allow.
//!
//! One [`Client`] serves the whole process: one connection pool, one limit on requests in flight, one pause per host.
//! What a host asks for (`Retry-After`, `RateLimit`) holds for every fetch from it, not only for the one that was told.
//!
//! | file | idea |
//! |---|---|
//! | `client` | the front door: the public calls |
//! | `shared` | options, and the state that all fetches share |
//! | `fetch` | one logical GET: hops, permits, gates, retries |
//! | `read_header`, `read_file` | what a fetch reads: a header by ranges, or a small file |
//! | `range`, `redirect`, `status`, `limits` | pure rules: `Content-Range`, where a redirect may lead, what a status means, what a host asks for |
//! | `gate`, `hint`, `retry`, `cancel`, `cost` | state: pauses, first-range size, backoff, cancellation, counters |
//! | `origin` | endpoint and token, and the URLs of files |

mod cancel;
mod client;
mod cost;
mod fetch;
mod gate;
mod hint;
mod limits;
mod origin;
mod range;
mod read_file;
mod read_header;
mod redirect;
mod retry;
mod shared;
mod status;
#[cfg(test)]
mod tests;

pub use cancel::Cancel;
pub use client::Client;
pub use cost::{Cost, Counters};
pub use hint::SizeHint;
pub use origin::Origin;
pub use read_header::HeaderBytes;
pub use shared::ClientOptions;
