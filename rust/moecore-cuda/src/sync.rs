//! The words that two sides share: atomics in somebody's memory, or loom's under `--cfg moecore_loom`.
#![expect(unsafe_code, reason = "memory shared with the GPU")]

#[cfg(moecore_loom)]
pub use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(moecore_loom))]
pub use std::sync::atomic::{AtomicU64, Ordering};

/// Words in memory that an owner keeps.
#[cfg(not(moecore_loom))]
pub struct Words {
    base: std::ptr::NonNull<AtomicU64>,
    count: usize,
    _owner: Box<dyn std::any::Any + Send + Sync>,
}

// SAFETY: all access goes through atomics.
#[cfg(not(moecore_loom))]
unsafe impl Send for Words {}
// SAFETY: as above.
#[cfg(not(moecore_loom))]
unsafe impl Sync for Words {}

#[cfg(not(moecore_loom))]
impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Words").field("base", &self.base).field("count", &self.count).finish_non_exhaustive()
    }
}

#[cfg(not(moecore_loom))]
impl Words {
    /// `count` words from `base` on.
    ///
    /// # Safety
    /// The memory is aligned to 8 bytes, that long, initialised, used as atomics only, and lives as long as `owner`.
    #[must_use]
    pub unsafe fn new(base: std::ptr::NonNull<u8>, count: usize, owner: Box<dyn std::any::Any + Send + Sync>) -> Self {
        debug_assert!(base.cast::<AtomicU64>().is_aligned());
        Self { base: base.cast(), count, _owner: owner }
    }

    /// Word `at`.
    ///
    /// # Panics
    /// If there is no such word.
    #[must_use]
    pub fn at(&self, at: usize) -> &AtomicU64 {
        assert!(at < self.count, "word {at} of {}", self.count);
        // SAFETY: inside the memory, which lives as long as `self`.
        unsafe { self.base.add(at).as_ref() }
    }

    /// Address of the first word.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }
}

/// Words of a model.
#[cfg(moecore_loom)]
#[derive(Debug)]
pub struct Words(Vec<AtomicU64>);

#[cfg(moecore_loom)]
impl Words {
    /// `count` words of the model's own: a model has no GPU's memory.
    ///
    /// # Safety
    /// None is needed.
    #[must_use]
    pub unsafe fn new(_: std::ptr::NonNull<u8>, count: usize, _: Box<dyn std::any::Any + Send + Sync>) -> Self {
        Self::zeros(count)
    }

    /// `count` zeros.
    #[must_use]
    pub fn zeros(count: usize) -> Self {
        Self((0..count).map(|_| AtomicU64::new(0)).collect())
    }

    /// Word `at`.
    #[must_use]
    pub fn at(&self, at: usize) -> &AtomicU64 {
        &self.0[at]
    }

    /// No address in a model.
    #[must_use]
    pub fn address(&self) -> u64 {
        0
    }
}
