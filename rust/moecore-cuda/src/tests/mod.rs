//! The mailbox, with a thread in the place of the GPU.

mod build;
mod fake_gpu;
#[cfg(moecore_loom)]
mod loom;
#[cfg(not(moecore_loom))]
mod protocol;
