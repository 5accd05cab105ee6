//! A hand-written HTTP/1.1 server on 127.0.0.1: what it sends is up to each test, byte by byte.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// A request as the server saw it.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// Counts all requests of this server, from 0.
    pub(super) number: usize,
    pub(super) connection: usize,
    pub(super) path: String,
    pub(super) at: Instant,
    headers: Vec<(String, String)>,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// First and last byte asked for.
    pub(super) fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().unwrap(), last.parse().unwrap()))
    }
}

/// The Content-Length that the server sends.
#[derive(Debug, Clone, Copy, Default)]
enum Length {
    #[default]
    Own,
    Announced(usize),
    Absent,
}

/// What the server sends.
#[derive(Debug, Clone, Default)]
pub(super) struct Reply {
    status: u16,
    headers: String,
    body: Vec<u8>,
    length: Length,
    /// Wait before the answer.
    wait: Duration,
    /// Wait before each byte of the body.
    drip: Duration,
    close: bool,
}

impl Reply {
    pub(super) fn new(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    /// Ends the connection without an answer.
    pub(super) fn hang_up() -> Self {
        Self { close: true, ..Self::default() }
    }

    pub(super) fn redirect(location: &str) -> Self {
        Self::new(302).header("location", location).body(format!("Found. Redirecting to {location}").as_bytes())
    }

    /// A file from a server that does ranges as it should.
    pub(super) fn file(seen: &Seen, file: &[u8]) -> Self {
        let Some((first, last)) = seen.range() else { return Self::new(200).body(file) };
        if first >= file.len() {
            return Self::new(416).header("content-range", &format!("bytes */{}", file.len()));
        }
        let last = last.min(file.len() - 1);
        Self::new(206)
            .header("content-range", &format!("bytes {first}-{last}/{}", file.len()))
            .body(&file[first..=last])
    }

    pub(super) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.extend([name, ": ", value, "\r\n"]);
        self
    }

    pub(super) fn body(mut self, body: &[u8]) -> Self {
        self.body = body.to_vec();
        self
    }

    /// Announces `length` bytes, or nothing, whatever the body has. The connection ends after the body.
    pub(super) fn announce(mut self, length: Option<usize>) -> Self {
        self.length = length.map_or(Length::Absent, Length::Announced);
        self.close = true;
        self
    }

    /// Sends only the first `len` bytes of the body, then hangs up.
    pub(super) fn cut(mut self, len: usize) -> Self {
        let full = self.body.len();
        self.body.truncate(len);
        self.announce(Some(full))
    }

    pub(super) fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    pub(super) fn drip(mut self, drip: Duration) -> Self {
        self.drip = drip;
        self
    }

    /// `false` when the connection is over.
    fn send(self, stream: &mut TcpStream) -> bool {
        thread::sleep(self.wait);
        if self.status == 0 {
            return false;
        }
        let length = match self.length {
            Length::Own => format!("content-length: {}\r\n", self.body.len()),
            Length::Announced(length) => format!("content-length: {length}\r\n"),
            Length::Absent => String::new(),
        };
        let head = format!("HTTP/1.1 {} x\r\n{}{length}\r\n", self.status, self.headers);
        let sent = if self.drip.is_zero() {
            stream.write_all(&[head.as_bytes(), &self.body].concat())
        } else {
            stream.write_all(head.as_bytes()).and_then(|()| {
                self.body.iter().try_for_each(|&byte| {
                    thread::sleep(self.drip);
                    stream.write_all(&[byte])
                })
            })
        };
        sent.is_ok() && !self.close
    }
}

type Handler = Arc<dyn Fn(&Seen) -> Reply + Send + Sync>;

/// The server. Its threads end with the test process.
pub(super) struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    most: Arc<AtomicUsize>,
}

impl Server {
    pub(super) fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let handler: Handler = Arc::new(handler);
        let (seen, most) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let server = Self { address, seen: Arc::clone(&seen), most: Arc::clone(&most) };
        let now = Arc::new(AtomicUsize::new(0));
        thread::spawn(move || {
            for (connection, stream) in listener.incoming().enumerate() {
                let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
                let (now, most) = (Arc::clone(&now), Arc::clone(&most));
                thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    stream.set_nodelay(true).unwrap();
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    while let Some(request) = read_request(&mut reader, connection, &seen) {
                        most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                        let go_on = handler(&request).send(&mut stream);
                        now.fetch_sub(1, SeqCst);
                        if !go_on {
                            break;
                        }
                    }
                });
            }
        });
        server
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The requests so far.
    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The ranges asked for so far.
    pub(super) fn ranges(&self) -> Vec<(usize, usize)> {
        self.seen().iter().filter_map(Seen::range).collect()
    }

    /// The most requests that were being answered at once.
    pub(super) fn most_at_once(&self) -> usize {
        self.most.load(SeqCst)
    }
}

fn read_request(reader: &mut BufReader<TcpStream>, connection: usize, all: &Mutex<Vec<Seen>>) -> Option<Seen> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        lines.push(line.to_owned());
    }
    let path = lines[0].strip_prefix("GET ").expect("only GET is used").split(' ').next().unwrap().to_owned();
    let headers = lines[1..].iter().filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
    let mut all = all.lock().unwrap();
    let seen = Seen { number: all.len(), connection, path, at: Instant::now(), headers };
    all.push(seen.clone());
    Some(seen)
}
