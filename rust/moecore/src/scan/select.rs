//! Which files of a repo are the model: pure functions over a file list.
//!
//! Repos hold the same weights several times (`consolidated*`, `original/`, fp16 variants) and things that are not
//! the model (adapters). Everything left out is named in a warning.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, ErrorKind};

/// The files that make up a model.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Weight files.
    pub shards: Vec<String>,
    /// The index that says which of `shards` count, when names alone do not.
    pub ambiguous_until: Option<String>,
    /// Indexes of the model, whether needed or not.
    pub index: Option<String>,
    /// Configs in order of preference.
    pub config: Option<String>,
    /// `hf_quant_config.json`.
    pub quant_config: Option<String>,
    /// What was left out, and what is missing.
    pub warnings: Vec<String>,
    /// Shards that the numbering or the index promises and the list lacks: the first few.
    pub missing: Vec<String>,
    /// How many more of them there are.
    pub missing_more: u64,
}

impl Selection {
    /// One error for all missing shards.
    #[must_use]
    pub fn missing_error(&self, advice: &str) -> Option<Error> {
        let (first, rest) = self.missing.split_first()?;
        let more = rest.len() as u64 + self.missing_more;
        let others = if more > 0 { format!(" and {more} more shards") } else { String::new() };
        let message = format!("this shard is missing{others}; {advice}");
        Some(Error::new(ErrorKind::NotFound, message).with_file(first))
    }
}

/// Missing shards that are named; one tiny file may promise a hundred thousand.
const MISSING_NAMED: usize = 16;

/// Folders that hold copies in other formats.
const COPIES: &[&str] = &["original", "onnx", "openvino", "coreml", "metal", "gguf"];

const VARIANTS: &[&str] = &[".fp16", ".bf16", ".fp32", ".int8", ".non_ema", ".ema"];

const ENDING: &str = ".safetensors";

/// Chooses the model's files from all files of a repo or folder.
#[must_use]
pub fn select(files: &[String]) -> Selection {
    let mut selection = Selection {
        config: ["config.json", "params.json"].iter().find_map(|name| find(files, name)),
        quant_config: find(files, "hf_quant_config.json"),
        ..Selection::default()
    };
    let mut left_out: BTreeMap<&str, usize> = BTreeMap::new();
    let mut root: Vec<&str> = Vec::new();
    let mut nested: Vec<&str> = Vec::new();
    let all: Vec<&str> = files.iter().map(String::as_str).filter(|name| name.ends_with(ENDING)).collect();
    for &name in &all {
        let base = name.rsplit('/').next().unwrap_or(name);
        let folder = name.split('/').next().filter(|_| name.contains('/'));
        if base.starts_with("adapter_") {
            *left_out.entry("adapters").or_default() += 1;
        } else if folder.is_some_and(|folder| COPIES.contains(&folder) || folder.starts_with('.')) {
            *left_out.entry("copies in other formats").or_default() += 1;
        } else if is_variant(name, &all) {
            *left_out.entry("variants of other precision").or_default() += 1;
        } else if folder.is_some() {
            nested.push(name);
        } else {
            root.push(name);
        }
    }
    let (consolidated, plain): (Vec<&str>, Vec<&str>) =
        root.into_iter().partition(|name| name.starts_with("consolidated"));
    selection.index = files.iter().find(|name| *name == "model.safetensors.index.json").cloned().or_else(|| {
        files.iter().find(|name| name.ends_with(".safetensors.index.json") && !name.contains('/')).cloned()
    });
    let has_root = !(plain.is_empty() && consolidated.is_empty());
    if has_root && !nested.is_empty() {
        left_out.insert("in subfolders", nested.len());
    }
    let chosen = if !plain.is_empty() {
        if !consolidated.is_empty() {
            left_out.insert("consolidated copies", consolidated.len());
        }
        plain
    } else if !consolidated.is_empty() {
        consolidated
    } else {
        if !nested.is_empty() {
            selection.warnings.push("weights are in subfolders only; all of them are counted".to_owned());
        }
        nested
    };
    selection.shards = chosen.iter().map(|&name| name.to_owned()).collect();
    selection.shards.sort_unstable();

    let sets = sets(&selection.shards);
    if sets.len() > 1 && !selection.shards[0].contains('/') {
        match &selection.index {
            Some(index) => selection.ambiguous_until = Some(index.clone()),
            None => selection.warnings.push(format!("{} separate weight files are counted together", sets.len())),
        }
    }
    for (set, numbers) in &sets {
        let (names, more) = missing(set, numbers, MISSING_NAMED.saturating_sub(selection.missing.len()));
        selection.missing.extend(names);
        selection.missing_more += more;
    }
    for (what, count) in left_out {
        selection.warnings.push(format!("left out: {count} files ({what})"));
    }
    selection
}

fn find(files: &[String], name: &str) -> Option<String> {
    files.iter().find(|file| *file == name).cloned()
}

/// `model.fp16.safetensors` beside `model.safetensors`: the same weights again.
fn is_variant(name: &str, all: &[&str]) -> bool {
    VARIANTS.iter().any(|variant| {
        name.find(variant).is_some_and(|at| {
            let plain = format!("{}{}", &name[..at], &name[at + variant.len()..]);
            all.contains(&plain.as_str())
        })
    })
}

/// A numbered set of shards: what is before the number, and how many there should be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Set {
    stem: String,
    of: String,
}

/// Numbers of a set, and how wide they are written: 1 where they are not padded (Kimi-K2: `model-1-of-61`).
#[derive(Debug, Default, PartialEq, Eq)]
struct Numbers {
    present: BTreeSet<u64>,
    width: usize,
}

/// Shards by set. A file without `-00001-of-00002` is a set of its own.
fn sets(shards: &[String]) -> BTreeMap<Set, Numbers> {
    let mut sets: BTreeMap<Set, Numbers> = BTreeMap::new();
    for name in shards {
        let stem = name.strip_suffix(ENDING).unwrap_or(name);
        let numbered = stem.rsplit_once("-of-").and_then(|(before, of)| {
            let (stem, number) = before.rsplit_once('-')?;
            let all_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number = Some(number).filter(|number| all_digits(number) && all_digits(of))?;
            let width = if number.starts_with('0') { number.len() } else { 1 };
            Some((Set { stem: stem.to_owned(), of: of.to_owned() }, number.parse().ok()?, width))
        });
        if let Some((set, number, width)) = numbered {
            let numbers = sets.entry(set).or_default();
            numbers.present.insert(number);
            numbers.width = numbers.width.max(width);
        } else {
            sets.insert(Set { stem: stem.to_owned(), of: String::new() }, Numbers::default());
        }
    }
    sets
}

/// The first `limit` names of a set that are not there, and how many more. gpt-oss counts from 0 and holds one more
/// than it says.
fn missing(set: &Set, numbers: &Numbers, limit: usize) -> (Vec<String>, u64) {
    let Ok(of) = set.of.parse::<u64>() else { return (Vec::new(), 0) };
    let first = u64::from(!numbers.present.contains(&0));
    let promised = (of.saturating_add(1)).saturating_sub(first);
    let count = promised.saturating_sub(numbers.present.range(first..=of.max(first)).count() as u64);
    // Of limit + present numbers at least `limit` are missing ones.
    let looked_at = (limit + numbers.present.len()) as u64;
    let names: Vec<String> = (first..=of.min(first.saturating_add(looked_at)))
        .filter(|number| !numbers.present.contains(number))
        .take(limit)
        .map(|number| format!("{}-{number:0width$}-of-{}{ENDING}", set.stem, set.of, width = numbers.width))
        .collect();
    let more = count.saturating_sub(names.len() as u64);
    (names, more)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(files: &[&str]) -> Selection {
        select(&files.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn copies_variants_and_adapters_are_left_out() {
        let selection = selected(&[
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "consolidated-00001-of-00001.safetensors",
            "original/model.safetensors",
            "adapter_model.safetensors",
            "README.md",
        ]);
        assert_eq!(selection.shards, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
        assert_eq!(selection.ambiguous_until, None);
        assert_eq!(selection.warnings.len(), 3);
        let variant = selected(&["model.safetensors", "model.fp16.safetensors"]);
        assert_eq!(variant.shards, ["model.safetensors"]);
        assert_eq!(selected(&["model.fp16.safetensors"]).shards, ["model.fp16.safetensors"]);
    }

    #[test]
    fn consolidated_files_count_when_alone() {
        let selection = selected(&["consolidated.safetensors", "params.json"]);
        assert_eq!(selection.shards, ["consolidated.safetensors"]);
        assert_eq!(selection.config.as_deref(), Some("params.json"));
    }

    #[test]
    fn the_index_settles_odd_names() {
        let files = ["model_0.safetensors", "model_1.safetensors", "model.safetensors.index.json"];
        assert_eq!(selected(&files).ambiguous_until.as_deref(), Some("model.safetensors.index.json"));
        assert_eq!(selected(&files[..2]).warnings.len(), 1);
    }

    #[test]
    fn gaps_in_the_numbering_are_named() {
        let gap = selected(&["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]);
        assert_eq!(gap.missing, ["model-00002-of-00003.safetensors"]);
        // gpt-oss counts 0, 1, 2 "of 2".
        let from_zero = selected(&[
            "model-00000-of-00002.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]);
        assert!(from_zero.missing.is_empty());
        let boast = selected(&["model-00001-of-99999.safetensors"]);
        assert_eq!((boast.missing.len(), boast.missing_more), (16, 99_998 - 16));
        assert!(boast.missing_error("x").unwrap().to_string().contains("and 99997 more"));
        assert_eq!(selected(&["model-1-of-18446744073709551615.safetensors"]).missing.len(), 16);
        // Kimi-K2 does not pad its numbers.
        let unpadded: Vec<String> =
            (1..=12).filter(|n| *n != 7).map(|n| format!("model-{n}-of-12.safetensors")).collect();
        let unpadded = select(&[unpadded, vec!["model.safetensors.index.json".to_owned()]].concat());
        assert_eq!((unpadded.missing, unpadded.ambiguous_until), (vec!["model-7-of-12.safetensors".to_owned()], None));
        // DeepSeek-V3 writes the count with six digits.
        let wide = selected(&["model-00001-of-000002.safetensors"]);
        assert_eq!(wide.missing, ["model-00002-of-000002.safetensors"]);
    }

    #[test]
    fn subfolders_count_when_the_root_is_empty() {
        let selection = selected(&["unet/model.safetensors", "vae/model.safetensors", "onnx/model.safetensors"]);
        assert_eq!(selection.shards.len(), 2);
        assert_eq!(selection.warnings.len(), 2);
    }
}
