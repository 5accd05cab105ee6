//! Launches of the routing kernels: router's logits to chosen experts, to rows sorted by expert or slot, and back.
//!
//! | call | launches |
//! |---|---|
//! | [`gate`](Routing::gate), [`permute`](Routing::permute), [`combine`](Routing::combine), [`align`](Routing::align) | one |
//! | [`route`](Routing::route), few tokens | one, and a `permute` if rows are wanted |
//! | the same, more tokens | one that chooses and counts, one that places (and copies rows) |
//! | the same, many tokens | the same, and one between them that adds up the counts |
//!
//! The host's time is most of what a small call costs: nothing here allocates or waits.
#![expect(unsafe_code, reason = "launches with addresses from outside")]

mod check;
mod layout;
mod plan;
mod rule;

use std::sync::Arc;

use moecore::Result;

pub use check::MAX_GROUPS;
pub(crate) use check::gate as check_gate;
pub use layout::*;
use layout::{BY_LOGITS, BY_SCORES};
pub use plan::workspace;
pub(crate) use rule::ruled;

use crate::context::{Context, Entered};
use crate::kernels::{Family, Format, Kernel, Kernels, Shape};
use crate::stream::Stream;
use plan::{Route, Tiles};

/// The routing kernels of one GPU, on this thread.
#[derive(Debug)]
pub struct Routing<'a> {
    context: &'a Context,
    kernels: &'a Kernels,
    _entered: Entered<'a>,
}

impl<'a> Routing<'a> {
    /// Launches on a GPU. The first of a process loads the kernels.
    pub fn on(context: &'a Arc<Context>) -> Result<Self> {
        Ok(Self { context, kernels: context.kernels()?, _entered: context.enter()? })
    }

    /// Chooses experts by logits of a format.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launch is over, and fit the shapes.
    pub unsafe fn gate(&self, format: Format, args: &GateArgs, stream: Stream) -> Result<()> {
        check::gate(format, args)?;
        if args.tokens == 0 {
            return Ok(());
        }
        let args = ruled(format, args);
        let kernel = by_rule(GATE, format, &args);
        // SAFETY: the caller's promise.
        unsafe { self.launch(kernel, &plan::gate(args.tokens, self.kernels.gpu()), stream, &args) }
    }

    /// Chooses experts by logits of a format, or takes the ids that are given, and sorts rows by bin; copies the rows
    /// if `x` is there. `counts`, `starts` and `tile` are filled in here. At `workspace` there are [`workspace`] bytes;
    /// what they hold before and after means nothing.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launches are over, and fit the shapes.
    pub unsafe fn route(&self, format: Format, args: &RouteArgs, workspace: u64, stream: Stream) -> Result<()> {
        check::route(format, args)?;
        let args = &RouteArgs { gate: ruled(format, &args.gate), ..*args };
        let gate = &args.gate;
        // SAFETY: the caller's promise; the plan's parts of the workspace are inside of what `workspace` asks for.
        unsafe {
            match plan::route(gate.tokens, gate.k, args.bins, self.kernels.gpu()) {
                Route::Small(shape) => {
                    self.launch(by_rule(SMALL, format, gate), &shape, stream, args)?;
                    if args.x == 0 { Ok(()) } else { self.copy(&check::rows_of(args), stream) }
                }
                Route::Tiles(tiles) => {
                    check::workspace(workspace)?;
                    self.tiles(format, args, tiles, workspace, stream)
                }
            }
        }
    }

    /// Sorts tile by tile.
    ///
    /// # Safety
    /// As [`route`](Self::route).
    unsafe fn tiles(
        &self,
        format: Format,
        args: &RouteArgs,
        tiles: Tiles,
        workspace: u64,
        stream: Stream,
    ) -> Result<()> {
        let (k, bins) = (args.gate.k, args.bins);
        let starts = if tiles.scanned() { workspace + tiles.starts(bins) } else { 0 };
        let args = RouteArgs { counts: workspace, starts, tile: tiles.tile, ..*args };
        let place = match args.scales {
            0 => Kernel::of(Family::RoutePlace),
            _ => Kernel::with(Family::RoutePlaceFp8, check::number("route", "x_format", args.x_format)?),
        };
        // SAFETY: the caller's promise.
        unsafe {
            self.launch(by_rule(COUNT, format, &args.gate), &tiles.count(bins), stream, &args)?;
            if tiles.scanned() {
                self.launch(Kernel::of(Family::RouteScan), &Tiles::scan(bins), stream, &args)?;
            }
            self.launch(place, &tiles.place(k, bins, if args.x == 0 { 0 } else { args.row_bytes }), stream, &args)
        }
    }

    /// Copies rows of tokens to where `inverse` wants them.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launch is over, and fit the shapes.
    pub unsafe fn permute(&self, args: &PermuteArgs, stream: Stream) -> Result<()> {
        check::permute(args)?;
        // SAFETY: the caller's promise.
        unsafe { self.copy(args, stream) }
    }

    /// # Safety
    /// As [`permute`](Self::permute).
    unsafe fn copy(&self, args: &PermuteArgs, stream: Stream) -> Result<()> {
        if args.tokens == 0 || args.rows == 0 {
            return Ok(());
        }
        let (kernel, number) = if args.scales == 0 {
            (Kernel::of(Family::Permute), None)
        } else {
            let format = check::number("permute", "x_format", args.x_format)?;
            (Kernel::with(Family::PermuteFp8, format), Some(format.bytes()))
        };
        let shape = plan::permute(args.tokens, args.row_bytes, number, self.kernels.gpu());
        // SAFETY: the caller's promise.
        unsafe { self.launch(kernel, &shape, stream, args) }
    }

    /// Adds up rows of a format, weighted, for each token.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launch is over, and fit the shapes.
    pub unsafe fn combine(&self, format: Format, args: &CombineArgs, stream: Stream) -> Result<()> {
        check::combine(args)?;
        if args.tokens == 0 {
            return Ok(());
        }
        let shape = plan::combine(args.tokens, args.k, args.row_bytes, self.kernels.gpu());
        // SAFETY: the caller's promise.
        unsafe { self.launch(Kernel::with(Family::Combine, format), &shape, stream, args) }
    }

    /// Cuts a sorted order into blocks of one bin each.
    ///
    /// # Safety
    /// All addresses are valid on the GPU until the launch is over, and fit the shapes.
    pub unsafe fn align(&self, args: &AlignArgs, stream: Stream) -> Result<()> {
        check::align(args)?;
        let shape = plan::align(args.pairs, args.bins, args.capacity / args.block, self.kernels.gpu());
        // SAFETY: the caller's promise.
        unsafe { self.launch(Kernel::of(Family::Align), &shape, stream, args) }
    }

    /// # Safety
    /// `args` is what the kernel takes, and its addresses are valid on the GPU.
    unsafe fn launch<T>(&self, kernel: Kernel, shape: &Shape, stream: Stream, args: &T) -> Result<()> {
        // SAFETY: the caller's promise; the context is current as long as this lives.
        unsafe { self.kernels.launch(self.context, kernel, shape, stream, args) }
    }
}

/// Families for whatever is asked for, and for the short ways: by logits, by scores.
type Rules = [Family; 3];
const GATE: Rules = [Family::Gate, Family::GateLogits, Family::GateScores];
const SMALL: Rules = [Family::RouteSmall, Family::RouteSmallLogits, Family::RouteSmallScores];
const COUNT: Rules = [Family::RouteCount, Family::RouteCountLogits, Family::RouteCountScores];

/// The kernel for logits of a format and as many experts, by the rule that the arguments name.
fn by_rule([any, logits, scores]: Rules, format: Format, args: &GateArgs) -> Kernel {
    let family = match args.flags & (BY_LOGITS | BY_SCORES) {
        BY_LOGITS => logits,
        BY_SCORES => scores,
        _ => return Kernel::with(any, format),
    };
    Kernel { width: plan::width(args.experts), ..Kernel::with(family, format) }
}

#[cfg(test)]
mod tests;
