//! The kernels as functions of a context. All are loaded and launched once before the first of them may wait: a kernel
//! that is loaded later can hold up the very copies that a waiting one is waiting for.
#![expect(unsafe_code, reason = "driver calls")]

use std::ffi::{CString, c_int, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

use moecore::{Error, ErrorKind, Result};

use crate::context::Context;
use crate::driver::{Handle, LaunchAttribute, LaunchConfig, SUCCESS};
use crate::image;
use crate::layout::{AcquireArgs, ExpertArgs, GateAcquireArgs, TableArgs};
use crate::stream::{OwnStream, Stream};
use crate::tuning::{
    ACQUIRE_BLOCKS, ACQUIRE_THREADS, DOWN_OUTPUTS, DOWN_SHARES, DOWN_WARPS, EXPERT_WARPS, TRANSPOSED_WARPS,
};

/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`.
const PROCESSORS: c_int = 16;
/// `CU_FUNC_ATTRIBUTE_PTX_VERSION`, and the first architecture whose kernels can wait for others.
const COMPILED_FOR: c_int = 5;
const LINKED: c_int = 90;

/// Number format of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
}

impl Format {
    /// The format that the kernels know by this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16].get(number as usize).copied()
    }

    /// Bytes of a number.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// One of the expert products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// act(gate) * up of a concatenated matrix.
    Up,
    /// The weighted sum of the down products.
    Down,
    /// A plain product.
    Linear,
    /// A plain product with a transposed matrix.
    LinearTransposed,
}

/// Kernels that do the same for different formats and widths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Acquire,
    GateAcquire,
    UpdateTable,
    ExpertUp,
    ExpertDown,
    SlotLinear,
    SlotLinearTransposed,
    Gate,
    GateLogits,
    GateScores,
    RouteSmall,
    RouteSmallLogits,
    RouteSmallScores,
    RouteCount,
    RouteCountLogits,
    RouteCountScores,
    RouteScan,
    RoutePlace,
    RoutePlaceFp8,
    Permute,
    PermuteFp8,
    Combine,
    Align,
}

/// Every family in the order of [`Family`]: its kernels' name, and for how many of [`FORMATS`] and of [`WIDTHS`] there is
/// one. With a single one the name has no such ending.
const FAMILIES: [(Family, &str, usize, usize); 23] = [
    (Family::Acquire, "moecore_acquire", 1, 1),
    (Family::GateAcquire, "moecore_gate_acquire", 3, 1),
    (Family::UpdateTable, "moecore_update_table", 1, 1),
    (Family::ExpertUp, "moecore_expert_up", 3, 1),
    (Family::ExpertDown, "moecore_expert_down", 3, 1),
    (Family::SlotLinear, "moecore_slot_linear", 3, 1),
    (Family::SlotLinearTransposed, "moecore_slot_linear_t", 3, 1),
    (Family::Gate, "moecore_gate", 3, 1),
    (Family::GateLogits, "moecore_gate_logits", 3, 4),
    (Family::GateScores, "moecore_gate_scores", 3, 4),
    (Family::RouteSmall, "moecore_route_small", 3, 1),
    (Family::RouteSmallLogits, "moecore_route_small_logits", 3, 4),
    (Family::RouteSmallScores, "moecore_route_small_scores", 3, 4),
    (Family::RouteCount, "moecore_route_count", 3, 1),
    (Family::RouteCountLogits, "moecore_route_count_logits", 3, 4),
    (Family::RouteCountScores, "moecore_route_count_scores", 3, 4),
    (Family::RouteScan, "moecore_route_scan", 1, 1),
    (Family::RoutePlace, "moecore_route_place_plain", 1, 1),
    (Family::RoutePlaceFp8, "moecore_route_place_fp8", 3, 1),
    (Family::Permute, "moecore_permute", 1, 1),
    (Family::PermuteFp8, "moecore_permute_fp8", 3, 1),
    (Family::Combine, "moecore_combine", 3, 1),
    (Family::Align, "moecore_align", 1, 1),
];
const FORMATS: [&str; 3] = ["_f32", "_bf16", "_f16"];
/// Neighbouring experts of a lane: for 64 experts, 128, 256 and 512.
const WIDTHS: [&str; 4] = ["_w2", "_w4", "_w8", "_w16"];
/// No kernel takes more bytes of arguments: all of them zero mean that there is nothing to do.
const NOTHING_TO_DO: [u64; 512] = [0; 512];

/// One kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernel {
    pub(crate) family: Family,
    pub(crate) format: usize,
    pub(crate) width: usize,
}

impl Kernel {
    /// The kernel of a family that has a single one.
    pub(crate) fn of(family: Family) -> Self {
        Self { family, format: 0, width: 0 }
    }

    /// The kernel of a family for a number format.
    pub(crate) fn with(family: Family, format: Format) -> Self {
        Self { format: format as usize, ..Self::of(family) }
    }

    fn name(self) -> String {
        let (_, name, formats, widths) = FAMILIES[self.family as usize];
        let format = if formats > 1 { FORMATS[self.format] } else { "" };
        let width = if widths > 1 { WIDTHS[self.width] } else { "" };
        format!("{name}{format}{width}")
    }
}

/// How many blocks and threads a kernel is launched with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) grid: (u32, u32),
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block in bytes.
    pub(crate) shared: u32,
    /// Blocks of a cluster; 1: there are none.
    pub(crate) cluster: u32,
    /// May start before the kernel ahead of it in the stream is over: it waits by itself for what that one writes.
    pub(crate) early: bool,
}

impl Shape {
    pub(crate) fn new(grid: (u32, u32), threads: u32) -> Self {
        Self { grid, threads, shared: 0, cluster: 1, early: false }
    }
}

/// What launches depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gpu {
    /// Multiprocessors.
    pub(crate) processors: u32,
    /// Whether kernels may start early and form clusters.
    pub(crate) linked: bool,
}

/// All kernels of a context.
#[derive(Debug)]
pub struct Kernels {
    handles: [[[Handle; WIDTHS.len()]; FORMATS.len()]; FAMILIES.len()],
    gpu: Gpu,
}

// SAFETY: function handles may be used from any thread; the module is never unloaded.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    pub(crate) fn load(context: &Arc<Context>) -> Result<Self> {
        let _entered = context.enter()?;
        let api = context.api();
        let image = image::for_capability(context.capability())?;
        let mut module = null_mut();
        // SAFETY: the image is a whole fatbin or cubin; the driver copies what it needs.
        unsafe { api.check((api.module_load)(&raw mut module, image.as_ptr().cast()), "loading the kernels")? };
        let handles = [[[null_mut(); WIDTHS.len()]; FORMATS.len()]; FAMILIES.len()];
        let mut kernels = Self { handles, gpu: Gpu { processors: 1, linked: false } };
        for kernel in every_kernel() {
            let name = CString::new(kernel.name()).unwrap_or_default();
            // SAFETY: address of a handle and a name that ends in 0.
            let status = unsafe { (api.module_function)(kernels.handle_mut(kernel), module, name.as_ptr()) };
            if status != SUCCESS {
                api.check(status, &format!("finding {}", kernel.name()))?;
            }
        }
        kernels.gpu = kernels.look(context)?;
        kernels.warm_up(context)?;
        Ok(kernels)
    }

    fn handle_mut(&mut self, kernel: Kernel) -> &mut Handle {
        &mut self.handles[kernel.family as usize][kernel.format][kernel.width]
    }

    /// Asks for what launches depend on.
    fn look(&self, context: &Context) -> Result<Gpu> {
        let api = context.api();
        let (mut device, mut processors, mut compiled_for) = (0, 0, 0);
        let number = c_int::try_from(context.ordinal()).unwrap_or(c_int::MAX);
        let waits = self.handles[Family::RoutePlace as usize][0][0];
        // SAFETY: addresses of locals, and a function of this context.
        unsafe {
            api.check((api.device)(&raw mut device, number), "opening the GPU")?;
            api.check((api.device_attribute)(&raw mut processors, PROCESSORS, device), "counting the multiprocessors")?;
            let asked = (api.function_attribute)(&raw mut compiled_for, COMPILED_FOR, waits);
            api.check(asked, "asking for a kernel's architecture")?;
        }
        // The code decides, not the GPU: what was made of PTX for an older one starts early and waits for nobody.
        let linked = api.launch_with.is_some() && compiled_for >= LINKED;
        Ok(Gpu { processors: processors.unsigned_abs().max(1), linked })
    }

    /// What launches depend on.
    pub(crate) fn gpu(&self) -> Gpu {
        self.gpu
    }

    /// Launches every kernel once with nothing to do.
    fn warm_up(&self, context: &Arc<Context>) -> Result<()> {
        let stream = OwnStream::new(context)?;
        // Some add up their bins, of which there are none, in so much shared memory.
        let shape = Shape { shared: 128, ..Shape::new((1, 1), 32) };
        for kernel in every_kernel() {
            // SAFETY: without pairs, entries, outputs, tokens or bins the kernels touch no other memory.
            unsafe { self.launch(context, kernel, &shape, stream.get(), &NOTHING_TO_DO)? };
        }
        stream.synchronize()
    }

    /// Launches `acquire`.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launch is over.
    pub(crate) unsafe fn acquire(&self, context: &Context, args: &AcquireArgs, stream: Stream) -> Result<()> {
        let shape = Shape::new((ACQUIRE_BLOCKS, 1), ACQUIRE_THREADS);
        // SAFETY: the caller's promise.
        unsafe { self.launch(context, Kernel::of(Family::Acquire), &shape, stream, args) }
    }

    /// Launches `gate_acquire`.
    ///
    /// # Safety
    /// As [`acquire`](Self::acquire).
    pub(crate) unsafe fn gate_acquire(
        &self,
        context: &Context,
        format: Format,
        args: &GateAcquireArgs,
        stream: Stream,
    ) -> Result<()> {
        let shape = Shape { early: true, ..Shape::new((ACQUIRE_BLOCKS, 1), ACQUIRE_THREADS) };
        // SAFETY: the caller's promise.
        unsafe { self.launch(context, Kernel::with(Family::GateAcquire, format), &shape, stream, args) }
    }

    /// Launches `update_table`.
    ///
    /// # Safety
    /// The table is valid on the GPU and has all entries' experts.
    pub(crate) unsafe fn update_table(&self, context: &Context, args: &TableArgs, stream: Stream) -> Result<()> {
        let shape = Shape::new((1, 1), 128);
        // SAFETY: the caller's promise.
        unsafe { self.launch(context, Kernel::of(Family::UpdateTable), &shape, stream, args) }
    }

    /// Launches an expert product.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launch is over, and fit the shapes.
    pub(crate) unsafe fn product(
        &self,
        context: &Context,
        product: Product,
        format: Format,
        args: &ExpertArgs,
        stream: Stream,
    ) -> Result<()> {
        let rows = if product == Product::Down { args.tokens } else { args.tokens * args.k };
        let (family, warps, columns) = match product {
            Product::Up => (Family::ExpertUp, EXPERT_WARPS, EXPERT_WARPS),
            Product::Down => (Family::ExpertDown, DOWN_WARPS, DOWN_WARPS / DOWN_SHARES * DOWN_OUTPUTS),
            Product::Linear => (Family::SlotLinear, EXPERT_WARPS, EXPERT_WARPS),
            Product::LinearTransposed => (Family::SlotLinearTransposed, TRANSPOSED_WARPS, 32 * 16 / format.bytes()),
        };
        let parts = args.outputs.div_ceil(columns);
        if rows == 0 || parts == 0 {
            return Ok(());
        }
        if parts > 65_535 {
            return Err(Error::new(ErrorKind::Device, format!("{} outputs are too many for one launch", args.outputs)));
        }
        let shape = Shape::new((rows, parts), 32 * warps);
        // SAFETY: the caller's promise.
        unsafe { self.launch(context, Kernel::with(family, format), &shape, stream, args) }
    }

    /// One launch of a kernel with a single struct of arguments.
    ///
    /// # Safety
    /// `args` is what the kernel takes, its addresses are valid on the GPU, and the context is current.
    pub(crate) unsafe fn launch<T>(
        &self,
        context: &Context,
        kernel: Kernel,
        shape: &Shape,
        stream: Stream,
        args: &T,
    ) -> Result<()> {
        let api = context.api();
        let function = self.handles[kernel.family as usize][kernel.format][kernel.width];
        let mut parameters = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        let parameters = parameters.as_mut_ptr();
        let linked = api.launch_with.filter(|_| self.gpu.linked && (shape.early || shape.cluster > 1));
        let status = if let Some(launch_with) = linked {
            let attributes = [
                if shape.early { LaunchAttribute::EARLY } else { LaunchAttribute::IGNORED },
                if shape.cluster > 1 { LaunchAttribute::cluster(shape.cluster) } else { LaunchAttribute::IGNORED },
            ];
            let config = LaunchConfig {
                grid: [shape.grid.0, shape.grid.1, 1],
                block: [shape.threads, 1, 1],
                shared_bytes: shape.shared,
                stream: stream.0,
                attributes: attributes.as_ptr(),
                attribute_count: 2,
            };
            // SAFETY: the driver copies arguments and attributes before it returns; the rest is the caller's promise.
            unsafe { launch_with(&raw const config, function, parameters, null_mut()) }
        } else {
            let ((x, y), threads) = (shape.grid, shape.threads);
            // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
            unsafe { (api.launch)(function, x, y, 1, threads, 1, 1, shape.shared, stream.0, parameters, null_mut()) }
        };
        if status == SUCCESS {
            return Ok(());
        }
        api.check(status, &format!("launching {}", kernel.name()))
    }
}

/// Names of all kernels.
#[cfg(test)]
pub(crate) fn names() -> impl Iterator<Item = String> {
    every_kernel().map(Kernel::name)
}

fn every_kernel() -> impl Iterator<Item = Kernel> {
    FAMILIES.into_iter().flat_map(|(family, _, formats, widths)| {
        (0..formats).flat_map(move |format| (0..widths).map(move |width| Kernel { family, format, width }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_lie_where_they_are_looked_up() {
        for (at, (family, ..)) in FAMILIES.into_iter().enumerate() {
            assert_eq!(family as usize, at, "{family:?}");
        }
    }
}
