//! A raw file or block device as a disk: the kernel copies between its page cache and guest memory.

use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use super::{Backend, Uring};
use crate::files;
use crate::virtio::View;

/// A file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error("cannot open disk {path}: {source}")]
    Open {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It can be opened, and is no place for sectors.
    #[error("disk {path} is {found}; give a regular file or a block device")]
    Kind {
        /// Which one.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// It has no size.
    #[error("cannot find the size of disk {path}: {source}; give a regular file or a block device")]
    Size {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn holds_sectors(file_type: FileType) -> bool {
    file_type.is_file() || file_type.is_block_device()
}

/// A disk that is a flat file.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: u64,
}

impl RawFile {
    /// The disk at `path`.
    ///
    /// # Errors
    /// It cannot be opened in this way, or is neither file nor block device.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let cannot = |source| OpenError::Open { path: path.into(), source };
        // Before it is opened: that waits at a FIFO, and does things to some devices.
        let file_type = fs::metadata(path).map_err(cannot)?.file_type();
        if !holds_sectors(file_type) {
            return Err(OpenError::Kind { path: path.into(), found: files::kind(file_type) });
        }
        let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(cannot)?;
        Self::new(file).map_err(|source| OpenError::Size { path: path.into(), source })
    }

    /// The disk that an open file is.
    ///
    /// # Errors
    /// It is neither file nor block device, or cannot be measured.
    pub fn new(mut file: File) -> io::Result<Self> {
        let file_type = file.metadata()?.file_type();
        if !holds_sectors(file_type) {
            return Err(io::Error::other(format!("this is {}", files::kind(file_type))));
        }
        // The length of a block device is where its end is, not what its metadata says.
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, size })
    }

    /// A ring for requests to this file.
    ///
    /// # Errors
    /// The host has no io_uring, or forbids it.
    pub fn ring(&self) -> io::Result<Uring> {
        Uring::open(self.file.as_fd())
    }

    /// `fallocate`; false where the file system cannot.
    fn allocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<bool> {
        let range = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        let (offset, len) = (range(offset)?, range(len)?);
        loop {
            // SAFETY: plain numbers, and a descriptor that is open as long as `self.file`.
            if unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, offset, len) } == 0 {
                return Ok(true);
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => return Ok(false),
                _ => return Err(error),
            }
        }
    }
}

impl Backend for RawFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len).map(|_| ())
    }

    fn write_zeroes(&mut self, mut offset: u64, mut len: u64, unmap: bool) -> io::Result<()> {
        let way = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        if self.allocate(way | libc::FALLOC_FL_KEEP_SIZE, offset, len)? {
            return Ok(());
        }
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        while len > 0 {
            let part = len.min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..part as usize], offset)?;
            (offset, len) = (offset + part, len - part);
        }
        Ok(())
    }

    fn read_to_guest(&mut self, offset: u64, into: View<'_>, _bounce: &mut [u8]) -> io::Result<()> {
        into.read_exact_at(self.file.as_fd(), offset)
    }

    fn write_from_guest(&mut self, offset: u64, from: View<'_>, _bounce: &mut [u8]) -> io::Result<()> {
        from.write_all_at(self.file.as_fd(), offset)
    }
}
