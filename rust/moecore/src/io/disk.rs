//! A real file, opened once.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::experts::SourceFile;
use crate::io::plan::PAGE;
use crate::io::source::{Alignment, Source};

/// Not offered by other systems: there, reads are buffered.
#[cfg(target_os = "linux")]
const DIRECT: OFlags = OFlags::DIRECT;
#[cfg(not(target_os = "linux"))]
const DIRECT: OFlags = OFlags::empty();
#[cfg(target_os = "linux")]
const NOATIME: OFlags = OFlags::NOATIME;
#[cfg(not(target_os = "linux"))]
const NOATIME: OFlags = OFlags::empty();

/// A file that is kept open.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    name: String,
    indexed: SourceFile,
    alignment: Alignment,
    /// The descriptor has `O_DIRECT`.
    direct: AtomicBool,
    /// The caller wanted direct reads: what buffered reads leave in the page cache is not to stay there.
    drop_cache: bool,
}

impl Disk {
    /// Opens a file as it was indexed, for direct reads if `direct` and if its file system knows them.
    pub(super) fn open(indexed: &SourceFile, direct: bool) -> Result<Self> {
        let name = indexed.path.display().to_string();
        let fail = |message: &str, source: std::io::Error| {
            Error::new(ErrorKind::Io, message).with_file(&*name).with_source(source)
        };
        // Asked before opening: a pipe would wait for its writer.
        let metadata = std::fs::metadata(&indexed.path)
            .map_err(|source| fail("cannot be opened; it was there when the model was indexed", source))?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::Io, "not a regular file; load the model again").with_file(name));
        }
        let mut wanted = if direct { DIRECT | NOATIME } else { NOATIME };
        let file = loop {
            match rustix::fs::open(&indexed.path, OFlags::RDONLY | OFlags::CLOEXEC | wanted, Mode::empty()) {
                Ok(file) => break File::from(file),
                Err(Errno::INTR) => {}
                // Only the owner may leave the access time alone.
                Err(Errno::PERM) if wanted.intersects(NOATIME) => wanted.remove(NOATIME),
                Err(Errno::INVAL | Errno::OPNOTSUPP) if wanted.intersects(DIRECT) => wanted.remove(DIRECT),
                Err(errno @ (Errno::MFILE | Errno::NFILE)) => {
                    return Err(fail("too many open files; raise the limit (`ulimit -n`)", errno.into()));
                }
                Err(errno) => return Err(fail("cannot be opened; check its permissions", errno.into())),
            }
        };
        let (alignment, direct_now) = match alignment(&file) {
            Some(alignment) => (alignment, wanted.intersects(DIRECT)),
            None => (Alignment { block: PAGE, memory: 4096 }, false),
        };
        let disk = Self {
            file,
            indexed: indexed.clone(),
            alignment,
            direct: AtomicBool::new(wanted.intersects(DIRECT)),
            drop_cache: direct,
            name,
        };
        if !direct_now {
            disk.leave_direct();
        }
        disk.verify()?;
        Ok(disk)
    }
}

/// What direct reads must be aligned to, or `None` where the file takes none.
#[cfg(target_os = "linux")]
fn alignment(file: &File) -> Option<Alignment> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let usual = Alignment { block: PAGE, memory: 4096 };
    // Linux before 6.1 and some file systems do not say; a first read that is refused says it then.
    let Ok(answer) = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else { return Some(usual) };
    if answer.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Some(usual);
    }
    let (block, memory) = (answer.stx_dio_offset_align, answer.stx_dio_mem_align);
    (block.is_power_of_two() && memory.is_power_of_two())
        .then_some(Alignment { block: block.into(), memory: memory as usize })
}

#[cfg(not(target_os = "linux"))]
fn alignment(_file: &File) -> Option<Alignment> {
    None
}

impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Source for Disk {
    fn name(&self) -> &str {
        &self.name
    }

    fn bytes(&self) -> u64 {
        self.indexed.bytes
    }

    fn verify(&self) -> Result<()> {
        let now = self.file.metadata().and_then(|metadata| Ok((metadata.len(), metadata.modified()?)));
        let (bytes, modified) = now.map_err(|source| {
            Error::new(ErrorKind::Io, "cannot be examined; check the disk").with_file(&*self.name).with_source(source)
        })?;
        if (bytes, modified) == (self.indexed.bytes, self.indexed.modified) {
            return Ok(());
        }
        let message = if bytes == self.indexed.bytes {
            "changed since it was indexed; load the model again".to_owned()
        } else {
            format!("changed since it was indexed ({bytes} bytes, were {}); load the model again", self.indexed.bytes)
        };
        Err(Error::new(ErrorKind::Io, message).with_file(&*self.name))
    }

    fn direct(&self) -> Option<Alignment> {
        self.direct.load(Ordering::Relaxed).then_some(self.alignment)
    }

    fn leave_direct(&self) {
        #[cfg(target_os = "linux")]
        if self.direct.swap(false, Ordering::Relaxed)
            && let Ok(flags) = rustix::fs::fcntl_getfl(&self.file)
        {
            // If this fails, the next read is refused again and reported.
            let _ = rustix::fs::fcntl_setfl(&self.file, flags - DIRECT);
        }
        #[cfg(target_os = "linux")]
        // Rows are read whole and in no order: reading ahead of them fetches bytes of other experts. Advice only.
        let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::Random);
    }

    fn read_at(&self, memory: &mut [MaybeUninit<u8>], offset: u64) -> Result<usize, Errno> {
        rustix::io::pread(&self.file, memory, offset).map(|(read, _)| read.len())
    }

    fn release(&self, begin: u64, end: u64) {
        #[cfg(target_os = "linux")]
        if self.drop_cache && !self.direct.load(Ordering::Relaxed) {
            // Advice only.
            let bytes = std::num::NonZeroU64::new(end - begin);
            let _ = rustix::fs::fadvise(&self.file, begin, bytes, rustix::fs::Advice::DontNeed);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (begin, end, self.drop_cache);
    }
}
