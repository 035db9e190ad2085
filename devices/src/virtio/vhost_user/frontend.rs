//! Our end of a connection, after both ends have said what they can do: what is asked of a backend, in whole steps.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq as Request;
use vhost::vhost_user::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{self, CONFIG_HEAD, Connection, MAX_FDS, Talk, TalkError};
use crate::Memory;
use crate::virtio::{COMMON_FEATURES, Virtqueue};

/// How long a backend may take for one step: to say what it can do, to begin, to stop. Each is a handful of messages that
/// are answered at once; a vCPU or the API waits for them.
const PATIENCE: Duration = Duration::from_secs(5);
/// What of the protocol we use, where the backend has it.
const WANTED: Protocol = Protocol::MQ.union(Protocol::REPLY_ACK).union(Protocol::CONFIG);
/// The feature bit by which a backend says that it speaks of features of the protocol at all.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Where the backend finds guest memory "at the frontend's addresses". Where it really is in this process is nobody's
/// business; this only has to be free of guest addresses, which end below.
const USER: u64 = 1 << 52;

/// A backend cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody listens there, or nobody accepts.
    #[error(
        "cannot connect to the vhost-user backend at {path}: {source}; start it before the VM, with this socket, and give \
         the VMM the right to connect"
    )]
    Connect {
        /// The socket.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// It does not do what it should.
    #[error("the vhost-user backend at {path} {fault}; look at what it says, and start it and the VM anew")]
    Backend {
        /// The socket.
        path: String,
        /// What it does, with the message.
        fault: String,
    },
    /// It is of an old kind, or for another device.
    #[error("the vhost-user backend at {path} has no {what}: {remedy}")]
    Lacks {
        /// The socket.
        path: String,
        /// What is missing.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// Its device cannot be shown to a guest.
    #[error("the vhost-user backend at {path} describes a device that cannot be: {what}; correct its configuration")]
    Config {
        /// The socket.
        path: String,
        /// Which register has which value.
        what: String,
    },
    /// Guest memory is not of a kind that can be shared.
    #[error("guest memory cannot be shared with a vhost-user backend: {0}")]
    Memory(&'static str),
    /// Descriptors or threads have run out.
    #[error("cannot make what a vhost-user device needs: {0}; raise the limits on open files and threads")]
    Host(#[source] io::Error),
}

/// A backend that has said what it can do.
pub struct Frontend {
    path: String,
    features: u64,
    protocol: Protocol,
    queues: Option<usize>,
    /// For one step.
    patience: Duration,
    /// To wait for the backend's end.
    socket: UnixStream,
    /// Locked for one step at a time, last of all locks.
    connection: Mutex<Connection>,
}

impl Frontend {
    /// Connects to the backend that listens at `path`.
    ///
    /// # Errors
    /// Nobody is there, or it is not as it should be.
    pub fn connect(path: &Path) -> Result<Self, VhostUserError> {
        let text = path.display().to_string();
        let stream = connection::connect(path, Instant::now() + PATIENCE)
            .map_err(|source| VhostUserError::Connect { path: text.clone(), source })?;
        Self::over(stream, text, PATIENCE)
    }

    /// Asks the backend at the other end of `stream` what it can do; `path` is what it is called in messages.
    ///
    /// # Errors
    /// It is not as it should be, or descriptors have run out.
    pub(super) fn over(stream: UnixStream, path: String, patience: Duration) -> Result<Self, VhostUserError> {
        let socket = stream.try_clone().map_err(VhostUserError::Host)?;
        let mut connection = Connection::new(stream);
        let asked = connection.talk(Instant::now() + patience, false, |talk| {
            let features = talk.number(Request::GET_FEATURES)?;
            if features & PROTOCOL_FEATURES == 0 {
                return Ok((features, Protocol::empty(), None));
            }
            let offered = talk.number(Request::GET_PROTOCOL_FEATURES)?;
            let protocol = Protocol::from_bits_truncate(offered) & WANTED;
            talk.tell(Request::SET_PROTOCOL_FEATURES, &protocol.bits().to_ne_bytes(), &[])?;
            talk.acks = protocol.contains(Protocol::REPLY_ACK);
            talk.tell(Request::SET_OWNER, &[], &[])?;
            let queues = protocol.contains(Protocol::MQ).then(|| talk.number(Request::GET_QUEUE_NUM)).transpose()?;
            Ok((features, protocol, queues))
        });
        let fault = |error: TalkError| VhostUserError::Backend { path: path.clone(), fault: error.to_string() };
        let (features, protocol, queues) = asked.map_err(fault)?;
        for (feature, what) in
            [(PROTOCOL_FEATURES, "protocol features"), (1 << VIRTIO_F_VERSION_1, "modern virtio (VIRTIO_F_VERSION_1)")]
        {
            if features & feature == 0 {
                return Err(VhostUserError::Lacks { path, what, remedy: "use a newer one" });
            }
        }
        // Whatever it says, more than all devices of ours together have mean nothing.
        let queues = queues.map(|queues| usize::try_from(queues).unwrap_or(usize::MAX));
        Ok(Self { path, features, protocol, queues, patience, socket, connection: Mutex::new(connection) })
    }

    /// What it is called in messages.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Feature bits of the backend's device.
    pub(crate) const fn features(&self) -> u64 {
        self.features
    }

    /// What of [`COMMON_FEATURES`] it has.
    pub(crate) const fn ring_features(&self) -> u64 {
        self.features & COMMON_FEATURES
    }

    /// How many virtqueues it has, if it says so.
    pub(crate) const fn queues(&self) -> Option<usize> {
        self.queues
    }

    /// Is readable, in `poll`'s sense of the other end being gone, when the backend is.
    pub(super) const fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Reads its device's configuration space from the beginning.
    ///
    /// # Errors
    /// It has none, or does not answer as it should.
    pub(crate) fn config<const LEN: usize>(&self) -> Result<[u8; LEN], VhostUserError> {
        if !self.protocol.contains(Protocol::CONFIG) {
            return Err(self.lacks("configuration to be read", "use one for this kind of device"));
        }
        // Offset, length, flags, and as much room as is asked for.
        let head = [0, LEN as u32, 0].map(u32::to_ne_bytes);
        let mut message = head.concat();
        message.resize(CONFIG_HEAD + LEN, 0);
        let mut answer = message.clone();
        self.talk(|talk| {
            talk.ask(Request::GET_CONFIG, &message, &mut answer)?;
            if answer[..8] == message[..8] { Ok(()) } else { Err(TalkError::Nonsense(Request::GET_CONFIG)) }
        })?;
        let mut config = [0; LEN];
        config.copy_from_slice(&answer[CONFIG_HEAD..]);
        Ok(config)
    }

    /// Has the backend work on `rings`, by their numbers, for a driver that has accepted `features`. Those of which
    /// `is_on` is false wait for [`Self::enable`].
    ///
    /// # Errors
    /// The backend does not do as it is told. Some rings may work.
    pub(super) fn start(
        &self,
        features: u64,
        table: &MemoryTable,
        rings: &[Ring<'_>],
        is_on: &dyn Fn(u16) -> bool,
    ) -> Result<(), VhostUserError> {
        self.talk(|talk| {
            let features = features & self.features | PROTOCOL_FEATURES;
            talk.tell(Request::SET_FEATURES, &features.to_ne_bytes(), &[])?;
            let fds: Vec<_> =
                table.regions.iter().filter_map(|region| Some(region.file_offset()?.file().as_fd())).collect();
            talk.tell(Request::SET_MEM_TABLE, &table.message, &fds)?;
            for ring in rings {
                let state = ring.queue.state();
                let number = ring.queue.index();
                talk.tell(Request::SET_VRING_NUM, &pair(number, state.size), &[])?;
                talk.tell(Request::SET_VRING_BASE, &pair(number, state.next_avail), &[])?;
                let parts = [state.desc_table, state.used_ring, state.avail_ring].map(|address| address + USER);
                let log = [0; 8];
                let parts = parts.map(u64::to_ne_bytes).concat();
                talk.tell(Request::SET_VRING_ADDR, &[&pair(number, 0)[..], &parts, &log].concat(), &[])?;
                give(talk, Request::SET_VRING_ERR, number, ring.error)?;
                give(talk, Request::SET_VRING_CALL, number, ring.call)?;
                give(talk, Request::SET_VRING_KICK, number, ring.queue.notify())?;
            }
            // Off, too: one that was on for the driver before is on still.
            let mut numbers = rings.iter().map(|ring| ring.queue.index());
            numbers
                .try_for_each(|number| talk.tell(Request::SET_VRING_ENABLE, &pair(number, is_on(number).into()), &[]))
        })
    }

    /// From now on the backend works on a ring that was set up, or leaves it alone.
    ///
    /// # Errors
    /// The backend does not do as it is told.
    pub(crate) fn enable(&self, ring: u16, on: bool) -> Result<(), VhostUserError> {
        self.talk(|talk| talk.tell(Request::SET_VRING_ENABLE, &pair(ring, on.into()), &[]))
    }

    /// Has the backend signal another event for a ring.
    ///
    /// # Errors
    /// The backend does not do as it is told.
    pub(super) fn call(&self, ring: u16, event: &EventFd) -> Result<(), VhostUserError> {
        self.talk(|talk| give(talk, Request::SET_VRING_CALL, ring, event))
    }

    /// Has the backend let go of rings; tells `moved` how far each is.
    ///
    /// # Errors
    /// The backend does not do as it is told.
    pub(super) fn stop(
        &self,
        rings: impl Iterator<Item = u16>,
        mut moved: impl FnMut(u16, u16),
    ) -> Result<(), VhostUserError> {
        self.talk(|talk| {
            for ring in rings {
                let mut answer = [0; 8];
                talk.ask(Request::GET_VRING_BASE, &pair(ring, 0), &mut answer)?;
                let [number, position] =
                    [0, 4].map(|at| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| answer[at + byte])));
                let position = u16::try_from(position).ok().filter(|_| number == u32::from(ring));
                moved(ring, position.ok_or(TalkError::Nonsense(Request::GET_VRING_BASE))?);
            }
            Ok(())
        })
    }

    /// Whether nothing is said to the backend any more.
    pub(super) fn is_given_up(&self) -> bool {
        self.lock().is_given_up()
    }

    /// Closes the connection, for good, because the backend does `what`. Returns what it did first.
    pub(super) fn give_up(&self, what: &str) -> String {
        self.lock().give_up(what)
    }

    fn talk<T>(&self, talk: impl FnOnce(&mut Talk<'_>) -> Result<T, TalkError>) -> Result<T, VhostUserError> {
        let acks = self.protocol.contains(Protocol::REPLY_ACK);
        let mut connection = self.lock();
        // From here on: what waited for the lock has not waited for the backend.
        let result = connection.talk(Instant::now() + self.patience, acks, talk);
        result.map_err(|error| VhostUserError::Backend { path: self.path.clone(), fault: error.to_string() })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// It has no `what`.
    pub(crate) fn lacks(&self, what: &'static str, remedy: &'static str) -> VhostUserError {
        VhostUserError::Lacks { path: self.path.clone(), what, remedy }
    }
}

/// A virtqueue, for a backend.
pub(super) struct Ring<'a> {
    pub(super) queue: &'a Virtqueue,
    /// Interrupts the driver.
    pub(super) call: &'a EventFd,
    /// Signalled when the backend gives it up.
    pub(super) error: &'a EventFd,
}

fn pair(ring: u16, number: u16) -> [u8; 8] {
    (u64::from(number) << 32 | u64::from(ring)).to_le_bytes()
}

fn give(talk: &mut Talk<'_>, request: Request, ring: u16, event: &EventFd) -> Result<(), TalkError> {
    // SAFETY: the event is borrowed for as long as this.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    talk.tell(request, &u64::from(ring).to_ne_bytes(), &[fd])
}

/// Guest memory as a backend is told of it.
pub(super) struct MemoryTable {
    regions: Memory,
    message: Vec<u8>,
}

impl std::fmt::Debug for MemoryTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryTable").field("bytes", &self.message.len()).finish()
    }
}

impl MemoryTable {
    /// # Errors
    /// It is not a file, or in too many parts.
    pub(super) fn new(memory: &Memory) -> Result<Self, VhostUserError> {
        let count = memory.iter().count();
        if count > MAX_FDS {
            return Err(VhostUserError::Memory("it is in more than 8 parts; leave out what adds memory"));
        }
        let mut message = (count as u64).to_le_bytes().to_vec();
        for region in memory.iter() {
            let file = region.file_offset().ok_or(VhostUserError::Memory("it is in no file"))?;
            let guest = region.start_addr().raw_value();
            let fields = [guest, region.len(), guest + USER, file.start()];
            message.extend(fields.map(u64::to_ne_bytes).concat());
        }
        Ok(Self { regions: memory.clone(), message })
    }
}
