//! Who carries the frames of a network interface, in the place of such as DPDK, which no package of a reasonable size has: the
//! crate vhost-user-backend between two rings and a tap of the node.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use bedplate_devices::virtio::net::{Tap, TapQueues};
use bedplate_tests::patience::until;
use vhost::vhost_user::{Listener, VhostUserProtocolFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

const PROTOCOL_FEATURES: u64 = 1 << 30;
/// For its guest to go.
const PATIENCE: Duration = Duration::from_secs(60);
/// Rings.
const RX: usize = 0;
const TX: usize = 1;
/// The tap's event: behind those of rings and of the end.
const TAP: u16 = 3;
/// A frame with its header, which is the same on the tap: nobody has agreed on larger ones.
const FRAME: usize = 12 + 1518;

struct Carrier {
    tap: Tap,
    memory: Memory,
    carried: Arc<AtomicU64>,
    exit: (EventConsumer, EventNotifier),
}

impl Carrier {
    /// From the tap to the guest. What it has no room for is dropped, as on a wire.
    fn receive(&self, ring: &VringRwLock<Memory>) -> Result<()> {
        let memory = self.memory.memory();
        let mut frame = [0; FRAME];
        while let Ok(len) = rustix::io::read(self.tap.as_fd(), &mut frame) {
            // One buffer has all of it.
            frame[10..12].copy_from_slice(&1u16.to_le_bytes());
            let chain = ring.get_mut().get_queue_mut().pop_descriptor_chain(self.memory.memory());
            let Some(chain) = chain else { continue };
            let (head, mut rest) = (chain.head_index(), &frame[..len]);
            for piece in chain.filter(|piece| piece.is_write_only()) {
                let (now, later) = rest.split_at(rest.len().min(piece.len() as usize));
                memory.write_slice(now, piece.addr())?;
                rest = later;
            }
            ring.add_used(head, (len - rest.len()) as u32)?;
            self.carried.fetch_add(1, Ordering::Relaxed);
        }
        Ok(ring.signal_used_queue()?)
    }

    /// From the guest to the tap.
    fn send(&self, ring: &VringRwLock<Memory>) -> Result<()> {
        let memory = self.memory.memory();
        let chains: Vec<_> = ring.get_mut().get_queue_mut().iter(self.memory.memory())?.collect();
        for chain in chains {
            let (head, mut frame) = (chain.head_index(), Vec::with_capacity(FRAME));
            for piece in chain {
                let start = frame.len();
                frame.resize(start + piece.len() as usize, 0);
                memory.read_slice(&mut frame[start..], piece.addr())?;
            }
            // One that the tap does not take is lost.
            let _ = rustix::io::write(self.tap.as_fd(), &frame);
            ring.add_used(head, 0)?;
            self.carried.fetch_add(1, Ordering::Relaxed);
        }
        Ok(ring.signal_used_queue()?)
    }
}

impl VhostUserBackendMut for Carrier {
    type Bitmap = ();
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.0.try_clone().ok().zip(self.exit.1.try_clone().ok())
    }

    fn handle_event(
        &mut self,
        event: u16,
        _events: EventSet,
        rings: &[VringRwLock<Memory>],
        _thread: usize,
    ) -> io::Result<()> {
        let done = match event {
            TAP if rings[RX].get_ref().get_queue().ready() => self.receive(&rings[RX]),
            TAP => {
                // Nobody is there.
                while rustix::io::read(self.tap.as_fd(), &mut [0; FRAME]).is_ok() {}
                Ok(())
            }
            event if usize::from(event) == TX => self.send(&rings[TX]),
            _ => Ok(()),
        };
        done.map_err(io::Error::other)
    }
}

/// Carries frames between the guest that connects to its socket and a tap, until that guest's end.
pub struct NetBackend {
    thread: Option<JoinHandle<Result<()>>>,
    carried: Arc<AtomicU64>,
}

impl NetBackend {
    pub fn start(socket: &Path, tap: &str) -> Result<Self> {
        let tap = Tap::open(tap, TapQueues::Exactly(1))?.pop().context("no queue of the tap")?;
        let (fd, carried) = (tap.as_fd().as_raw_fd(), Arc::<AtomicU64>::default());
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK)?;
        let ended = exit.1.try_clone()?;
        let none = || Memory::new(GuestMemoryMmap::new());
        let carrier = Carrier { tap, memory: none(), carried: Arc::clone(&carried), exit };
        let mut listener = Listener::new(socket, true)?;
        let mut daemon = VhostUserDaemon::new("net".into(), Arc::new(Mutex::new(carrier)), none())
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        daemon.get_epoll_handlers()[0].register_listener(fd, EventSet::IN, TAP.into())?;
        let thread = thread::spawn(move || {
            daemon.start(&mut listener).map_err(|error| anyhow::anyhow!("{error}"))?;
            // However the connection ends, it is the end.
            let _ = daemon.wait();
            Ok(ended.notify()?)
        });
        Ok(Self { thread: Some(thread), carried })
    }

    /// Frames so far.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }

    /// Waits until the guest has gone.
    pub fn wait(mut self) -> Result<()> {
        let thread = self.thread.take().context("it is waited for once")?;
        until("the end of a backend", PATIENCE, || Ok(thread.is_finished().then_some(())))?;
        thread.join().map_err(|_| anyhow::anyhow!("the backend panicked"))?
    }
}
