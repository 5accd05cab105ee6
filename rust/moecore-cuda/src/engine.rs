//! The engine: what a decode call launches, in which order, and what happens when something fails.
//!
//! **Slots and stream order.** All calls of one engine are in one order on the GPU: each stream after the first waits
//! for what was put into the one before. So when the record of a call arrives, everything that used slots for earlier
//! calls is over or will be before this call's kernel goes on; a victim that the scheduler picks for this call, never
//! one of the call's own experts, may be overwritten by the same kernel.
//!
//! **Captured graphs** replay on whatever stream the caller picks: keep to one stream, or order them yourself. They end
//! with the engine: after [`CudaEngine::close`] they must not run.
#![expect(unsafe_code, reason = "launches with addresses from outside")]

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use moecore::scheduler::decisions::Decisions;
use moecore::{Error, ErrorKind, Result};

use crate::answer::{Answering, Layer};
use crate::context::Context;
use crate::kernels::{Format, Product};
use crate::layout::{
    AcquireArgs, ExpertArgs, GateAcquireArgs, MAILBOX_BYTES, MAX_EXPERTS, MAX_PAIRS, NOTHING, STATE_BYTES,
    STATUS_CLOSED, STATUS_MISSING, STATUS_TIMEOUT, TABLE_BATCH, TableArgs,
};
use crate::mailbox::Mailbox;
use crate::pinned::PinnedBlock;
use crate::routing::{self, GateArgs, IDS_I64};
use crate::stats::Snapshot;
use crate::stream::{Event, Stream};
use crate::sync::Words;

/// Rows end below this.
const LARGEST_ROW: u64 = 1 << 32;

/// How long the GPU waits for an answer before it goes on with an error.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Memory and shapes of an engine. All addresses are of GPU memory that somebody else owns.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Slot 0, aligned to 16 bytes.
    pub arena: u64,
    /// Distance of two slots: a multiple of 16.
    pub slot_bytes: u64,
    /// Slots.
    pub slots: u32,
    /// `int32` for each expert of all layers: its slot or -1.
    pub table: u64,
    /// `uint32` for each expert of all layers: how often it was asked for.
    pub counts: u64,
    /// 64 bytes.
    pub state: u64,
    /// The layers in order; dense ids follow each other.
    pub layers: Vec<Layer>,
}

/// An expert product over slots: shapes and addresses of one launch.
#[derive(Debug, Clone, Copy)]
pub struct Products {
    /// Which.
    pub product: Product,
    /// Number format.
    pub format: Format,
    /// Offset of the matrix in a slot.
    pub offset: u64,
    /// Offset of the bias in a slot.
    pub bias_offset: Option<u64>,
    /// Activations.
    pub x: u64,
    /// Slots of the pairs.
    pub slots: u64,
    /// Routing weights of the pairs (`Down` only).
    pub weights: u64,
    /// Result.
    pub out: u64,
    /// Tokens.
    pub tokens: u32,
    /// Experts of a token.
    pub k: u32,
    /// Length of a sum.
    pub inputs: u32,
    /// Elements of a result row.
    pub outputs: u32,
    /// Activation (`Up` only): 0 silu, 1 gelu, 2 gelu with tanh, 3 relu.
    pub act: u32,
    /// 1: routing weights are float32; 2: activations have a row for each pair.
    pub flags: u32,
}

impl Products {
    /// The kernels' arguments, over matrices that begin at `arena`, one for each of `slots`.
    pub(crate) fn args(&self, arena: u64, slot_bytes: u64, slots: u32) -> ExpertArgs {
        ExpertArgs {
            arena,
            slot_bytes,
            offset: self.offset,
            bias_offset: self.bias_offset.unwrap_or(u64::MAX),
            x: self.x,
            slots: self.slots,
            weights: self.weights,
            out: self.out,
            tokens: self.tokens,
            k: self.k,
            inputs: self.inputs,
            outputs: self.outputs,
            act: self.act,
            flags: self.flags,
            slot_count: slots,
            reserved: 0,
        }
    }
}

/// Experts of one model on one GPU.
#[derive(Debug)]
pub struct CudaEngine {
    context: Arc<Context>,
    setup: Setup,
    mailbox: Arc<Mailbox>,
    /// The stream of the last call, and an event for leaving it.
    order: Mutex<Order>,
    answering: Mutex<Answering>,
    told: Arc<crate::answer::Shared>,
    closed: AtomicBool,
}

#[derive(Debug)]
struct Order {
    last: Option<Stream>,
    left: Event,
}

impl CudaEngine {
    /// An engine on GPU `device`, and its answering thread. The table must say -1 for every expert.
    ///
    /// # Safety
    /// The memory in `setup` is valid on the GPU until the engine is closed, and long enough.
    pub unsafe fn new(device: u32, setup: Setup, decisions: Box<dyn Decisions>) -> Result<Self> {
        check(&setup)?;
        let context = Context::of(device)?;
        context.kernels()?;
        let block = PinnedBlock::new(&context, MAILBOX_BYTES)?;
        let base = block.base();
        // SAFETY: pinned memory is page-aligned, zeroed and that long; the block owns it.
        let words = unsafe { Words::new(base, MAILBOX_BYTES / 8, Box::new(block)) };
        let mailbox = Arc::new(Mailbox::new(words));
        mailbox.set_timeout(u64::try_from(PATIENCE.as_nanos()).unwrap_or(u64::MAX));
        // SAFETY: the caller's promise.
        unsafe { write_state(&context, setup.state, &[1])? };
        let order = Mutex::new(Order { last: None, left: Event::new(&context)? });
        let answering = Answering::start(Arc::clone(&mailbox), setup.layers.clone(), setup.slots, decisions)?;
        let told = Arc::clone(answering.shared());
        let answering = Mutex::new(answering);
        Ok(Self { context, setup, mailbox, order, answering, told, closed: false.into() })
    }

    /// The GPU's context.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Address of the mailbox.
    #[must_use]
    pub fn mailbox(&self) -> u64 {
        self.mailbox.address()
    }

    /// Memory and shapes.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Finds the slots of a call's experts and brings those that are missing, in `stream`.
    ///
    /// `ids` has `pairs` expert numbers (`int64`) of the layer, `slots` room for as many `int32`. Nothing waits here.
    ///
    /// # Safety
    /// Both are valid on the GPU until the launch is over.
    pub unsafe fn acquire(
        &self,
        layer: u32,
        ids: u64,
        pairs: u32,
        slots: u64,
        phase: u32,
        stream: Stream,
    ) -> Result<()> {
        let Some(args) = self.call(layer, ids, pairs, slots, phase)? else {
            return Ok(());
        };
        let kernels = self.context.kernels()?;
        let _entered = self.context.enter()?;
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        self.follow(&mut order, stream)?;
        // SAFETY: the caller's promise here and at `new`.
        unsafe { kernels.acquire(&self.context, &args, stream) }
    }

    /// The same, with ids that the kernel itself chooses by logits of a format, and writes to `gate.ids` as `int64`.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launch is over, and fit the shapes.
    pub unsafe fn gate_acquire(
        &self,
        layer: u32,
        format: Format,
        gate: GateArgs,
        slots: u64,
        phase: u32,
        stream: Stream,
    ) -> Result<()> {
        let gate = GateArgs { flags: gate.flags | IDS_I64, valid: 0, ..gate };
        routing::check_gate(format, &gate)?;
        let pairs = gate.tokens.saturating_mul(gate.k);
        let Some(acquire) = self.call(layer, gate.ids, pairs, slots, phase)? else {
            return Ok(());
        };
        if gate.experts != acquire.experts {
            let message =
                format!("{} logits a token for the {} experts of layer {layer}", gate.experts, acquire.experts);
            return Err(Error::new(ErrorKind::Device, message));
        }
        let kernels = self.context.kernels()?;
        let _entered = self.context.enter()?;
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        self.follow(&mut order, stream)?;
        let args = GateAcquireArgs { acquire, gate: routing::ruled(format, &gate) };
        // SAFETY: the caller's promise here and at `new`.
        unsafe { kernels.gate_acquire(&self.context, format, &args, stream) }
    }

    /// Arguments of a call; `None` for one without pairs.
    fn call(&self, layer: u32, ids: u64, pairs: u32, slots: u64, phase: u32) -> Result<Option<AcquireArgs>> {
        self.check()?;
        let Some(shape) = self.setup.layers.get(layer as usize) else {
            return Err(Error::new(ErrorKind::Device, format!("there is no layer {layer}")));
        };
        if pairs > MAX_PAIRS {
            let message = format!("{pairs} pairs of token and expert are too many for one call ({MAX_PAIRS})");
            return Err(Error::new(ErrorKind::Device, message));
        }
        let args = AcquireArgs {
            ids,
            slots,
            table: self.setup.table,
            counts: self.setup.counts,
            state: self.setup.state,
            mailbox: self.mailbox.address(),
            arena: self.setup.arena,
            slot_bytes: self.setup.slot_bytes,
            row_bytes: shape.row_bytes,
            pairs,
            layer,
            first: shape.first,
            experts: shape.experts,
            phase,
            reserved: 0,
        };
        Ok((pairs > 0).then_some(args))
    }

    /// Launches an expert product in `stream`.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launch is over and fit the shapes; the matrices lie inside a slot.
    pub unsafe fn product(&self, what: &Products, stream: Stream) -> Result<()> {
        let args = what.args(self.setup.arena, self.setup.slot_bytes, self.setup.slots);
        let kernels = self.context.kernels()?;
        let _entered = self.context.enter()?;
        // SAFETY: the caller's promise.
        unsafe { kernels.product(&self.context, what.product, what.format, &args, stream) }
    }

    /// Changes the table in `stream`: each expert's slot, or `None` if it leaves. An expert is named once.
    ///
    /// # Safety
    /// Slots hold what the table will say by the time `stream` gets there.
    pub unsafe fn update_table(&self, entries: &[(u32, Option<u32>)], stream: Stream) -> Result<()> {
        self.check()?;
        let experts = self.experts();
        let wrong = |&&(expert, slot): &&(u32, Option<u32>)| expert >= experts || slot >= Some(self.setup.slots);
        if let Some((expert, slot)) = entries.iter().find(wrong) {
            let message = format!("no place in the table for expert {expert} in slot {slot:?}");
            return Err(Error::new(ErrorKind::Device, message));
        }
        let kernels = self.context.kernels()?;
        let _entered = self.context.enter()?;
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        self.follow(&mut order, stream)?;
        for batch in entries.chunks(TABLE_BATCH) {
            let mut args = TableArgs { table: self.setup.table, count: 0, reserved: 0, entry: [[0; 2]; TABLE_BATCH] };
            for (entry, (expert, slot)) in args.entry.iter_mut().zip(batch) {
                *entry = [*expert, slot.unwrap_or(NOTHING)];
                args.count += 1;
            }
            // SAFETY: the experts are in the table; the rest is the caller's promise.
            unsafe { kernels.update_table(&self.context, &args, stream)? };
        }
        Ok(())
    }

    /// Makes `stream` go on where the last call's stream ends.
    fn follow(&self, order: &mut Order, stream: Stream) -> Result<()> {
        if order.last == Some(stream) {
            return Ok(());
        }
        if let Some(last) = order.last {
            // A capture has no place in the order of eager calls: whoever captures has waited for them.
            if self.is_capturing(stream)? {
                return Ok(());
            }
            order.left.record(last)?;
            order.left.hold(stream)?;
        }
        order.last = Some(stream);
        Ok(())
    }

    fn is_capturing(&self, stream: Stream) -> Result<bool> {
        let api = self.context.api();
        let mut status: c_int = 0;
        // SAFETY: a live stream and the address of a local.
        unsafe { api.check((api.stream_capturing)(stream.0, &raw mut status), "asking whether a stream captures")? };
        Ok(status != 0)
    }

    /// Fails if a call before has failed, or the engine is closed.
    pub fn check(&self) -> Result<()> {
        self.open()?;
        match self.error() {
            Some(message) => Err(Error::new(ErrorKind::Device, message)),
            None => Ok(()),
        }
    }

    fn open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Device, "the expert engine is closed"));
        }
        Ok(())
    }

    /// What has failed, if anything has: results since then are not to be used.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        if let Some(reason) = self.told.error() {
            return Some(reason);
        }
        let (status, seq) = self.mailbox.failure()?;
        let what = match status {
            STATUS_TIMEOUT => "the GPU has waited too long for an expert; is the host out of memory or the disk stuck?",
            STATUS_CLOSED => "the engine was closed while a call was under way",
            STATUS_MISSING => "the scheduler has left an expert without a slot (a defect of moecore: please report it)",
            _ => "the host could not bring an expert",
        };
        Some(format!("{what} (call {seq})"))
    }

    /// Changes how long the GPU waits for an answer. It holds for launches that are under way, too.
    pub fn set_patience(&self, patience: Duration) {
        self.mailbox.set_timeout(u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Counters of the answering thread.
    #[must_use]
    pub fn stats(&self) -> Snapshot {
        self.told.stats.snapshot()
    }

    /// Goes on after an error, say of a disk: waits for the GPU, then the engine forgets the error and the table, so that
    /// each expert is brought anew when it is next asked for. The results since the error stay useless. Fails if the
    /// scheduler has panicked.
    pub fn clear_error(&self) -> Result<()> {
        self.open()?;
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        self.context.synchronize()?;
        let experts = self.experts() as usize;
        let _entered = self.context.enter()?;
        let api = self.context.api();
        // The scheduler may have given slots away whose rows never came. A call of its that fails from here on, one that
        // the GPU has not waited for, shows at the next call like any other.
        // SAFETY: the table and the state are the engine's, and no kernel runs.
        unsafe {
            api.check((api.fill_words)(self.setup.table, NOTHING, experts), "clearing the table")?;
            write_state(&self.context, self.setup.state + 4, &[])?;
        }
        self.context.synchronize()?;
        if !self.told.clear() {
            return self.check();
        }
        self.mailbox.clear_failure();
        Ok(())
    }

    /// Experts of all layers.
    fn experts(&self) -> u32 {
        self.setup.layers.last().map_or(0, |layer| layer.first + layer.experts)
    }

    /// Ends the engine: calls that wait are answered with a failure, then the GPU's work is waited for. A second call
    /// does nothing.
    pub fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let decisions = self.answering.lock().unwrap_or_else(PoisonError::into_inner).stop();
        // The GPU may be reading rows that the scheduler owns.
        let idle = self.context.synchronize();
        drop(decisions);
        idle
    }
}

impl Drop for CudaEngine {
    fn drop(&mut self) {
        // Who wants to know has called it.
        let _ = self.close();
    }
}

/// What the kernels take for granted.
fn check(setup: &Setup) -> Result<()> {
    let mut first = 0;
    for (number, layer) in setup.layers.iter().enumerate() {
        let row_fits = layer.row_bytes.is_multiple_of(16) && layer.row_bytes <= setup.slot_bytes;
        // Tiles of a whole answer are counted in 32 bits.
        let countable = layer.row_bytes < LARGEST_ROW;
        if layer.first != first || layer.experts > MAX_EXPERTS || !row_fits || !countable {
            let message = format!("layer {number} has a shape that the kernels do not take: {layer:?}");
            return Err(Error::new(ErrorKind::Device, message));
        }
        first += layer.experts;
    }
    if !setup.arena.is_multiple_of(16) || !setup.slot_bytes.is_multiple_of(16) || setup.slots > i32::MAX.unsigned_abs()
    {
        return Err(Error::new(ErrorKind::Device, "slots must begin at multiples of 16 bytes"));
    }
    Ok(())
}

/// Fresh state from `at` on: `words`, then zeros to its end.
///
/// # Safety
/// `at` is a word of the state's memory, as many words after its start as `words` leave out, and no kernel uses it.
unsafe fn write_state(context: &Context, at: u64, words: &[u32]) -> Result<()> {
    let _entered = context.enter()?;
    let mut state = [0_u32; STATE_BYTES / 4];
    state[..words.len()].copy_from_slice(words);
    let api = context.api();
    // Without words, the first one is left as it is.
    let bytes = if words.is_empty() { STATE_BYTES - 4 } else { STATE_BYTES };
    // SAFETY: the caller's promise; the copy is over when the call returns.
    let status = unsafe { (api.copy_to_device)(at, state.as_ptr().cast(), bytes) };
    api.check(status, "writing the engine's state")
}
