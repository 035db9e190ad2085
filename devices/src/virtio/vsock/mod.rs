//! The socket device, Virtio 1.2, 5.10: stream connections between the guest and Unix sockets of the host, in the way
//! that Firecracker's clients know.
//!
//! A program on the host connects to `uds_path`, says `CONNECT <port>\n`, and is connected to whoever listens on that port
//! in the guest once it reads `OK <port>\n`. A program in the guest that connects to port P of the host (address 2)
//! reaches whoever listens on `{uds_path}_P`.
//!
//! Everything is bounded: clients, what is buffered for each, refusals that wait for the guest to take them. A guest that
//! breaks its credit or the order of packets has the connection reset.

mod connection;
mod handshake;
mod hub;
mod packet;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::hub::{Client, Hub};
use super::{Active, Drained, Handler, Session, VirtioDevice, Virtqueue, Worker, read_image};
use crate::metrics::DeviceMetrics;

const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
/// The token of the listening socket; those of clients follow.
const LISTENER: u32 = 0;

/// What a socket device is like.
#[derive(Debug, Clone)]
pub struct VsockConfig {
    /// The guest's address: 3 or more.
    pub guest_cid: u32,
    /// Where the host's programs connect to, and the start of the names of where they listen.
    pub uds_path: PathBuf,
}

/// A socket device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Addresses below 3, and the last, have other meanings.
    #[error("vsock guest_cid {0} is reserved; choose one from 3 to 4294967294")]
    Cid(u32),
    /// The socket cannot be made.
    #[error("cannot listen on {path} for a vsock device: {source}; {}", remedy(.path, .source))]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn remedy(path: &Path, source: &io::Error) -> &'static str {
    // `sun_path` has 108 bytes, and the last ends it.
    if path.as_os_str().len() > 107 {
        return "choose an uds_path of at most 107 bytes";
    }
    match source.kind() {
        io::ErrorKind::AddrInUse => "remove what is there, or choose another uds_path",
        _ => "choose an uds_path in a directory that exists and that you may write",
    }
}

/// A virtio socket device.
pub struct Vsock {
    config: [u8; 8],
    worker: Worker<VsockHandler>,
}

impl Vsock {
    /// A device that listens on its path from now on; clients wait there until the guest's driver is up.
    ///
    /// # Errors
    /// The address is reserved, or the path cannot be listened on.
    pub fn new(config: VsockConfig) -> Result<Self, VsockError> {
        let VsockConfig { guest_cid, uds_path } = config;
        if !(3..u32::MAX).contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        let listener = UnixListener::bind(&uds_path).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listener = listener.map_err(|source| VsockError::Listen { path: uds_path.clone(), source })?;
        let guest_cid = u64::from(guest_cid);
        let handler =
            VsockHandler { hub: Hub::new(guest_cid, uds_path, listener), listening: false, refusals_full: false };
        Ok(Self { config: guest_cid.to_le_bytes(), worker: Worker::new("vsock", handler, Arc::default()) })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        // Without any the device is one for streams.
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        // Receive, transmit, and events, of which there are none: this device keeps its address.
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&self.config, offset, data);
    }

    fn activate(&mut self, active: Active) -> io::Result<()> {
        self.worker.start(active)
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        self.worker.stop()
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        self.worker.metrics()
    }
}

struct VsockHandler {
    hub: Hub,
    /// The listening socket is watched.
    listening: bool,
    /// The transmit queue waits until the guest has taken refusals.
    refusals_full: bool,
}

impl VsockHandler {
    fn transmit(&mut self, session: &mut Session<'_, '_>) {
        let (hub, metrics) = (&mut self.hub, session.metrics);
        if let Some(queue) = session.queue(TX) {
            self.refusals_full = queue.drain(|chain| hub.receive(chain, metrics)) == Drained::Waiting;
        }
    }

    /// Hands the guest what there is for it, as far as it has buffers.
    fn send(&mut self, session: &mut Session<'_, '_>) {
        let (hub, metrics) = (&mut self.hub, session.metrics);
        if let Some(queue) = session.queue(RX)
            && hub.has_packet()
        {
            queue.drain(|chain| hub.send(chain, metrics));
        }
    }

    /// After any event: packets out, packets in that waited for that, watches.
    fn settle(&mut self, session: &mut Session<'_, '_>) {
        self.send(session);
        if self.refusals_full {
            self.transmit(session);
            self.send(session);
        }
        for client in std::mem::take(&mut self.hub.closed) {
            let (stream, watched) = match &client {
                Client::Handshake(handshake) => (&handshake.stream, handshake.watched),
                Client::Connected(connection) => (&connection.stream, connection.watched),
            };
            if watched.is_some() {
                session.unwatch(&stream.as_fd());
            }
        }
        for token in std::mem::take(&mut self.hub.touched) {
            self.watch_client(token, session);
        }
        self.watch_listener(session);
    }

    fn watch_client(&mut self, token: u32, session: &mut Session<'_, '_>) {
        let (fd, watched, wanted) = match self.hub.clients.get_mut(&token) {
            Some(Client::Handshake(handshake)) => {
                (handshake.stream.as_fd(), &mut handshake.watched, Some(EventSet::IN))
            }
            Some(Client::Connected(connection)) => {
                let wanted = connection.interest();
                (connection.stream.as_fd(), &mut connection.watched, wanted)
            }
            None => return,
        };
        let result = match (*watched, wanted) {
            (before, after) if before == after => return,
            (_, None) => {
                session.unwatch(&fd);
                Ok(())
            }
            (None, Some(events)) => session.watch(&fd, token, events),
            (Some(_), Some(events)) => session.rewatch(&fd, token, events),
        };
        match result {
            Ok(()) => *watched = wanted,
            Err(error) => session.metrics.host_fault(|| format!("cannot watch a vsock client: {error}")),
        }
    }

    /// Clients wait in the listener's backlog while there is no room for them.
    fn watch_listener(&mut self, session: &mut Session<'_, '_>) {
        let wanted = self.hub.has_room();
        if wanted == self.listening {
            return;
        }
        let fd = self.hub.door.as_fd();
        if wanted {
            if let Err(error) = session.watch(&fd, LISTENER, EventSet::IN) {
                return session.metrics.host_fault(|| format!("cannot watch a vsock listener: {error}"));
            }
        } else {
            session.unwatch(&fd);
        }
        self.listening = wanted;
    }

    fn accept(&mut self, session: &mut Session<'_, '_>) {
        while self.hub.has_room() {
            match self.hub.accept() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return session.metrics.host_fault(|| format!("cannot accept a vsock client: {error}")),
            }
        }
    }
}

impl Handler for VsockHandler {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        self.hub.clear();
        (self.listening, self.refusals_full) = (false, false);
        self.watch_listener(session);
    }

    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>) {
        if queue == TX {
            self.transmit(session);
        }
        self.settle(session);
    }

    fn ready(&mut self, token: u32, events: EventSet, session: &mut Session<'_, '_>) {
        match token {
            LISTENER => self.accept(session),
            client => self.hub.ready(client, events),
        }
        self.settle(session);
    }

    fn stopping(&mut self, _session: &mut Session<'_, '_>) {
        // Descriptors leave the epoll with the worker, which ends next; clients see the end of their connections.
        self.hub.clear();
    }
}
