//! All connections of one device, and the way to new ones: by a listening socket for the host, by connecting to
//! `{path}_{port}` for the guest. Nothing here knows of queues or of epoll; it is told of events and asked for packets.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use event_manager::EventSet;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::connection::Connection;
use super::handshake::{Handshake, Progress};
use super::packet::{HEADER_LEN, HOST_CID, Header, Ports, TYPE_STREAM, op};
use crate::door::Door;
use crate::metrics::DeviceMetrics;
use crate::virtio::{Answer, Chain, MAX_TOKEN, View};

/// Clients and connections at once: few enough for the usual limit of open files.
pub(super) const MAX_CLIENTS: usize = 256;
/// Refusals that wait for the guest's buffers; when there are so many, its packets wait too.
const MAX_REFUSALS: usize = 64;
/// Ports that the host connects from, so that they are none that a person would choose.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// A socket of the host's.
pub(super) enum Client {
    /// It has not yet said where it wants to.
    Handshake(Handshake),
    Connected(Connection),
}

/// See the module's documentation.
pub(super) struct Hub {
    guest_cid: u64,
    path: PathBuf,
    pub(super) door: Door,
    /// By token, in the order of their coming as long as tokens have not been used up.
    pub(super) clients: HashMap<u32, Client>,
    by_ports: HashMap<Ports, u32>,
    /// Connections that have a packet for the guest, each once.
    line: VecDeque<u32>,
    refusals: VecDeque<Header>,
    /// Clients whose interest may have changed, and those that are to be unwatched and closed.
    pub(super) touched: Vec<u32>,
    pub(super) closed: Vec<Client>,
    next_token: u32,
    next_port: u32,
}

impl Hub {
    pub(super) fn new(guest_cid: u64, path: PathBuf, listener: UnixListener) -> Self {
        Self {
            guest_cid,
            path,
            door: Door::new(listener),
            clients: HashMap::new(),
            by_ports: HashMap::new(),
            line: VecDeque::new(),
            refusals: VecDeque::new(),
            touched: Vec::new(),
            closed: Vec::new(),
            next_token: 0,
            next_port: FIRST_HOST_PORT,
        }
    }

    /// Closes everything but the listener.
    pub(super) fn clear(&mut self) {
        self.clients.clear();
        self.by_ports.clear();
        self.line.clear();
        self.refusals.clear();
        self.touched.clear();
        self.closed.clear();
    }

    /// Whether there is room for one more client. The longest-dead connection makes room, if there is one.
    pub(super) fn has_room(&mut self) -> bool {
        if self.clients.len() >= MAX_CLIENTS {
            let closing = |(token, client): (&u32, &Client)| match client {
                Client::Connected(connection) if connection.is_closing() => Some(*token),
                _ => None,
            };
            if let Some(token) = self.clients.iter().filter_map(closing).min() {
                self.give_up(token);
            }
        }
        self.clients.len() < MAX_CLIENTS
    }

    fn add(&mut self, client: Client) -> u32 {
        // Token 0 is the listener's.
        loop {
            self.next_token = if self.next_token == MAX_TOKEN { 1 } else { self.next_token + 1 };
            if !self.clients.contains_key(&self.next_token) {
                break;
            }
        }
        if let Client::Connected(connection) = &client {
            self.by_ports.insert(connection.ports, self.next_token);
        }
        self.clients.insert(self.next_token, client);
        self.touched.push(self.next_token);
        self.next_token
    }

    fn close(&mut self, token: u32) {
        if let Some(client) = self.clients.remove(&token) {
            if let Client::Connected(connection) = &client {
                self.by_ports.remove(&connection.ports);
                if connection.queued {
                    self.line.retain(|other| *other != token);
                }
            }
            self.closed.push(client);
        }
    }

    /// Closes a connection whose end the guest has not confirmed.
    fn give_up(&mut self, token: u32) {
        if let Some(Client::Connected(connection)) = self.clients.get(&token)
            && self.refusals.len() < MAX_REFUSALS
        {
            self.refusals.push_back(Header::to_guest(self.guest_cid, connection.ports, op::RESET));
        }
        self.close(token);
    }

    /// Takes one waiting client. Returns false if there is none.
    pub(super) fn accept(&mut self) -> io::Result<bool> {
        match self.door.accept() {
            Ok(stream) => {
                stream.set_nonblocking(true)?;
                self.add(Client::Handshake(Handshake::new(stream)));
                Ok(true)
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock => Ok(false),
                // The client has gone again.
                ErrorKind::ConnectionAborted | ErrorKind::Interrupted => Ok(true),
                _ => Err(error),
            },
        }
    }

    /// A client's socket is ready.
    pub(super) fn ready(&mut self, token: u32, events: EventSet) {
        match self.clients.get_mut(&token) {
            Some(Client::Connected(connection)) => {
                connection.ready(events);
                self.settle(token);
            }
            Some(Client::Handshake(handshake)) => match handshake.read() {
                Progress::Wait => {}
                Progress::Failed => self.close(token),
                Progress::Port(port) => self.connect_to_guest(token, port),
            },
            None => {}
        }
    }

    /// The client `token` wants to the guest's port `port`.
    fn connect_to_guest(&mut self, token: u32, port: u32) {
        let ports = loop {
            let ports = Ports { host: self.next_port, guest: port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&ports) {
                break ports;
            }
        };
        if let Some(Client::Handshake(handshake)) = self.clients.remove(&token) {
            let (stream, watched) = handshake.finish();
            let connection = Connection::request(self.guest_cid, ports, stream, watched);
            self.by_ports.insert(ports, token);
            self.clients.insert(token, Client::Connected(connection));
            self.settle(token);
        }
    }

    /// After anything has happened to a connection: into the line if it has a packet, and its watch is looked at.
    fn settle(&mut self, token: u32) {
        self.touched.push(token);
        if let Some(Client::Connected(connection)) = self.clients.get_mut(&token)
            && !connection.queued
            && connection.has_packet()
        {
            connection.queued = true;
            self.line.push_back(token);
        }
    }

    /// Whether there is something for the guest.
    pub(super) fn has_packet(&self) -> bool {
        !self.refusals.is_empty() || !self.line.is_empty()
    }

    /// Fills one buffer of the guest's.
    pub(super) fn send(&mut self, chain: &Chain, metrics: &DeviceMetrics) -> Answer {
        let buffer = chain.writable.view();
        if chain.fault.is_some() {
            return Answer::Used(0);
        }
        // There has to be room for data, or a connection that has some could not go on.
        if buffer.len() <= HEADER_LEN {
            metrics.guest_faults.increment();
            return Answer::Used(0);
        }
        if let Some(refusal) = self.refusals.pop_front() {
            return Answer::Used(buffer.copy_from(&refusal.bytes()) as u32);
        }
        while let Some(token) = self.line.pop_front() {
            let Some(Client::Connected(connection)) = self.clients.get_mut(&token) else { continue };
            connection.queued = false;
            let sent = connection.send(buffer);
            if connection.over {
                self.close(token);
            } else {
                self.settle(token);
            }
            if let Some(len) = sent {
                return Answer::Used(len as u32);
            }
        }
        Answer::Wait
    }

    /// Takes one packet of the guest's.
    pub(super) fn receive(&mut self, chain: &Chain, metrics: &DeviceMetrics) -> Answer {
        if self.refusals.len() >= MAX_REFUSALS {
            return Answer::Wait;
        }
        if chain.fault.is_none() && self.take_packet(chain.readable.view()).is_none() {
            metrics.guest_faults.increment();
        }
        Answer::Used(0)
    }

    /// `None` if the packet is against the rules.
    fn take_packet(&mut self, packet: View<'_>) -> Option<()> {
        let (header, data) = Header::parse(packet)?;
        let (data, _) = data.split_at(header.len as usize)?;
        if header.src_cid != self.guest_cid {
            return None;
        }
        if header.socket_type != TYPE_STREAM || header.dst_cid != HOST_CID {
            self.refuse(&header);
            return None;
        }
        let token = self.by_ports.get(&header.ports()).copied();
        match (header.op, token) {
            (op::RESET, Some(token)) => self.close(token),
            (op::RESET, None) => {}
            (op::REQUEST, None) => self.connect_to_host(&header),
            (op::REQUEST, Some(token)) => {
                // It cannot be both the old connection and a new one.
                self.close(token);
                self.refuse(&header);
                return None;
            }
            (_, Some(token)) => {
                let Some(Client::Connected(connection)) = self.clients.get_mut(&token) else { return None };
                let result = connection.receive(&header, data);
                self.settle(token);
                return result.ok();
            }
            // Of a connection that the host has given up before: nothing wrong with it.
            (_, None) => self.refuse(&header),
        }
        Some(())
    }

    fn refuse(&mut self, header: &Header) {
        if header.op != op::RESET {
            self.refusals.push_back(header.refusal());
        }
    }

    fn connect_to_host(&mut self, request: &Header) {
        let stream = if self.has_room() { self.host_socket(request.dst_port) } else { None };
        match stream {
            Some(stream) => {
                let token = self.add(Client::Connected(Connection::accept(request, stream)));
                self.settle(token);
            }
            None => self.refuse(request),
        }
    }

    /// A connection to whoever listens for `port`. Never waits: a listener whose backlog is full is as good as none.
    fn host_socket(&self, port: u32) -> Option<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path).ok()?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
        rustix::net::connect(&socket, &address).ok()?;
        Some(UnixStream::from(socket))
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // Whoever connects from now on learns at once that nobody is there.
        let _ = std::fs::remove_file(&self.path);
    }
}
