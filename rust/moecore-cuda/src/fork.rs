//! Whether this process is a forked child of one that had started CUDA. The system tells it once, so that no launch has
//! to ask for the process' number.
#![cfg_attr(unix, expect(unsafe_code, reason = "registering a handler"))]

use std::sync::atomic::{AtomicBool, Ordering};

use moecore::{Error, ErrorKind, Result};

static FORKED: AtomicBool = AtomicBool::new(false);

/// Has the system tell of forks from now on. Called before the driver makes its first context.
#[cfg(unix)]
pub(crate) fn watch() {
    use std::ffi::c_int;
    use std::sync::Once;

    unsafe extern "C" {
        fn pthread_atfork(
            prepare: Option<extern "C" fn()>,
            parent: Option<extern "C" fn()>,
            child: Option<extern "C" fn()>,
        ) -> c_int;
    }
    extern "C" fn in_child() {
        FORKED.store(true, Ordering::Relaxed);
    }
    static ONCE: Once = Once::new();
    // SAFETY: the handler only stores a flag. Without memory for it, a child meets the driver's own error.
    ONCE.call_once(|| unsafe {
        pthread_atfork(None, None, Some(in_child));
    });
}

/// There is no fork here.
#[cfg(not(unix))]
pub(crate) fn watch() {}

/// A forked child cannot use its parent's context.
pub(crate) fn check() -> Result<()> {
    if !FORKED.load(Ordering::Relaxed) {
        return Ok(());
    }
    let message = "this process was forked after CUDA had started, and CUDA does not survive a fork; start it with \
                   multiprocessing's `spawn` method";
    Err(Error::new(ErrorKind::Device, message))
}
