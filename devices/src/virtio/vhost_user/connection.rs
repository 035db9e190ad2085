//! Messages to a backend and its answers: the vhost-user protocol on the wire.
//!
//! The crate's own frontend is not used: where a socket's time is up it tries again, for ever, and a backend that says
//! nothing would hold the vCPU that asks. Here all messages of one [`Talk`] have one deadline, an answer is as long as was
//! expected or is none, and descriptors that come with one are never taken.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType,
};
use vhost::vhost_user::message::FrontendReq;

/// Bytes of a header: request, flags, bytes that follow; each a number of four bytes as the machine has them.
const HEADER_LEN: usize = 12;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Descriptors with one message, at most: as many as the protocol lets a table of memory have.
pub(super) const MAX_FDS: usize = 8;

/// Bytes of what precedes configuration space in a message: offset, length, flags.
pub(super) const CONFIG_HEAD: usize = 12;

/// Never waits here, and is no signal where nobody is there.
const FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// Between two attempts to get into the queue of a listener that is full.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// What the other end does wrong. The words go on where `the backend` was the subject.
#[derive(Debug, thiserror::Error)]
pub(super) enum TalkError {
    #[error("does not answer in time ({0:?})")]
    Late(FrontendReq),
    #[error("has closed the connection")]
    Closed,
    #[error("cannot be reached any more: {0}")]
    Socket(io::Error),
    #[error("answers {0:?} with something else")]
    Nonsense(FrontendReq),
    #[error("refuses {0:?}")]
    Refused(FrontendReq),
    #[error("was given up: it {0}")]
    Broken(String),
}

impl TalkError {
    /// Whether it is unknown what comes next on the socket.
    const fn is_final(&self) -> bool {
        !matches!(self, Self::Refused(_))
    }
}

/// A socket with a backend at its other end.
pub(super) struct Connection {
    stream: UnixStream,
    /// Nothing is said or believed any more, because the backend did this.
    broken: Option<String>,
}

/// Connects to whoever listens at `path`, and waits until `deadline` for one who is busy.
pub(super) fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => thread::sleep(CONNECT_PAUSE),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

impl Connection {
    pub(super) const fn new(stream: UnixStream) -> Self {
        Self { stream, broken: None }
    }

    /// Says and hears several things until `deadline`. After an error that leaves open what comes next, the connection is
    /// closed, which tells a backend that works to stop.
    pub(super) fn talk<T>(
        &mut self,
        deadline: Instant,
        acks: bool,
        talk: impl FnOnce(&mut Talk<'_>) -> Result<T, TalkError>,
    ) -> Result<T, TalkError> {
        if let Some(reason) = &self.broken {
            return Err(TalkError::Broken(reason.clone()));
        }
        let result = talk(&mut Talk { stream: &self.stream, deadline, acks });
        if let Some(error) = result.as_ref().err().filter(|error| error.is_final()) {
            self.give_up(&error.to_string());
        }
        result
    }

    pub(super) const fn is_given_up(&self) -> bool {
        self.broken.is_some()
    }

    /// Closes the connection, for good, because the backend does `what`. Returns what it did first.
    pub(super) fn give_up(&mut self, what: &str) -> String {
        // Fails only where the other end was faster.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
        self.broken.get_or_insert_with(|| what.into()).clone()
    }
}

/// Some messages with one deadline.
pub(super) struct Talk<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
    /// The backend answers every message, if it is asked to.
    pub(super) acks: bool,
}

impl Talk<'_> {
    /// Tells the backend something.
    pub(super) fn tell(
        &mut self,
        request: FrontendReq,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), TalkError> {
        self.send(request, if self.acks { NEED_REPLY } else { 0 }, payload, fds)?;
        if !self.acks {
            return Ok(());
        }
        let mut done = [0; 8];
        self.answer(request, &mut done)?;
        if u64::from_ne_bytes(done) == 0 { Ok(()) } else { Err(TalkError::Refused(request)) }
    }

    /// Asks for a number.
    pub(super) fn number(&mut self, request: FrontendReq) -> Result<u64, TalkError> {
        let mut number = [0; 8];
        self.ask(request, &[], &mut number)?;
        Ok(u64::from_ne_bytes(number))
    }

    /// Asks for as many bytes as `answer` has.
    pub(super) fn ask(&mut self, request: FrontendReq, payload: &[u8], answer: &mut [u8]) -> Result<(), TalkError> {
        self.send(request, 0, payload, &[])?;
        self.answer(request, answer)
    }

    fn send(
        &mut self,
        request: FrontendReq,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), TalkError> {
        let header = [request.into(), VERSION | flags, payload.len() as u32];
        let mut message: Vec<u8> = header.iter().flat_map(|number: &u32| number.to_ne_bytes()).collect();
        message.extend_from_slice(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut rest = message.as_slice();
        let mut fds = fds;
        while !rest.is_empty() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(TalkError::Socket(io::Error::other("too many descriptors for one message")));
            }
            let sent = rustix::net::sendmsg(self.stream, &[IoSlice::new(rest)], &mut control, FLAGS);
            match sent {
                Ok(count) => {
                    rest = &rest[count..];
                    // They have gone with the first byte.
                    fds = &[];
                }
                Err(error) => self.after(error, request, PollFlags::OUT)?,
            }
        }
        Ok(())
    }

    /// Takes the answer to `request`, which must be as long as `answer`.
    fn answer(&mut self, request: FrontendReq, answer: &mut [u8]) -> Result<(), TalkError> {
        let mut header = [0; HEADER_LEN];
        self.receive(request, &mut header)?;
        let field = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (code, flags, len) = (field(0), field(4), field(8));
        if code != u32::from(request) || flags & VERSION_MASK != VERSION || flags & REPLY == 0 {
            return Err(TalkError::Nonsense(request));
        }
        if len as usize == answer.len() {
            return self.receive(request, answer);
        }
        // What a backend answers that has no configuration to show: nothing, or only where it would be.
        let mut without = [0; CONFIG_HEAD];
        match (request, len as usize) {
            (FrontendReq::GET_CONFIG, 0) => Err(TalkError::Refused(request)),
            (FrontendReq::GET_CONFIG, CONFIG_HEAD) => {
                self.receive(request, &mut without)?;
                Err(TalkError::Refused(request))
            }
            _ => Err(TalkError::Nonsense(request)),
        }
    }

    fn receive(&mut self, request: FrontendReq, bytes: &mut [u8]) -> Result<(), TalkError> {
        let mut at = 0;
        while at < bytes.len() {
            // Without a place for descriptors the kernel closes those that come.
            match rustix::net::recv(self.stream, &mut bytes[at..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(TalkError::Closed),
                Ok((_, count)) => at += count,
                Err(error) => self.after(error, request, PollFlags::IN)?,
            }
        }
        Ok(())
    }

    /// What to do after `error`: wait until the socket is ready, or give up.
    fn after(&self, error: Errno, request: FrontendReq, wanted: PollFlags) -> Result<(), TalkError> {
        match error {
            Errno::AGAIN => {}
            Errno::INTR => return Ok(()),
            Errno::PIPE | Errno::CONNRESET => return Err(TalkError::Closed),
            error => return Err(TalkError::Socket(error.into())),
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|error| TalkError::Socket(io::Error::other(error)))?;
        match poll(&mut [PollFd::from_borrowed_fd(self.stream.as_fd(), wanted)], Some(&left)) {
            Ok(0) => Err(TalkError::Late(request)),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(TalkError::Socket(error.into())),
        }
    }
}
