//! Experts on an NVIDIA GPU.
//!
//! A decode call of one layer is one launch of [`acquire`](CudaEngine::acquire) or of `gate_acquire`, and two of the
//! expert products. The first looks the experts up in a table on the GPU and writes a record into a ring in pinned host
//! memory. If all are resident nobody waits and nobody is asked. Else the kernel waits for a word of the answering
//! thread, which has asked the scheduler what goes where, and copies the missing rows itself, straight from pinned
//! memory, at 88 to 93 % of the copy engine's rate (`benches/results/cuda_fetch.md`).
//!
//! ```text
//!  torch's stream   acquire ───────────── waits ── copies rows ──> expert_up ──> expert_down
//!                      │ record                ▲ orders
//!  pinned memory     ring ─────┐          answer word
//!                              ▼               │
//!  answering thread          reads ── Decisions::call (core; no driver, no locks)
//! ```
//!
//! Why the kernel waits itself, and not the stream on a memory word: a call without a miss then needs one launch and no
//! trip over the bus, no driver feature is needed, and the kernel can give up, so that no fault leaves the GPU waiting.
//!
//! The driver is found at run time ([`is_available`]); nothing of CUDA is needed to build, install or import. This is
//! the only crate with unsafe code for a GPU. It knows neither Python nor torch: memory comes as addresses.

pub mod answer;
pub mod context;
pub mod copy;
pub mod driver;
pub mod engine;
mod fork;
pub mod image;
pub mod kernels;
pub mod layout;
pub mod mailbox;
pub mod nvrtc;
pub mod pinned;
pub mod prefetch;
pub mod resident;
pub mod routing;
pub mod stats;
pub mod stream;
pub mod sync;
pub mod tuning;

#[cfg(test)]
mod tests;

pub use driver::is_available;
pub use engine::{CudaEngine, Products, Setup};
pub use pinned::PinnedArena;
