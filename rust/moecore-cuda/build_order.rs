// Where the kernels' machine code comes from. Part of `build.rs`; the crate's tests include it, too.

use std::path::PathBuf;

/// A source of machine code.
#[derive(Debug, PartialEq, Eq)]
pub enum Source {
    /// A ready image.
    Image(PathBuf),
    /// A compiler.
    Compiler(PathBuf),
    /// None: the source is compiled at first use.
    Later,
}

/// The first there is of: `MOECORE_FATBIN`, `MOECORE_NVCC`, the pip packages of the build's Python (their version is
/// known), `CUDA_HOME`, `PATH`. What is named outright is taken, there or not, so that a mistake shows.
pub fn choose(
    variable: impl Fn(&str) -> Option<PathBuf>,
    packages: impl FnOnce() -> Vec<PathBuf>,
    is_file: impl Fn(&PathBuf) -> bool,
) -> Source {
    if let Some(image) = variable("MOECORE_FATBIN") {
        return Source::Image(image);
    }
    if let Some(compiler) = variable("MOECORE_NVCC") {
        return Source::Compiler(compiler);
    }
    let packages = packages().into_iter().map(|folder| folder.join("cu13/bin/nvcc"));
    let home = variable("CUDA_HOME").map(|home| home.join("bin/nvcc"));
    let path = variable("PATH").unwrap_or_default();
    let path: Vec<PathBuf> = std::env::split_paths(&path).map(|folder| folder.join("nvcc")).collect();
    packages.chain(home).chain(path).find(is_file).map_or(Source::Later, Source::Compiler)
}
