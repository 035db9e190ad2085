//! Where a guest's console goes, the serial or the virtio one: terminal, file or socket, and a log beside it.
//!
//! The device writes into a [`Sink`], which never blocks a vCPU; a thread of its own, made by [`Console::serve`],
//! carries the bytes to all outputs and brings input back. A slow terminal or client holds up nobody but itself: beyond a
//! bound its output is dropped.

mod backlog;
mod clients;
mod file_log;
mod keys;
mod outlet;
mod sink;
mod terminal;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use bedplate_devices::threads;
use bedplate_devices::virtio::console::ConsoleControl;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::files;
use crate::machine::SerialLine;
use crate::sandbox;
use clients::Clients;
use file_log::FileLog;
use keys::Keys;
use outlet::Outlet;
pub use sink::Sink;
use terminal::RawTerminal;

/// Input that waits for the guest, at most; beyond it nothing is read from outside.
const MAX_PENDING_INPUT: usize = 4096;
/// At the end, a terminal or file that has stalled may take this long; how the VM ended has to be reported, too.
const GRACE: Duration = Duration::from_secs(2);

/// Where the console goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Standard input and output; raw where it is a terminal.
    Stdio,
    /// Nowhere.
    Off,
    /// Appended to a file; no input.
    File(PathBuf),
    /// A listening Unix socket.
    Socket(PathBuf),
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "off" => Ok(Self::Off),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err("expected stdio, off, file:PATH or socket:PATH".into()),
        }
    }
}

/// A place that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("console: {path}: {source}; {}", files::remedy(.source))]
pub struct ConsoleError {
    path: PathBuf,
    source: io::Error,
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ConsoleError {
    move |source| ConsoleError { path: path.into(), source }
}

/// A guest's end of a console: a serial port, or a virtio console.
pub trait Line: Send + 'static {
    /// Gives the guest as much of `input` as there is room for; how much that was.
    fn push_input(&self, input: &[u8]) -> usize;

    /// Signalled when the guest has taken all input.
    fn drained(&self) -> &EventFd;
}

impl Line for SerialLine {
    fn push_input(&self, input: &[u8]) -> usize {
        self.port.lock().unwrap_or_else(|e| e.into_inner()).push_input(input)
    }

    fn drained(&self) -> &EventFd {
        &self.drained
    }
}

impl Line for ConsoleControl {
    fn push_input(&self, input: &[u8]) -> usize {
        self.push_input(input)
    }

    fn drained(&self) -> &EventFd {
        self.drained()
    }
}

/// All outputs, open.
pub struct Console {
    sink: Sink,
    output: Output,
    log: Option<FileLog>,
}

enum Output {
    Stdio(Outlet),
    Off,
    File(Outlet),
    Socket(Clients),
}

impl Output {
    fn open(target: &Target) -> Result<Self, ConsoleError> {
        Ok(match target {
            // Of its own: whoever prints while this one stalls is not kept by a lock.
            Target::Stdio => Self::Stdio(
                rustix::stdio::stdout()
                    .try_clone_to_owned()
                    .map(|stdout| Outlet::new(File::from(stdout), GRACE))
                    .map_err(at(Path::new("standard output")))?,
            ),
            Target::Off => Self::Off,
            Target::File(path) => Self::File(outlet(path).map_err(at(path))?),
            Target::Socket(path) => Self::Socket(Clients::listen(path).map_err(at(path))?),
        })
    }
}

fn outlet(path: &Path) -> io::Result<Outlet> {
    let file = files::append_to(path)?;
    // Once open, a FIFO that is full for a while loses nothing: it is the outlet's thread that waits.
    rustix::io::ioctl_fionbio(&file, false)?;
    Ok(Outlet::new(file, GRACE))
}

impl Console {
    /// Opens `target` and the log.
    ///
    /// # Errors
    /// One of them cannot be opened.
    pub fn open(target: &Target, log: Option<&Path>) -> Result<Self, ConsoleError> {
        let output = Output::open(target)?;
        let log = log.map(|path| FileLog::open(path).map_err(at(path))).transpose()?;
        let sink = Sink::new().map_err(at(Path::new("eventfd")))?;
        Ok(Self { sink, output, log })
    }

    /// Goes to `target` instead; the log stays.
    ///
    /// # Errors
    /// It cannot be opened; then nothing changes.
    pub fn redirect(&mut self, target: &Target) -> Result<(), ConsoleError> {
        self.output = Output::open(target)?;
        Ok(())
    }

    /// Where the device writes to.
    pub fn sink(&self) -> Sink {
        self.sink.clone()
    }

    /// Starts to carry bytes. `leave` is signalled when the person at the terminal wants out (Ctrl-A X).
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn serve<L: Line>(mut self, line: L, leave: &EventFd) -> io::Result<Serving> {
        if let Output::Stdio(outlet) | Output::File(outlet) = &mut self.output {
            outlet.start()?;
        }
        let quit = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let terminal = match self.output {
            Output::Stdio(_) => RawTerminal::enter()?,
            _ => None,
        };
        let is_terminal = terminal.is_some();
        let server = Server {
            sink: self.sink,
            stdin_open: matches!(self.output, Output::Stdio(_)),
            keys: Keys::new(is_terminal),
            output: self.output,
            log: self.log,
            line,
            pending: VecDeque::new(),
            quit: quit.try_clone()?,
            leave: leave.try_clone()?,
        };
        let thread = threads::named("console").spawn(move || {
            sandbox::narrow(sandbox::Thread::Console);
            server.run();
        })?;
        Ok(Serving { quit, thread: Some(thread), _terminal: terminal })
    }
}

/// The console at work. Dropped, it has delivered all output that somebody took, and the terminal is as it was before.
pub struct Serving {
    quit: EventFd,
    thread: Option<JoinHandle<()>>,
    /// Restored after the thread has ended.
    _terminal: Option<RawTerminal>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.quit.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// What lives on the console thread.
struct Server<L> {
    sink: Sink,
    output: Output,
    log: Option<FileLog>,
    stdin_open: bool,
    keys: Keys,
    line: L,
    /// Input that the guest had no room for.
    pending: VecDeque<u8>,
    quit: EventFd,
    leave: EventFd,
}

impl<L: Line> Server<L> {
    fn run(mut self) {
        loop {
            let stop = self.wait();
            self.carry_output();
            if stop {
                return;
            }
            self.carry_input();
        }
    }

    /// Sleeps until there is something to do; true when it is to end.
    fn wait(&self) -> bool {
        let stdin = io::stdin();
        let wants_input = self.pending.len() < MAX_PENDING_INPUT;
        let mut fds = vec![
            PollFd::from_borrowed_fd(borrow(&self.quit), PollFlags::IN),
            PollFd::from_borrowed_fd(borrow(self.sink.event()), PollFlags::IN),
            PollFd::from_borrowed_fd(borrow(self.line.drained()), PollFlags::IN),
        ];
        if self.stdin_open && wants_input {
            fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        if let Output::Socket(clients) = &self.output {
            clients.poll_fds(wants_input, &mut fds);
        }
        // Interrupted by a signal: as if something had happened.
        let _ = poll(&mut fds, None);
        !fds[0].revents().is_empty()
    }

    fn carry_output(&mut self) {
        let bytes = self.sink.take();
        if let Some(log) = &mut self.log {
            log.append(&bytes);
        }
        match &mut self.output {
            Output::Off => {}
            Output::Stdio(outlet) | Output::File(outlet) => outlet.push(&bytes),
            Output::Socket(clients) => clients.broadcast(&bytes),
        }
    }

    fn carry_input(&mut self) {
        // Cleared first: a FIFO that empties from here on signals again.
        let _ = self.line.drained().read();
        let wants_input = self.pending.len() < MAX_PENDING_INPUT;
        match &mut self.output {
            Output::Stdio(_) if self.stdin_open && wants_input => self.read_stdin(),
            // Clients come, go and listen whatever the guest reads.
            Output::Socket(clients) => clients.exchange(wants_input.then_some(&mut self.pending)),
            _ => {}
        }
        self.feed();
    }

    fn read_stdin(&mut self) {
        let mut fds = [PollFd::from_borrowed_fd(rustix::stdio::stdin(), PollFlags::IN)];
        if !matches!(poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1)) {
            return;
        }
        let mut bytes = [0; 512];
        // Not through the standard library, which reads ahead, and nobody would be told of what it has.
        match rustix::io::read(rustix::stdio::stdin(), &mut bytes) {
            Err(Errno::INTR | Errno::AGAIN) => {}
            Ok(0) | Err(_) => self.stdin_open = false,
            Ok(len) => {
                if self.keys.pass(&bytes[..len], &mut self.pending) {
                    let _ = self.leave.write(1);
                }
            }
        }
    }

    /// Gives the guest what it has room for.
    fn feed(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let taken = self.line.push_input(self.pending.make_contiguous());
        self.pending.drain(..taken);
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the borrow lives no longer than the descriptor's owner.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests;
