//! One malformed header per rule of [`moecore::header`], and the headers that must be accepted.

use std::fmt::Write;

use moecore::dtype::Dtype;
use moecore::header::{Header, MAX_HEADER_LEN_LOCAL, MAX_METADATA, MAX_TENSORS};
use moecore::{Error, ErrorKind};

const FILE: &str = "model-00001.safetensors";

fn parse(json: &str) -> Header {
    Header::parse(json.as_bytes(), None, FILE).unwrap_or_else(|error| panic!("{json:.200}: {error}"))
}

/// The header must be refused, with a well-formed error that contains `fault` and names `tensor`.
#[track_caller]
fn refused(json: impl AsRef<[u8]>, fault: &str, tensor: Option<&str>) {
    refused_with_len(json, None, fault, tensor);
}

#[track_caller]
fn refused_with_len(json: impl AsRef<[u8]>, file_len: Option<u64>, fault: &str, tensor: Option<&str>) {
    let error = Header::parse(json.as_ref(), file_len, FILE).expect_err("must be refused");
    check_error(&error, fault, tensor);
}

#[track_caller]
fn check_error(error: &Error, fault: &str, tensor: Option<&str>) {
    assert_eq!(error.kind(), ErrorKind::InvalidHeader, "{error}");
    assert_eq!(error.file(), Some(FILE), "{error}");
    assert_eq!(error.tensor(), tensor, "{error}");
    let text = error.to_string();
    assert!(text.contains(fault), "{text}");
    assert!(text.contains("; ") && !text.ends_with('.'), "says what to do, without a full stop: {text}");
}

/// One U8 tensor `a` of 4 bytes, with one piece of its entry replaced.
fn entry(from: &str, to: &str) -> String {
    let good = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    assert!(good.contains(from));
    good.replace(from, to)
}

/// Tensors `a` and `b` of U8 with these offsets and matching shapes.
fn two(a: (u64, u64), b: (u64, u64)) -> String {
    let one = |name, (begin, end): (u64, u64)| {
        format!(r#""{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end.saturating_sub(begin))
    };
    format!("{{{},{}}}", one("a", a), one("b", b))
}

#[test]
fn refuses_json_of_impossible_length() {
    refused("", "the header has 0 bytes", None);
    refused("1", "the header has 1 bytes", None);
    let longest = usize::try_from(MAX_HEADER_LEN_LOCAL).unwrap();
    let mut json = "{}".to_owned() + &" ".repeat(longest - 2);
    assert!(parse(&json).is_empty());
    json.push(' ');
    refused(json, "the header has 100000001 bytes", None);
}

#[test]
fn refuses_bytes_that_are_not_utf8() {
    refused(b"{\"\xff\":1}", "not UTF-8", None);
}

#[test]
fn refuses_what_is_not_a_json_object() {
    refused("[]", "invalid type: sequence, expected an object of tensors", None);
    refused("null", "invalid type: null", None);
    refused("{} x", "trailing characters", None);
    refused("{}\0", "trailing characters", None);
    refused("{\"a", "EOF while parsing", None);
    refused("\u{feff}{}", "not valid JSON", None);
}

#[test]
fn refuses_an_entry_cut_short_and_names_the_tensor() {
    refused(r#"{"a":{"dtype":"U8","sha"#, "EOF while parsing", Some("a"));
    // Behind an entry no tensor is at fault.
    refused(entry("}}", "} x"), "expected `,` or `}`", None);
}

#[test]
fn refuses_duplicate_names() {
    let zero = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    refused(format!(r#"{{"b":{zero},"a":{zero},"c":{zero},"a":{zero}}}"#), "occurs twice", Some("a"));
    // The same name in another spelling, and with a valid cover of the data.
    let spelled = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    refused(spelled, "occurs twice", Some("a"));
}

#[test]
fn refuses_duplicate_fields() {
    refused(entry(r#""dtype":"U8""#, r#""dtype":"U8","dtype":"U8""#), "field `dtype` occurs twice", Some("a"));
    refused(entry(r#""shape":[4]"#, r#""shape":[4],"shape":[4]"#), "field `shape` occurs twice", Some("a"));
    let offsets = r#""data_offsets":[0,4],"data_offsets":[0,4]"#;
    refused(entry(r#""data_offsets":[0,4]"#, offsets), "field `data_offsets` occurs twice", Some("a"));
}

#[test]
fn refuses_missing_fields() {
    refused(entry(r#""dtype":"U8","#, ""), "field `dtype` is missing", Some("a"));
    refused(entry(r#""shape":[4],"#, ""), "field `shape` is missing", Some("a"));
    refused(entry(r#","data_offsets":[0,4]"#, ""), "field `data_offsets` is missing", Some("a"));
}

#[test]
fn refuses_fields_of_the_wrong_type() {
    refused(entry(r#"{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#, "3"), "expected an object with", Some("a"));
    refused(entry(r#""U8""#, "8"), "expected the name of a dtype", Some("a"));
    refused(entry("[4]", "4"), "expected a list of dimensions", Some("a"));
    refused(entry("[4]", "null"), "expected a list of dimensions", Some("a"));
    refused(entry("[4]", "[-4]"), "invalid value: integer `-4`", Some("a"));
    refused(entry("[4]", "[4.0]"), "invalid type: floating point `4.0`", Some("a"));
    refused(entry("[4]", "[18446744073709551616]"), "invalid type: floating point", Some("a"));
    refused(entry("[0,4]", "[0]"), "invalid length 1", Some("a"));
    refused(entry("[0,4]", "[0,4,8]"), "trailing characters", Some("a"));
}

#[test]
fn refuses_encodings_of_the_crate_s_derived_code() {
    refused(r#"{"a":["U8",[4],[0,4]]}"#, "invalid type: sequence", Some("a"));
    refused(entry(r#""U8""#, r#"{"U8":null}"#), "invalid type: map", Some("a"));
}

#[test]
fn refuses_unknown_dtypes() {
    refused(entry("U8", "u8"), "unknown dtype `u8`", Some("a"));
    refused(entry("U8", "F128"), "unknown dtype `F128`", Some("a"));
    refused(entry("U8", ""), "unknown dtype ``", Some("a"));
}

#[test]
fn refuses_more_than_eight_dimensions() {
    assert_eq!(parse(&entry("[4]", "[4,1,1,1,1,1,1,1]")).get("a").unwrap().shape.len(), 8);
    refused(entry("[4]", "[4,1,1,1,1,1,1,1,1]"), "more than 8 dimensions", Some("a"));
}

#[test]
fn refuses_shapes_that_overflow() {
    refused(entry("[4]", "[4294967296,4294967296]"), "more elements than 64 bits can count", Some("a"));
    // As the crate multiplies: in order, so a zero helps only what follows it.
    refused(entry("[4]", "[4294967296,4294967296,0]"), "more elements than 64 bits can count", Some("a"));
    parse(r#"{"a":{"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}}"#);
    // The count of bits overflows, the count of elements does not.
    refused(entry("[4]", "[4611686018427387904]"), "overflow 64 bits", Some("a"));
}

#[test]
fn refuses_sub_byte_counts_that_do_not_fill_bytes() {
    refused(
        r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#,
        "3 elements of F4 overflow 64 bits or do not fill whole bytes",
        Some("a"),
    );
    refused(r#"{"a":{"dtype":"F6_E2M3","shape":[2],"data_offsets":[0,2]}}"#, "do not fill whole bytes", Some("a"));
    parse(r#"{"a":{"dtype":"F6_E3M2","shape":[4],"data_offsets":[0,3]}}"#);
}

#[test]
fn refuses_spans_that_do_not_match_shape_and_dtype() {
    refused(entry("U8", "BF16"), "shape [4] of BF16 takes 8 bytes but has 4", Some("a"));
    refused(entry("[4]", "[3]"), "takes 3 bytes but has 4", Some("a"));
    refused(entry("[4]", "[]"), "takes 1 bytes but has 4", Some("a"));
}

#[test]
fn refuses_data_that_ends_before_it_begins() {
    refused(entry("[0,4]", "[4,0]"), "data begins at 4, after its end 0", Some("a"));
}

#[test]
fn refuses_data_that_does_not_begin_at_zero() {
    refused(entry("[0,4]", "[8,12]"), "data begins at 8, which leaves a hole after byte 0", Some("a"));
}

#[test]
fn refuses_holes() {
    refused(two((0, 4), (5, 9)), "data begins at 5, which leaves a hole after byte 4", Some("b"));
}

#[test]
fn refuses_overlaps() {
    refused(two((0, 4), (3, 7)), "data begins at 3, which overlaps data up to byte 4", Some("b"));
    refused(two((0, 4), (0, 4)), "overlaps", Some("b"));
}

#[test]
fn refuses_bytes_after_the_last_tensor_and_files_cut_short() {
    let json = entry("U8", "U8");
    let exact = 8 + json.len() as u64 + 4;
    Header::parse(json.as_bytes(), Some(exact), FILE).unwrap();
    refused_with_len(&json, Some(exact + 1), "1 bytes follow the last tensor", None);
    refused_with_len(&json, Some(exact - 1), "the file is truncated", None);
    refused_with_len("{}", Some(11), "1 bytes follow", None);
}

#[test]
fn refuses_data_past_the_range_of_file_offsets() {
    let tensors: Vec<_> = (0..8u64)
        .map(|i| {
            let (begin, end) = (i << 61, ((i + 1) << 61).wrapping_sub(u64::from(i == 7)));
            format!(r#""t{i}":{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end - begin)
        })
        .collect();
    // 2^61 bytes are 2^64 bits: no such tensor, so the chain already breaks at its first link.
    refused(format!("{{{}}}", tensors.join(",")), "overflow 64 bits", Some("t0"));
    let step = (1u64 << 61) - 1;
    let tensors: Vec<_> = (0..9u64)
        .map(|i| {
            let (begin, end) = if i < 8 { (i * step, (i + 1) * step) } else { (8 * step, u64::MAX) };
            format!(r#""t{i}":{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end - begin)
        })
        .collect();
    refused(format!("{{{}}}", tensors.join(",")), "which no file can have", None);
}

#[test]
fn refuses_metadata_that_does_not_map_strings_to_strings() {
    refused(r#"{"__metadata__":{"a":1}}"#, "`__metadata__` is invalid: invalid type: integer `1`", None);
    refused(r#"{"__metadata__":{"a":null}}"#, "`__metadata__` is invalid", None);
    refused(r#"{"__metadata__":[]}"#, "expected null or an object of strings", None);
    refused(r#"{"__metadata__":"pt"}"#, "expected null or an object of strings", None);
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, "`__metadata__` occurs twice", None);
    refused(r#"{"__metadata__":null,"__metadata__":null}"#, "`__metadata__` occurs twice", None);
}

#[test]
fn refuses_too_many_tensors() {
    let mut json = String::with_capacity(60 * MAX_TENSORS);
    for i in 0..=MAX_TENSORS {
        json.push(if i == 0 { '{' } else { ',' });
        write!(json, r#""{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#).unwrap();
    }
    json.push('}');
    let last = format!("{MAX_TENSORS:x}");
    refused(&json, "more than 1048576 tensors", Some(&last));
    let shorter = json[..json.rfind(&format!(r#","{last}""#)).unwrap()].to_owned() + "}";
    assert_eq!(parse(&shorter).len(), MAX_TENSORS);
}

#[test]
fn refuses_too_much_metadata() {
    let mut entries: Vec<_> = (0..MAX_METADATA).map(|i| format!(r#""{i}":"""#)).collect();
    let json = |entries: &[String]| format!(r#"{{"__metadata__":{{{}}}}}"#, entries.join(","));
    assert_eq!(parse(&json(&entries)).metadata().len(), MAX_METADATA);
    entries.push(r#""one more":"""#.to_owned());
    refused(json(&entries), "more than 65536 entries", None);
}

#[test]
fn skips_unknown_fields_as_strictly_as_the_rest() {
    let extra = |value: &str| entry(r#""dtype""#, &format!(r#""extra":{value},"dtype""#));
    for value in ["null", "true", "-1", "1.5", "18446744073709551615", r#""x""#, r#"[1,{"y":[]}]"#] {
        assert_eq!(parse(&extra(value)).len(), 1);
    }
    refused(extra("1e999"), "number out of range", Some("a"));
    refused(extra(r#""\ud800""#), "unexpected end of hex escape", Some("a"));
    refused(extra(&("[".repeat(200) + &"]".repeat(200))), "recursion limit exceeded", Some("a"));
}

#[test]
fn errors_quote_foreign_text_shortened_and_escaped() {
    let name = "x".repeat(10_000);
    let error = Header::parse(format!(r#"{{"{name}":1}}"#).as_bytes(), None, FILE).unwrap_err();
    assert!(error.tensor().unwrap().len() < 300);
    let error = Header::parse(br#"{"\u001b[31m":{"dtype":"\u0007"}}"#, None, FILE).unwrap_err();
    assert!(!error.to_string().contains(char::is_control), "{error}");
    let error = Header::parse(format!(r#"{{"a":{{"dtype":["{name}"]}}}}"#).as_bytes(), None, FILE).unwrap_err();
    assert!(error.to_string().len() < 600);
}

#[test]
fn accepts_headers_without_tensors() {
    for json in ["{}", "  {} \n\t\r", r#"{"__metadata__":null}"#, r#"{"__metadata__":{}}"#] {
        let header = parse(json);
        assert!(header.is_empty());
        assert_eq!((header.header_len(), header.data_len()), (json.len() as u64, 0));
        assert!(header.metadata().is_empty());
    }
}

#[test]
fn accepts_scalars_and_tensors_without_elements() {
    let json = r#"{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
                   "z":{"dtype":"F64","shape":[3,0],"data_offsets":[4,4]},
                   "y":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}"#;
    let header = parse(json);
    let names: Vec<_> = header.tensors().map(|tensor| tensor.name).collect();
    assert_eq!(names, ["y", "s", "z"]);
    let scalar = header.get("s").unwrap();
    assert_eq!((scalar.elements(), scalar.bytes(), scalar.shape), (1, 4, &[][..]));
    assert_eq!(header.get("z").unwrap().elements(), 0);
}

#[test]
fn gives_tensors_in_offset_order_whatever_the_file_s_order() {
    let json = two((4, 6), (0, 4));
    let header = parse(&json);
    let offsets: Vec<_> = header.tensors().map(|tensor| (tensor.name, tensor.offsets)).collect();
    assert_eq!(offsets, [("b", (0, 4)), ("a", (4, 6))]);
    assert_eq!(header.tensors().len(), 2);
    assert_eq!(header.data_len(), 6);
    assert!(header.get("c").is_none());
}

#[test]
fn reads_every_field() {
    let json = r#"{"__metadata__":{"format":"pt","by":"x","format":"np"},
        "model.\u00e9\"":{"data_offsets":[0,12],"shape":[2,3],"dtype":"BF16"}} "#;
    let header = parse(json);
    let tensor = header.get("model.\u{e9}\"").unwrap();
    assert_eq!((tensor.dtype, tensor.shape, tensor.offsets), (Dtype::BF16, &[2, 3][..], (0, 12)));
    assert_eq!((tensor.elements(), tensor.bytes()), (6, 12));
    let metadata: Vec<_> = header.metadata().iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(metadata, [("by", "x"), ("format", "np")]);
}

#[test]
fn finds_every_name_among_many() {
    let json: Vec<_> = (0..10_000u32)
        .map(|i| format!(r#""layers.{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1))
        .collect();
    let header = parse(&format!("{{{}}}", json.join(",")));
    for i in 0..10_000u64 {
        assert_eq!(header.get(&format!("layers.{i}")).unwrap().offsets, (i, i + 1));
    }
    assert!(header.get("layers.10000").is_none());
}
