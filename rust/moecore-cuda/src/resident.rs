//! Expert products over a resident tensor: all experts' matrices one after the other, where an expert's slot is its
//! number.
#![expect(unsafe_code, reason = "launches with addresses from outside")]

use std::sync::Arc;

use moecore::{Error, ErrorKind, Result};

use crate::context::Context;
use crate::engine::Products;
use crate::stream::Stream;

/// Launches an expert product. Its matrix lies at `offset` of each expert, and its `experts` are
/// `expert_bytes` apart.
///
/// # Safety
/// All addresses are valid on the GPU until the launch is over and fit the shapes.
pub unsafe fn product(
    context: &Arc<Context>,
    tensor: u64,
    expert_bytes: u64,
    experts: u32,
    what: &Products,
    stream: Stream,
) -> Result<()> {
    let pairs = u64::from(what.tokens) * u64::from(what.k);
    if pairs >= 1 << 31 {
        let (tokens, k) = (what.tokens, what.k);
        let message = format!("expert_matvec: {tokens} tokens with {k} experts each are too many for one launch");
        return Err(Error::new(ErrorKind::Device, message));
    }
    let args = what.args(tensor, expert_bytes, experts);
    let kernels = context.kernels()?;
    let _entered = context.enter()?;
    // SAFETY: the caller's promise.
    unsafe { kernels.product(context, what.product, what.format, &args, stream) }
}
