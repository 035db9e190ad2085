//! A debugger's way into the guest: the GDB remote protocol on a Unix socket.
//!
//! The guest waits before its first instruction until a debugger has come. One at a time is served, by a thread of its own;
//! when it goes away, the guest runs on without breakpoints, and the next one stops it again. What only a vCPU's own thread
//! can do, its registers and page tables, that thread is asked for ([`Lifecycle::ask`]).

mod breakpoints;
mod connection;
mod registers;
mod target;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use bedplate_api::socket;
use bedplate_api::vmm::ExitReason;
use bedplate_devices::{Memory, threads};
use gdbstub::stub::state_machine::GdbStubStateMachine as Machine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError};
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::files;
use crate::machine::lifecycle::Lifecycle;
use crate::sandbox;
use connection::Connection;
use target::{Guest, Silent};

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("debugger's socket: {}: {source}; {}", path.display(), files::remedy(.source))]
pub struct DebugSocketError {
    path: PathBuf,
    source: io::Error,
}

/// Where a debugger is awaited. Dropped, the socket is gone.
#[derive(Debug)]
pub struct DebugSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl DebugSocket {
    /// Listens.
    ///
    /// # Errors
    /// Somebody else does, or the host refuses.
    pub fn listen(path: &Path) -> Result<Self, DebugSocketError> {
        let listener = socket::listen(path).map_err(|source| DebugSocketError { path: path.into(), source })?;
        Ok(Self { listener, path: path.into() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for DebugSocket {
    fn drop(&mut self) {
        socket::remove(&self.path);
    }
}

/// Told in words what debuggers do, on the debugger's thread.
pub type Words = Box<dyn Fn(&str) + Send>;

/// A machine that waits for a debugger, until the thread is started.
pub struct Debugger {
    listener: UnixListener,
    words: Words,
    event: EventFd,
}

/// The thread. Dropped, it ends.
pub struct Debugging {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Debugger {
    /// Has the machine of `life` wait, before it has vCPUs.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(socket: &DebugSocket, words: Words, life: &Lifecycle) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        life.wait_for_debugger(event.try_clone()?);
        Ok(Self { listener: socket.listener.try_clone()?, words, event })
    }

    /// Serves debuggers of a guest with this memory and this many vCPUs.
    ///
    /// # Errors
    /// The host has no threads or descriptors left.
    pub fn start(self, life: &Arc<Lifecycle>, memory: Memory, vcpus: usize) -> io::Result<Debugging> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let mut server = Server {
            guest: Guest::new(Arc::clone(life), memory, vcpus),
            life: Arc::clone(life),
            debugger: self,
            stop: Arc::clone(&stop),
        };
        let body = move || {
            sandbox::narrow(sandbox::Thread::Debugger);
            server.run();
        };
        let thread = threads::named("debugger").spawn(body)?;
        Ok(Debugging { stop, thread: Some(thread) })
    }
}

impl Drop for Debugging {
    fn drop(&mut self) {
        // Fails only if it is signalled already.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of it has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

type Error = GdbStubError<Silent, io::Error>;

/// What has happened.
enum Event {
    /// A byte of the debugger's.
    Byte(u8),
    /// The guest may have stopped.
    Guest,
    /// The debugger is gone, or the machine.
    End,
}

/// What lives on the thread.
struct Server {
    life: Arc<Lifecycle>,
    guest: Guest,
    debugger: Debugger,
    stop: Arc<EventFd>,
}

impl Server {
    fn run(&mut self) {
        while let Some(stream) = self.next_client() {
            if !self.guest.hold() {
                return;
            }
            (self.debugger.words)("a debugger has come: the guest stands still");
            match self.converse(stream) {
                Ok(Some(DisconnectReason::Kill)) => {
                    self.life.end(ExitReason::Stopped, "ended by a debugger");
                    return;
                }
                Ok(_) => {}
                Err(error) => (self.debugger.words)(&format!("the debugger was not understood: {error}")),
            }
            self.guest.let_go();
            (self.debugger.words)("the debugger has gone: the guest runs on");
        }
        // Nobody will come any more: the guest does not wait for that.
        self.guest.let_go();
    }

    /// Waits for a debugger; None at the end.
    fn next_client(&self) -> Option<UnixStream> {
        loop {
            match self.debugger.listener.accept() {
                Ok((stream, _)) => return Some(stream),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // Gone before its turn came.
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    (self.debugger.words)(&format!("no debugger can be served any more: {error}"));
                    return None;
                }
            }
            if self.wait(&[self.debugger.listener.as_fd()])? {
                return None;
            }
        }
    }

    /// Sleeps until one of these is readable, or there is something of the guest's; true at the end. None where the host
    /// refuses to wait.
    fn wait(&self, fds: &[BorrowedFd<'_>]) -> Option<bool> {
        let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        fds.push(PollFd::from_borrowed_fd(borrow(&self.stop), PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
        Some(fds.last().is_some_and(|stop| !stop.revents().is_empty()))
    }

    /// Why the debugger has left; None where it or the machine just went away.
    fn converse(&mut self, stream: UnixStream) -> Result<Option<DisconnectReason>, Error> {
        let Ok(connection) = Connection::new(stream, Arc::clone(&self.stop)) else { return Ok(None) };
        // What has been is not news for this one.
        let _ = self.debugger.event.read();
        let mut machine = GdbStub::new(connection).run_state_machine(&mut self.guest)?;
        loop {
            machine = match machine {
                Machine::Idle(mut idle) => match self.next(idle.borrow_conn(), false) {
                    Event::Byte(byte) => idle.incoming_data(&mut self.guest, byte)?,
                    Event::Guest => idle.into(),
                    Event::End => return Ok(None),
                },
                Machine::Running(mut running) => match self.next(running.borrow_conn(), true) {
                    Event::Byte(byte) => running.incoming_data(&mut self.guest, byte)?,
                    Event::Guest => match self.guest.stop_reason() {
                        Some(reason) => running.report_stop(&mut self.guest, reason)?,
                        None => running.into(),
                    },
                    Event::End => return Ok(None),
                },
                Machine::CtrlCInterrupt(interrupted) => {
                    // Where the machine has ended that is said next.
                    let reason = self.guest.hold().then(|| self.guest.interrupted());
                    interrupted.interrupt_handled(&mut self.guest, reason)?
                }
                Machine::Disconnected(gone) => return Ok(Some(gone.get_reason())),
            }
        }
    }

    /// The next thing to look at. While the guest runs, also what it does.
    fn next(&self, connection: &mut Connection, runs: bool) -> Event {
        loop {
            if runs && self.debugger.event.read().is_ok() {
                return Event::Guest;
            }
            match connection.take() {
                Ok(Some(byte)) => return Event::Byte(byte),
                Ok(None) => {}
                Err(_) => return Event::End,
            }
            let mut fds = vec![connection.as_fd()];
            if runs {
                fds.push(borrow(&self.debugger.event));
            }
            match self.wait(&fds) {
                Some(false) => {}
                // What the debugger waits for is said first.
                Some(true) if runs && self.life.exit().is_some() => return Event::Guest,
                Some(true) | None => return Event::End,
            }
        }
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the borrow lives no longer than the descriptor's owner.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
