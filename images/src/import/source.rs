//! Something to import: a sequence of bytes with holes.

use std::fs::{File, FileType};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom, seek};

use super::ImportError;

/// A disk, kernel or initial RAM disk as it is read, whatever holds it.
pub(crate) trait Source {
    /// Length in bytes; constant.
    fn size(&self) -> u64;
    /// The first range at or after `from` that may hold anything but zeros, and no hole; `None` when there is none.
    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, ImportError>;
    /// Fills `bytes` from `offset`; the range is within the size.
    fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> Result<(), ImportError>;
}

/// A file or block device whose bytes are the disk.
pub(super) struct RawSource {
    file: File,
    size: u64,
    path: PathBuf,
}

impl RawSource {
    pub(super) fn new(file: File, path: &Path) -> Result<Self, ImportError> {
        // A block device has a length only for who seeks.
        let size = seek(&file, SeekFrom::End(0)).map_err(|e| ImportError::io("examine", path)(e.into()))?;
        Ok(Self { file, size, path: path.to_owned() })
    }
}

impl Source for RawSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, ImportError> {
        if from >= self.size {
            return Ok(None);
        }
        let start = match seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            // Nothing but a hole follows.
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // Not a file system that knows holes.
            Err(_) => return Ok(Some(from..self.size)),
        };
        let end = seek(&self.file, SeekFrom::Hole(start)).unwrap_or(self.size);
        Ok((start < self.size).then(|| start..end.clamp(start + 1, self.size)))
    }

    fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> Result<(), ImportError> {
        self.file.read_exact_at(bytes, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => ImportError::Truncated {
                path: self.path.clone(),
                what: "what is being read".to_owned(),
                end: offset + bytes.len() as u64,
                size: self.file.metadata().map_or(0, |m| m.len()),
            },
            _ => ImportError::io("read", &self.path)(e),
        })
    }
}

/// Bytes in memory: what was found inside a disk.
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl Source for Bytes<'_> {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, ImportError> {
        Ok((from < self.size()).then(|| from..self.size()))
    }

    fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> Result<(), ImportError> {
        // Within the slice, by this trait's contract.
        bytes.copy_from_slice(&self.0[offset as usize..][..bytes.len()]);
        Ok(())
    }
}

/// Opens a file or block device; `wanted` is what to name instead of anything else. A pipe would keep us waiting for
/// somebody who writes to it, and a character device may never end, or do something when it is opened.
pub(super) fn open_file(path: &Path, wanted: &'static str) -> Result<File, ImportError> {
    let check = |kind: FileType| match other_than_file(kind) {
        Some(found) => Err(ImportError::NotAFile { path: path.to_owned(), found, wanted }),
        None => Ok(()),
    };
    check(path.metadata().map_err(ImportError::io("open", path))?.file_type())?;
    // Somebody may have put a pipe there since: opening must not wait, and what was opened is what counts.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(ImportError::io("open", path))?;
    check(file.metadata().map_err(ImportError::io("examine", path))?.file_type())?;
    Ok(file)
}

fn other_than_file(kind: FileType) -> Option<&'static str> {
    match kind {
        kind if kind.is_file() || kind.is_block_device() => None,
        kind if kind.is_dir() => Some("a directory"),
        kind if kind.is_fifo() => Some("a named pipe"),
        kind if kind.is_socket() => Some("a socket"),
        kind if kind.is_char_device() => Some("a character device"),
        _ => Some("something else"),
    }
}

/// The first `head` bytes of a file and its last 512, or as many as there are.
pub(super) fn read_ends(file: &File, head: usize) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let size = seek(file, SeekFrom::End(0))?;
    let read = |len: u64, at: u64| {
        // Both lengths are small, and no more than there is.
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, at).map(|()| bytes)
    };
    Ok((read(size.min(head as u64), 0)?, read(size.min(512), size - size.min(512))?))
}
