//! The crate's one error: a kind to act on, a message that says what to do, and the file and tensor it is about.

use std::fmt;

/// What went wrong, as far as a caller can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A safetensors header breaks the format's rules.
    InvalidHeader,
    /// `config.json` or an index file cannot be used.
    InvalidConfig,
    /// The target is neither a repo id nor a path that can be scanned.
    InvalidTarget,
    /// A repo, revision or file does not exist.
    NotFound,
    /// The repo is gated or private, or the token is not accepted.
    AccessDenied,
    /// The host asks for fewer requests than the scan may still make.
    RateLimited,
    /// The connection failed, timed out or broke off, after all retries.
    Network,
    /// The server's answer breaks HTTP or contradicts itself.
    Protocol,
    /// The network is switched off and the answer is not cached.
    Offline,
    /// A local file cannot be read or written.
    Io,
    /// The caller cancelled the work.
    Cancelled,
    /// The memory given to experts cannot hold what one call needs.
    Budget,
    /// A device, its driver or its memory failed.
    Device,
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error with its kind, the file and tensor it is about, and the cause.
///
/// Messages are lower case, end without a full stop, and say what to do where there is something to do.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    file: Option<String>,
    tensor: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    /// A new error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), file: None, tensor: None, source: None }
    }

    /// Names the file the error is about.
    #[must_use]
    pub fn with_file(mut self, file: impl Into<String>) -> Self {
        self.file.get_or_insert_with(|| file.into());
        self
    }

    /// Names the tensor the error is about.
    #[must_use]
    pub fn with_tensor(mut self, tensor: impl Into<String>) -> Self {
        self.tensor.get_or_insert_with(|| tensor.into());
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The message alone, without the names and the cause.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The file the error is about, as the caller named it.
    #[must_use]
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// The tensor the error is about.
    #[must_use]
    pub fn tensor(&self) -> Option<&str> {
        self.tensor.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{file}: ")?;
        }
        if let Some(tensor) = &self.tensor {
            write!(f, "tensor `{tensor}`: ")?;
        }
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
