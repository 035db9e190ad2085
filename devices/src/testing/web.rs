//! The guest's side of its metadata server: a client that is honest, and frames that are not.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Loopback, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Cidr};

use crate::metadata::{Request, Responder, Response, Service};

/// Where the server of these tests is.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// Rounds of polling in which an exchange of some hundred frames is long over.
const ROUNDS: i64 = 2000;

/// Says what it was asked; for `/big`, a hundred thousand bytes.
pub struct Echo;

impl Service for Echo {
    fn answer(&mut self, request: &Request<'_>) -> Response {
        let token = request.header(&["x-metadata-token"]).unwrap_or("none");
        match request.path {
            "/big" => Response::text(200, "b".repeat(100_000)),
            path => Response::text(200, format!("{} {path} {token}", request.method)),
        }
    }
}

/// A guest's network stack with one client.
pub struct WebClient {
    device: Loopback,
    interface: Interface,
    sockets: SocketSet<'static>,
    port: u16,
    /// Frames to the guest that were seen.
    pub seen: usize,
}

impl WebClient {
    /// A client that uses the local ports from `port` on.
    pub fn new(port: u16) -> Self {
        let mut device = Loopback::new(Medium::Ethernet);
        let config = Config::new(EthernetAddress([2, 0, 0, 0, 0, 7]).into());
        let mut interface = Interface::new(config, &mut device, Instant::ZERO);
        interface.update_ip_addrs(|list| list.push(IpCidr::Ipv4(Ipv4Cidr::new(GUEST, 0))).unwrap());
        Self { device, interface, sockets: SocketSet::new(Vec::new()), port, seen: 0 }
    }

    /// Sends `request` on a connection of its own and reads until the server closes it, or says no more.
    pub fn ask(&mut self, server: &mut Responder, request: &[u8]) -> String {
        let buffer = || SocketBuffer::new(vec![0; 4096]);
        let handle = self.sockets.add(Socket::new(buffer(), buffer()));
        self.port += 1;
        let remote = (IpAddress::Ipv4(SERVER), 80);
        let context = self.interface.context();
        self.sockets.get_mut::<Socket<'_>>(handle).connect(context, remote, self.port).unwrap();
        let (mut answer, mut left) = (Vec::new(), request);
        for round in 1..ROUNDS {
            self.exchange(server, Instant::from_millis(round));
            let socket = self.sockets.get_mut::<Socket<'_>>(handle);
            left = &left[socket.send_slice(left).unwrap_or(0)..];
            let _ = socket.recv(|data| (data.len(), answer.extend_from_slice(data)));
            if !socket.may_recv() && round > 10 {
                socket.close();
            }
            if !socket.is_open() {
                break;
            }
        }
        self.sockets.get_mut::<Socket<'_>>(handle).abort();
        self.exchange(server, Instant::from_millis(ROUNDS));
        self.sockets.remove(handle);
        String::from_utf8(answer).unwrap()
    }

    /// Lets both sides work, and carries their frames.
    fn exchange(&mut self, server: &mut Responder, now: Instant) {
        let mut from_server = VecDeque::new();
        while let Some(frame) = server.frame() {
            from_server.push_back(frame.to_vec());
            server.drop_frame();
        }
        self.seen += from_server.len();
        let mut wire = Wire { device: &mut self.device, incoming: from_server, outgoing: Vec::new() };
        self.interface.poll(now, &mut wire, &mut self.sockets);
        for frame in wire.outgoing {
            assert!(server.wants(&frame), "the guest talks to nobody else");
            server.take(&frame);
        }
        server.work();
    }
}

/// What the guest's stack sends and receives.
struct Wire<'a> {
    device: &'a mut Loopback,
    incoming: VecDeque<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
}

/// A frame, for smoltcp.
pub struct Incoming(Vec<u8>);

impl smoltcp::phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

/// A place for a frame, for smoltcp.
pub struct Outgoing<'a>(&'a mut Vec<Vec<u8>>);

impl smoltcp::phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push(frame);
        result
    }
}

impl Device for Wire<'_> {
    type RxToken<'b>
        = Incoming
    where
        Self: 'b;
    type TxToken<'b>
        = Outgoing<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        Some((Incoming(self.incoming.pop_front()?), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.device.capabilities()
    }
}

/// Gives `server` frames that `bytes` describe: many of them nearly right.
pub fn disturb(server: &mut Responder, bytes: &[u8]) {
    let mut bytes = bytes.iter().copied();
    while let Some(kind) = bytes.next() {
        let mut next = || bytes.next().unwrap_or_default();
        let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, next() % 16, 8, 0];
        if kind & 1 == 0 {
            // IPv4, TCP to port 80 from one of some ports, with flags, numbers and data as they come.
            let len = usize::from(next()) % 64;
            frame.extend([0x45, 0, 0, (40 + len) as u8, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, next() % 4]);
            frame.extend(SERVER.octets());
            frame.extend([4, next() % 16, 0, 80, 0, 0, 0, next(), next(), next(), next(), next()]);
            frame.extend([0x50, next(), next(), next(), 0, 0, 0, 0]);
            frame.extend((0..len).map(|_| next()));
        } else {
            frame[13] = 6;
            frame.extend([0, 1, 8, 0, 6, 4, 0, next() % 4, 2, 0, 0, 0, 0, next(), 10, 0, 0, next()]);
            frame.extend([0; 6]);
            frame.extend(SERVER.octets());
        }
        // Some bytes become others, and the end may be missing.
        for _ in 0..kind >> 1 & 3 {
            let at = usize::from(next()) % frame.len();
            frame[at] = next();
        }
        if kind >> 3 & 3 == 0 {
            frame.truncate(14 + usize::from(next()) % frame.len());
        }
        if server.wants(&frame) {
            server.take(&frame);
        }
        if kind >> 5 == 0 {
            server.work();
        }
        if kind >> 6 == 0 {
            server.drop_frame();
        }
    }
}
