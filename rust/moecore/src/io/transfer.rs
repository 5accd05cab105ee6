//! The steps of reading one piece, for engines that wait for a read and for those that do not.

use std::mem::MaybeUninit;

use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::io::flight::Piece;
use crate::io::plan::PAGE;
use crate::io::source::{Alignment, Source};

/// Aligned memory for reads whose bytes lie or go where direct reads cannot. Grows to what is needed once.
#[derive(Debug, Default)]
pub(super) struct Bounce {
    memory: Vec<MaybeUninit<u8>>,
}

impl Bounce {
    /// The first `bytes` bytes, from an address that is a multiple of `alignment`.
    fn memory(&mut self, bytes: usize, alignment: usize) -> &mut [MaybeUninit<u8>] {
        if self.memory.len() < bytes + alignment {
            self.memory = Vec::new();
            self.memory.resize(bytes + alignment, MaybeUninit::uninit());
        }
        let start = self.memory.as_ptr().align_offset(alignment);
        &mut self.memory[start..start + bytes]
    }
}

/// How a piece is read.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// Part by part to its place. Reads that continue one another do so at multiples of the block.
    Straight { block: u64, direct: bool },
    /// One direct read of all blocks, then a copy of each part.
    Bounce { begin: u64, end: u64, block: u64, memory: usize },
}

/// A piece that is being read: ask `next`, do the read, tell `advance`; until `next` says that nothing is left.
#[derive(Debug)]
pub(super) struct Transfer {
    piece: Piece,
    way: Option<Way>,
    part: usize,
    got: usize,
}

impl Transfer {
    pub(super) fn new(piece: Piece) -> Self {
        Self { piece, way: None, part: 0, got: 0 }
    }

    pub(super) fn piece(&self) -> &Piece {
        &self.piece
    }

    /// The next read: its offset in the file and its memory.
    pub(super) fn next<'a>(
        &'a mut self,
        source: &impl Source,
        bounce: &'a mut Bounce,
    ) -> Option<(u64, &'a mut [MaybeUninit<u8>])> {
        let way = *self.way.get_or_insert_with(|| way(&self.piece, source.direct()));
        let got = self.got;
        let part = self.piece.parts.get_mut(self.part)?;
        match way {
            Way::Straight { .. } => Some((part.offset + got as u64, &mut part.window.memory()[got..])),
            Way::Bounce { begin, end, memory, .. } => {
                Some((begin + got as u64, &mut bounce.memory(length(begin, end), memory)[got..]))
            }
        }
    }

    /// Takes the outcome of the read that `next` asked for.
    pub(super) fn advance(
        &mut self,
        source: &impl Source,
        bounce: &mut Bounce,
        outcome: Result<usize, Errno>,
    ) -> Result<()> {
        let way = self.way.expect("`next` was called");
        let offset = match way {
            Way::Straight { .. } => self.piece.parts[self.part].offset,
            Way::Bounce { begin, .. } => begin,
        };
        let read = match outcome {
            Ok(read) => read,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(()),
            // Some file systems open a file for direct reads and then refuse them.
            Err(Errno::INVAL | Errno::OPNOTSUPP) if way.is_direct() => {
                source.leave_direct();
                (self.way, self.part, self.got) = (None, 0, 0);
                return Ok(());
            }
            Err(errno) => {
                let at = offset + self.got as u64;
                let message = format!("cannot be read at byte {at}; check the disk");
                return Err(Error::new(ErrorKind::Io, message).with_file(source.name()).with_source(fault(errno)));
            }
        };
        let (needed, block) = match way {
            Way::Straight { block, .. } => (self.piece.parts[self.part].window.bytes(), block),
            Way::Bounce { begin, block, .. } => (length(begin, self.piece.end), block),
        };
        let reached = self.got + read;
        if reached < needed {
            // A direct read stops inside a block only at the file's end.
            let next = (offset + reached as u64) / block * block;
            let next = usize::try_from(next.saturating_sub(offset)).expect("inside the piece");
            if next <= self.got {
                let at = offset + reached as u64;
                let message = format!("ends at byte {at}, inside an expert; load the model again");
                return Err(Error::new(ErrorKind::Io, message).with_file(source.name()));
            }
            self.got = next;
            return Ok(());
        }
        self.got = 0;
        match way {
            Way::Straight { .. } => self.part += 1,
            Way::Bounce { begin, end, memory, .. } => {
                let read = bounce.memory(length(begin, end), memory);
                for part in &mut self.piece.parts {
                    let from = length(begin, part.offset);
                    part.window.write(&read[from..from + part.window.bytes()]);
                }
                self.part = self.piece.parts.len();
            }
        }
        if self.part == self.piece.parts.len() {
            source.release(self.piece.begin, self.piece.end);
        }
        Ok(())
    }
}

impl Way {
    fn is_direct(self) -> bool {
        !matches!(self, Self::Straight { direct: false, .. })
    }
}

/// Straight to the destination if the file's reads are buffered or if everything happens to be aligned.
fn way(piece: &Piece, direct: Option<Alignment>) -> Way {
    let Some(Alignment { block, memory }) = direct else {
        return Way::Straight { block: 1, direct: false };
    };
    let fits = |offset: u64, bytes: usize| offset.is_multiple_of(block) && (bytes as u64).is_multiple_of(block);
    if piece.parts.iter().all(|part| fits(part.offset, part.window.bytes()) && part.window.is_aligned(memory)) {
        return Way::Straight { block, direct: true };
    }
    let page = block.max(PAGE);
    Way::Bounce {
        begin: piece.begin / page * page,
        end: piece.end.next_multiple_of(page),
        // A short read may end at any block, inside of a page.
        block,
        memory: memory.max(4096),
    }
}

fn length(begin: u64, end: u64) -> usize {
    usize::try_from(end - begin).expect("pieces fit into memory")
}

fn fault(errno: Errno) -> std::io::Error {
    errno.into()
}
