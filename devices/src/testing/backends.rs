//! What devices stand on when there is neither file nor tap.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::host::DEADLINE;
use crate::virtio::block::Backend;
use crate::virtio::net::Link;

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
}

impl Wire {
    /// A link, its other end, and the features that the device sets on it.
    pub fn new() -> (Self, UnixDatagram, Arc<Mutex<Vec<u64>>>) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(DEADLINE.as_secs()))).unwrap();
        let offloads = Arc::<Mutex<Vec<u64>>>::default();
        (Self { socket: ours, offloads: Arc::clone(&offloads) }, theirs, offloads)
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link for Wire {
    fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        self.offloads.lock().unwrap().push(features);
        Ok(())
    }
}
