//! Local targets: a folder, one `.safetensors` file, or an index file.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::header::Header;
use crate::scan::Checkpoint;
use crate::scan::MAX_CONFIG_LEN;
use crate::scan::index::{Index, MAX_INDEX_LEN};
use crate::scan::select::{self, Selection};

/// Reads the headers of a local target. Bytes of weights are never read.
pub fn scan_local(target: &Path) -> Result<Checkpoint> {
    let metadata = std::fs::metadata(target).map_err(|source| io_error(target, source))?;
    let (folder, (selection, index)) = if metadata.is_dir() {
        let files = list(target)?;
        (target.to_owned(), with_index(target, select::select(&files))?)
    } else {
        let folder = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        (folder.to_owned(), single(folder, target)?)
    };
    if selection.shards.is_empty() {
        let message = "holds no .safetensors file; other formats are not read";
        return Err(Error::new(ErrorKind::InvalidTarget, message).with_file(target.display().to_string()));
    }
    read(&folder, selection, index.as_ref())
}

/// The selection of a target that is one file.
fn single(folder: &Path, target: &Path) -> Result<(Selection, Option<Index>)> {
    let name = target.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let beside = select::select(&list(folder)?);
    let own = |shards: Vec<String>, index: Option<String>| Selection {
        shards,
        index,
        config: beside.config.clone(),
        quant_config: beside.quant_config.clone(),
        ..Selection::default()
    };
    if name.ends_with(".safetensors") {
        return Ok((own(vec![name], None), None));
    }
    if name.ends_with(".index.json") {
        let index = Index::parse(&small(&folder.join(&name), MAX_INDEX_LEN)?, &name)?;
        return Ok((own(index.files(&name)?, Some(name)), Some(index)));
    }
    let message = "is neither a folder nor a .safetensors or .safetensors.index.json file";
    Err(Error::new(ErrorKind::InvalidTarget, message).with_file(target.display().to_string()))
}

/// A local index is cheap to read, so it always has the word on which files count.
fn with_index(folder: &Path, mut selection: Selection) -> Result<(Selection, Option<Index>)> {
    let Some(name) = selection.index.clone() else { return Ok((selection, None)) };
    let index = Index::parse(&small(&folder.join(&name), MAX_INDEX_LEN)?, &name)?;
    let named = index.files(&name)?;
    // An index left behind by other files says nothing about the ones that are here.
    if named.iter().any(|name| selection.shards.contains(name)) {
        selection.missing = named.iter().filter(|name| !selection.shards.contains(*name)).cloned().collect();
        selection.shards = named.into_iter().filter(|name| selection.shards.contains(name)).collect();
    }
    selection.ambiguous_until = None;
    Ok((selection, Some(index)))
}

fn read(folder: &Path, selection: Selection, index: Option<&Index>) -> Result<Checkpoint> {
    let mut checkpoint = Checkpoint { warnings: selection.warnings.clone(), ..Checkpoint::default() };
    for name in &selection.shards {
        match Header::read(&folder.join(name)) {
            Ok(header) => {
                checkpoint.inventory.add_header(&header);
                checkpoint.header_bytes += header.header_len();
                checkpoint.files.push(name.clone());
            }
            Err(error) => checkpoint.failures.push(error),
        }
    }
    if checkpoint.files.is_empty() {
        return Err(checkpoint.failures.swap_remove(0));
    }
    checkpoint.failures.extend(selection.missing_error("download the repo again"));
    for (name, place) in
        [(selection.config, &mut checkpoint.config), (selection.quant_config, &mut checkpoint.quant_config)]
    {
        if let Some(name) = name {
            match small(&folder.join(&name), MAX_CONFIG_LEN) {
                Ok(bytes) => *place = Some(bytes),
                Err(error) => checkpoint.failures.push(error),
            }
        }
    }
    if let (Some(index), Some(name), true) = (index, &selection.index, checkpoint.failures.is_empty()) {
        checkpoint.warnings.extend(index.compare(&checkpoint.inventory, name));
    }
    Ok(checkpoint)
}

/// File names of a folder and of its subfolders, one level down.
fn list(folder: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for (name, path) in entries(folder)? {
        if path.is_dir() {
            // Subfolders matter only when the root is empty; one that cannot be read is as good as absent.
            files.extend(entries(&path).unwrap_or_default().into_iter().map(|(inner, _)| format!("{name}/{inner}")));
        } else {
            files.push(name);
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries = std::fs::read_dir(folder).map_err(|source| io_error(folder, source))?;
    Ok(entries
        .filter_map(|entry| entry.ok().and_then(|e| Some((e.file_name().into_string().ok()?, e.path()))))
        .collect())
}

fn small(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let refuse =
        |message: String| Err(Error::new(ErrorKind::InvalidConfig, message).with_file(path.display().to_string()));
    // Asked before opening: a pipe would wait for its writer, and a device may have no end.
    if !std::fs::metadata(path).map_err(|source| io_error(path, source))?.is_file() {
        return refuse("not a regular file; replace it by the repo's own".to_owned());
    }
    let mut bytes = Vec::new();
    let mut reader = File::open(path).map_err(|source| io_error(path, source))?.take(limit + 1);
    reader.read_to_end(&mut bytes).map_err(|source| io_error(path, source))?;
    if bytes.len() as u64 > limit {
        return refuse(format!("is longer than {limit} bytes; such files are shorter"));
    }
    Ok(bytes)
}

fn io_error(path: &Path, source: std::io::Error) -> Error {
    let (kind, message) = match source.kind() {
        std::io::ErrorKind::NotFound => (ErrorKind::NotFound, "no such file or folder; check the path"),
        _ => (ErrorKind::Io, "cannot be read; check its permissions"),
    };
    Error::new(kind, message).with_file(path.display().to_string()).with_source(source)
}
