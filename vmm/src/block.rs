//! What block devices read from and write to: a file of the host, or a copy-on-write disk of `images`.

use std::io;

use bedplate_api::vmm::IoEngine;
use bedplate_devices::virtio::block::{Backend, Medium, RawFile};
use bedplate_images::disk::Disk;

use crate::config::DriveConfig;
use crate::machine::DeviceError;

/// Any kind of disk.
pub type AnyMedium = Medium<Box<dyn Backend>>;

/// Opens what holds a drive. With it comes a warning where the host cannot do what was asked for, and does it otherwise.
///
/// # Errors
/// It is not there, may not be opened, or is no disk.
pub fn open(drive: &DriveConfig) -> Result<(AnyMedium, Option<String>), DeviceError> {
    let (id, path) = (|| drive.id.clone(), &drive.path);
    let metadata =
        std::fs::metadata(path).map_err(|source| DeviceError::Path { id: id(), path: path.clone(), source })?;
    if metadata.is_dir() {
        let disk = Disk::open(path).map_err(|source| DeviceError::ImageDisk { id: id(), source })?;
        return Ok((AnyMedium::from(Box::new(ImageDisk::new(disk)) as Box<dyn Backend>), None));
    }
    let file = RawFile::open(path, drive.read_only).map_err(|source| DeviceError::Drive { id: id(), source })?;
    let (ring, warning) = match drive.engine {
        IoEngine::Sync => (None, None),
        IoEngine::Async => match file.ring() {
            Ok(ring) => (Some(ring), None),
            Err(error) => (None, Some(no_ring(&drive.id, &error))),
        },
    };
    Ok((Medium { backend: Box::new(file), ring }, warning))
}

fn no_ring(id: &str, error: &io::Error) -> String {
    format!(
        "drive {id:?}: no io_uring for io_engine Async ({error}), so that each request is a system call. A drive that is \
         exchanged inside the sandbox gets none; at the start, kernel.io_uring_disabled must be 0. Or leave io_engine out"
    )
}

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
