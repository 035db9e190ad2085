//! What block devices read from and write to: a file of the host, or a copy-on-write disk of `images`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, absolute};
use std::time::Duration;

use bedplate_api::vmm::IoEngine;
use bedplate_api::vmm::chunks::MAX_WANTED;
use bedplate_devices::virtio::block::{Backend, Medium, RawFile};
use bedplate_images::disk::Disk;
use vmm_sys_util::timerfd::TimerFd;

use crate::chunks::{ChunkClient, Verdict};
use crate::config::DriveConfig;
use crate::machine::DeviceError;
use crate::sandbox::is_inside;

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
    let failed = |path: &Path| {
        let (id, path) = (drive.id.clone(), path.to_owned());
        |source| DeviceError::Path { id, path, source }
    };
    if metadata.is_dir() {
        if is_inside() && Disk::spec_of(path).is_ok_and(|spec| spec.shared) {
            return Err(DeviceError::SharedLater { id: id() });
        }
        let disk = Disk::open(path).map_err(|source| DeviceError::ImageDisk { id: id(), source: Box::new(source) })?;
        if let Some(period) = disk.renewal() {
            if drive.chunk_source.is_some() {
                return Err(DeviceError::SharedChunks { id: id() });
            }
            return Ok((
                AnyMedium::from(Box::new(SharedDisk::new(disk, period).map_err(failed(path))?) as Box<dyn Backend>),
                None,
            ));
        }
        if let Some(source) = &drive.chunk_source {
            // Connected to when a chunk lacks, which may be long after this.
            let socket = absolute(&source.socket).map_err(failed(path))?;
            let place = socket.parent().unwrap_or(&socket);
            std::fs::metadata(place).map_err(failed(place))?;
        }
        let client = drive.chunk_source.as_ref().map(ChunkClient::open).transpose().map_err(failed(path))?;
        return Ok((AnyMedium::from(Box::new(ImageDisk::new(disk, client)) as Box<dyn Backend>), None));
    }
    if drive.chunk_source.is_some() {
        return Err(DeviceError::FileChunks { id: id() });
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

/// The child of an image. Every chunk that the guest reads is verified on the way; one that the store lacks is asked for,
/// where there is somebody to ask.
pub struct ImageDisk {
    disk: Disk,
    client: Option<ChunkClient>,
}

impl ImageDisk {
    /// `disk` for a guest; `client` gets what its image lacks.
    pub fn new(mut disk: Disk, client: Option<ChunkClient>) -> Self {
        disk.note_loads(client.is_some());
        Self { disk, client }
    }

    /// What the device is told of a request. One that lacks a chunk has to wait for it; beside that one, the others are
    /// asked for that the range `ahead` will need.
    fn answer(&mut self, result: io::Result<()>, ahead: Option<(u64, u64)>) -> io::Result<()> {
        let Some(client) = &mut self.client else { return result };
        self.disk.take_loaded().into_iter().for_each(|number| client.was_read(number));
        let Err(error) = result else { return Ok(()) };
        let Some(number) = Disk::lacks_chunk(&error) else { return Err(error) };
        match client.want(number) {
            Verdict::Wait => {}
            Verdict::Answered => return Err(error),
            Verdict::TooLate => {
                let waited = client.patience().as_secs();
                let said = format!("{error}; nobody could get it for {waited} s, so the guest was told of an error");
                return Err(io::Error::new(io::ErrorKind::TimedOut, said));
            }
        }
        let missing = ahead.and_then(|(offset, len)| self.disk.missing(offset, len, MAX_WANTED).ok());
        for other in missing.into_iter().flatten().filter(|other| *other != number) {
            // Whatever became of it: its turn comes when the request gets so far.
            let _later = client.want(other);
        }
        Err(io::ErrorKind::WouldBlock.into())
    }
}

impl Backend for ImageDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn progress(&self) -> Option<BorrowedFd<'_>> {
        self.client.as_ref().map(ChunkClient::progress)
    }

    fn proceed(&mut self) -> bool {
        self.client.as_mut().is_some_and(ChunkClient::proceed)
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let result = self.disk.read_at(data, offset);
        self.answer(result, Some((offset, data.len() as u64)))
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let result = self.disk.write_at(data, offset);
        self.answer(result, None)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let result = self.disk.discard(offset, len);
        self.answer(result, None)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            return self.discard(offset, len);
        }
        let result = self.disk.write_zeroes(offset, len);
        self.answer(result, None)
    }
}

/// An image's child in a directory that several nodes can reach, whose lease is renewed also while the guest does nothing.
/// Its image is in the store, whole.
pub struct SharedDisk {
    disk: ImageDisk,
    timer: TimerFd,
}

impl SharedDisk {
    /// `disk` for a guest, renewed every `period`.
    ///
    /// # Errors
    /// The host has no timer left.
    pub fn new(disk: Disk, period: Duration) -> io::Result<Self> {
        let of = |error: vmm_sys_util::errno::Error| io::Error::from_raw_os_error(error.errno());
        let mut timer = TimerFd::new().map_err(of)?;
        timer.reset(period, Some(period)).map_err(of)?;
        Ok(Self { disk: ImageDisk::new(disk, None), timer })
    }
}

impl Backend for SharedDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn progress(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the timer's descriptor is open as long as the timer, which the returned borrow keeps.
        Some(unsafe { BorrowedFd::borrow_raw(self.timer.as_raw_fd()) })
    }

    fn proceed(&mut self) -> bool {
        // It is readable, so this does not wait. How often it has elapsed does not matter.
        let _ = self.timer.wait();
        // Where the lease is gone, or cannot be renewed, the guest's next flush says so to the guest.
        let _ = self.disk.disk.renew();
        false
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, data)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.disk.write_at(offset, data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.disk.write_zeroes(offset, len, unmap)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bedplate_api::image::{ImageKind, Manifest, Part};
    use bedplate_images::disk::Holder;
    use bedplate_images::index::Index;
    use bedplate_images::{CHUNK_SIZE, Store};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    #[test]
    fn the_lease_of_a_shared_disk_is_renewed_while_the_guest_does_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("store")).unwrap();
        let size = CHUNK_SIZE as u64;
        let index = Index::new(size, vec![store.put_chunk(&[1; CHUNK_SIZE]).unwrap()]).unwrap();
        let part = Part { size, index: store.put_blob(&index.encode()).unwrap(), content: size };
        let manifest = Manifest {
            schema: 1,
            kind: ImageKind::Disk,
            parts: [("disk".to_owned(), part)].into(),
            boot: None,
            firmware: None,
            origin: None,
            labels: BTreeMap::new(),
        };
        let image = store.put_manifest(&manifest).unwrap();
        let (path, us) = (dir.path().join("disk"), Holder::this_host().unwrap());
        drop(Disk::create_shared(&path, &store, &image, &us).unwrap());
        let lease = || {
            let names = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name());
            names.into_iter().find(|name| name.to_string_lossy().starts_with("lease.")).unwrap()
        };

        let disk = Disk::open(&path).unwrap();
        assert_eq!(disk.renewal(), Some(Holder::PERIOD / 3));
        let mut disk = SharedDisk::new(disk, Duration::from_millis(100)).unwrap();
        for _ in 0..2 {
            let before = lease();
            let descriptor = disk.progress().unwrap();
            let deadline = Timespec { tv_sec: 60, tv_nsec: 0 };
            assert_eq!(poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&deadline)).unwrap(), 1);
            assert!(!disk.proceed());
            assert_ne!(lease(), before);
        }
        let elsewhere = Holder::named("another-host").unwrap();
        assert!(Disk::open_shared(&path, &elsewhere).unwrap_err().to_string().contains("is held by"));
        drop(disk);
        Disk::open_shared(&path, &elsewhere).unwrap();
    }
}
