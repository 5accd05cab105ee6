//! Which way a gate's rows take: the short ways of `cuda/gate_fast.cuh` ask nothing that is known before the launch.

use super::layout::{BY_LOGITS, BY_SCORES, GROUP_TOP2, GateArgs, SCORE_SIGMOID, SCORE_SQRT_SOFTPLUS, WORD_K};
use super::plan;
use crate::kernels::Format;

/// The same arguments, with the flag of the way that will do.
pub(crate) fn ruled(format: Format, args: &GateArgs) -> GateArgs {
    GateArgs { flags: args.flags | rule(format, args), ..*args }
}

/// The flag of a short way, or 0.
fn rule(format: Format, args: &GateArgs) -> u32 {
    if args.logits == 0 {
        return 0; // ids are given
    }
    let Some(each) = plan::experts_of_a_lane(args.experts) else { return 0 };
    let load = (each * format.bytes()).min(16); // bytes
    let numbers = load / format.bytes();
    let whole = args.experts.is_multiple_of(numbers)
        && args.logits.is_multiple_of(u64::from(load))
        && (args.stride * u64::from(format.bytes())).is_multiple_of(u64::from(load));
    if !whole || args.k > WORD_K {
        return 0;
    }
    if args.bias == 0 && args.groups <= 1 {
        return BY_LOGITS;
    }
    let scores = matches!(args.scoring, SCORE_SIGMOID | SCORE_SQRT_SOFTPLUS)
        && (args.bias != 0 || args.flags & GROUP_TOP2 != 0)
        && args.bias.is_multiple_of(16);
    if scores && groups_are_lanes(args, each) { BY_SCORES } else { 0 }
}

/// Whether a group is a power of two of lanes that own so many experts each.
fn groups_are_lanes(args: &GateArgs, each: u32) -> bool {
    let size = args.experts / args.groups.max(1);
    args.groups <= 1 || (each <= 8 && size.is_multiple_of(each) && (size / each).is_power_of_two())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(experts: u32) -> GateArgs {
        GateArgs {
            logits: 4096,
            experts,
            stride: u64::from(experts),
            k: 8,
            groups: 1,
            top_groups: 1,
            tokens: 1,
            ..GateArgs::default()
        }
    }

    #[test]
    fn logits_rank_where_nothing_else_does() {
        for experts in [60, 64, 72, 128, 160, 256, 384, 512] {
            assert_eq!(rule(Format::F32, &args(experts)), BY_LOGITS, "{experts}");
            assert_eq!(rule(Format::Bf16, &args(experts)), BY_LOGITS, "{experts}");
        }
        for experts in [513, 896, 1024, 61, 127, 254] {
            assert_eq!(rule(Format::F32, &args(experts)), 0, "{experts}");
        }
        assert_eq!(rule(Format::F32, &args(132)), BY_LOGITS);
        assert_eq!(rule(Format::Bf16, &args(132)), 0, "8 numbers of 16 bits are one load");
        assert_eq!(rule(Format::F32, &GateArgs { k: 31, ..args(64) }), BY_LOGITS);
        assert_eq!(rule(Format::F32, &GateArgs { k: 32, ..args(64) }), 0);
    }

    #[test]
    fn rows_lie_where_wide_loads_may_begin() {
        let all = args(256);
        assert_eq!(rule(Format::F32, &GateArgs { logits: 4100, ..all }), 0);
        assert_eq!(rule(Format::F32, &GateArgs { stride: 257, ..all }), 0);
        assert_eq!(rule(Format::F32, &GateArgs { stride: 260, ..all }), BY_LOGITS);
        assert_eq!(rule(Format::F16, &GateArgs { stride: 260, ..all }), 0);
        assert_eq!(rule(Format::Bf16, &GateArgs { logits: 4100, stride: 62, ..args(60) }), BY_LOGITS, "two at a time");
    }

    #[test]
    fn scores_rank_with_a_bias_or_groups_of_two_best() {
        let biased = GateArgs { bias: 4096, scoring: SCORE_SIGMOID, ..args(256) };
        assert_eq!(rule(Format::F32, &biased), BY_SCORES);
        assert_eq!(rule(Format::F32, &GateArgs { scoring: SCORE_SQRT_SOFTPLUS, ..biased }), BY_SCORES);
        assert_eq!(rule(Format::F32, &GateArgs { scoring: 0, ..biased }), 0);
        assert_eq!(rule(Format::F32, &GateArgs { scoring: 3, ..biased }), 0);
        assert_eq!(rule(Format::F32, &GateArgs { bias: 4104, ..biased }), 0);
        let grouped = GateArgs { bias: 0, groups: 8, top_groups: 4, ..biased };
        assert_eq!(rule(Format::F32, &grouped), 0, "logits rank, in groups");
        assert_eq!(rule(Format::F32, &GateArgs { flags: GROUP_TOP2, ..grouped }), BY_SCORES);
        assert_eq!(rule(Format::F32, &GateArgs { bias: 4096, ..grouped }), BY_SCORES);
        let many = GateArgs { flags: GROUP_TOP2, ..grouped };
        assert_eq!(rule(Format::F32, &GateArgs { experts: 160, stride: 160, ..many }), 0, "20 are not whole lanes");
        assert_eq!(rule(Format::F32, &GateArgs { experts: 192, stride: 192, ..many }), 0, "3 lanes");
        assert_eq!(rule(Format::F32, &GateArgs { experts: 512, stride: 512, ..many }), 0);
        assert_eq!(rule(Format::F32, &GateArgs { experts: 384, stride: 384, ..biased }), BY_SCORES);
    }

    #[test]
    fn two_groups_are_groups() {
        let limited = GateArgs { groups: 2, top_groups: 1, ..args(64) };
        assert_eq!(rule(Format::F32, &limited), 0, "logits rank, in groups");
        let scored = |experts| GateArgs { groups: 2, scoring: SCORE_SIGMOID, flags: GROUP_TOP2, ..args(experts) };
        assert_eq!(rule(Format::F32, &scored(64)), BY_SCORES);
        assert_eq!(rule(Format::F32, &scored(160)), 0, "10 lanes");
        assert_eq!(rule(Format::F32, &GateArgs { bias: 4096, flags: 0, ..scored(160) }), 0);
    }

    #[test]
    fn other_flags_stay() {
        let flags = ruled(Format::F32, &GateArgs { flags: 5, ..args(64) }).flags;
        assert_eq!(flags, 5 | BY_LOGITS);
    }
}
