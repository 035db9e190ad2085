//! The few things that a disk does to its files, so that tests can record them and cut the power between any two.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

/// A file of fixed length that the overlay keeps data or its map in.
pub(super) trait Backing {
    /// Fills `bytes` from `offset`.
    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`; after an error any of them may have been written.
    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Gives the space of a range back, which reads as zeros from then on. A file system that cannot is no error: the
    /// space stays in use and the map says what the guest reads.
    fn punch(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// Returns when everything written survives a power cut.
    fn sync(&mut self) -> io::Result<()>;
}

impl Backing for File {
    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn punch(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match fallocate(&*self, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}
