//! The header of a safetensors file, read from its first bytes.

use tokio::time::Instant;

use super::fetch::{Answer, Ask, Fetch};
use super::retry::Failure;
use super::{SizeHint, range};
use crate::header::{MAX_HEADER_LEN_REMOTE, header_len};
use crate::{Error, ErrorKind, Result};

/// So many ranges may make up one header. Two do unless a server sends less than it is asked for.
const MAX_PARTS: u32 = 8;
/// Memory that is set aside on a header's word alone; more is taken as bytes arrive.
const TRUSTED: u64 = 1024 * 1024;

/// A header's JSON, and what it took to get it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderBytes {
    /// The JSON: exactly as many bytes as the file's first 8 bytes say.
    pub json: Vec<u8>,
    /// Length of the whole file, if the server told it.
    pub file_len: Option<u64>,
    /// Requests sent, redirects and retries included.
    pub requests: u32,
    /// Body bytes received.
    pub bytes: u64,
}

/// The file from its first byte on, as far as it was received.
#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    file_len: Option<u64>,
}

impl Received {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// How many bytes the header takes, as far as that is known: 8 until its length was read.
    fn needed(&self, file: &str) -> Result<u64> {
        if let Some(prefix) = self.bytes.first_chunk::<8>() {
            return Ok(8 + header_len(*prefix, MAX_HEADER_LEN_REMOTE, self.file_len, file)?);
        }
        match self.file_len {
            Some(len) if len < 8 => {
                let why = "too few for a safetensors header; its upload may have failed";
                Err(Error::new(ErrorKind::InvalidHeader, format!("the file has {len} bytes, {why}")).with_file(file))
            }
            _ => Ok(8),
        }
    }

    /// Whether all that is needed is here.
    fn is_complete(&self, needed: u64) -> bool {
        self.len() >= needed.max(8)
    }

    /// Keeps the file's length; every answer has to tell the same one.
    fn learn_len(&mut self, len: Option<u64>, answer: &Answer<'_>) -> Result<()> {
        match (self.file_len, len) {
            (Some(known), Some(len)) if known != len => {
                Err(answer.protocol(format_args!("a file of {known} bytes and then one of {len}")))
            }
            _ => {
                self.file_len = self.file_len.or(len);
                Ok(())
            }
        }
    }
}

impl Fetch<'_> {
    /// The header's JSON. The first range has the hint's size; the second one, if any, is exactly what is missing.
    pub(super) async fn header(mut self, hint: &SizeHint) -> Result<HeaderBytes> {
        let mut probe = hint.admit().await;
        let mut got = Received::default();
        let (mut observed, mut parts) = (false, 0);
        loop {
            let needed = got.needed(self.file)?;
            if !observed && got.len() >= 8 {
                hint.observe(needed);
                // What this fetch can teach the others is known: its second request is no reason to wait.
                drop(probe.take());
                observed = true;
            }
            if got.is_complete(needed) {
                got.bytes.truncate(usize::try_from(needed).unwrap_or(usize::MAX));
                got.bytes.drain(..8);
                let Received { bytes: json, file_len } = got;
                return Ok(HeaderBytes { json, file_len, requests: self.requests, bytes: self.bytes });
            }
            if parts == MAX_PARTS {
                let what = format!("the server sends the header in more than {MAX_PARTS} pieces; check HF_ENDPOINT");
                return Err(Error::new(ErrorKind::Protocol, what).with_file(self.file));
            }
            let ask = if got.bytes.is_empty() { Ask::First(hint) } else { Ask::Range(got.len()..=needed - 1) };
            match self.part(&ask, &mut got).await {
                Ok(()) => parts += 1,
                Err(failure) => self.recover(failure).await?,
            }
        }
    }

    /// One attempt at the bytes that `ask` names. A failed one leaves `got` without them.
    async fn part(&mut self, ask: &Ask<'_>, got: &mut Received) -> Result<(), Failure> {
        let mut answer = self.attempt(ask).await?;
        answer.check_plain()?;
        match answer.status().as_u16() {
            206 => self.ranged(&mut answer, got).await,
            200 => self.whole(&mut answer, got).await,
            _ => unsatisfied(&answer, got),
        }
    }

    /// A 206: the bytes that `Content-Range` promises, no more and no less.
    async fn ranged(&mut self, answer: &mut Answer<'_>, got: &mut Received) -> Result<(), Failure> {
        let asked = answer.asked.clone().unwrap_or(0..=0);
        let part = range::part(answer.header("content-range"), &asked).map_err(|what| answer.protocol(what))?;
        got.learn_len(part.file_len, answer)?;
        let (start, end) = (got.bytes.len(), got.len() + part.len);
        got.bytes.reserve(usize::try_from(part.len.min(TRUSTED)).unwrap_or_default());
        let deadline = self.deadline(part.len);
        let read = tokio::time::timeout(deadline, self.exactly(answer, &mut got.bytes, end)).await;
        let read = read.unwrap_or_else(|_| Err(answer.broken("sends too slowly")));
        if read.is_err() {
            got.bytes.truncate(start);
        }
        read
    }

    async fn exactly(&mut self, answer: &mut Answer<'_>, buf: &mut Vec<u8>, end: u64) -> Result<(), Failure> {
        // To the end of the body, so that an HTTP/1.1 connection can be used again.
        while self.append(answer, buf, end).await? {
            if answer.surplus > 0 {
                return Err(answer.protocol("more bytes than its Content-Range says").into());
            }
        }
        if (buf.len() as u64) < end { Err(answer.broken("ended a body before its end")) } else { Ok(()) }
    }

    /// A 200: the server ignored the range and sends the file from its start. The rest is dropped unread.
    async fn whole(&mut self, answer: &mut Answer<'_>, got: &mut Received) -> Result<(), Failure> {
        got.learn_len(answer.response.content_length(), answer)?;
        got.bytes.clear();
        let read = self.until_complete(answer, got).await;
        if read.is_err() {
            got.bytes.clear();
        }
        read
    }

    async fn until_complete(&mut self, answer: &mut Answer<'_>, got: &mut Received) -> Result<(), Failure> {
        let started = Instant::now();
        loop {
            let needed = got.needed(self.file)?;
            if got.is_complete(needed) {
                return Ok(());
            }
            let read =
                tokio::time::timeout_at(started + self.deadline(needed), self.append(answer, &mut got.bytes, u64::MAX));
            if !read.await.unwrap_or_else(|_| Err(answer.broken("sends too slowly")))? {
                // Without a Content-Length, the end of the body is the only word on the file's length.
                got.file_len = got.file_len.or(Some(got.len()));
                got.needed(self.file)?;
                return Err(answer.broken("ended a body before its end"));
            }
        }
    }
}

/// A 416. The first range begins at 0, which every file has but an empty one.
fn unsatisfied(answer: &Answer<'_>, got: &mut Received) -> Result<(), Failure> {
    match range::unsatisfied(answer.header("content-range")) {
        None | Some(0) if got.bytes.is_empty() => {
            got.file_len = Some(0);
            Ok(())
        }
        len => {
            let len = len.map_or_else(|| "unknown length".to_owned(), |len| format!("{len} bytes"));
            let at = got.len();
            Err(answer.protocol(format_args!("HTTP 416 for a range at byte {at} of a file of {len}")).into())
        }
    }
}
