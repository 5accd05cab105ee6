//! The kernels as functions of a context. All are loaded and launched once before the first of them may wait: a kernel
//! that is loaded later can hold up the very copies that a waiting one is waiting for.
#![expect(unsafe_code, reason = "driver calls")]

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use moecore::{Error, ErrorKind, Result};

use crate::context::Context;
use crate::driver::Handle;
use crate::image;
use crate::layout::{AcquireArgs, ExpertArgs, TABLE_BATCH, TableArgs};
use crate::stream::{OwnStream, Stream};
use crate::tuning::{
    ACQUIRE_BLOCKS, ACQUIRE_THREADS, DOWN_OUTPUTS, DOWN_SHARES, DOWN_WARPS, EXPERT_WARPS, TRANSPOSED_WARPS,
};

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

const EXPERTS: [(Product, [&CStr; 3]); 4] = [
    (Product::Up, [c"moecore_expert_up_f32", c"moecore_expert_up_bf16", c"moecore_expert_up_f16"]),
    (Product::Down, [c"moecore_expert_down_f32", c"moecore_expert_down_bf16", c"moecore_expert_down_f16"]),
    (Product::Linear, [c"moecore_slot_linear_f32", c"moecore_slot_linear_bf16", c"moecore_slot_linear_f16"]),
    (
        Product::LinearTransposed,
        [c"moecore_slot_linear_t_f32", c"moecore_slot_linear_t_bf16", c"moecore_slot_linear_t_f16"],
    ),
];

/// All kernels of a context.
#[derive(Debug)]
pub struct Kernels {
    acquire: Handle,
    update_table: Handle,
    experts: [[Handle; 3]; 4],
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
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole fatbin or cubin; the driver copies what it needs.
        unsafe { api.check((api.module_load)(&raw mut module, image.as_ptr().cast()), "loading the kernels")? };
        let find = |name: &CStr| {
            let mut function = std::ptr::null_mut();
            // SAFETY: address of a local and a name that ends in 0.
            let status = unsafe { (api.module_function)(&raw mut function, module, name.as_ptr()) };
            api.check(status, &format!("finding {}", name.to_string_lossy())).map(|()| function)
        };
        let mut experts = [[std::ptr::null_mut(); 3]; 4];
        for (handles, (_, names)) in experts.iter_mut().zip(EXPERTS) {
            for (handle, name) in handles.iter_mut().zip(names) {
                *handle = find(name)?;
            }
        }
        let kernels =
            Self { acquire: find(c"moecore_acquire")?, update_table: find(c"moecore_update_table")?, experts };
        kernels.warm_up(context)?;
        Ok(kernels)
    }

    /// Launches every kernel once with nothing to do.
    fn warm_up(&self, context: &Arc<Context>) -> Result<()> {
        let stream = OwnStream::new(context)?;
        let nothing = AcquireArgs::default();
        // SAFETY: without pairs, entries or outputs the kernels touch no memory.
        unsafe {
            self.acquire(context, &nothing, stream.get())?;
            let table = TableArgs { table: 0, count: 0, reserved: 0, entry: [[0; 2]; TABLE_BATCH] };
            self.update_table(context, &table, stream.get())?;
            for (product, _) in EXPERTS {
                for format in [Format::F32, Format::Bf16, Format::F16] {
                    let function = self.experts[product as usize][format as usize];
                    launch(context, function, (1, 1), 32 * warps(product), stream.get(), &ExpertArgs::default())?;
                }
            }
        }
        stream.synchronize()
    }

    /// Launches `acquire`.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launch is over.
    pub(crate) unsafe fn acquire(&self, context: &Context, args: &AcquireArgs, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { launch(context, self.acquire, (ACQUIRE_BLOCKS, 1), ACQUIRE_THREADS, stream, args) }
    }

    /// Launches `update_table`.
    ///
    /// # Safety
    /// The table is valid on the GPU and has all entries' experts.
    pub(crate) unsafe fn update_table(&self, context: &Context, args: &TableArgs, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { launch(context, self.update_table, (1, 1), 128, stream, args) }
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
        let columns = match product {
            Product::LinearTransposed => 32 * 16 / format.bytes(),
            Product::Down => DOWN_WARPS / DOWN_SHARES * DOWN_OUTPUTS,
            Product::Up | Product::Linear => EXPERT_WARPS,
        };
        let parts = args.outputs.div_ceil(columns);
        if rows == 0 || parts == 0 {
            return Ok(());
        }
        if parts > 65_535 {
            return Err(Error::new(ErrorKind::Device, format!("{} outputs are too many for one launch", args.outputs)));
        }
        let function = self.experts[product as usize][format as usize];
        // SAFETY: the caller's promise.
        unsafe { launch(context, function, (rows, parts), 32 * warps(product), stream, args) }
    }
}

/// Warps of a block.
fn warps(product: Product) -> u32 {
    match product {
        Product::LinearTransposed => TRANSPOSED_WARPS,
        Product::Down => DOWN_WARPS,
        Product::Up | Product::Linear => EXPERT_WARPS,
    }
}

/// One launch of a kernel with a single struct of arguments.
///
/// # Safety
/// `args` is what the kernel takes, and its addresses are valid on the GPU.
unsafe fn launch<T>(
    context: &Context,
    function: Handle,
    grid: (u32, u32),
    threads: u32,
    stream: Stream,
    args: &T,
) -> Result<()> {
    let api = context.api();
    let mut parameters = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
    let null = std::ptr::null_mut();
    // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
    let status =
        unsafe { (api.launch)(function, grid.0, grid.1, 1, threads, 1, 1, 0, stream.0, parameters.as_mut_ptr(), null) };
    api.check(status, "launching a kernel")
}
