//! A GPU's primary context: the one that torch uses. No other is ever made.
#![expect(unsafe_code, reason = "driver calls")]

use std::ffi::c_int;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use moecore::{Error, ErrorKind, Result};

use crate::driver::{Api, Handle, api};
use crate::fork;
use crate::kernels::Kernels;

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const CAPABILITY: [c_int; 2] = [75, 76];

/// One GPU of this process.
#[derive(Debug)]
pub struct Context {
    api: &'static Api,
    handle: Handle,
    ordinal: u32,
    capability: (u32, u32),
    kernels: OnceLock<Kernels>,
    loading: Mutex<()>,
}

// SAFETY: a context handle may be used from any thread; it is never released.
unsafe impl Send for Context {}
// SAFETY: as above; everything else in it is read-only or synchronised.
unsafe impl Sync for Context {}

/// Contexts that were asked for: they live as long as the process, as torch's do.
static CONTEXTS: Mutex<Vec<Arc<Context>>> = Mutex::new(Vec::new());

impl Context {
    /// The primary context of GPU `ordinal`.
    pub fn of(ordinal: u32) -> Result<Arc<Self>> {
        fork::check()?;
        fork::watch();
        let api = api()?;
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(context) = contexts.iter().find(|context| context.ordinal == ordinal) {
            return Ok(Arc::clone(context));
        }
        let number = c_int::try_from(ordinal).map_err(|_| Error::new(ErrorKind::Device, "no such GPU"))?;
        let (mut device, mut handle) = (0, std::ptr::null_mut());
        let mut capability = [0; 2];
        // SAFETY: addresses of locals; the context is retained for good.
        unsafe {
            api.check((api.device)(&raw mut device, number), &format!("opening GPU {ordinal}"))?;
            for (value, attribute) in capability.iter_mut().zip(CAPABILITY) {
                api.check((api.device_attribute)(value, attribute, device), "reading the compute capability")?;
            }
            api.check((api.context_retain)(&raw mut handle, device), &format!("opening GPU {ordinal}"))?;
        }
        let context = Arc::new(Self {
            api,
            handle,
            ordinal,
            capability: (capability[0].unsigned_abs(), capability[1].unsigned_abs()),
            kernels: OnceLock::new(),
            loading: Mutex::new(()),
        });
        contexts.push(Arc::clone(&context));
        Ok(context)
    }

    /// Number of the GPU.
    #[must_use]
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Compute capability, major and minor.
    #[must_use]
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// The driver's functions.
    pub(crate) fn api(&self) -> &'static Api {
        self.api
    }

    /// All kernels, loaded and launched once, so that no later launch loads anything.
    pub fn kernels(self: &Arc<Self>) -> Result<&Kernels> {
        if let Some(kernels) = self.kernels.get() {
            return Ok(kernels);
        }
        let _one = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = self.kernels.get() {
            return Ok(kernels);
        }
        let kernels = Kernels::load(self)?;
        Ok(self.kernels.get_or_init(|| kernels))
    }

    /// Makes this the thread's context until the guard goes.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        fork::check()?;
        let mut current = std::ptr::null_mut();
        // SAFETY: address of a local.
        unsafe { self.api.check((self.api.context_current)(&raw mut current), "asking for the current context")? };
        if current == self.handle {
            return Ok(Entered { context: self, pushed: false });
        }
        // SAFETY: the context is alive: it is never released.
        unsafe { self.api.check((self.api.context_push)(self.handle), "entering the context")? };
        Ok(Entered { context: self, pushed: true })
    }

    /// Waits for all work of the GPU.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: no arguments.
        unsafe { self.api.check((self.api.context_synchronize)(), "waiting for the GPU") }
    }
}

/// Keeps a context current on this thread.
#[derive(Debug)]
pub(crate) struct Entered<'a> {
    context: &'a Context,
    pushed: bool,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: what was pushed is popped; a failure leaves the context current, which harms nobody.
            unsafe { (self.context.api.context_pop)(&raw mut popped) };
        }
    }
}
