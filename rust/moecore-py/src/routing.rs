//! Launches of the routing kernels and of expert products over resident tensors, for `moecore.ops`. A call takes plain
//! positional numbers, addresses among them, and keeps the GIL: a launch takes less time than letting go of it would.
#![expect(unsafe_code, reason = "addresses come from Python, whose caller answers for them")]

use moecore::{Error, ErrorKind, Result};
use moecore_cuda::context::Context;
use moecore_cuda::engine::Products;
use moecore_cuda::kernels::{Format, Product};
use moecore_cuda::resident;
use moecore_cuda::routing::{self, AlignArgs, CombineArgs, GateArgs, PermuteArgs, RouteArgs, Routing};
use moecore_cuda::stream::Stream;
use pyo3::prelude::*;

use crate::errors::to_python;

/// Flag of the expert products: slots are `int64`.
const SLOTS_I64: u32 = 4;

/// Launches the gate: weights and ids of the k best experts of each token.
#[pyfunction]
#[pyo3(signature = (
    device, logits_format, logits, stride, tokens, experts, k, groups, top_groups, scoring, flags, bias, weights,
    weights_format, ids, valid, scale, eps, stream,
))]
#[expect(clippy::too_many_arguments, reason = "a launch")]
pub fn routing_gate(
    py: Python<'_>,
    device: u32,
    logits_format: u32,
    logits: u64,
    stride: u64,
    tokens: u32,
    experts: u32,
    k: u32,
    groups: u32,
    top_groups: u32,
    scoring: u32,
    flags: u32,
    bias: u64,
    weights: u64,
    weights_format: u32,
    ids: u64,
    valid: u64,
    scale: f32,
    eps: f32,
    stream: u64,
) -> PyResult<()> {
    let args = GateArgs {
        logits,
        bias,
        weights,
        ids,
        valid,
        stride,
        tokens,
        experts,
        k,
        groups,
        top_groups,
        scoring,
        flags,
        weights_format,
        scale,
        eps,
    };
    let launch = || {
        let format = format("gate", logits_format)?;
        let context = Context::of(device)?;
        // SAFETY: the caller's tensors.
        unsafe { Routing::on(&context)?.gate(format, &args, Stream::from_raw(stream)) }
    };
    launch().map_err(|error| to_python(py, &error))
}

/// Launches the gate (not if `logits` is 0: ids are given), the sorting of rows by bin, and with `x` their copy.
#[pyfunction]
#[pyo3(signature = (
    device, logits_format, logits, stride, tokens, experts, k, groups, top_groups, scoring, flags, bias, weights,
    weights_format, ids, valid, scale, eps, bin_of, bins, ends, source, inverse, workspace, x, x_format, row_bytes,
    rows, scales, stream,
))]
#[expect(clippy::too_many_arguments, clippy::similar_names, reason = "a launch")]
pub fn routing_route(
    py: Python<'_>,
    device: u32,
    logits_format: u32,
    logits: u64,
    stride: u64,
    tokens: u32,
    experts: u32,
    k: u32,
    groups: u32,
    top_groups: u32,
    scoring: u32,
    flags: u32,
    bias: u64,
    weights: u64,
    weights_format: u32,
    ids: u64,
    valid: u64,
    scale: f32,
    eps: f32,
    bin_of: u64,
    bins: u32,
    ends: u64,
    source: u64,
    inverse: u64,
    workspace: u64,
    x: u64,
    x_format: u32,
    row_bytes: u32,
    rows: u64,
    scales: u64,
    stream: u64,
) -> PyResult<()> {
    let gate = GateArgs {
        logits,
        bias,
        weights,
        ids,
        valid,
        stride,
        tokens,
        experts,
        k,
        groups,
        top_groups,
        scoring,
        flags,
        weights_format,
        scale,
        eps,
    };
    let args = RouteArgs {
        gate,
        bin_of,
        ends,
        source,
        inverse,
        x,
        rows,
        scales,
        bins,
        row_bytes,
        x_format,
        ..RouteArgs::default()
    };
    let launch = || {
        let format = format("route", logits_format)?;
        let context = Context::of(device)?;
        // SAFETY: the caller's tensors.
        unsafe { Routing::on(&context)?.route(format, &args, workspace, Stream::from_raw(stream)) }
    };
    launch().map_err(|error| to_python(py, &error))
}

/// Bytes of memory that `routing_route` needs between its launches; 0 where it makes one alone.
#[pyfunction]
#[pyo3(signature = (tokens, bins))]
pub fn routing_workspace(tokens: u32, bins: u32) -> u64 {
    routing::workspace(tokens, bins)
}

/// Launches the copy of tokens' rows to the rows that `inverse` names.
#[pyfunction]
#[pyo3(signature = (device, x, x_format, inverse, out, scales, tokens, k, rows, row_bytes, stream))]
#[expect(clippy::too_many_arguments, reason = "a launch")]
pub fn routing_permute(
    py: Python<'_>,
    device: u32,
    x: u64,
    x_format: u32,
    inverse: u64,
    out: u64,
    scales: u64,
    tokens: u32,
    k: u32,
    rows: u32,
    row_bytes: u32,
    stream: u64,
) -> PyResult<()> {
    let args = PermuteArgs { x, inverse, out, scales, tokens, k, rows, row_bytes, x_format, reserved: 0 };
    let launch = || {
        let context = Context::of(device)?;
        // SAFETY: the caller's tensors.
        unsafe { Routing::on(&context)?.permute(&args, Stream::from_raw(stream)) }
    };
    launch().map_err(|error| to_python(py, &error))
}

/// Launches out[t] = residual[t] + shared[t] + scale * sum over j of weights[t, j] * rows[inverse[t, j]].
#[pyfunction]
#[pyo3(signature = (
    device, format, rows, inverse, weights, weights_format, shared, residual, out, tokens, k, row_count, row_bytes,
    scale, stream,
))]
#[expect(clippy::too_many_arguments, reason = "a launch")]
pub fn routing_combine(
    py: Python<'_>,
    device: u32,
    format: u32,
    rows: u64,
    inverse: u64,
    weights: u64,
    weights_format: u32,
    shared: u64,
    residual: u64,
    out: u64,
    tokens: u32,
    k: u32,
    row_count: u32,
    row_bytes: u32,
    scale: f32,
    stream: u64,
) -> PyResult<()> {
    let args = CombineArgs {
        rows,
        inverse,
        weights,
        shared,
        residual,
        out,
        tokens,
        k,
        row_count,
        row_bytes,
        weights_format,
        scale,
    };
    let launch = || {
        let format = self::format("combine", format)?;
        let context = Context::of(device)?;
        // SAFETY: the caller's tensors.
        unsafe { Routing::on(&context)?.combine(format, &args, Stream::from_raw(stream)) }
    };
    launch().map_err(|error| to_python(py, &error))
}

/// Launches the cut of a sorted order into blocks of one bin each.
#[pyfunction]
#[pyo3(signature = (device, ends, inverse, order, owner, places, pairs, bins, block, capacity, stream))]
#[expect(clippy::too_many_arguments, reason = "a launch")]
pub fn routing_align(
    py: Python<'_>,
    device: u32,
    ends: u64,
    inverse: u64,
    order: u64,
    owner: u64,
    places: u64,
    pairs: u32,
    bins: u32,
    block: u32,
    capacity: u32,
    stream: u64,
) -> PyResult<()> {
    let args = AlignArgs { ends, inverse, order, owner, places, pairs, bins, block, capacity };
    let launch = || {
        let context = Context::of(device)?;
        // SAFETY: the caller's tensors.
        unsafe { Routing::on(&context)?.align(&args, Stream::from_raw(stream)) }
    };
    launch().map_err(|error| to_python(py, &error))
}

/// Launches h[p] = act(gate) * up for each pair, over all experts' concatenated matrices.
#[pyfunction]
#[pyo3(signature = (
    device, dtype, weights_ptr, expert_stride_bytes, experts, x, slots, slots_i64, out, tokens, k, inputs, outputs, act,
    stream,
))]
#[expect(clippy::too_many_arguments, reason = "a launch")]
pub fn experts_up(
    py: Python<'_>,
    device: u32,
    dtype: u32,
    weights_ptr: u64,
    expert_stride_bytes: u64,
    experts: u32,
    x: u64,
    slots: u64,
    slots_i64: bool,
    out: u64,
    tokens: u32,
    k: u32,
    inputs: u32,
    outputs: u32,
    act: u32,
    stream: u64,
) -> PyResult<()> {
    let launch = || {
        let what = Products {
            product: Product::Up,
            format: format("expert_matvec", dtype)?,
            offset: 0,
            bias_offset: None,
            x,
            slots,
            weights: 0,
            out,
            tokens,
            k,
            inputs,
            outputs,
            act,
            flags: if slots_i64 { SLOTS_I64 } else { 0 },
        };
        product(device, weights_ptr, expert_stride_bytes, experts, &what, stream)
    };
    launch().map_err(|error| to_python(py, &error))
}

/// Launches out[t] = sum over k of weight * down(h[t, k]).
#[pyfunction]
#[pyo3(signature = (
    device, dtype, weights_ptr, expert_stride_bytes, experts, x, slots, slots_i64, weights, weights_f32, out, tokens, k,
    inputs, outputs, stream,
))]
#[expect(clippy::too_many_arguments, reason = "a launch")]
pub fn experts_down(
    py: Python<'_>,
    device: u32,
    dtype: u32,
    weights_ptr: u64,
    expert_stride_bytes: u64,
    experts: u32,
    x: u64,
    slots: u64,
    slots_i64: bool,
    weights: u64,
    weights_f32: bool,
    out: u64,
    tokens: u32,
    k: u32,
    inputs: u32,
    outputs: u32,
    stream: u64,
) -> PyResult<()> {
    let launch = || {
        let what = Products {
            product: Product::Down,
            format: format("expert_matvec", dtype)?,
            offset: 0,
            bias_offset: None,
            x,
            slots,
            weights,
            out,
            tokens,
            k,
            inputs,
            outputs,
            act: 0,
            flags: u32::from(weights_f32) | if slots_i64 { SLOTS_I64 } else { 0 },
        };
        product(device, weights_ptr, expert_stride_bytes, experts, &what, stream)
    };
    launch().map_err(|error| to_python(py, &error))
}

fn product(device: u32, tensor: u64, expert_bytes: u64, experts: u32, what: &Products, stream: u64) -> Result<()> {
    let context = Context::of(device)?;
    // SAFETY: the caller's tensors.
    unsafe { resident::product(&context, tensor, expert_bytes, experts, what, Stream::from_raw(stream)) }
}

fn format(op: &str, number: u32) -> Result<Format> {
    let none = || Error::new(ErrorKind::Device, format!("{op}: {number} is no number format"));
    Format::from_number(number).ok_or_else(none)
}
