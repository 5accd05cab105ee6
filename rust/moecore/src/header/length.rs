//! The length prefix: what the first 8 bytes claim, checked before anything is allocated.

use super::invalid;
use crate::error::Result;

/// Bytes of the length prefix. The header ends at byte `PREFIX_LEN + n`, not at `n`.
pub const PREFIX_LEN: u64 = 8;

/// Longest header accepted from a local file: the limit of the `safetensors` crate.
pub const MAX_HEADER_LEN_LOCAL: u64 = 100_000_000;

/// Longest header accepted from the network: the limit of `huggingface_hub`.
pub const MAX_HEADER_LEN_REMOTE: u64 = 25_000_000;

/// Shortest JSON object: `{}`.
const MIN_HEADER_LEN: u64 = 2;

/// Length `n` of the JSON, from the first 8 bytes of a file.
///
/// Refuses a length below 2, above `limit`, or that ends past `file_len` where that is known. The error names `file`.
pub fn header_len(prefix: [u8; 8], limit: u64, file_len: Option<u64>, file: &str) -> Result<u64> {
    let len = u64::from_le_bytes(prefix);
    let fault = if len < MIN_HEADER_LEN {
        format!("header claims {len} bytes but the shortest header has 2")
    } else if let Some(file_len) = file_len.filter(|&file_len| file_len.saturating_sub(PREFIX_LEN) < len) {
        format!("header claims {len} bytes but the file has {file_len}")
    } else if len > limit {
        format!("header claims {len} bytes, more than the limit of {limit}")
    } else {
        return Ok(len);
    };
    Err(invalid(format!("{fault}; {}", advice(prefix))).with_file(file))
}

/// Refuses a file too short for prefix and header.
pub(super) fn check_file_len(file_len: u64) -> Result<()> {
    if file_len < PREFIX_LEN + MIN_HEADER_LEN {
        return Err(invalid(format!(
            "the file has {file_len} bytes but the shortest safetensors file has 10; download it again"
        )));
    }
    Ok(())
}

/// Refuses JSON that no prefix could have announced.
pub(super) fn check_json_len(len: u64) -> Result<()> {
    if (MIN_HEADER_LEN..=MAX_HEADER_LEN_LOCAL).contains(&len) {
        return Ok(());
    }
    Err(invalid(format!(
        "the header has {len} bytes but must have {MIN_HEADER_LEN} to {MAX_HEADER_LEN_LOCAL}; the file is damaged or not a \
         safetensors file; download it again"
    )))
}

/// What to do about a prefix that is no length. Other formats in place of the file are the usual cause.
fn advice(prefix: [u8; 8]) -> &'static str {
    match &prefix {
        b"version " => "the file is a git-lfs pointer, not the file itself; run `git lfs pull` or download it again",
        [b'G', b'G', b'U', b'F', ..] => "this is a GGUF file; name a .safetensors file",
        [b'P', b'K', 3, 4, ..] => "this is a zip or PyTorch file; name or convert to a .safetensors file",
        [b'<', b'!' | b'h', ..] => "this is an HTML page, not a safetensors file; download the file again",
        _ => "the file is truncated or not a safetensors file; download it again",
    }
}
