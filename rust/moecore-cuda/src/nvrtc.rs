//! Compiles the embedded source at first use, for builds that had no compiler: torch brings NVRTC along. The machine code
//! is kept in the user's cache folder.
#![expect(unsafe_code, reason = "foreign functions")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

use libloading::Library;
use moecore::{Error, ErrorKind, Result};

/// What is compiled.
const SOURCE: (&CStr, &str) = (c"image.cu", include_str!("../../../cuda/image.cu"));
/// What it includes.
const HEADERS: [(&CStr, &str); 24] = [
    (c"align.cu", include_str!("../../../cuda/align.cu")),
    (c"combine.cu", include_str!("../../../cuda/combine.cu")),
    (c"common.cuh", include_str!("../../../cuda/common.cuh")),
    (c"copy.cuh", include_str!("../../../cuda/copy.cuh")),
    (c"experts.cu", include_str!("../../../cuda/experts.cu")),
    (c"fetch.cu", include_str!("../../../cuda/fetch.cu")),
    (c"gate.cu", include_str!("../../../cuda/gate.cu")),
    (c"exact.cuh", include_str!("../../../cuda/exact.cuh")),
    (c"gate.cuh", include_str!("../../../cuda/gate.cuh")),
    (c"gate_any.cuh", include_str!("../../../cuda/gate_any.cuh")),
    (c"gate_fast.cuh", include_str!("../../../cuda/gate_fast.cuh")),
    (c"index.cuh", include_str!("../../../cuda/index.cuh")),
    (c"mailbox.cuh", include_str!("../../../cuda/mailbox.cuh")),
    (c"numbers.cuh", include_str!("../../../cuda/numbers.cuh")),
    (c"order.cuh", include_str!("../../../cuda/order.cuh")),
    (c"permute.cu", include_str!("../../../cuda/permute.cu")),
    (c"permute.cuh", include_str!("../../../cuda/permute.cuh")),
    (c"ptx.cuh", include_str!("../../../cuda/ptx.cuh")),
    (c"route_small.cu", include_str!("../../../cuda/route_small.cu")),
    (c"route_tiles.cu", include_str!("../../../cuda/route_tiles.cu")),
    (c"routing.cuh", include_str!("../../../cuda/routing.cuh")),
    (c"scores.cuh", include_str!("../../../cuda/scores.cuh")),
    (c"tuning.cuh", include_str!("../../../cuda/tuning.cuh")),
    (c"weights.cuh", include_str!("../../../cuda/weights.cuh")),
];
/// The library's file, where it is in none of the usual places.
const GIVEN: &str = "MOECORE_NVRTC";
const NAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];
/// PTX for GPUs that are newer than the compiler is of this architecture: the lowest that the kernels need.
const LOWEST: c_int = 80;

/// Folders that may have the library.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Names folders that may have the library, beside those that the loader knows: `nvidia/*/lib` of the Python packages.
pub fn search_in(folders: Vec<PathBuf>) {
    *FOLDERS.lock().unwrap_or_else(PoisonError::into_inner) = folders;
}

/// Machine code for a compute capability: from the cache, or compiled and put there.
pub fn image(capability: (u32, u32)) -> Result<Vec<u8>> {
    let name = format!("{:016x}-sm{}{}.cubin", source_hash(), capability.0, capability.1);
    let place = cache_folder().map(|folder| folder.join(name));
    if let Some(code) = place.as_ref().and_then(|place| std::fs::read(place).ok()) {
        return Ok(code);
    }
    let code = compile(capability)?;
    if let Some(place) = place {
        // A cache that cannot be written costs the next process its time, and nothing else.
        let _ = keep(&place, &code);
    }
    Ok(code)
}

/// Compiles the kernels for a compute capability.
pub fn compile(capability: (u32, u32)) -> Result<Vec<u8>> {
    Compiler::find()?.compile(capability)
}

/// FNV-1a over all that is compiled.
fn source_hash() -> u64 {
    let text = HEADERS.iter().chain([&SOURCE]).flat_map(|(name, text)| name.to_bytes().iter().chain(text.as_bytes()));
    text.fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("moecore").join("kernels"))
}

/// Writes a file that appears whole.
fn keep(place: &Path, code: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = place.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let aside = place.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&aside, code)?;
    std::fs::rename(&aside, place).inspect_err(|_| {
        // Nothing half-written stays behind.
        let _ = std::fs::remove_file(&aside);
    })
}

type Program = *mut c_void;
type Text = *const c_char;

macro_rules! nvrtc {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        struct Compiler {
            $($field: unsafe extern "C" fn($($argument),*) -> c_int,)*
            explain: unsafe extern "C" fn(c_int) -> Text,
            _library: Library,
        }

        impl Compiler {
            fn load(library: Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of nvrtc.h for these names.
                unsafe {
                    Ok(Self {
                        $($field: *library.get($symbol)?,)*
                        explain: *library.get("nvrtcGetErrorString")?,
                        _library: library,
                    })
                }
            }
        }
    };
}

nvrtc! {
    create = "nvrtcCreateProgram"(*mut Program, Text, Text, c_int, *const Text, *const Text);
    run = "nvrtcCompileProgram"(Program, c_int, *const Text);
    destroy = "nvrtcDestroyProgram"(*mut Program);
    log_size = "nvrtcGetProgramLogSize"(Program, *mut usize);
    log = "nvrtcGetProgramLog"(Program, *mut c_char);
    cubin_size = "nvrtcGetCUBINSize"(Program, *mut usize);
    cubin = "nvrtcGetCUBIN"(Program, *mut c_char);
    ptx_size = "nvrtcGetPTXSize"(Program, *mut usize);
    ptx = "nvrtcGetPTX"(Program, *mut c_char);
    architecture_count = "nvrtcGetNumSupportedArchs"(*mut c_int);
    architectures = "nvrtcGetSupportedArchs"(*mut c_int);
}

type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Fill = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

impl Compiler {
    fn find() -> Result<Self> {
        let folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let beside = folders.iter().flat_map(|folder| NAMES.map(|name| folder.join(name)));
        let given = std::env::var_os(GIVEN).map(PathBuf::from);
        let mut places = given.into_iter().chain(NAMES.map(PathBuf::from)).chain(beside);
        // SAFETY: the library runs its own start-up code, which is what loading it means.
        let library = places.find_map(|place| unsafe { Library::new(place) }.ok());
        let none = "this build of moecore has no compiled kernels, and NVRTC, which could compile them, was not found; \
                    install a torch for CUDA or `nvidia-cuda-nvrtc`, or name the library in MOECORE_NVRTC";
        let library = library.ok_or_else(|| Error::new(ErrorKind::Device, none))?;
        Self::load(library).map_err(|error| Error::new(ErrorKind::Device, format!("NVRTC is too old: {error}")))
    }

    fn check(&self, status: c_int, what: &str) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the library returns a static string for every code.
        let reason = unsafe { CStr::from_ptr((self.explain)(status)) }.to_string_lossy();
        Err(Error::new(ErrorKind::Device, format!("NVRTC cannot {what}: {reason}")))
    }

    fn compile(&self, (major, minor): (u32, u32)) -> Result<Vec<u8>> {
        let wanted = c_int::try_from(major * 10 + minor).unwrap_or(c_int::MAX);
        let known = self.knows(wanted)?;
        let target = if known { format!("sm_{wanted}") } else { format!("compute_{LOWEST}") };
        let (text, names) = (HEADERS.map(|(_, text)| text), HEADERS.map(|(name, _)| name.as_ptr()));
        let text = text.map(|text| CString::new(text).unwrap_or_default());
        let source = CString::new(SOURCE.1).unwrap_or_default();
        let options = [format!("--gpu-architecture={target}"), "--std=c++17".to_owned()];
        let options = options.map(|option| CString::new(option).unwrap_or_default());
        let options = options.each_ref().map(|option| option.as_ptr());
        let texts = text.each_ref().map(|text| text.as_ptr());
        let counts = [HEADERS.len(), options.len()].map(|count| c_int::try_from(count).unwrap_or(0));
        let mut program = null_mut();
        // SAFETY: strings that end in 0 and arrays of as many as the counts say; all outlive the calls.
        unsafe {
            let created = (self.create)(
                &raw mut program,
                source.as_ptr(),
                SOURCE.0.as_ptr(),
                counts[0],
                texts.as_ptr(),
                names.as_ptr(),
            );
            self.check(created, "take the kernels' source")?;
            let status = (self.run)(program, counts[1], options.as_ptr());
            let code = self.check(status, &format!("compile the kernels for {target}")).map_err(|error| {
                let log = self.bytes(program, self.log_size, self.log).unwrap_or_default();
                Error::new(ErrorKind::Device, format!("{error}\n{}", String::from_utf8_lossy(&log)))
            });
            let (size, fill): (Size, Fill) =
                if known { (self.cubin_size, self.cubin) } else { (self.ptx_size, self.ptx) };
            let code = code.and_then(|()| self.bytes(program, size, fill));
            (self.destroy)(&raw mut program);
            code
        }
    }

    /// Whether there is machine code for an architecture.
    fn knows(&self, wanted: c_int) -> Result<bool> {
        let mut count = 0;
        // SAFETY: the address of a local, and an array of the length that the library has told.
        unsafe {
            self.check((self.architecture_count)(&raw mut count), "name its architectures")?;
            let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
            self.check((self.architectures)(known.as_mut_ptr()), "name its architectures")?;
            Ok(known.contains(&wanted))
        }
    }

    /// A result of a program.
    ///
    /// # Safety
    /// The program is alive, and the two functions belong together.
    unsafe fn bytes(&self, program: Program, size: Size, fill: Fill) -> Result<Vec<u8>> {
        let mut length = 0;
        // SAFETY: the address of a local, and a buffer of the length that the library has told.
        unsafe {
            self.check(size(program, &raw mut length), "tell a length")?;
            let mut bytes = vec![0_u8; length];
            self.check(fill(program, bytes.as_mut_ptr().cast()), "give its result")?;
            Ok(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::names;

    #[test]
    fn every_included_file_is_embedded() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda");
        let mut files: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        let mut embedded: Vec<_> = HEADERS.iter().chain([&SOURCE]).map(|(name, _)| name.to_str().unwrap()).collect();
        embedded.sort_unstable();
        assert_eq!(files, embedded);
    }

    #[test]
    fn compiles_for_every_gpu() {
        if Compiler::find().is_err() {
            eprintln!("skipped: no NVRTC here; name its library in {GIVEN}");
            return;
        }
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let code = compile(capability).unwrap();
            assert!(code.starts_with(b"\x7fELF"), "{capability:?}");
            let has = |name: &str| code.windows(name.len()).any(|part| part == name.as_bytes());
            for name in names() {
                assert!(has(&name), "{capability:?} {name}");
            }
        }
        // A GPU that the compiler does not know gets PTX, which its driver compiles.
        let text = compile((99, 0)).unwrap();
        assert!(String::from_utf8_lossy(&text).contains(".target sm_80"));
        assert_eq!(text.last(), Some(&0));
    }

    #[test]
    fn a_file_of_the_cache_appears_whole() {
        let folder = std::env::temp_dir().join(format!("moecore-nvrtc-{}", std::process::id()));
        let place = folder.join("kernels").join("a-sm90.cubin");
        for code in [&b"first"[..], b"second"] {
            keep(&place, code).unwrap();
            assert_eq!(std::fs::read(&place).unwrap(), code);
        }
        assert_eq!(std::fs::read_dir(place.parent().unwrap()).unwrap().count(), 1);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
