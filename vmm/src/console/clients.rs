//! The console as a Unix socket: who connects gets the last 64 KiB, then everything; what anybody sends, the guest gets.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags};

use super::backlog::Backlog;
use crate::socket;

/// What a new client is shown.
const REPLAY: usize = 64 << 10;
/// What may wait for a slow client; beyond it, it loses the oldest.
const MAX_WAITING: usize = 256 << 10;
/// Clients at once.
const MAX_CLIENTS: usize = 16;

pub(super) struct Clients {
    listener: UnixListener,
    path: PathBuf,
    connected: Vec<Client>,
    replay: Backlog,
}

struct Client {
    stream: UnixStream,
    waiting: Backlog,
    /// It will send no more; it may go on listening.
    silent: bool,
    gone: bool,
}

impl Clients {
    pub fn listen(path: &Path) -> io::Result<Self> {
        let listener = socket::listen(path)?;
        Ok(Self { listener, path: path.into(), connected: Vec::new(), replay: Backlog::new(REPLAY) })
    }

    pub fn poll_fds<'a>(&'a self, wants_input: bool, fds: &mut Vec<PollFd<'a>>) {
        if self.connected.len() < MAX_CLIENTS {
            fds.push(PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN));
        }
        // One that is silent and has all output would be ready for ever; should it be gone, the next output tells.
        for client in self.connected.iter().filter(|client| !client.silent || !client.waiting.is_empty()) {
            let input = if wants_input && !client.silent { PollFlags::IN } else { PollFlags::empty() };
            let output = if client.waiting.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            fds.push(PollFd::from_borrowed_fd(client.stream.as_fd(), input | output));
        }
    }

    pub fn broadcast(&mut self, bytes: &[u8]) {
        self.replay.push(bytes);
        for client in &mut self.connected {
            client.waiting.push(bytes);
            client.send();
        }
        self.connected.retain(|client| !client.gone);
    }

    /// Accepts who waits, sends what can be sent, and collects what was sent to us.
    pub fn exchange(&mut self, input: &mut VecDeque<u8>) {
        while self.connected.len() < MAX_CLIENTS
            && let Ok((stream, _)) = self.listener.accept()
        {
            if stream.set_nonblocking(true).is_ok() {
                let mut waiting = Backlog::new(MAX_WAITING);
                waiting.push(&self.replay.to_vec());
                self.connected.push(Client { stream, waiting, silent: false, gone: false });
            }
        }
        for client in &mut self.connected {
            client.send();
            client.receive(input);
        }
        self.connected.retain(|client| !client.gone);
    }
}

impl Client {
    fn send(&mut self) {
        while !self.waiting.is_empty() {
            match self.stream.write(self.waiting.front()) {
                Ok(len) => self.waiting.consume(len),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
    }

    /// One piece at a time, so that nobody keeps the others from talking.
    fn receive(&mut self, input: &mut VecDeque<u8>) {
        let mut bytes = [0; 512];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.silent = true,
            Ok(len) => input.extend(&bytes[..len]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.gone = true,
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // What is left for clients that are quick enough goes out, then the socket disappears.
        for client in &mut self.connected {
            client.send();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}
