//! Something to import or to look into: a sequence of bytes with holes.

use std::fs::{File, FileType};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bedplate_api::Digest;
use bedplate_api::image::Part;
use rustix::fs::{OFlags, SeekFrom, seek};

use super::ImportError;
use crate::frame::chunk_buffer;
use crate::index::IndexFile;
use crate::{CHUNK_SIZE, Store, StoreError};

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
pub(crate) struct RawSource {
    file: File,
    size: u64,
    path: PathBuf,
}

impl RawSource {
    pub(crate) fn new(file: File, path: &Path) -> Result<Self, ImportError> {
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

/// A part that is in the store already.
pub(super) struct Stored {
    store: Store,
    index: IndexFile,
    /// The chunk that was read last: file systems are read in small pieces.
    number: Option<u64>,
    plain: Box<[u8; CHUNK_SIZE]>,
}

impl Stored {
    pub(super) fn open(store: &Store, part: &Part) -> Result<Self, ImportError> {
        Ok(Self { index: store.index(part)?, store: store.clone(), number: None, plain: chunk_buffer() })
    }

    fn load(&mut self, number: u64) -> Result<(), ImportError> {
        if self.number == Some(number) {
            return Ok(());
        }
        self.number = None;
        match self.index.digest(number).map_err(StoreError::from)? {
            Digest::ZERO => self.plain.fill(0),
            digest => {
                self.store.read_chunk(&digest, &mut self.plain)?;
            }
        }
        self.number = Some(number);
        Ok(())
    }
}

impl Source for Stored {
    fn size(&self) -> u64 {
        self.index.size()
    }

    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, ImportError> {
        for number in from / CHUNK_SIZE as u64..self.index.count() {
            if self.index.digest(number).map_err(StoreError::from)? != Digest::ZERO {
                let start = number * CHUNK_SIZE as u64;
                return Ok(Some(from.max(start)..(start + CHUNK_SIZE as u64).min(self.size())));
            }
        }
        Ok(None)
    }

    fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> Result<(), ImportError> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            self.load(at / CHUNK_SIZE as u64)?;
            // Below the chunk size.
            let within = (at % CHUNK_SIZE as u64) as usize;
            let len = (CHUNK_SIZE - within).min(bytes.len() - done);
            bytes[done..done + len].copy_from_slice(&self.plain[within..within + len]);
            done += len;
        }
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
