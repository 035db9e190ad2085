//! A copy-on-write disk of `images` as what a block device reads from and writes to.

use std::io;

use bedplate_devices::virtio::block::Backend;
use bedplate_images::disk::Disk;

/// The child of an image. Every chunk that the guest reads is verified on the way.
pub struct ImageDisk {
    disk: Disk,
}

impl ImageDisk {
    /// `disk` for a guest.
    pub const fn new(disk: Disk) -> Self {
        Self { disk }
    }
}

impl Backend for ImageDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(data, offset)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.disk.write_at(data, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            return self.disk.discard(offset, len);
        }
        self.disk.write_zeroes(offset, len)
    }
}
