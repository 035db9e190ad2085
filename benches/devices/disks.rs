//! What the disks of the benchmark are made of, and the same work without a device.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use bedplate_devices::virtio::View;
use bedplate_devices::virtio::block::Backend;

/// Bytes of every disk: more than the processor's caches hold.
pub const DISK_LEN: u64 = 64 << 20;

/// A disk in this process, copied to and from guest memory like the chunks of an image.
pub struct MemoryDisk(pub Vec<u8>);

impl Backend for MemoryDisk {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self.0[offset as usize..][..data.len()]);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.0[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
}

/// Every page written, so that none is a hole.
pub fn contents() -> Vec<u8> {
    vec![0x5a; DISK_LEN as usize]
}

/// A file without a name in `directory`, gone when it is closed.
pub fn file_in(directory: &Path) -> io::Result<File> {
    let file = tempfile::tempfile_in(directory)?;
    file.write_all_at(&contents(), 0)?;
    Ok(file)
}

/// The same, past the page cache.
pub fn direct_file_in(directory: &Path) -> io::Result<File> {
    let file = tempfile::NamedTempFile::new_in(directory)?;
    file.as_file().write_all_at(&contents(), 0)?;
    file.as_file().sync_all()?;
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(file.path())
}

/// Offsets of whole blocks of `len` bytes, in an order that no cache foresees.
pub struct Offsets {
    state: u64,
    len: u64,
}

impl Offsets {
    /// Always the same ones.
    pub fn new(len: u64) -> Self {
        Self { state: 0x9e37_79b9_7f4a_7c15, len }
    }

    /// The next offset (xorshift64).
    pub fn pick(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % (DISK_LEN / self.len) * self.len
    }
}

/// A disk whose reads and writes do nothing at all, so that only the device is left.
pub struct NoDisk;

impl Backend for NoDisk {
    fn size(&self) -> u64 {
        DISK_LEN
    }

    fn read_at(&mut self, _offset: u64, _data: &mut [u8]) -> io::Result<()> {
        Ok(())
    }

    fn write_at(&mut self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&mut self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Ok(())
    }

    fn read_to_guest(&mut self, _offset: u64, _into: View<'_>, _bounce: &mut [u8]) -> io::Result<()> {
        Ok(())
    }
}
