//! Compiles the kernels into one image, where a compiler is found; else the image is empty and NVRTC compiles the
//! embedded source at first use. Never fails the build.

mod build_order;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use build_order::{Source, choose};

/// Machine code for these, and PTX of the lowest for GPUs that nobody knows yet.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

fn main() {
    let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../../cuda");
    let image = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it")).join("moecore.fatbin");
    println!("cargo::rerun-if-changed={}", kernels.display());
    for name in ["MOECORE_FATBIN", "MOECORE_NVCC", "PYO3_PYTHON", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rustc-env=MOECORE_IMAGE={}", image.display());

    let source = choose(set, pip_packages, |nvcc| nvcc.is_file());
    println!("kernels: {source:?}");
    let built = match source {
        Source::Image(ready) => read(&ready).and_then(|code| write(&image, &code)),
        Source::Compiler(nvcc) => compile(&nvcc, &kernels, &image),
        Source::Later => Err("no nvcc found (MOECORE_NVCC, pip packages, CUDA_HOME, PATH)".to_owned()),
    };
    if let Err(reason) = built {
        fs::write(&image, []).expect("the build folder can be written");
        println!("cargo::warning=kernels are not compiled: {reason}; NVRTC will do it at first use");
    }
}

/// An environment variable that names a path.
fn set(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Folders of NVIDIA's packages in the build's Python: an isolated build has the pinned ones.
fn pip_packages() -> Vec<PathBuf> {
    let python = set("PYO3_PYTHON").unwrap_or_else(|| PathBuf::from("python3"));
    let folders = Command::new(python).args(["-c", "import nvidia; print(*nvidia.__path__, sep='\\n')"]).output();
    let folders = folders.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    folders.lines().map(PathBuf::from).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, code: &[u8]) -> Result<(), String> {
    fs::write(path, code).map_err(|error| format!("{}: {error}", path.display()))
}

fn compile(nvcc: &Path, kernels: &Path, image: &Path) -> Result<(), String> {
    let run = |command: &mut Command| {
        let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let text = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
        Err(format!("{}: {text}", nvcc.display()))
    };
    let known = run(Command::new(nvcc).arg("--list-gpu-code"))?;
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--threads=0", "-Xfatbin", "-compress-all"]);
    for architecture in ARCHITECTURES {
        if known.lines().any(|line| line.trim() == format!("sm_{architecture}")) {
            command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
        }
    }
    command.arg(format!("-gencode=arch=compute_{0},code=compute_{0}", ARCHITECTURES[0]));
    command.arg(kernels.join("image.cu")).arg("-o").arg(image);
    run(&mut command).map(|_| ())
}
