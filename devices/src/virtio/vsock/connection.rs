//! One connection between a socket of the host and a port of the guest: its state, its credit, and what is still to be
//! said to the guest about it.
//!
//! Bytes of the guest's that the host's socket does not take wait in `backlog`, which credit bounds: the guest may have
//! [`BUFFER_LEN`] bytes unacknowledged and no more. Bytes of the host's wait in its socket, until the guest has given
//! credit and a buffer.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::num::Wrapping;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use event_manager::EventSet;

use super::packet::{HEADER_LEN, Header, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::virtio::View;

/// Bytes of the guest's that are buffered for one connection.
pub(super) const BUFFER_LEN: u32 = 128 << 10;
/// Data in one packet to the guest, however large its buffer is.
const MAX_DATA_LEN: usize = 64 << 10;

/// What has to be said to the guest, in this order; data comes before the shutdown.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    reset: bool,
    request: bool,
    response: bool,
    shutdown: bool,
    credit_request: bool,
    credit_update: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The host wants to connect; the guest has to answer.
    Requested,
    Established,
    /// The host's side is gone, and the guest has been told or will be.
    Closing,
}

/// A packet of the guest's that is against the rules. The connection will be reset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// See the module's documentation.
pub(super) struct Connection {
    pub(super) ports: Ports,
    guest_cid: u64,
    pub(super) stream: UnixStream,
    state: State,
    pending: Pending,
    /// What the host has closed already, as flags of a shutdown packet.
    host_closed: u32,
    /// What the guest has.
    guest_closed: u32,
    /// The socket may have bytes.
    readable: bool,
    /// The peer of the socket is gone.
    hung_up: bool,
    backlog: VecDeque<u8>,
    /// Bytes of the guest's that the host has taken, and how many of them the guest knows of.
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    /// The guest's buffer, what it has taken from it, and what was sent to it.
    guest_buffer: u32,
    guest_taken: Wrapping<u32>,
    sent: Wrapping<u32>,
    /// The guest has been sent a reset: there is nothing left of it.
    pub(super) over: bool,
    /// What the socket is watched for, if it is. Kept by whoever watches.
    pub(super) watched: Option<EventSet>,
    /// It is in the line for the guest's buffers. Kept by the hub.
    pub(super) queued: bool,
}

impl Connection {
    /// The host connects.
    pub(super) fn request(guest_cid: u64, ports: Ports, stream: UnixStream, watched: Option<EventSet>) -> Self {
        let pending = Pending { request: true, ..Pending::default() };
        Self::new(guest_cid, ports, stream, State::Requested, pending, watched)
    }

    /// The guest has connected by the packet `request`.
    pub(super) fn accept(request: &Header, stream: UnixStream) -> Self {
        let pending = Pending { response: true, ..Pending::default() };
        let mut new = Self::new(request.src_cid, request.ports(), stream, State::Established, pending, None);
        new.take_credit(request);
        new
    }

    fn new(
        guest_cid: u64,
        ports: Ports,
        stream: UnixStream,
        state: State,
        pending: Pending,
        watched: Option<EventSet>,
    ) -> Self {
        Self {
            ports,
            guest_cid,
            stream,
            state,
            pending,
            host_closed: 0,
            guest_closed: 0,
            readable: false,
            hung_up: false,
            backlog: VecDeque::new(),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            guest_buffer: 0,
            guest_taken: Wrapping(0),
            sent: Wrapping(0),
            over: false,
            watched,
            queued: false,
        }
    }

    /// Bytes that the guest has room for. A guest that claims to have taken more than it was sent has none.
    fn credit(&self) -> usize {
        self.guest_buffer.saturating_sub((self.sent - self.guest_taken).0) as usize
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_taken = Wrapping(header.fwd_cnt);
    }

    fn host_reads(&self) -> bool {
        self.host_closed & SHUTDOWN_RECEIVE == 0 && !self.hung_up
    }

    fn may_read(&self) -> bool {
        self.state == State::Established
            && self.host_closed & SHUTDOWN_SEND == 0
            && self.guest_closed & SHUTDOWN_RECEIVE == 0
    }

    /// Whether there is something for the guest.
    pub(super) fn has_packet(&self) -> bool {
        let Pending { reset, request, response, shutdown, credit_request, credit_update } = self.pending;
        let said = reset || request || response || shutdown || credit_request || credit_update;
        said || (self.readable && self.may_read() && self.credit() > 0)
    }

    /// What the socket should be watched for; `None` once there is nothing to learn from it.
    pub(super) fn interest(&self) -> Option<EventSet> {
        if self.hung_up {
            return None;
        }
        let mut events = EventSet::empty();
        events.set(EventSet::IN, self.may_read() && !self.readable && self.credit() > 0);
        events.set(EventSet::OUT, !self.backlog.is_empty());
        Some(events)
    }

    /// It is only kept until the guest has confirmed that it is closed.
    pub(super) fn is_closing(&self) -> bool {
        self.state == State::Closing
    }

    /// The socket is ready.
    pub(super) fn ready(&mut self, events: EventSet) {
        if events.contains(EventSet::OUT) {
            self.write_backlog();
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.lose_host();
        }
        self.readable |= events.contains(EventSet::IN);
    }

    /// The host takes nothing more. What it has sent before may still be there to read.
    fn lose_host(&mut self) {
        self.hung_up = true;
        self.readable = true;
        self.backlog.clear();
        if self.state == State::Requested {
            // Nobody waits for the answer any more.
            self.reset();
        } else if !self.may_read() {
            self.close();
        }
    }

    /// The host reads no more, which need not be its end: that is said by the socket itself. The guest is told, and what is on
    /// its way is thrown away.
    fn lose_reader(&mut self) {
        self.count_forwarded(self.backlog.len());
        self.backlog = VecDeque::new();
        self.host_closed |= SHUTDOWN_RECEIVE;
        self.pending.shutdown = true;
        self.after_backlog();
    }

    /// The guest will be told that the connection is over, at once.
    pub(super) fn reset(&mut self) {
        self.backlog.clear();
        self.pending = Pending { reset: true, ..Pending::default() };
    }

    /// The host's side is gone: nothing is taken and nothing comes any more.
    fn close(&mut self) {
        self.backlog.clear();
        self.state = State::Closing;
        self.host_closed = SHUTDOWN_BOTH;
        self.pending.shutdown = true;
    }

    /// A packet of the guest's for this connection, neither request nor reset.
    pub(super) fn receive(&mut self, header: &Header, data: View<'_>) -> Result<(), Violation> {
        if self.pending.reset {
            return Ok(());
        }
        self.take_credit(header);
        let result = match (header.op, self.state) {
            (op::RESPONSE, State::Requested) => self.establish(),
            (op::DATA, State::Established) => self.take_data(data),
            // On its way before the guest has heard of the end.
            (op::DATA, State::Closing) => Ok(()),
            (op::SHUTDOWN, State::Established | State::Closing) => {
                self.guest_closed |= header.flags & SHUTDOWN_BOTH;
                self.after_backlog();
                Ok(())
            }
            (op::CREDIT_UPDATE, _) => Ok(()),
            (op::CREDIT_REQUEST, _) => {
                self.pending.credit_update = true;
                Ok(())
            }
            _ => Err(Violation),
        };
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn establish(&mut self) -> Result<(), Violation> {
        self.state = State::Established;
        let greeting = format!("OK {}\n", self.ports.host);
        // A few bytes into an empty socket: it takes them, or it is broken.
        if !matches!(self.stream.write(greeting.as_bytes()), Ok(len) if len == greeting.len()) {
            self.reset();
        }
        Ok(())
    }

    fn take_data(&mut self, data: View<'_>) -> Result<(), Violation> {
        if data.len() > BUFFER_LEN as usize - self.backlog.len() || self.guest_closed & SHUTDOWN_SEND != 0 {
            return Err(Violation);
        }
        let mut rest = data;
        if self.host_reads() && self.backlog.is_empty() && !data.is_empty() {
            match data.write_once(self.stream.as_fd()) {
                Ok(len) => {
                    self.count_forwarded(len);
                    rest = data.split_at(len).map_or(rest, |(_, rest)| rest);
                }
                Err(error) if is_transient(&error) => {}
                Err(_) => self.lose_reader(),
            }
        }
        if !self.host_reads() {
            self.count_forwarded(rest.len());
        } else if !rest.is_empty() {
            let start = self.backlog.len();
            self.backlog.resize(start + rest.len(), 0);
            let (front, back) = self.backlog.as_mut_slices();
            let skipped = front.len().min(start);
            let done = rest.copy_to(&mut front[skipped..]);
            if let Some((_, rest)) = rest.split_at(done) {
                rest.copy_to(&mut back[start - skipped..]);
            }
        }
        Ok(())
    }

    fn write_backlog(&mut self) {
        while !self.backlog.is_empty() {
            let (front, back) = self.backlog.as_slices();
            match self.stream.write(if front.is_empty() { back } else { front }) {
                Ok(len) => {
                    self.backlog.drain(..len);
                    self.count_forwarded(len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.lose_reader(),
            }
        }
        // What a stalled connection had grown to is given back.
        self.backlog = VecDeque::new();
        self.after_backlog();
    }

    fn count_forwarded(&mut self, len: usize) {
        self.forwarded += Wrapping(len as u32);
        // The guest must hear of it before it believes the buffer to be full.
        self.pending.credit_update |= (self.forwarded - self.announced).0 >= BUFFER_LEN / 2;
    }

    /// Does what the guest's shutdown asks for, once the host has everything that was sent before it.
    fn after_backlog(&mut self) {
        if !self.backlog.is_empty() {
            return;
        }
        if self.guest_closed == SHUTDOWN_BOTH {
            self.reset();
        } else if self.guest_closed & SHUTDOWN_SEND != 0 {
            // Fails where the other side is gone already.
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
        }
    }

    /// Writes the next packet to the guest's buffer; returns its length, or `None` if there is none after all.
    pub(super) fn send(&mut self, buffer: View<'_>) -> Option<usize> {
        let (head, room) = buffer.split_at(HEADER_LEN)?;
        let mut len = 0;
        let op = if std::mem::take(&mut self.pending.reset) {
            op::RESET
        } else if std::mem::take(&mut self.pending.request) {
            op::REQUEST
        } else if std::mem::take(&mut self.pending.response) {
            op::RESPONSE
        } else if let Some(data) = self.read_data(room) {
            len = data;
            op::DATA
        } else if std::mem::take(&mut self.pending.reset) {
            op::RESET
        } else if std::mem::take(&mut self.pending.shutdown) {
            op::SHUTDOWN
        } else if std::mem::take(&mut self.pending.credit_request) {
            op::CREDIT_REQUEST
        } else if std::mem::take(&mut self.pending.credit_update) {
            op::CREDIT_UPDATE
        } else {
            return None;
        };
        let header = Header {
            len: len as u32,
            flags: if op == op::SHUTDOWN { self.host_closed } else { 0 },
            buf_alloc: BUFFER_LEN,
            fwd_cnt: self.forwarded.0,
            ..Header::to_guest(self.guest_cid, self.ports, op)
        };
        // Every packet says what has been taken.
        self.announced = self.forwarded;
        self.pending.credit_update = false;
        head.copy_from(&header.bytes());
        self.over = op == op::RESET;
        Some(HEADER_LEN + len)
    }

    /// Reads from the socket to the guest's buffer, as far as its credit goes.
    fn read_data(&mut self, room: View<'_>) -> Option<usize> {
        if !self.readable || !self.may_read() {
            return None;
        }
        let len = self.credit().min(room.len()).min(MAX_DATA_LEN);
        let (room, _) = room.split_at(len)?;
        if room.is_empty() {
            return None;
        }
        match room.read_once(self.stream.as_fd(), &mut []) {
            Ok(0) => {
                self.readable = false;
                self.host_closed |= SHUTDOWN_SEND;
                self.pending.shutdown = true;
                if self.hung_up {
                    self.close();
                }
                None
            }
            Ok(len) => {
                self.sent += Wrapping(len as u32);
                self.pending.credit_request |= self.credit() == 0;
                Some(len)
            }
            Err(error) if is_transient(&error) => {
                self.readable = false;
                None
            }
            Err(_) => {
                self.reset();
                None
            }
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
