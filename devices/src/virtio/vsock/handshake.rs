//! What a client of the host says before it is connected: `CONNECT <port>\n`.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use event_manager::EventSet;
use rustix::net::{RecvFlags, recv};

/// Bytes of the longest line that makes sense, with its end: `CONNECT 4294967295\n` and a carriage return.
const MAX_LINE: usize = 20;

/// How far a client is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The line is not complete.
    Wait,
    /// The guest's port that it wants to.
    Port(u32),
    /// It said something else, or left.
    Failed,
}

/// A client that has not said where it wants to.
pub(super) struct Handshake {
    pub(super) stream: UnixStream,
    line: Vec<u8>,
    /// As in a connection.
    pub(super) watched: Option<EventSet>,
}

impl Handshake {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new(), watched: None }
    }

    /// Reads up to the end of the line and no further: what follows is for the guest.
    pub(super) fn read(&mut self) -> Progress {
        let mut bytes = [0; MAX_LINE];
        let room = MAX_LINE - self.line.len();
        let seen = match recv(self.stream.as_fd(), &mut bytes[..room], RecvFlags::PEEK) {
            Ok((_, seen)) if seen > 0 => seen,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Progress::Wait,
            _ => return Progress::Failed,
        };
        let end = bytes[..seen].iter().position(|byte| *byte == b'\n');
        let len = end.map_or(seen, |end| end + 1);
        // They are there: they have just been seen, and nobody else reads.
        if !matches!(recv(self.stream.as_fd(), &mut bytes[..len], RecvFlags::empty()), Ok((_, n)) if n == len) {
            return Progress::Failed;
        }
        self.line.extend_from_slice(&bytes[..len]);
        match end {
            Some(_) => parse(&self.line).map_or(Progress::Failed, Progress::Port),
            None if self.line.len() == MAX_LINE => Progress::Failed,
            None => Progress::Wait,
        }
    }

    /// The socket, for the connection.
    pub(super) fn finish(self) -> (UnixStream, Option<EventSet>) {
        (self.stream, self.watched)
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let command = words.next()?;
    let port = words.next()?.parse().ok()?;
    (command.eq_ignore_ascii_case("CONNECT") && words.next().is_none()).then_some(port)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn pair() -> (Handshake, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Handshake::new(ours), theirs)
    }

    #[test]
    fn nothing_after_the_line_is_taken() {
        let (mut handshake, mut client) = pair();
        assert_eq!(handshake.read(), Progress::Wait);
        client.write_all(b"CONN").unwrap();
        assert_eq!(handshake.read(), Progress::Wait);
        client.write_all(b"ECT 4294967295\nhello").unwrap();
        assert_eq!(handshake.read(), Progress::Port(u32::MAX));
        let mut rest = [0; 5];
        handshake.finish().0.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn other_lines_fail() {
        let long = [b'x'; 100];
        for line in
            [&b"CONNECT\n"[..], b"CONNECT 4294967296\n", b"CONNECT 1 2\n", b"LISTEN 1\n", b"\xff 1\n", b"\n", &long]
        {
            let (mut handshake, mut client) = pair();
            client.write_all(line).unwrap();
            assert_eq!(handshake.read(), Progress::Failed, "{line:?}");
        }
        let (mut handshake, client) = pair();
        drop(client);
        assert_eq!(handshake.read(), Progress::Failed);
    }
}
