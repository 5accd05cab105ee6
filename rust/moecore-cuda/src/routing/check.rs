//! Arguments that no kernel can serve, found before a launch. What a caller owes besides, such as tensors that are as
//! long as the shapes say, cannot be seen from here.

use moecore::{Error, ErrorKind, Result};

use super::layout::{
    AlignArgs, CombineArgs, GROUP_TOP2, GateArgs, IDS_I64, LAST_SCORING, MAX_BLOCK, MAX_EXPERTS, MAX_K, PermuteArgs,
    RENORMALIZE, RouteArgs, SCALED_COLUMNS,
};
use super::plan;
use crate::kernels::Format;

/// Groups that experts can be in.
pub const MAX_GROUPS: u32 = 32;

/// Whether a gate can be launched.
pub(crate) fn gate(format: Format, args: &GateArgs) -> Result<()> {
    let op = "gate";
    choice(op, args)?;
    if args.tokens > 0 {
        present(op, "logits", args.logits)?;
    }
    gate_memory(op, format, args)
}

/// Whether rows can be sorted, before it is known where the workspace lies.
pub(super) fn route(format: Format, args: &RouteArgs) -> Result<()> {
    let op = "route";
    let gate = &args.gate;
    if gate.logits == 0 {
        pairs(op, gate.tokens, gate.k)?;
        range(op, "experts", gate.experts, 1, MAX_EXPERTS)?;
    } else {
        choice(op, gate)?;
    }
    gate_memory(op, format, gate)?;
    range(op, "bins", args.bins, 1, MAX_EXPERTS)?;
    if args.bin_of == 0 && args.bins != gate.experts {
        return Err(wrong(op, &format!("{} bins for {} experts, without bin_of", args.bins, gate.experts)));
    }
    present(op, "ends", args.ends)?;
    // The ids, too: a second launch reads what the first has chosen.
    for (name, address) in [("ids", gate.ids), ("source", args.source), ("inverse", args.inverse)] {
        if gate.tokens > 0 {
            present(op, name, address)?;
        }
    }
    for (name, address) in
        [("bin_of", args.bin_of), ("ends", args.ends), ("source", args.source), ("inverse", args.inverse)]
    {
        aligned(op, name, address, 4)?;
    }
    if args.x == 0 || gate.tokens == 0 {
        return Ok(());
    }
    copy(op, &rows_of(args))
}

/// Whether this can be the workspace of a route that needs one.
pub(super) fn workspace(address: u64) -> Result<()> {
    present("route", "workspace", address)?;
    aligned("route", "workspace", address, 16)
}

/// The copy of rows that a route asks for, as a launch of its own.
pub(super) fn rows_of(args: &RouteArgs) -> PermuteArgs {
    PermuteArgs {
        x: args.x,
        inverse: args.inverse,
        out: args.rows,
        scales: args.scales,
        tokens: args.gate.tokens,
        k: args.gate.k,
        rows: args.gate.tokens * args.gate.k,
        row_bytes: args.row_bytes,
        x_format: args.x_format,
        reserved: 0,
    }
}

/// Whether rows can be copied.
pub(super) fn permute(args: &PermuteArgs) -> Result<()> {
    let op = "permute";
    pairs(op, args.tokens, args.k)?;
    if args.tokens == 0 || args.rows == 0 {
        return Ok(());
    }
    range(op, "rows", args.rows, 0, i32::MAX.unsigned_abs())?;
    present(op, "x", args.x)?;
    present(op, "inverse", args.inverse)?;
    aligned(op, "inverse", args.inverse, 4)?;
    copy(op, args)
}

/// Whether rows can be summed.
pub(super) fn combine(args: &CombineArgs) -> Result<()> {
    let op = "combine";
    pairs(op, args.tokens, args.k)?;
    if args.tokens == 0 {
        return Ok(());
    }
    let weight_bytes = number(op, "weights_format", args.weights_format)?.bytes();
    range(op, "row_count", args.row_count, 0, i32::MAX.unsigned_abs())?;
    rows(op, args.tokens, args.row_bytes)?;
    if args.row_count > 0 {
        present(op, "rows", args.rows)?;
    }
    present(op, "out", args.out)?;
    aligned(op, "inverse", args.inverse, 4)?;
    aligned(op, "weights", args.weights, weight_bytes)?;
    for (name, address) in
        [("rows", args.rows), ("shared", args.shared), ("residual", args.residual), ("out", args.out)]
    {
        aligned(op, name, address, 16)?;
    }
    Ok(())
}

/// Arguments of the cut into blocks.
pub(super) fn align(args: &AlignArgs) -> Result<()> {
    let op = "align";
    range(op, "pairs", args.pairs, 0, i32::MAX.unsigned_abs())?;
    range(op, "bins", args.bins, 1, MAX_EXPERTS)?;
    range(op, "block", args.block, 1, MAX_BLOCK)?;
    range(op, "capacity", args.capacity, 0, i32::MAX.unsigned_abs())?;
    let most = args.pairs.min(args.bins) * (args.block - 1);
    if u64::from(args.capacity) + u64::from(args.block) <= u64::from(args.pairs) + u64::from(most) {
        return Err(wrong(op, &format!("capacity is {}, too little for any order of the pairs", args.capacity)));
    }
    if !args.capacity.is_multiple_of(args.block) {
        return Err(wrong(
            op,
            &format!("capacity is {}, which is no number of blocks of {}", args.capacity, args.block),
        ));
    }
    for (name, address) in [("ends", args.ends), ("order", args.order), ("owner", args.owner), ("places", args.places)]
    {
        present(op, name, address)?;
        aligned(op, name, address, 4)?;
    }
    aligned(op, "inverse", args.inverse, 4)
}

/// A format by its number.
pub(super) fn number(op: &str, name: &str, format: u32) -> Result<Format> {
    Format::from_number(format).ok_or_else(|| wrong(op, &format!("{name} is {format}, which is no number format")))
}

/// How experts are chosen.
fn choice(op: &str, args: &GateArgs) -> Result<()> {
    pairs(op, args.tokens, args.k)?;
    range(op, "experts", args.experts, 1, MAX_EXPERTS)?;
    range(op, "k", args.k, 1, args.experts)?;
    range(op, "groups", args.groups, 1, MAX_GROUPS)?;
    if !args.experts.is_multiple_of(args.groups) {
        return Err(wrong(op, &format!("{} experts are not {} equal groups", args.experts, args.groups)));
    }
    range(op, "top_groups", args.top_groups, 1, args.groups)?;
    let left = args.top_groups * (args.experts / args.groups);
    if left < args.k {
        return Err(wrong(op, &format!("k is {}, but {} groups leave {left} experts", args.k, args.top_groups)));
    }
    range(op, "scoring", args.scoring, 0, LAST_SCORING)?;
    if args.flags & !(RENORMALIZE | GROUP_TOP2 | IDS_I64) == 0 {
        return Ok(());
    }
    Err(wrong(op, &format!("flags are {:#x}, of which some mean nothing", args.flags)))
}

/// Where a gate's tensors lie.
fn gate_memory(op: &str, format: Format, args: &GateArgs) -> Result<()> {
    let weight_bytes = number(op, "weights_format", args.weights_format)?.bytes();
    aligned(op, "logits", args.logits, format.bytes())?;
    aligned(op, "bias", args.bias, 4)?;
    aligned(op, "weights", args.weights, weight_bytes)?;
    aligned(op, "ids", args.ids, if args.flags & IDS_I64 == 0 { 4 } else { 8 })?;
    aligned(op, "valid", args.valid, 4)
}

/// A copy of rows, as they are or as e4m3 with scales.
fn copy(op: &str, args: &PermuteArgs) -> Result<()> {
    rows(op, args.tokens, args.row_bytes)?;
    present(op, "the rows' place", args.out)?;
    aligned(op, "x", args.x, 16)?;
    aligned(op, "the rows' place", args.out, 16)?;
    if args.scales == 0 {
        return Ok(());
    }
    aligned(op, "scales", args.scales, 4)?;
    let bytes = number(op, "x_format", args.x_format)?.bytes();
    if args.row_bytes.is_multiple_of(SCALED_COLUMNS * bytes) {
        return Ok(());
    }
    let numbers = args.row_bytes / bytes;
    Err(wrong(op, &format!("rows of {numbers} numbers have no whole scales: {SCALED_COLUMNS} share one")))
}

/// Tokens and experts of each: every pair has a row that an `int32` counts.
fn pairs(op: &str, tokens: u32, k: u32) -> Result<()> {
    range(op, "k", k, 1, MAX_K)?;
    if u64::from(tokens) * u64::from(k) < 1 << 31 {
        return Ok(());
    }
    Err(wrong(op, &format!("{tokens} tokens with {k} experts each are too many for one launch")))
}

/// Rows are moved 16 bytes at a time, and their pieces are counted.
fn rows(op: &str, tokens: u32, bytes: u32) -> Result<()> {
    if bytes == 0 || !bytes.is_multiple_of(16) {
        return Err(wrong(op, &format!("rows of {bytes} bytes, which is no multiple of 16")));
    }
    if plan::countable(tokens, bytes) {
        return Ok(());
    }
    Err(wrong(op, &format!("{tokens} rows of {bytes} bytes are too many for one launch")))
}

fn range(op: &str, name: &str, value: u32, least: u32, most: u32) -> Result<()> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(wrong(op, &format!("{name} is {value}, not in {least}..={most}")))
}

fn present(op: &str, name: &str, address: u64) -> Result<()> {
    if address != 0 {
        return Ok(());
    }
    Err(wrong(op, &format!("{name} is null")))
}

fn aligned(op: &str, name: &str, address: u64, bytes: u32) -> Result<()> {
    if address.is_multiple_of(u64::from(bytes)) {
        return Ok(());
    }
    Err(wrong(op, &format!("{name} does not begin on {bytes} bytes")))
}

fn wrong(op: &str, what: &str) -> Error {
    Error::new(ErrorKind::Device, format!("{op}: {what}"))
}
