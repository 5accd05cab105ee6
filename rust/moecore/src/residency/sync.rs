//! Atomics of the slot table: the standard library's, or loom's under `--cfg moecore_loom`.
//!
//! The name is not loom's usual `loom`: tokio hides its sockets under that one, and then the HTTP client does not build.

#[cfg(moecore_loom)]
pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(moecore_loom))]
pub(super) use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Where a thread begins its search for a free lane: each thread somewhere else, so that threads share no cache line.
#[cfg(not(moecore_loom))]
pub(super) fn first_lane() -> usize {
    use std::sync::atomic::AtomicUsize;
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: usize = THREADS.fetch_add(1, Ordering::Relaxed));
    MINE.with(|mine| *mine)
}

/// A fence before which loom lets other threads run: by itself it takes a fence and the access before it for one step,
/// and would not see what the table's clock is released for.
#[cfg(moecore_loom)]
pub(super) fn fence(order: Ordering) {
    loom::lazy_static! {
        static ref FENCES: AtomicU64 = AtomicU64::new(0);
    }
    // All fences use one word, so that loom tries both orders of any two.
    FENCES.fetch_add(1, Ordering::Relaxed);
    loom::sync::atomic::fence(order);
}

/// Always the first lane, so that the models meet on one.
#[cfg(moecore_loom)]
pub(super) fn first_lane() -> usize {
    0
}
