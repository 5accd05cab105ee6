//! Arguments of the routing kernels: `cuda/routing.cuh`, as seen from this side. That file says what each field means;
//! addresses are of GPU memory, 0 where there is none.

/// Experts that a gate can choose from, and bins that rows can be sorted into.
pub const MAX_EXPERTS: u32 = 1024;
/// Experts of a token.
pub const MAX_K: u32 = 32;
/// Places of an aligned block.
pub const MAX_BLOCK: u32 = 1024;
/// The last of the scorings.
pub const LAST_SCORING: u32 = 3;
/// Flag: weights are divided by their sum.
pub const RENORMALIZE: u32 = 1;
/// Flag: a group's score is the sum of its two best.
pub const GROUP_TOP2: u32 = 2;
/// Flag: ids are `int64`.
pub const IDS_I64: u32 = 4;
/// Flag, set before a launch: the logits rank, and nothing is in the way of the short way.
pub(super) const BY_LOGITS: u32 = 8;
/// Flag, set before a launch: scores rank.
pub(super) const BY_SCORES: u32 = 16;
/// Experts of a token that the short ways can choose.
pub(super) const WORD_K: u32 = 31;
/// Scoring by sigmoid.
pub(super) const SCORE_SIGMOID: u32 = 1;
/// Scoring by sqrt(softplus).
pub(super) const SCORE_SQRT_SOFTPLUS: u32 = 2;
/// Columns that share a scale, where rows become e4m3.
pub const SCALED_COLUMNS: u32 = 128;

/// Arguments of a gate.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "cuda/routing.cuh says what each means")]
pub struct GateArgs {
    pub logits: u64,
    pub bias: u64,
    pub weights: u64,
    pub ids: u64,
    pub valid: u64,
    pub stride: u64,
    pub tokens: u32,
    pub experts: u32,
    pub k: u32,
    pub groups: u32,
    pub top_groups: u32,
    pub scoring: u32,
    pub flags: u32,
    pub weights_format: u32,
    pub scale: f32,
    pub eps: f32,
}

/// Arguments of the kernels that sort rows by bin.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "cuda/routing.cuh says what each means")]
pub struct RouteArgs {
    pub gate: GateArgs,
    pub bin_of: u64,
    pub ends: u64,
    pub source: u64,
    pub inverse: u64,
    pub counts: u64,
    pub starts: u64,
    pub x: u64,
    pub rows: u64,
    pub scales: u64,
    pub bins: u32,
    pub row_bytes: u32,
    pub x_format: u32,
    pub tile: u32,
}

/// Arguments of the copy of rows.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "cuda/routing.cuh says what each means")]
pub struct PermuteArgs {
    pub x: u64,
    pub inverse: u64,
    pub out: u64,
    pub scales: u64,
    pub tokens: u32,
    pub k: u32,
    pub rows: u32,
    pub row_bytes: u32,
    pub x_format: u32,
    pub reserved: u32,
}

/// Arguments of the weighted sum of rows.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "cuda/routing.cuh says what each means")]
pub struct CombineArgs {
    pub rows: u64,
    pub inverse: u64,
    pub weights: u64,
    pub shared: u64,
    pub residual: u64,
    pub out: u64,
    pub tokens: u32,
    pub k: u32,
    pub row_count: u32,
    pub row_bytes: u32,
    pub weights_format: u32,
    pub scale: f32,
}

/// Arguments of the cut into blocks of one bin each.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "cuda/routing.cuh says what each means")]
pub struct AlignArgs {
    pub ends: u64,
    pub inverse: u64,
    pub order: u64,
    pub owner: u64,
    pub places: u64,
    pub pairs: u32,
    pub bins: u32,
    pub block: u32,
    pub capacity: u32,
}

// The kernels assert the same numbers.
const _: () = assert!(size_of::<GateArgs>() == 88);
const _: () = assert!(size_of::<RouteArgs>() == 176);
const _: () = assert!(size_of::<PermuteArgs>() == 56);
const _: () = assert!(size_of::<CombineArgs>() == 72);
const _: () = assert!(size_of::<AlignArgs>() == 56);

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::kernels::Format;

    const HEADER: &str = include_str!("../../../../cuda/routing.cuh");

    /// Fields of a struct of the header, with their offsets by the rules of C.
    fn fields(name: &str) -> Vec<(String, usize)> {
        let body = HEADER.split_once(&format!("struct {name} {{")).unwrap().1.split_once("};").unwrap().0;
        let mut at = 0;
        let mut found = Vec::new();
        for line in body.lines().filter_map(|line| line.split("//").next()?.trim().strip_suffix(';')) {
            let (kind, field) = line.rsplit_once([' ', '*']).unwrap();
            let (size, alignment) = match kind.trim() {
                _ if line.contains('*') => (8, 8),
                "u64" => (8, 8),
                "u32" | "float" => (4, 4),
                "GateArgs" => (size_of::<GateArgs>(), 8),
                other => panic!("{other} of {name}"),
            };
            at = usize::next_multiple_of(at, alignment);
            found.push((field.to_owned(), at));
            at += size;
        }
        found
    }

    macro_rules! agree {
        ($kind:ident: $($field:ident)*) => {
            let here = [$((stringify!($field).to_owned(), offset_of!($kind, $field))),*];
            assert_eq!(fields(stringify!($kind)), here, stringify!($kind));
        };
    }

    #[test]
    fn fields_lie_where_the_kernels_look() {
        agree!(GateArgs: logits bias weights ids valid stride tokens experts k groups top_groups scoring flags
               weights_format scale eps);
        agree!(RouteArgs: gate bin_of ends source inverse counts starts x rows scales bins row_bytes x_format tile);
        agree!(PermuteArgs: x inverse out scales tokens k rows row_bytes x_format reserved);
        agree!(AlignArgs: ends inverse order owner places pairs bins block capacity);
        agree!(CombineArgs: rows inverse weights shared residual out tokens k row_count row_bytes weights_format scale);
    }

    #[test]
    fn numbers_mean_the_same() {
        for (name, here) in [
            ("GATE_MAX_EXPERTS", MAX_EXPERTS),
            ("GATE_MAX_K", MAX_K),
            ("SCORE_SIGMOID", SCORE_SIGMOID),
            ("SCORE_SQRT_SOFTPLUS", SCORE_SQRT_SOFTPLUS),
            ("SCORE_SOFTMAX_TOPK", LAST_SCORING),
            ("GATE_RENORMALIZE", RENORMALIZE),
            ("GATE_GROUP_TOP2", GROUP_TOP2),
            ("GATE_IDS_I64", IDS_I64),
            ("GATE_BY_LOGITS", BY_LOGITS),
            ("GATE_BY_SCORES", BY_SCORES),
            ("FORMAT_F32", Format::F32 as u32),
            ("FORMAT_BF16", Format::Bf16 as u32),
            ("FORMAT_F16", Format::F16 as u32),
        ] {
            let there = HEADER.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
            let there = there.and_then(|text| text.split_whitespace().next()?.trim_end_matches('u').parse().ok());
            assert_eq!(there, Some(here), "{name}");
        }
    }
}
