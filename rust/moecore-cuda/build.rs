//! Compiles the kernels into one image, where a compiler is found; else the image is empty and NVRTC compiles the
//! embedded source at first use. Never fails the build.
//!
//! Where the compiler comes from, in order: a ready image (`MOECORE_FATBIN`), `MOECORE_NVCC`, the pip packages of the
//! build's Python (their version is known), `CUDA_HOME`, `PATH`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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

    let built = match set("MOECORE_FATBIN") {
        Some(ready) => fs::copy(&ready, &image).map(|_| ()).map_err(|error| format!("{}: {error}", ready.display())),
        None => match find_compiler() {
            Some(nvcc) => compile(&nvcc, &kernels, &image),
            None => Err("no nvcc found (MOECORE_NVCC, pip packages, CUDA_HOME, PATH)".to_owned()),
        },
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

fn find_compiler() -> Option<PathBuf> {
    if let Some(given) = set("MOECORE_NVCC") {
        return Some(given);
    }
    let python = set("PYO3_PYTHON").unwrap_or_else(|| PathBuf::from("python3"));
    let folders = Command::new(python).args(["-c", "import nvidia; print(*nvidia.__path__, sep='\\n')"]).output();
    let folders = folders.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let pip = folders.lines().map(|folder| Path::new(folder).join("cu13/bin/nvcc"));
    let home = set("CUDA_HOME").map(|home| home.join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::split_paths(&path).map(|folder| folder.join("nvcc"));
    pip.chain(home).chain(path).find(|nvcc| nvcc.is_file())
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
