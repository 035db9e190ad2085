//! The console as a Unix socket: who connects gets the last 64 KiB, then everything; what anybody sends, the guest gets.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use bedplate_api::socket;
use bedplate_devices::door::Door;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::backlog::Backlog;

/// What a new client is shown.
const REPLAY: usize = 64 << 10;
/// What may wait for a slow client; beyond it, it loses the oldest.
const MAX_WAITING: usize = 256 << 10;
/// Clients at once.
const MAX_CLIENTS: usize = 16;

pub(super) struct Clients {
    door: Door,
    path: PathBuf,
    connected: Vec<Client>,
    replay: Backlog,
}

struct Client {
    stream: UnixStream,
    waiting: Backlog,
    /// It will send no more; it may go on listening.
    silent: bool,
    /// It listens no more; what it has sent before may still be unread.
    hung_up: bool,
    /// Nothing can be read from it.
    failed: bool,
}

impl Clients {
    pub fn listen(path: &Path) -> io::Result<Self> {
        Ok(Self {
            door: Door::new(socket::listen(path)?),
            path: path.into(),
            connected: Vec::new(),
            replay: Backlog::new(REPLAY),
        })
    }

    pub fn poll_fds<'a>(&'a self, wants_input: bool, fds: &mut Vec<PollFd<'a>>) {
        if self.connected.len() < MAX_CLIENTS || self.expendable().is_some() {
            fds.push(PollFd::from_borrowed_fd(self.door.as_fd(), PollFlags::IN));
        }
        for client in &self.connected {
            let input = if wants_input && !client.silent { PollFlags::IN } else { PollFlags::empty() };
            let output = if client.waiting.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            // Even where nothing is asked for, the end of a connection is reported, and then again and again.
            if !client.hung_up || !input.is_empty() {
                fds.push(PollFd::from_borrowed_fd(client.stream.as_fd(), input | output));
            }
        }
    }

    pub fn broadcast(&mut self, bytes: &[u8]) {
        self.replay.push(bytes);
        for client in self.connected.iter_mut().filter(|client| !client.hung_up) {
            client.waiting.push(bytes);
            client.send();
        }
        self.forget();
    }

    /// Accepts who waits, sends what can be sent, and collects what was sent to us if there is room for `input`.
    pub fn exchange(&mut self, mut input: Option<&mut VecDeque<u8>>) {
        self.notice_ends();
        for client in &mut self.connected {
            if let Some(input) = &mut input {
                client.receive(input);
            }
        }
        self.forget();
        self.accept();
        for client in &mut self.connected {
            client.send();
        }
        self.forget();
    }

    /// New clients take the places of those that only might be listening.
    fn accept(&mut self) {
        loop {
            let expendable = self.expendable();
            let full = self.connected.len() >= MAX_CLIENTS;
            if full && expendable.is_none() {
                return;
            }
            let Ok(stream) = self.door.accept() else { return };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if let Some(oldest) = expendable.filter(|_| full) {
                self.connected.remove(oldest);
            }
            let mut waiting = Backlog::new(MAX_WAITING);
            waiting.push(&self.replay.to_vec());
            self.connected.push(Client { stream, waiting, silent: false, hung_up: false, failed: false });
        }
    }

    /// The client to drop when there are too many.
    fn expendable(&self) -> Option<usize> {
        self.connected.iter().position(|client| client.silent || client.hung_up)
    }

    /// A quiet guest's output does not tell who hung up; asking does.
    fn notice_ends(&mut self) {
        for client in self.connected.iter_mut().filter(|client| !client.hung_up) {
            let mut fds = [PollFd::new(&client.stream, PollFlags::empty())];
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            if matches!(poll(&mut fds, Some(&at_once)), Ok(1)) {
                client.hang_up();
            }
        }
    }

    fn forget(&mut self) {
        self.connected.retain(|client| !(client.failed || client.hung_up && client.silent));
    }
}

impl Client {
    fn send(&mut self) {
        while !self.waiting.is_empty() {
            match self.stream.write(self.waiting.front()) {
                Ok(len) => self.waiting.consume(len),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.hang_up(),
            }
        }
    }

    fn hang_up(&mut self) {
        self.hung_up = true;
        self.waiting = Backlog::new(0);
    }

    /// One piece at a time, so that nobody keeps the others from talking.
    fn receive(&mut self, input: &mut VecDeque<u8>) {
        let mut bytes = [0; 512];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.silent = true,
            Ok(len) => input.extend(&bytes[..len]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.failed = true,
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // What is left for clients that are quick enough goes out, then the socket disappears.
        for client in &mut self.connected {
            client.send();
        }
        socket::remove(&self.path);
    }
}
