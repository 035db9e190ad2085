//! What comes into RAM from files: noted when it is known where it lies, and read later.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, ReadVolatile, VolatileMemoryError, VolatileSlice};

use super::{BootError, read_error};
use crate::files;
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
    /// Its length, and when it was last written to, where the file system says that.
    state: (u64, Option<SystemTime>),
}

struct Piece {
    /// Index of its file.
    source: usize,
    offset: u64,
    /// Guest-physical, below 4 GiB.
    place: Range<u64>,
}

impl Contents {
    /// Opens a file; its number here.
    pub fn open(&mut self, what: &'static str, path: &Path) -> Result<usize, BootError> {
        let cannot = |source| read_error(what, path, source);
        let file = files::read_regular(path).map_err(cannot)?;
        let state = state(&file).map_err(cannot)?;
        self.files.push(Source { what, path: path.into(), file, state });
        Ok(self.files.len() - 1)
    }

    /// A file, where it is, and how many bytes it has.
    pub fn file(&self, source: usize) -> (&File, &Path, u64) {
        let Source { file, path, state: (len, _), .. } = &self.files[source];
        (file, path, *len)
    }

    /// Notes that all of a file shall lie at `address`, where there is room for it.
    pub fn add(&mut self, source: usize, address: u64) {
        let (_, _, len) = self.file(source);
        self.pieces.push(Piece { source, offset: 0, place: address..address + len });
    }

    /// Has `load` read a file into `ram`, and notes what it would read.
    pub fn note<T>(&mut self, source: usize, ram: &Ram, load: impl FnOnce(&mut Noting<'_>) -> T) -> T {
        let Source { file, state: (len, _), .. } = &self.files[source];
        load(&mut Noting { file, len: *len, source, pieces: &mut self.pieces, ram })
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
            let Source { what, path, file, .. } = &self.files[*source];
            let (mut file, offset) = (file, offset + (start - place.start));
            let mut read = || {
                file.seek(SeekFrom::Start(offset))?;
                // Parts are no longer than 2 MiB.
                let len = (end - start) as usize;
                let mut place = memory.get_slice(GuestAddress(start), len).map_err(io::Error::other)?;
                file.read_exact_volatile(&mut place).map_err(io_error)
            };
            read().map_err(|source| match source.kind() {
                ErrorKind::UnexpectedEof => changed(what, path, "has become shorter"),
                _ => read_error(what, path, source),
            })?;
        }
        Ok(())
    }

    /// To be called when all was read: of a file that was written to meanwhile, what was read may be parts of two.
    pub fn check(&self) -> Result<(), BootError> {
        for Source { what, path, file, state: before } in &self.files {
            if state(file).map_err(|source| read_error(what, path, source))? != *before {
                return Err(changed(what, path, "was written to"));
            }
        }
        Ok(())
    }
}

fn state(file: &File) -> io::Result<(u64, Option<SystemTime>)> {
    let metadata = file.metadata()?;
    Ok((metadata.len(), metadata.modified().ok()))
}

fn changed(what: &'static str, path: &Path, how: &'static str) -> BootError {
    BootError::Changed { what, path: path.into(), how }
}

fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
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
