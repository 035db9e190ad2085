//! A listening socket that turns away whom the process has no descriptor for. They would wait at it otherwise, and whoever
//! waits for it would never sleep again.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// Where clients come, without blocking.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    /// Let go of for the one who is turned away.
    spare: Option<UnixListener>,
}

impl Door {
    /// Of a listener that does not block.
    pub fn new(listener: UnixListener) -> Self {
        Self { spare: listener.try_clone().ok(), listener }
    }

    /// The next client.
    ///
    /// # Errors
    /// `WouldBlock` where nobody is there; `ConnectionAborted` or `Interrupted` where the next one may be; anything else has
    /// had one client turned away.
    pub fn accept(&mut self) -> io::Result<UnixStream> {
        use ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        let error = match self.listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(error) if matches!(error.kind(), WouldBlock | ConnectionAborted | Interrupted) => return Err(error),
            // A lack of descriptors is said before it is looked whether anybody is there.
            Err(error) => error,
        };
        self.spare = None;
        let turned_away = self.listener.accept().map(drop);
        self.spare = self.listener.try_clone().ok();
        turned_away.and(Err(error))
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}
