//! The debugger's connection. A debugger that does not read holds up nobody but itself: the end of the machine does not
//! wait for it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;

/// Of what it sends, this much is read at once.
const PIECE: usize = 4096;

pub(super) struct Connection {
    stream: UnixStream,
    received: VecDeque<u8>,
    to_send: Vec<u8>,
    stop: Arc<EventFd>,
}

impl Connection {
    /// Nothing is waited for after `stop` is signalled.
    pub fn new(stream: UnixStream, stop: Arc<EventFd>) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, received: VecDeque::new(), to_send: Vec::new(), stop })
    }

    /// The next byte that has come, if any.
    ///
    /// # Errors
    /// No more will come.
    pub fn take(&mut self) -> io::Result<Option<u8>> {
        if self.received.is_empty() {
            let mut bytes = [0; PIECE];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => self.received.extend(&bytes[..len]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(self.received.pop_front())
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn wait_for_room(&self) -> io::Result<()> {
        // SAFETY: the borrow ends with this function.
        let stop = unsafe { BorrowedFd::borrow_raw(self.stop.as_raw_fd()) };
        let mut fds = [PollFd::new(&self.stream, PollFlags::OUT), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => Err(io::Error::other("the machine ends")),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl gdbstub::conn::Connection for Connection {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.to_send.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to_send.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.to_send);
        let mut left = &bytes[..];
        while !left.is_empty() {
            match Write::write(&mut self.stream, left) {
                Ok(len) => left = &left[len..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait_for_room()?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
