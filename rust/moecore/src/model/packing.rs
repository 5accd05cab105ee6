//! Quantised tensors: logical parameters, stored elements and bytes are three different numbers.
//!
//! A packing is told by a tensor's companions and dtype, one tensor at a time, since a repo may hold several. The
//! config only helps where headers cannot say how many bits a word packs.

use hashbrown::HashMap;

use crate::dtype::Dtype;
use crate::header::inventory::{Inventory, Row};
use crate::header::names::Indices;
use crate::model::config::Config;

/// Endings of tensors that belong to another tensor and hold no parameters of their own: scales, zero points, maps.
/// Longer endings come before their own endings.
const OVERHEAD: &[&str] = &[
    ".weight_scale_inv",
    ".weight_scale_2",
    ".weight_scale",
    ".weight_global_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight_g_idx",
    ".weight_format",
    ".weight.absmax",
    ".weight.quant_map",
    ".weight.nested_absmax",
    ".weight.nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4",
    ".weight.quant_state.bitsandbytes__fp4",
    ".input_global_scale",
    ".input_scale",
    ".input_scale_inv",
    ".output_scale",
    ".activation_scale",
    ".pre_quant_scale",
    ".qzeros",
    ".scales",
    ".biases",
    ".g_idx",
    ".perm",
    ".SCB",
    ".scale",
    "_scale_inv",
    "_scale_2",
    "_input_scale",
    "_scales",
    "_scale",
    "_zero_point",
];

/// Scales of the KV cache: they hang on an attention block or on one of its projections.
const KV_SCALES: &[&str] = &[".k_scale", ".v_scale", ".q_scale", ".kv_scale"];

/// Endings of packed tensors.
const PACKED: &[&str] = &[".qweight", ".weight_packed", "_blocks"];

/// Endings of the tensor that an overhead tensor belongs to.
const PRIMARY: &[&str] = &[".weight", ".qweight", ".weight_packed", "", "_blocks"];

/// What one name pattern is in a packing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packing {
    /// The pattern without quantisation endings: what roles are read from.
    pub stem: String,
    /// Scales and the like: bytes, but no parameters.
    pub overhead: bool,
}

/// Reads the packing of each pattern of an inventory, by pattern number.
#[must_use]
pub fn patterns(inventory: &Inventory) -> Vec<Packing> {
    let known: HashMap<&str, u32> = by_pattern(inventory);
    let has_primary = |stem: &str| PRIMARY.iter().any(|ending| known.contains_key(format!("{stem}{ending}").as_str()));
    inventory
        .patterns()
        .iter()
        .map(|pattern| {
            let stem_of = |endings: &[&str]| {
                endings.iter().find_map(|ending| pattern.strip_suffix(ending)).filter(|stem| !stem.is_empty())
            };
            if let Some(stem) = OVERHEAD.iter().filter_map(|end| pattern.strip_suffix(end)).find(|s| has_primary(s)) {
                return Packing { stem: stem.to_owned(), overhead: true };
            }
            if let Some(stem) = stem_of(KV_SCALES) {
                return Packing { stem: stem.to_owned(), overhead: true };
            }
            let stem = stem_of(PACKED).unwrap_or(pattern);
            Packing { stem: stem.to_owned(), overhead: false }
        })
        .collect()
}

fn by_pattern(inventory: &Inventory) -> HashMap<&str, u32> {
    (0..).zip(inventory.patterns()).map(|(number, pattern)| (pattern.as_str(), number)).collect()
}

/// Counts the logical parameters of packed tensors.
pub struct Counter<'a> {
    inventory: &'a Inventory,
    packings: &'a [Packing],
    pattern_numbers: HashMap<&'a str, u32>,
    /// Shapes of companions by pattern and numbers, filled when a pattern is first asked for.
    companions: HashMap<u32, HashMap<Indices, u32>>,
    config: &'a Config,
    /// Stems whose bits per parameter are a guess.
    guessed: Vec<String>,
}

impl<'a> Counter<'a> {
    /// A counter over an inventory and its packings.
    #[must_use]
    pub fn new(inventory: &'a Inventory, packings: &'a [Packing], config: &'a Config) -> Self {
        let pattern_numbers = by_pattern(inventory);
        Self { inventory, packings, pattern_numbers, companions: HashMap::new(), config, guessed: Vec::new() }
    }

    /// Logical parameters of a tensor.
    pub fn logical(&mut self, row: &Row) -> u64 {
        let packing = &self.packings[row.pattern as usize];
        if packing.overhead {
            return 0;
        }
        let inventory = self.inventory;
        let pattern = inventory.patterns()[row.pattern as usize].as_str();
        let stored = inventory.elements(row);
        match row.dtype {
            // Step counters and hash tables of routers: buffers.
            Dtype::Bool | Dtype::I64 | Dtype::U64 => 0,
            dtype if dtype.is_float() => stored,
            _ if pattern.ends_with(".qweight") => stored * 32 / self.qweight_bits(row, &packing.stem),
            _ if pattern.ends_with("_blocks") => stored * 2,
            Dtype::U8 if pattern.ends_with(".weight_packed") => stored * 2,
            _ if pattern.ends_with(".weight_packed") => stored * 32 / self.config_bits(&packing.stem),
            Dtype::U8 | Dtype::I8 => stored * self.per_byte(row, pattern, stored),
            Dtype::U32 => stored * 32 / self.mlx_bits(row, pattern),
            _ => stored,
        }
    }

    /// Stems whose bits per parameter neither headers nor config state; 4 was assumed.
    #[must_use]
    pub fn guessed(self) -> Vec<String> {
        self.guessed
    }

    /// Shape of the tensor `name` with the numbers of `row`.
    fn companion(&mut self, name: &str, row: &Row) -> Option<&'a [u64]> {
        let number = *self.pattern_numbers.get(name)?;
        let inventory = self.inventory;
        let shapes = self.companions.entry(number).or_insert_with(|| {
            inventory.rows().iter().filter(|row| row.pattern == number).map(|row| (row.indices, row.shape)).collect()
        });
        shapes.get(&row.indices).map(|&shape| inventory.shapes()[shape as usize].as_slice())
    }

    /// GPTQ packs along the input, AWQ along the output; the other tensors of the module tell the bits.
    fn qweight_bits(&mut self, row: &Row, stem: &str) -> u64 {
        let &[rows, columns] = self.inventory.shape(row) else { return self.config_bits(stem) };
        let scales = self.companion(&format!("{stem}.scales"), row);
        if let Some(&[_, outputs]) = scales {
            if columns < outputs {
                return bits(columns, outputs).unwrap_or_else(|| self.config_bits(stem));
            }
            if let Some(&[_, words]) = self.companion(&format!("{stem}.qzeros"), row)
                && let Some(bits) = bits(words, outputs)
            {
                return bits;
            }
        }
        if let Some(&[inputs]) = self.companion(&format!("{stem}.g_idx"), row)
            && let Some(bits) = bits(rows, inputs)
        {
            return bits;
        }
        self.config_bits(stem)
    }

    /// Parameters in one byte of an 8-bit integer weight.
    fn per_byte(&mut self, row: &Row, pattern: &str, stored: u64) -> u64 {
        if self.companion(&format!("{pattern}.absmax"), row).is_some() {
            return 2; // bitsandbytes nf4 and fp4
        }
        let module = pattern.strip_suffix(".weight").unwrap_or(pattern);
        for ending in [".weight_scale", ".scale", "_scale", "_scales", "_weight_scale"] {
            if let Some(scale) = self.companion(&format!("{module}{ending}"), row) {
                // NVFP4 has one scale for 16 parameters, MXFP4 one for 32; 8-bit formats have far fewer scales.
                let scales: u64 = scale.iter().product();
                return if matches!((stored * 2).checked_div(scales), Some(16 | 32)) { 2 } else { 1 };
            }
        }
        1
    }

    /// MLX packs along the input in groups: [o, i * bits / 32] beside scales [o, i / group].
    fn mlx_bits(&mut self, row: &Row, pattern: &str) -> u64 {
        let module = pattern.strip_suffix(".weight").unwrap_or(pattern);
        let words = self.inventory.shape(row).last().copied();
        let groups = self.companion(&format!("{module}.scales"), row).and_then(|shape| shape.last().copied());
        let group_size = self.config.int(&["quantization.group_size", "quantization_config.group_size"]);
        match (words, groups) {
            (Some(words), Some(groups)) => {
                let inputs = groups * group_size.unwrap_or(64);
                bits(words, inputs).unwrap_or_else(|| self.config_bits(module))
            }
            _ => 32, // no scales: plain 32-bit integers
        }
    }

    fn config_bits(&mut self, stem: &str) -> u64 {
        let stated = self.config.int(&["quantization_config.bits", "quantization_config.w_bit", "quantization.bits"]);
        let grouped = || {
            let groups = self.config.get("quantization_config.config_groups")?.as_object()?;
            groups.values().find_map(|group| group.get("weights")?.get("num_bits")?.as_u64())
        };
        stated.or_else(grouped).filter(|bits| (1..=16).contains(bits)).unwrap_or_else(|| {
            if self.guessed.iter().all(|known| known != stem) {
                self.guessed.push(stem.to_owned());
            }
            4
        })
    }
}

/// Bits that make `count` parameters fill `words` 32-bit words, when they are whole and sensible.
fn bits(words: u64, count: u64) -> Option<u64> {
    let total = words.checked_mul(32)?;
    (count > 0 && total.is_multiple_of(count)).then(|| total / count).filter(|bits| (1..=16).contains(bits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::names;

    /// Name, dtype and shape.
    type Tensor<'a> = (&'a str, Dtype, &'a [u64]);

    fn total(tensors: &[Tensor<'_>], config: &str) -> (u64, usize) {
        let mut inventory = Inventory::default();
        let mut pattern = String::new();
        for (name, dtype, shape) in tensors {
            let indices = names::collapse(name, &mut pattern);
            inventory.add(&pattern, shape, *dtype, indices);
        }
        let config = Config::parse(config.as_bytes(), "config.json").unwrap();
        let packings = patterns(&inventory);
        let mut counter = Counter::new(&inventory, &packings, &config);
        let total = inventory.rows().iter().map(|row| counter.logical(row)).sum();
        (total, counter.guessed().len())
    }

    // Each case is a 256 x 512 linear layer (131,072 parameters) as the named tool stores it.
    #[test]
    fn every_packing_has_the_same_logical_parameters() {
        use Dtype::{BF16, F8E4M3, F16, F32, I8, I32, I64, U8, U32};
        let cases: &[(&str, &[Tensor<'_>], &str)] = &[
            ("plain", &[("a.0.weight", BF16, &[256, 512])], "{}"),
            ("fp8 block", &[("a.0.weight", F8E4M3, &[256, 512]), ("a.0.weight_scale_inv", F32, &[2, 4])], "{}"),
            (
                "fp8 tensor",
                &[("a.0.weight", F8E4M3, &[256, 512]), ("a.0.weight_scale", F32, &[]), ("a.0.input_scale", F32, &[])],
                "{}",
            ),
            ("mxfp4", &[("a.0.w_blocks", U8, &[1, 256, 16, 16]), ("a.0.w_scales", U8, &[1, 256, 16])], "{}"),
            (
                "nvfp4",
                &[
                    ("a.0.weight", U8, &[256, 256]),
                    ("a.0.weight_scale", F8E4M3, &[256, 32]),
                    ("a.0.weight_scale_2", F32, &[]),
                ],
                "{}",
            ),
            (
                "gptq 4 bit",
                &[
                    ("a.0.qweight", I32, &[64, 256]),
                    ("a.0.qzeros", I32, &[4, 32]),
                    ("a.0.scales", F16, &[4, 256]),
                    ("a.0.g_idx", I32, &[512]),
                ],
                "{}",
            ),
            (
                "gptq 3 bit",
                &[("a.0.qweight", I32, &[48, 256]), ("a.0.qzeros", I32, &[4, 24]), ("a.0.scales", F16, &[4, 256])],
                "{}",
            ),
            (
                "gptq without zeros",
                &[("a.0.qweight", I32, &[128, 256]), ("a.0.scales", F16, &[4, 256])],
                r#"{"quantization_config":{"bits":8}}"#,
            ),
            (
                "awq",
                &[("a.0.qweight", I32, &[512, 32]), ("a.0.qzeros", I32, &[4, 32]), ("a.0.scales", F16, &[4, 256])],
                "{}",
            ),
            (
                "compressed-tensors int4",
                &[
                    ("a.0.weight_packed", I32, &[256, 64]),
                    ("a.0.weight_scale", BF16, &[256, 4]),
                    ("a.0.weight_shape", I64, &[2]),
                ],
                r#"{"quantization_config":{"config_groups":{"group_0":{"weights":{"num_bits":4}}}}}"#,
            ),
            (
                "compressed-tensors nvfp4",
                &[("a.0.weight_packed", U8, &[256, 256]), ("a.0.weight_global_scale", F32, &[1])],
                "{}",
            ),
            (
                "bitsandbytes nf4",
                &[
                    ("a.0.weight", U8, &[65536, 1]),
                    ("a.0.weight.absmax", U8, &[2048]),
                    ("a.0.weight.quant_map", F32, &[16]),
                    ("a.0.weight.nested_absmax", F32, &[8]),
                    ("a.0.weight.quant_state.bitsandbytes__nf4", U8, &[90]),
                ],
                "{}",
            ),
            ("bitsandbytes int8", &[("a.0.weight", I8, &[256, 512]), ("a.0.SCB", F32, &[256])], "{}"),
            (
                "mlx",
                &[("a.0.weight", U32, &[256, 64]), ("a.0.scales", BF16, &[256, 8]), ("a.0.biases", BF16, &[256, 8])],
                r#"{"quantization":{"bits":4,"group_size":64}}"#,
            ),
        ];
        for (what, tensors, config) in cases {
            assert_eq!(total(tensors, config), (131_072, 0), "{what}");
        }
    }

    #[test]
    fn a_guess_is_told() {
        let (parameters, guesses) = total(&[("a.0.weight_packed", Dtype::I32, &[256, 64])], "{}");
        assert_eq!((parameters, guesses), (131_072, 1));
    }

    #[test]
    fn scale_parameters_without_a_weight_are_parameters() {
        let tensors: &[Tensor<'_>] =
            &[("router.scale", Dtype::BF16, &[8]), ("router.proj.weight", Dtype::BF16, &[4, 8])];
        assert_eq!(total(tensors, "{}").0, 40);
    }
}
