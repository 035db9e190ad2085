//! What devices stand on when there is neither file nor tap.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::host::DEADLINE;
use crate::virtio::block::Backend;
use crate::virtio::net::{Link, tap_features};

/// A disk in memory. All writes are durable at once.
pub struct RamDisk {
    bytes: Vec<u8>,
}

impl RamDisk {
    /// A disk of `len` zeroes.
    pub fn new(len: usize) -> Self {
        Self { bytes: vec![0; len] }
    }

    fn range(&mut self, offset: u64, len: usize) -> &mut [u8] {
        // Out of bounds means that the device did not check, which is what a test wants to know.
        &mut self.bytes[offset as usize..][..len]
    }
}

impl Backend for RamDisk {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(self.range(offset, data.len()));
        Ok(())
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.range(offset, data.len()).copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.range(offset, len as usize);
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.range(offset, len as usize).fill(0);
        Ok(())
    }
}

/// Takes bytes and forgets them.
#[derive(Clone)]
pub struct Nowhere;

impl io::Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A link over a pair of datagram sockets, which keep frames apart as a tap does.
pub struct Wire {
    socket: UnixDatagram,
    offloads: Arc<Mutex<Vec<u64>>>,
    attached: Arc<AtomicBool>,
    stuck: Arc<AtomicBool>,
}

impl Wire {
    /// A link, its other end, and the features that the device sets on it.
    pub fn new() -> (Self, UnixDatagram, Arc<Mutex<Vec<u64>>>) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(DEADLINE.as_secs()))).unwrap();
        let offloads = Arc::<Mutex<Vec<u64>>>::default();
        let attached = Arc::new(AtomicBool::new(true));
        (Self { socket: ours, offloads: Arc::clone(&offloads), attached, stuck: Arc::default() }, theirs, offloads)
    }

    /// Whether frames come to it, as the device has said.
    pub fn attached(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.attached)
    }

    /// Set, it can be neither attached nor detached.
    pub fn stuck(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stuck)
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link for Wire {
    fn features(&self) -> u64 {
        tap_features(true)
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.offloads.lock().unwrap().push(features);
        Ok(())
    }

    fn attach(&self, on: bool) -> io::Result<()> {
        if self.stuck.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        self.attached.store(on, Ordering::SeqCst);
        Ok(())
    }
}
