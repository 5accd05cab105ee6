//! The length prefix, the off-by-eight regressions, and headers of local files.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use moecore::header::{Header, MAX_HEADER_LEN_LOCAL, MAX_HEADER_LEN_REMOTE, PREFIX_LEN, header_len};
use moecore::{ErrorKind, Result};

const FILE: &str = "model.safetensors";

fn len_of(n: u64, limit: u64, file_len: Option<u64>) -> Result<u64> {
    header_len(n.to_le_bytes(), limit, file_len, FILE)
}

#[track_caller]
fn refused(result: Result<u64>, fault: &str) {
    let error = result.expect_err("must be refused");
    assert_eq!((error.kind(), error.file(), error.tensor()), (ErrorKind::InvalidHeader, Some(FILE), None));
    assert!(error.to_string().contains(fault) && !error.to_string().ends_with('.'), "{error}");
}

#[test]
fn lengths_below_two_are_refused() {
    refused(len_of(0, MAX_HEADER_LEN_LOCAL, None), "header claims 0 bytes");
    refused(len_of(1, MAX_HEADER_LEN_LOCAL, None), "header claims 1 bytes");
    assert_eq!(len_of(2, MAX_HEADER_LEN_LOCAL, None).unwrap(), 2);
}

#[test]
fn lengths_above_the_limit_are_refused() {
    for limit in [MAX_HEADER_LEN_LOCAL, MAX_HEADER_LEN_REMOTE] {
        assert_eq!(len_of(limit, limit, None).unwrap(), limit);
        refused(len_of(limit + 1, limit, None), "more than the limit");
        refused(len_of(u64::MAX, limit, None), "more than the limit");
    }
}

#[test]
fn lengths_past_the_file_are_refused() {
    refused(
        len_of(100_000_000_000, MAX_HEADER_LEN_LOCAL, Some(1234)),
        "header claims 100000000000 bytes but the file has 1234; the file is truncated or not a safetensors file; \
         download it again",
    );
    refused(len_of(u64::MAX, u64::MAX, Some(u64::MAX)), "but the file has");
    refused(len_of(2, MAX_HEADER_LEN_LOCAL, Some(0)), "but the file has 0");
}

#[test]
fn other_formats_are_named() {
    for (prefix, advice) in [
        (b"version ", "git lfs pull"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"PK\x03\x04\0\0\0\0", "PyTorch"),
        (b"<!doctyp", "HTML"),
        (b"<html><h", "HTML"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF", "not a safetensors file"),
    ] {
        refused(header_len(*prefix, MAX_HEADER_LEN_LOCAL, Some(4096), FILE), advice);
    }
}

/// `Range: bytes=0-100000` is inclusive and brings 100,001 bytes: 8 of prefix and 99,993 of header. A reader that
/// compares `n` with 100,000 takes headers of 99,994 to 100,000 bytes for complete and cuts up to 7 bytes off.
#[test]
fn off_by_eight_a_first_range_holds_eight_bytes_less_of_header() {
    let received = 100_001;
    for n in 99_990..=100_002 {
        let n = len_of(n, MAX_HEADER_LEN_REMOTE, None).unwrap();
        assert_eq!(PREFIX_LEN + n <= received, n <= 99_993, "header of {n} bytes");
    }
    // A parser that is handed the cut header says so; it does not guess.
    let whole = padded(99_994);
    assert!(Header::parse(whole.as_bytes(), None, FILE).is_ok());
    let cut = &whole.as_bytes()[..usize::try_from(received - PREFIX_LEN).unwrap()];
    assert_eq!(Header::parse(cut, None, FILE).unwrap_err().kind(), ErrorKind::InvalidHeader);
}

/// The header ends at byte `8 + n`: a file of `n` to `n + 7` bytes is too short for it. And `n` is often, but not
/// always, a multiple of 8: writers that do not align are legal.
#[test]
fn off_by_eight_the_prefix_counts_into_the_file_length() {
    for n in 99_994..=99_999 {
        for short in 0..PREFIX_LEN {
            refused(len_of(n, MAX_HEADER_LEN_LOCAL, Some(n + short)), "but the file has");
        }
        assert_eq!(len_of(n, MAX_HEADER_LEN_LOCAL, Some(PREFIX_LEN + n)).unwrap(), n);

        let json = padded(usize::try_from(n).unwrap());
        assert!(Header::parse(json.as_bytes(), Some(PREFIX_LEN + n + 1), FILE).is_ok());
        assert!(Header::parse(json.as_bytes(), Some(n + 1), FILE).is_err());
    }
}

/// A header of exactly `len` bytes whose one tensor takes one byte; the last byte of the JSON is its brace.
fn padded(len: usize) -> String {
    let (head, tail) = (r#"{"a"#, r#"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#);
    format!("{head}{}{tail}", "a".repeat(len - head.len() - tail.len()))
}

fn write(path: &Path, json: &str, data_len: u64) {
    let mut file = File::create(path).unwrap();
    file.write_all(&(json.len() as u64).to_le_bytes()).unwrap();
    file.write_all(json.as_bytes()).unwrap();
    file.set_len(PREFIX_LEN + json.len() as u64 + data_len).unwrap();
}

#[test]
fn reads_the_header_of_a_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    let bytes = 64u64 << 30; // more than could be read in a test
    write(&path, &format!(r#"{{"a":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#), bytes);
    let header = Header::read(&path).unwrap();
    assert_eq!((header.len(), header.data_len()), (1, bytes));
    assert_eq!(header.header_len() + header.data_len() + PREFIX_LEN, fs::metadata(&path).unwrap().len());
}

#[test]
fn files_that_cannot_be_read_are_errors_of_their_kind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    let expect = |path: &Path, kind: ErrorKind, fault: &str| {
        let error = Header::read(path).expect_err("must be refused");
        assert_eq!((error.kind(), error.file()), (kind, path.to_str()), "{error}");
        assert!(error.to_string().contains(fault), "{error}");
    };
    expect(&path, ErrorKind::NotFound, "no such file");
    expect(folder.path(), ErrorKind::Io, "not a regular file");
    expect(&folder.path().join("x\0y"), ErrorKind::Io, "cannot read the file");

    fs::write(&path, b"").unwrap();
    expect(&path, ErrorKind::InvalidHeader, "the file has 0 bytes");
    fs::write(&path, b"\x02\0\0\0\0\0\0\0{").unwrap();
    expect(&path, ErrorKind::InvalidHeader, "the file has 9 bytes");
    fs::write(&path, b"\x03\0\0\0\0\0\0\0{}").unwrap();
    expect(&path, ErrorKind::InvalidHeader, "header claims 3 bytes but the file has 10");
    fs::write(&path, b"\x02\0\0\0\0\0\0\0{}x").unwrap();
    expect(&path, ErrorKind::InvalidHeader, "1 bytes follow the last tensor");
    fs::write(&path, b"version https://git-lfs.github.com/spec/v1\n").unwrap();
    expect(&path, ErrorKind::InvalidHeader, "git lfs pull");
    fs::write(&path, b"\x02\0\0\0\0\0\0\0{}").unwrap();
    assert!(Header::read(&path).unwrap().is_empty());
}
