//! The kernels' machine code: what `build.rs` has compiled, or their source, for NVRTC.

use std::borrow::Cow;

use moecore::Result;

use crate::nvrtc;

/// Bytes at an address that the driver likes.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static EMBEDDED: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("MOECORE_IMAGE")));

/// The image for all GPUs, or `None` if it was built without a compiler.
#[must_use]
pub fn embedded() -> Option<&'static [u8]> {
    (!EMBEDDED.0.is_empty()).then_some(&EMBEDDED.0)
}

/// The image that a GPU of this compute capability loads.
pub(crate) fn for_capability(capability: (u32, u32)) -> Result<Cow<'static, [u8]>> {
    embedded().map_or_else(|| nvrtc::image(capability).map(Cow::Owned), |image| Ok(Cow::Borrowed(image)))
}
