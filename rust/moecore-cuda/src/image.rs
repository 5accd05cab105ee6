//! The kernels' machine code: what `build.rs` has compiled, or their source, for NVRTC.

use std::borrow::Cow;

use moecore::{Error, ErrorKind, Result};

use crate::nvrtc;

/// The oldest compute capability that the kernels are written for.
const OLDEST: (u32, u32) = (8, 0);

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
    if capability < OLDEST {
        let ((major, minor), (least, _)) = (capability, OLDEST);
        let message =
            format!("moecore's kernels need a GPU of compute capability {least}.0 or newer, not {major}.{minor}");
        return Err(Error::new(ErrorKind::Device, message));
    }
    embedded().map_or_else(|| nvrtc::image(capability).map(Cow::Owned), |image| Ok(Cow::Borrowed(image)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_gpus_are_refused_by_name() {
        let error = for_capability((7, 5)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("8.0 or newer, not 7.5"), "{error}");
    }
}
