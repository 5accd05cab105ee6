//! [`moecore::header`] against the `safetensors` crate on generated and on damaged headers.

mod header_oracle;

use std::collections::HashSet;
use std::fmt::Write;

use header_oracle::{Verdict, compare};
use moecore::dtype::Dtype;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::FileFailurePersistence;

/// A header in pieces, so that damage can be done to names, fields and offsets as well as to bytes.
#[derive(Debug, Clone)]
struct Draft {
    metadata: Option<String>,
    entries: Vec<Entry>,
    /// White space between tokens, and around the whole.
    space: &'static str,
}

/// One tensor: its name and its fields, all as JSON.
#[derive(Debug, Clone)]
struct Entry {
    name: String,
    fields: Vec<(&'static str, String)>,
}

impl Draft {
    fn json(&self) -> String {
        let space = self.space;
        let mut pieces = Vec::new();
        pieces.extend(self.metadata.iter().map(|value| format!("\"__metadata__\"{space}:{value}")));
        for entry in &self.entries {
            let fields: Vec<_> = entry.fields.iter().map(|(key, value)| format!("\"{key}\":{space}{value}")).collect();
            pieces.push(format!("{}:{{{}}}", entry.name, fields.join(",")));
        }
        format!("{space}{{{}}}{space}", pieces.join(&format!("{space},")))
    }
}

fn quote(text: &str) -> String {
    serde_json::to_string(text).expect("a string")
}

/// Every character as an escape, which must mean the same.
fn escape(text: &str) -> String {
    let units = text.encode_utf16().fold(String::new(), |mut escaped, unit| {
        write!(escaped, "\\u{unit:04x}").expect("a string");
        escaped
    });
    format!("\"{units}\"")
}

fn names() -> impl Strategy<Value = (String, bool)> {
    let name = prop_oneof![
        4 => "model\\.layers\\.[0-9]{1,2}\\.mlp\\.experts\\.[0-9]{1,3}\\.(up|down|gate)_proj\\.weight",
        2 => "[a-c]{0,2}",
        1 => any::<String>(),
    ];
    (name, prop::bool::weighted(0.1))
}

/// A shape that fills whole bytes in every dtype of `bits` bits.
fn shape(bits: u64) -> impl Strategy<Value = Vec<u64>> {
    vec(prop_oneof![8 => 1..9u64, 1 => Just(0)], 0..=8).prop_map(move |mut shape| {
        let elements: u64 = shape.iter().product();
        if !(elements * bits).is_multiple_of(8) {
            shape.truncate(7);
            shape.push(4);
        }
        shape
    })
}

/// What follows a valid header's rules: dtype, shape, order of fields and an unknown field now and then.
fn contents() -> impl Strategy<Value = (Dtype, Vec<u64>, Vec<usize>, Option<&'static str>)> {
    let extra = select(vec!["null", "[1,{\"a\":[true,-1.5e3]}]", "\"\\u00e9\\n\"", "{}", "18446744073709551615"]);
    select(Dtype::ALL).prop_flat_map(move |dtype| {
        (
            Just(dtype),
            shape(dtype.bits()),
            Just(vec![0, 1, 2]).prop_shuffle(),
            prop::option::weighted(0.1, extra.clone()),
        )
    })
}

fn metadata() -> impl Strategy<Value = Option<String>> {
    let map = vec((any::<String>(), any::<String>()), 0..4).prop_map(|pairs| {
        let pairs: Vec<_> = pairs.iter().map(|(key, value)| format!("{}:{}", quote(key), quote(value))).collect();
        format!("{{{}}}", pairs.join(","))
    });
    prop_oneof![2 => Just(None), 1 => Just(Some("null".to_owned())), 3 => map.prop_map(Some)]
}

/// Headers that both must accept.
fn valid() -> impl Strategy<Value = Draft> {
    let tensors = vec((names(), contents()), 0..12).prop_map(|tensors| {
        let (mut seen, mut begin) = (HashSet::from(["__metadata__".to_owned()]), 0);
        let mut entries = Vec::new();
        for ((name, escaped), (dtype, shape, order, extra)) in tensors {
            if !seen.insert(name.clone()) {
                continue;
            }
            let end = begin + dtype.bytes_of(shape.iter().product()).expect("fills whole bytes");
            let values = [format!("\"{dtype}\""), format!("{shape:?}"), format!("[{begin},{end}]")];
            let keys = ["dtype", "shape", "data_offsets"];
            let mut fields: Vec<_> = order.into_iter().map(|i| (keys[i], values[i].clone())).collect();
            fields.extend(extra.map(|value| ("extra", value.to_owned())));
            entries.push(Entry { name: if escaped { escape(&name) } else { quote(&name) }, fields });
            begin = end;
        }
        entries
    });
    let shuffled = tensors.prop_flat_map(|entries| prop_oneof![Just(entries.clone()), Just(entries).prop_shuffle()]);
    (metadata(), shuffled, select(vec!["", "", " ", "\n\t\r "])).prop_map(|(metadata, entries, space)| Draft {
        metadata,
        entries,
        space,
    })
}

/// Damage to the pieces of a header.
#[derive(Debug, Clone)]
enum Damage {
    SwapFields(Index, Index, Index),
    CopyName(Index, Index),
    CopyEntry(Index, Index),
    CopyField(Index, Index),
    DropField(Index, Index),
    DropEntry(Index),
    Replace(Index, Index, &'static str),
    Metadata(&'static str),
}

fn damage() -> impl Strategy<Value = Damage> {
    let value = select(vec![
        "null",
        "0",
        "-1",
        "1.0",
        "1e999",
        "[]",
        "[0]",
        "[0,0]",
        "[0,0,0]",
        "{}",
        "\"F4\"",
        "\"f32\"",
        "\"\"",
        "[4294967296,4294967296]",
        "[1,1,1,1,1,1,1,1,1]",
        "[18446744073709551615]",
        "[0,18446744073709551616]",
        "[18446744073709551615,18446744073709551615]",
        "[2,1]",
        "[0,1]",
        "[1,2]",
        "{\"F32\":null}",
        "\"\\ud800\"",
        "[[[[]]]]",
        "\"U8\"",
        "\"\\u00558\"",
    ]);
    let metadata =
        select(vec!["{\"a\":1}", "{\"a\":null}", "[]", "\"pt\"", "{\"a\":\"b\",\"a\":\"c\"}", "{\"a\":{}}", "0"]);
    let index = any::<Index>;
    prop_oneof![
        3 => (index(), index(), index()).prop_map(|(a, b, field)| Damage::SwapFields(a, b, field)),
        1 => (index(), index()).prop_map(|(a, b)| Damage::CopyName(a, b)),
        1 => (index(), index()).prop_map(|(a, b)| Damage::CopyEntry(a, b)),
        1 => (index(), index()).prop_map(|(a, field)| Damage::CopyField(a, field)),
        1 => (index(), index()).prop_map(|(a, field)| Damage::DropField(a, field)),
        1 => index().prop_map(Damage::DropEntry),
        3 => (index(), index(), value).prop_map(|(a, field, value)| Damage::Replace(a, field, value)),
        1 => metadata.prop_map(Damage::Metadata),
    ]
}

impl Damage {
    fn apply(self, draft: &mut Draft) {
        let entries = &mut draft.entries;
        if let Self::Metadata(value) = self {
            draft.metadata = Some(value.to_owned());
            return;
        }
        if entries.iter().any(|entry| entry.fields.is_empty()) || entries.is_empty() {
            return;
        }
        let count = entries.len();
        let at = |index: Index| index.index(count);
        match self {
            Self::SwapFields(a, b, field) => {
                let (a, b) = (at(a), at(b));
                let key = entries[a].fields[field.index(entries[a].fields.len())].0;
                let of = |entry: &Entry| entry.fields.iter().position(|(name, _)| *name == key);
                if let (Some(i), Some(j)) = (of(&entries[a]), of(&entries[b])) {
                    let left = entries[a].fields[i].1.clone();
                    entries[a].fields[i].1 = std::mem::replace(&mut entries[b].fields[j].1, left);
                }
            }
            Self::CopyName(a, b) => {
                let (a, b) = (at(a), at(b));
                entries[a].name = entries[b].name.clone();
            }
            Self::CopyEntry(a, b) => {
                let (copy, b) = (entries[at(a)].clone(), at(b));
                entries.insert(b, copy);
            }
            Self::CopyField(a, field) => {
                let fields = &mut entries[at(a)].fields;
                fields.push(fields[field.index(fields.len())].clone());
            }
            Self::DropField(a, field) => {
                let fields = &mut entries[at(a)].fields;
                fields.remove(field.index(fields.len()));
            }
            Self::DropEntry(a) => {
                entries.remove(at(a));
            }
            Self::Replace(a, field, value) => {
                let fields = &mut entries[at(a)].fields;
                let field = field.index(fields.len());
                value.clone_into(&mut fields[field].1);
            }
            Self::Metadata(_) => unreachable!("done above"),
        }
    }
}

/// Damage to the bytes of a header.
#[derive(Debug, Clone)]
enum Scratch {
    Flip(Index, u8),
    /// Printable, so that it more often stays JSON.
    Write(Index, u8),
    Delete(Index, usize),
    Repeat(Index, usize),
}

fn scratch() -> impl Strategy<Value = Scratch> {
    let printable = select(br#"0123456789"{}[]:,.-\ uUFBI_ntrue"#.to_vec());
    prop_oneof![
        (any::<Index>(), 0..8u8).prop_map(|(at, bit)| Scratch::Flip(at, 1 << bit)),
        (any::<Index>(), printable).prop_map(|(at, byte)| Scratch::Write(at, byte)),
        (any::<Index>(), 1..40usize).prop_map(|(at, len)| Scratch::Delete(at, len)),
        (any::<Index>(), 1..40usize).prop_map(|(at, len)| Scratch::Repeat(at, len)),
    ]
}

impl Scratch {
    fn apply(self, json: &mut Vec<u8>) {
        if json.is_empty() {
            return;
        }
        let range = |at: Index, len: usize| at.index(json.len())..(at.index(json.len()) + len).min(json.len());
        match self {
            Self::Flip(at, bit) => {
                let at = at.index(json.len());
                json[at] ^= bit;
            }
            Self::Write(at, byte) => {
                let at = at.index(json.len());
                json[at] = byte;
            }
            Self::Delete(at, len) => drop(json.drain(range(at, len))),
            Self::Repeat(at, len) => {
                let range = range(at, len);
                let copy = json[range.clone()].to_vec();
                json.splice(range.end..range.end, copy);
            }
        }
    }
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2000),
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("proptest-regressions/header.txt"))),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn valid_headers_are_accepted_with_equal_rows(draft in valid()) {
        prop_assert_eq!(compare(draft.json().as_bytes()), Verdict::Accepted);
    }

    #[test]
    fn damaged_pieces_get_the_same_verdict(mut draft in valid(), damages in vec(damage(), 1..4)) {
        for damage in damages {
            damage.apply(&mut draft);
        }
        compare(draft.json().as_bytes());
    }

    #[test]
    fn damaged_bytes_get_the_same_verdict(draft in valid(), scratches in vec(scratch(), 1..4)) {
        let mut json = draft.json().into_bytes();
        for scratch in scratches {
            scratch.apply(&mut json);
        }
        compare(&json);
    }
}

/// The oracle itself must see each kind of verdict, and the two encodings in which ours is knowingly stricter.
#[test]
fn the_oracle_tells_the_verdicts_apart() {
    let json = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    assert_eq!(compare(json.as_bytes()), Verdict::Accepted);
    assert_eq!(compare(json.replace("[1]", "[2]").as_bytes()), Verdict::Refused);
    assert_eq!(compare(br#"{"a":["F32",[1],[0,4]]}"#), Verdict::Stricter);
    assert_eq!(compare(json.replace(r#""F32""#, r#"{"F32":null}"#).as_bytes()), Verdict::Stricter);
    assert_eq!(compare(json.replace("[1]", "[1,1,1,1,1,1,1,1,1]").as_bytes()), Verdict::Stricter);
    let twice = format!("{},{}", &json[..json.len() - 1], &json[1..]);
    assert_eq!(compare(twice.as_bytes()), Verdict::Stricter);
}

/// The seeds of the fuzz target, so that they stay what they are named.
#[test]
fn the_fuzz_seeds_get_the_same_verdict() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/header");
    let mut seen = 0;
    for seed in std::fs::read_dir(folder).expect("fuzz/seeds/header is part of the checkout") {
        let path = seed.unwrap().path();
        let verdict = compare(&std::fs::read(&path).unwrap());
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let expected = match name.split('-').next() {
            Some("ok") => Verdict::Accepted,
            Some("strict") => Verdict::Stricter,
            _ => Verdict::Refused,
        };
        assert_eq!(verdict, expected, "{name}");
        seen += 1;
    }
    assert!(seen > 0);
}
