//! What comes into RAM from files: noted when it is known where it lies, and read later.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, ReadVolatile, VolatileMemoryError, VolatileSlice,
};

use super::{BootError, read_error};
use crate::memory::Ram;

/// RAM is filled in units of a huge page, so that it can be had in those.
const PART: u64 = 2 << 20;

/// Pieces of files, and where each shall lie. Of two in one place the later one lies on top.
#[derive(Default)]
pub(super) struct Contents {
    files: Vec<Source>,
    pieces: Vec<Piece>,
}

struct Source {
    what: &'static str,
    path: PathBuf,
    file: File,
}

struct Piece {
    /// Index of its file.
    source: usize,
    offset: u64,
    /// Guest-physical, below 4 GiB.
    place: Range<u64>,
}

impl Contents {
    /// Notes that the first `len` bytes of a file shall lie at `address`.
    pub fn add(&mut self, what: &'static str, path: &Path, file: File, len: u64, address: u64) {
        let source = self.add_file(what, path, file);
        self.pieces.push(Piece { source, offset: 0, place: address..address + len });
    }

    fn add_file(&mut self, what: &'static str, path: &Path, file: File) -> usize {
        self.files.push(Source { what, path: path.into(), file });
        self.files.len() - 1
    }

    /// Has `load`, which reads a file of `len` bytes from its beginning into `ram`, and notes what it would read.
    pub fn note<T>(
        &mut self,
        (what, path): (&'static str, &Path),
        file: File,
        len: u64,
        ram: &Ram,
        load: impl FnOnce(&mut Noting<'_>) -> T,
    ) -> T {
        let source = self.add_file(what, path, file);
        let Self { files, pieces } = self;
        load(&mut Noting { file: &files[source].file, len, source, pieces, ram })
    }

    /// The parts of RAM in which there is something, in order; RAM ends at `end`.
    pub fn parts(&self, end: u64) -> Vec<Range<u64>> {
        let of = |piece: &Piece| (piece.place.start / PART)..piece.place.end.div_ceil(PART);
        let mut numbers: Vec<_> = self.pieces.iter().flat_map(of).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers.into_iter().map(|number| number * PART..((number + 1) * PART).min(end)).collect()
    }

    /// Reads what lies in `part` into `memory`.
    pub fn fill(&self, memory: &GuestMemoryMmap, part: &Range<u64>) -> Result<(), BootError> {
        for Piece { source, offset, place } in &self.pieces {
            let (start, end) = (place.start.max(part.start), place.end.min(part.end));
            if start >= end {
                continue;
            }
            let Source { what, path, file } = &self.files[*source];
            let (mut file, offset) = (file, offset + (start - place.start));
            let read = file.seek(SeekFrom::Start(offset)).and_then(|_| {
                // Parts are no longer than 2 MiB.
                let len = (end - start) as usize;
                memory.read_exact_volatile_from(GuestAddress(start), &mut file, len).map_err(words)
            });
            read.map_err(|source| read_error(what, path, source))?;
        }
        Ok(())
    }
}

fn words(error: GuestMemoryError) -> io::Error {
    match error {
        GuestMemoryError::IOError(error) => error,
        GuestMemoryError::PartialBuffer { .. } => io::Error::other("it has become shorter while it was read"),
        error => io::Error::other(error.to_string()),
    }
}

/// A file whose bytes are not read if they shall go to the guest's RAM. Whoever reads it has read them.
pub(super) struct Noting<'a> {
    file: &'a File,
    len: u64,
    source: usize,
    pieces: &'a mut Vec<Piece>,
    ram: &'a Ram,
}

impl Read for Noting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Seek for Noting<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl ReadVolatile for Noting<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let Some(start) = self.ram.low_address(buffer.ptr_guard().as_ptr()) else {
            return self.file.read_volatile(buffer);
        };
        let offset = self.file.stream_position().map_err(VolatileMemoryError::IOError)?;
        let len = self.len.saturating_sub(offset).min(buffer.len() as u64);
        self.file.seek(SeekFrom::Start(offset + len)).map_err(VolatileMemoryError::IOError)?;
        self.pieces.push(Piece { source: self.source, offset, place: start..start + len });
        // No more than the buffer has.
        Ok(len as usize)
    }
}
