//! A flag that ends waits at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use crate::{Error, ErrorKind, Result};

/// Stops every fetch that was given a clone of it: running requests are dropped, waits end at once.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<State>);

#[derive(Debug, Default)]
struct State {
    flag: AtomicBool,
    wake: Notify,
}

impl Cancel {
    /// A flag that is not set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the flag for good and wakes everybody who waits for it.
    pub fn cancel(&self) {
        self.0.flag.store(true, Ordering::Release);
        self.0.wake.notify_waiters();
    }

    /// Whether [`Cancel::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.flag.load(Ordering::Acquire)
    }

    /// Returns once [`Cancel::cancel`] was called.
    pub async fn cancelled(&self) {
        // Registered before the flag is read: a cancel between the two is not missed.
        let woken = self.0.wake.notified();
        if !self.is_cancelled() {
            woken.await;
        }
    }

    /// Runs `work` until it ends or the flag is set, whichever is first.
    pub(super) async fn guard<T>(&self, file: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.cancelled() => Err(Error::new(ErrorKind::Cancelled, "cancelled").with_file(file)),
            result = work => result,
        }
    }
}
