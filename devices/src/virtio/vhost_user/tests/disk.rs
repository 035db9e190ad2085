//! A disk by somebody else's code, the crate vhost-user-backend: it finds memory, rings and events as the protocol says.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use vhost::vhost_user::Listener;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::{ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::scripted::{PROTOCOL, VERSION_1};

type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// Bytes of the disk at first.
pub(super) const LEN: u64 = 1 << 20;

pub(super) struct Disk {
    bytes: Vec<u8>,
    sectors: Arc<AtomicU64>,
    memory: Memory,
    event_idx: bool,
    exit: (EventConsumer, EventNotifier),
}

impl VhostUserBackendMut for Disk {
    type Bitmap = ();
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        VERSION_1 | PROTOCOL | 3 << 28 | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_MQ
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; 60];
        config[..8].copy_from_slice(&self.sectors.load(Ordering::SeqCst).to_le_bytes());
        config[offset as usize..][..size as usize].to_vec()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().unwrap(), self.exit.1.try_clone().unwrap()))
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock<Memory>],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.memory();
        let vring = &vrings[usize::from(queue)];
        loop {
            vring.disable_notification().unwrap();
            let chains: Vec<_> = vring.get_mut().get_queue_mut().iter(self.memory.memory()).unwrap().collect();
            for chain in chains {
                let head = chain.head_index();
                // Kind and sector, data, a byte for the status.
                let pieces: Vec<_> = chain.collect();
                let kind: u32 = memory.read_obj(pieces[0].addr()).unwrap();
                let sector: u64 = memory.read_obj(vm_memory::Address::unchecked_add(&pieces[0].addr(), 8)).unwrap();
                let (data, status) = (&pieces[1], &pieces[2]);
                let range = sector as usize * 512..sector as usize * 512 + data.len() as usize;
                match kind {
                    0 => memory.write_slice(&self.bytes[range], data.addr()).unwrap(),
                    _ => memory.read_slice(&mut self.bytes[range], data.addr()).unwrap(),
                }
                memory.write_obj(0u8, status.addr()).unwrap();
                vring.add_used(head, if kind == 0 { data.len() + 1 } else { 1 }).unwrap();
            }
            if vring.needs_notification().unwrap() {
                vring.signal_used_queue().unwrap();
            }
            if !self.event_idx || !vring.enable_notification().unwrap() {
                return Ok(());
            }
        }
    }
}

/// The process that has it would be this thread.
pub(super) struct Server {
    pub(super) sectors: Arc<AtomicU64>,
    shutdown: ShutdownHandle,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at `path`, and calls `connect` once it does.
    pub(super) fn start<T>(path: &Path, connect: impl FnOnce() -> T) -> (T, Self) {
        let sectors = Arc::new(AtomicU64::new(LEN / 512));
        let disk = Disk {
            bytes: vec![0; LEN as usize],
            sectors: Arc::clone(&sectors),
            memory: Memory::new(GuestMemoryMmap::new()),
            event_idx: false,
            exit: new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap(),
        };
        let exit = disk.exit.1.try_clone().unwrap();
        let memory = Memory::new(GuestMemoryMmap::new());
        let mut listener = Listener::new(path, true).unwrap();
        let (handles, handle) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let mut daemon = VhostUserDaemon::new("disk".into(), Arc::new(Mutex::new(disk)), memory).unwrap();
            daemon.start(&mut listener).unwrap();
            handles.send(daemon.shutdown_handle().unwrap()).unwrap();
            // However the connection ends, it is the end.
            let _ = daemon.wait();
            exit.notify().unwrap();
        });
        let connected = connect();
        (connected, Self { sectors, shutdown: handle.recv().unwrap(), thread: Some(thread) })
    }

    /// Closes its connection, as its end would.
    pub(super) fn die(&self) {
        self.shutdown.shutdown();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.die();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
