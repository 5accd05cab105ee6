//! The CUDA driver, found at run time: a table of the functions that are used, and nothing of CUDA at build time.
//!
//! The functions return their status as a plain number. A newer driver may return codes that no list at build time
//! knows, so no enum stands for them.
#![expect(unsafe_code, reason = "foreign functions")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::offset_of;
use std::sync::OnceLock;

use libloading::Library;
use moecore::{Error, ErrorKind, Result};

/// A handle of the driver: context, stream, event, module or function.
pub type Handle = *mut c_void;

/// `cuLaunchKernelEx`.
type LaunchWith = unsafe extern "C" fn(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void) -> c_int;

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [c_uint; 3],
    pub(crate) block: [c_uint; 3],
    pub(crate) shared_bytes: c_uint,
    pub(crate) stream: Handle,
    pub(crate) attributes: *const LaunchAttribute,
    pub(crate) attribute_count: c_uint,
}

/// `CUlaunchAttribute`: a number that says which, and a union of 64 bytes.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct LaunchAttribute {
    id: c_uint,
    padding: c_uint,
    value: [u64; 8],
}

impl LaunchAttribute {
    /// `CU_LAUNCH_ATTRIBUTE_IGNORE`.
    pub(crate) const IGNORED: Self = Self { id: 0, padding: 0, value: [0; 8] };
    /// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: the kernel may start when the one before it in the
    /// stream says so, and waits by itself for that one's results.
    pub(crate) const EARLY: Self = Self { id: 6, padding: 0, value: [1, 0, 0, 0, 0, 0, 0, 0] };

    /// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`: so many blocks run side by side and see each other's shared memory.
    pub(crate) fn cluster(blocks: u32) -> Self {
        Self { id: 4, padding: 0, value: [u64::from(blocks) | 1 << 32, 1, 0, 0, 0, 0, 0, 0] }
    }
}

// The layout of cuda.h on 64-bit systems. Values are 32-bit numbers from the
// beginning on: little-endian, as every system with CUDA.
const _: () = assert!(size_of::<LaunchConfig>() == 56);
const _: () = assert!(offset_of!(LaunchConfig, block) == 12 && offset_of!(LaunchConfig, shared_bytes) == 24);
const _: () = assert!(offset_of!(LaunchConfig, stream) == 32 && offset_of!(LaunchConfig, attributes) == 40);
const _: () = assert!(offset_of!(LaunchConfig, attribute_count) == 48);
const _: () = assert!(size_of::<LaunchAttribute>() == 72 && offset_of!(LaunchAttribute, value) == 8);
const _: () = assert!(cfg!(target_endian = "little"));

macro_rules! api {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// Addresses of the driver's functions.
        #[derive(Debug)]
        pub struct Api {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
            /// `cuLaunchKernelEx`, or `None` where it is missing or too old for what it is used for.
            pub(crate) launch_with: Option<LaunchWith>,
            _library: Library,
        }

        impl Api {
            fn load(library: Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of cuda.h for these versioned names.
                unsafe {
                    Ok(Self {
                        $($field: *library.get($symbol)?,)*
                        launch_with: library.get("cuLaunchKernelEx").ok().map(|symbol| *symbol),
                        _library: library,
                    })
                }
            }
        }
    };
}

api! {
    init = "cuInit"(c_uint);
    driver_version = "cuDriverGetVersion"(*mut c_int);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device = "cuDeviceGet"(*mut c_int, c_int);
    device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    context_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    context_current = "cuCtxGetCurrent"(*mut Handle);
    context_push = "cuCtxPushCurrent_v2"(Handle);
    context_pop = "cuCtxPopCurrent_v2"(*mut Handle);
    context_synchronize = "cuCtxSynchronize"();
    error_name = "cuGetErrorName"(c_int, *mut *const c_char);
    error_string = "cuGetErrorString"(c_int, *mut *const c_char);
    host_alloc = "cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
    host_free = "cuMemFreeHost"(*mut c_void);
    copy_to_device = "cuMemcpyHtoD_v2"(u64, *const c_void, usize);
    copy_to_device_async = "cuMemcpyHtoDAsync_v2"(u64, *const c_void, usize, Handle);
    copy_on_device_async = "cuMemcpyDtoDAsync_v2"(u64, u64, usize, Handle);
    fill_words = "cuMemsetD32_v2"(u64, c_uint, usize);
    module_load = "cuModuleLoadData"(*mut Handle, *const c_void);
    module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
    function_attribute = "cuFuncGetAttribute"(*mut c_int, c_int, Handle);
    launch = "cuLaunchKernel"(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
    );
    stream_create = "cuStreamCreate"(*mut Handle, c_uint);
    stream_destroy = "cuStreamDestroy_v2"(Handle);
    stream_synchronize = "cuStreamSynchronize"(Handle);
    stream_wait = "cuStreamWaitEvent"(Handle, Handle, c_uint);
    stream_capturing = "cuStreamIsCapturing"(Handle, *mut c_int);
    event_create = "cuEventCreate"(*mut Handle, c_uint);
    event_destroy = "cuEventDestroy_v2"(Handle);
    event_record = "cuEventRecord"(Handle, Handle);
    event_query = "cuEventQuery"(Handle);
    event_synchronize = "cuEventSynchronize"(Handle);
}

/// `CUDA_SUCCESS`.
pub(crate) const SUCCESS: c_int = 0;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(crate) const OUT_OF_MEMORY: c_int = 2;
/// `CUDA_ERROR_NOT_READY`.
pub(crate) const NOT_READY: c_int = 600;
/// The oldest driver whose functions this crate uses.
const OLDEST: c_int = 12_000;
/// The oldest driver that captures an early launch into a graph.
const CAPTURES_EARLY: c_int = 12_030;

static API: OnceLock<Result<Api, String>> = OnceLock::new();

/// The driver, initialised; or why there is none.
fn probe() -> Result<Api, String> {
    let names: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };
    // SAFETY: the driver's library runs its own start-up code, which is what loading it means.
    let library = names.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
    let Some(library) = library else {
        return Err(format!("no NVIDIA driver here ({} was not found)", names[0]));
    };
    let mut api = Api::load(library).map_err(|error| format!("the NVIDIA driver is too old: {error}"))?;
    // SAFETY: plain calls with addresses of locals.
    unsafe {
        api.status((api.init)(0)).map_err(|error| format!("the NVIDIA driver does not start: {error}"))?;
        let (mut version, mut devices) = (0, 0);
        api.status((api.driver_version)(&raw mut version))?;
        if version < OLDEST {
            return Err(format!(
                "the NVIDIA driver serves CUDA {}.{}; moecore needs 12.0 (driver 525) or newer",
                version / 1000,
                version % 1000 / 10
            ));
        }
        if version < CAPTURES_EARLY {
            api.launch_with = None;
        }
        api.status((api.device_count)(&raw mut devices))?;
        if devices == 0 {
            return Err("the NVIDIA driver sees no GPU".to_owned());
        }
    }
    Ok(api)
}

/// The driver's functions. The first call loads and starts the driver.
pub fn api() -> Result<&'static Api> {
    match API.get_or_init(probe) {
        Ok(api) => Ok(api),
        Err(reason) => Err(Error::new(ErrorKind::Device, reason.clone())),
    }
}

/// Whether there is a GPU that this crate can use, or why not.
pub fn is_available() -> Result<(), String> {
    api().map(|_| ()).map_err(|error| error.to_string())
}

impl Api {
    /// A status as a result, in the driver's words.
    fn status(&self, status: c_int) -> Result<(), String> {
        if status == SUCCESS {
            return Ok(());
        }
        let word = |get: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = std::ptr::null();
            // SAFETY: the driver stores the address of a static string, or null for a code it does not know.
            unsafe {
                get(status, &raw mut text);
                (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        let name = word(self.error_name).unwrap_or_else(|| format!("CUDA error {status}"));
        Err(word(self.error_string).map_or_else(|| name.clone(), |text| format!("{name} ({text})")))
    }

    /// A status as a result; `what` says what failed.
    pub(crate) fn check(&self, status: c_int, what: &str) -> Result<()> {
        self.status(status).map_err(|reason| Error::new(ErrorKind::Device, format!("{what} failed: {reason}")))
    }
}
