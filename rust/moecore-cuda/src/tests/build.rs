//! Where `build.rs` finds the kernels' machine code.

#[path = "../../build_order.rs"]
mod build_order;

use std::path::PathBuf;

use build_order::{Source, choose};

/// What is chosen, where these variables are set, the packages are in `/pip`, and these files are there.
fn chosen(variables: &[(&str, &str)], files: &[&str]) -> Source {
    let variable =
        |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value));
    let is_file = |path: &PathBuf| files.iter().any(|file| path.as_os_str() == *file);
    choose(variable, || vec![PathBuf::from("/pip/nvidia")], is_file)
}

#[test]
fn the_order_of_compilers() {
    let all = [("MOECORE_FATBIN", "/a.fatbin"), ("MOECORE_NVCC", "/b"), ("CUDA_HOME", "/c"), ("PATH", "/d:/e")];
    let files = ["/pip/nvidia/cu13/bin/nvcc", "/c/bin/nvcc", "/e/nvcc"];
    let compiler = |path: &str| Source::Compiler(PathBuf::from(path));
    assert_eq!(chosen(&all, &files), Source::Image("/a.fatbin".into()));
    assert_eq!(chosen(&all[1..], &files), compiler("/b"));
    assert_eq!(chosen(&all[2..], &files), compiler("/pip/nvidia/cu13/bin/nvcc"));
    assert_eq!(chosen(&all[2..], &files[1..]), compiler("/c/bin/nvcc"));
    assert_eq!(chosen(&all[2..], &files[2..]), compiler("/e/nvcc"));
    assert_eq!(chosen(&all[2..], &[]), Source::Later);
    assert_eq!(chosen(&[], &[]), Source::Later);
}
