//! Frames of the guest → requests, and answers → frames.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::Ipv4Addr;
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr};

use super::Service;
use super::http::{self, Parsed, Response};

/// Of the server, locally administered: nobody but the guest of this interface ever sees it.
const MAC: EthernetAddress = EthernetAddress([0x02, b'b', b'e', b'd', b'p', b'l']);
const PORT: u16 = 80;
/// At once; clients of metadata use one.
const CONNECTIONS: usize = 8;
/// A request with its headers, at most.
const REQUEST_LEN: usize = 4096;
/// Of an answer, what may be on its way unacknowledged.
const SEND_LEN: usize = 16 << 10;
/// Frames that wait for the guest; what does not fit is sent again by TCP.
const FRAMES: usize = 16;
/// Ethernet header and 1500 bytes.
const FRAME_LEN: usize = 1514;
/// For a request to come, and for its answer to be taken.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of a frame that [`Destination::is_of`] needs: up to the end of an ARP packet.
pub const HEAD_LEN: usize = 42;

/// By what a frame for a server is known.
#[derive(Debug, Clone, Copy)]
pub struct Destination(Ipv4Addr);

impl Destination {
    /// Whether a frame that begins with `head` is for this server: then nobody else gets it.
    pub fn is_of(&self, head: &[u8]) -> bool {
        // Destination addresses: of ARP, the one that is asked for.
        let at = match head.get(12..14) {
            Some([0x08, 0x06]) => 38,
            Some([0x08, 0x00]) => 30,
            _ => return false,
        };
        head.get(at..at + 4) == Some(&self.0.octets()[..])
    }
}

/// The server behind one interface.
pub struct Responder {
    address: Ipv4Addr,
    stack: Stack,
    service: Box<dyn Service>,
}

/// All that depends on what one driver has sent.
struct Stack {
    /// Where its clock begins.
    started: std::time::Instant,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    port: Port,
}

/// One place for a client.
struct Connection {
    handle: SocketHandle,
    /// When it last began to wait for its client; absent while it listens.
    since: Option<Instant>,
    answer: Vec<u8>,
    sent: usize,
    /// Closed after the answer.
    last: bool,
}

impl Responder {
    /// Serves what `service` answers at `address`, port 80.
    pub fn new(address: Ipv4Addr, service: Box<dyn Service>) -> Self {
        Self { address, stack: Stack::new(address), service }
    }

    /// Which frames it is to be given.
    pub const fn destination(&self) -> Destination {
        Destination(self.address)
    }

    /// Whether a frame that begins with `head` is for this server.
    pub fn wants(&self, head: &[u8]) -> bool {
        self.destination().is_of(head)
    }

    /// Takes a frame and does all that can be done.
    pub fn take(&mut self, frame: &[u8]) {
        self.stack.make_room_for(frame);
        self.stack.port.incoming = Some(frame.to_vec());
        self.work();
        // Dropped where there was no room for an answer: TCP sends it again.
        self.stack.port.incoming = None;
    }

    /// Goes on after some time, see [`Responder::delay`].
    pub fn work(&mut self) {
        self.stack.work(self.service.as_mut());
    }

    /// The next frame for the guest, which stays until it is dropped.
    pub fn frame(&self) -> Option<&[u8]> {
        self.stack.port.outgoing.front().map(Vec::as_slice)
    }

    /// Drops the next frame for the guest.
    pub fn drop_frame(&mut self) {
        self.stack.port.outgoing.pop_front();
    }

    /// When [`Responder::work`] is to be called if no frame comes before; never, if there is no connection.
    pub fn delay(&mut self) -> Option<Duration> {
        self.stack.delay()
    }

    /// Forgets everything that a guest has begun.
    pub fn reset(&mut self) {
        self.stack = Stack::new(self.address);
    }
}

impl Stack {
    fn new(address: Ipv4Addr) -> Self {
        let mut port = Port::default();
        let mut config = Config::new(MAC.into());
        // Sequence numbers begin anywhere.
        config.random_seed = RandomState::new().hash_one(address);
        let mut interface = Interface::new(config, &mut port, Instant::ZERO);
        // Whatever address the guest uses, it is on this wire.
        interface.update_ip_addrs(|list| {
            // The list is empty and has room for two.
            let _ = list.push(IpCidr::Ipv4(Ipv4Cidr::new(address, 0)));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let connections = (0..CONNECTIONS).map(|_| Connection::new(&mut sockets)).collect();
        Self { started: std::time::Instant::now(), interface, sockets, connections, port }
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.started.elapsed().as_micros() as i64)
    }

    fn work(&mut self, service: &mut dyn Service) {
        let now = self.now();
        self.interface.poll(now, &mut self.port, &mut self.sockets);
        for connection in &mut self.connections {
            connection.serve(self.sockets.get_mut(connection.handle), service, now);
        }
        self.interface.poll(now, &mut self.port, &mut self.sockets);
        // The last acknowledgement is on its way and needs no memory of the connection: if it is lost, a reset follows.
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut::<Socket<'_>>(connection.handle);
            if socket.state() == State::TimeWait {
                connection.listen(socket);
            }
        }
    }

    /// If `frame` is a new client's and all places are taken, resets the connection that has waited longest.
    fn make_room_for(&mut self, frame: &[u8]) {
        if !is_first_of_connection(frame) || self.connections.iter().any(|connection| connection.since.is_none()) {
            return;
        }
        if let Some(oldest) = self.connections.iter_mut().min_by_key(|connection| connection.since) {
            oldest.listen(self.sockets.get_mut(oldest.handle));
        }
    }

    fn delay(&mut self) -> Option<Duration> {
        let now = self.now();
        let tcp = self.interface.poll_delay(now, &self.sockets).map(Duration::from);
        // Clocks do not go back, so that no connection began after now.
        let patience = |since: Instant| PATIENCE.saturating_sub((now - since).into());
        let oldest = self.connections.iter().filter_map(|connection| connection.since).min().map(patience);
        // Not at once, and again and again, where the guest has no room for what waits.
        let floor = Duration::from_millis(10);
        [tcp, oldest].into_iter().flatten().min().map(|delay: Duration| delay.max(floor))
    }
}

/// Whether a frame is for TCP and asks for a new connection.
fn is_first_of_connection(frame: &[u8]) -> bool {
    const PROTOCOL: usize = 23;
    const TCP: u8 = 6;
    const SYN: u8 = 1 << 1;
    const ACK: u8 = 1 << 4;
    let words = usize::from(frame.get(14).copied().unwrap_or_default() & 0xf);
    let flags = frame.get(14 + 4 * words + 13).copied().unwrap_or_default();
    frame.get(PROTOCOL) == Some(&TCP) && flags & (SYN | ACK) == SYN
}

impl Connection {
    fn new(sockets: &mut SocketSet<'static>) -> Self {
        let buffer = |len| SocketBuffer::new(vec![0; len]);
        let mut socket = Socket::new(buffer(REQUEST_LEN), buffer(SEND_LEN));
        socket.set_timeout(Some(PATIENCE.into()));
        // An answer is written at once: there is nothing to wait for.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let handle = sockets.add(socket);
        let mut connection = Self { handle, since: None, answer: Vec::new(), sent: 0, last: false };
        connection.listen(sockets.get_mut(handle));
        connection
    }

    /// Waits for a client, whatever was before.
    fn listen(&mut self, socket: &mut Socket<'_>) {
        socket.abort();
        (self.since, self.answer, self.sent, self.last) = (None, Vec::new(), 0, false);
        // Refused for a socket in use, which this is not any more, and for port 0.
        let _ = socket.listen(PORT);
    }

    fn serve(&mut self, socket: &mut Socket<'_>, service: &mut dyn Service, now: Instant) {
        match socket.state() {
            State::Listen => return,
            State::Closed => return self.listen(socket),
            _ => {}
        }
        if now - *self.since.get_or_insert(now) >= PATIENCE.into() {
            return self.listen(socket);
        }
        loop {
            self.send(socket, now);
            if self.sent < self.answer.len() || self.last || !self.read(socket, service) {
                break;
            }
        }
        let all_sent = self.sent == self.answer.len();
        if all_sent && (self.last || !socket.may_recv() && socket.state() != State::SynReceived) {
            socket.close();
        }
    }

    fn send(&mut self, socket: &mut Socket<'_>, now: Instant) {
        // Refused where the connection is closing: then nobody waits for the answer.
        let sent = socket.send_slice(&self.answer[self.sent..]).unwrap_or(0);
        if sent > 0 {
            self.sent += sent;
            self.since = Some(now);
        }
    }

    /// Answers the request in the buffer; false where there is none.
    fn read(&mut self, socket: &mut Socket<'_>, service: &mut dyn Service) -> bool {
        let mut bytes = [0; REQUEST_LEN];
        let len = socket.peek_slice(&mut bytes).unwrap_or(0);
        let (response, keep, used) = match http::parse(&bytes[..len]) {
            Parsed::Whole(request) => (service.answer(&request), request.keep, request.len),
            Parsed::Part if len < REQUEST_LEN => return false,
            Parsed::Part => (Response::text(400, "The request is too long."), false, len),
            Parsed::Wrong(what) => (Response::text(400, what), false, len),
        };
        let _ = socket.recv_slice(&mut bytes[..used]);
        (self.answer, self.sent, self.last) = (response.to_bytes(keep), 0, !keep);
        true
    }
}

/// The wire as smoltcp sees it.
#[derive(Default)]
struct Port {
    incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

impl Device for Port {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        if self.outgoing.len() >= FRAMES {
            return None;
        }
        let frame = self.incoming.take()?;
        Some((Incoming(frame), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        (self.outgoing.len() < FRAMES).then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_LEN;
        // A guest leaves checksums to its device, which this is: there is no wire on which a bit could flip.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}
