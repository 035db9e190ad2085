//! The network device whose frames another process carries: [`vhost_user`](crate::virtio::vhost_user).
//!
//! Registers and the control queue are ours, as with [`vhost`](super::vhost), frames the backend's. What it cannot do that
//! we know, no driver is offered.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::commands::Commands;
use super::pairs::{Pair, Pairs};
use super::registers::Registers;
use super::tap::tap_features;
use super::{MAX_PAIRS, NetConfig};
use crate::Memory;
use crate::metrics::DeviceMetrics;
use crate::virtio::vhost_user::{Frontend, Rings, VhostUserError};
use crate::virtio::{Active, VirtioDevice, Virtqueue, Worker, read_image};

/// Two rings of a backend's.
struct RingPair {
    frontend: Arc<Frontend>,
    /// The first of them, by which frames come to the guest.
    first: u16,
    /// The backend has them.
    given: AtomicBool,
}

impl Pair for RingPair {
    fn switch(&self, on: bool) -> io::Result<()> {
        let switch = |ring| match self.given.load(Ordering::Acquire) {
            true => self.frontend.enable(ring, on),
            false => Ok(()),
        };
        [self.first, self.first + 1].into_iter().try_for_each(switch).map_err(io::Error::other)
    }
}

/// A virtio network device over a vhost-user backend.
pub struct VhostUserNet {
    registers: Registers,
    pairs: Arc<Pairs<Arc<RingPair>>>,
    rings: Rings,
    /// Of the control queue, with several pairs.
    commands: Option<Worker<Commands<Arc<RingPair>>>>,
}

impl VhostUserNet {
    /// A device over `frontend`'s backend, with `pairs` pairs of queues or as many as it and we have, in `memory`. The
    /// limits of `config` are not looked at.
    ///
    /// # Errors
    /// The backend has not so many, memory cannot be shared, or descriptors have run out.
    pub fn new(
        frontend: Frontend,
        config: &NetConfig,
        memory: &Memory,
        pairs: Option<usize>,
        usual: usize,
    ) -> Result<Self, VhostUserError> {
        // Some count pairs, and some queues: this is right for both. One that does not say has a pair.
        let most = frontend.queues().map_or(1, |queues| (queues / 2).clamp(1, MAX_PAIRS));
        let count = pairs.unwrap_or(most.min(usual.max(1)));
        if !(1..=most).contains(&count) {
            return Err(frontend.lacks("more pairs of queues", "ask for fewer (queue_pairs), or have it offer them"));
        }
        let frontend = Arc::new(frontend);
        let pair = |index: usize| {
            let frontend = Arc::clone(&frontend);
            Arc::new(RingPair { frontend, first: 2 * index as u16, given: AtomicBool::new(false) })
        };
        let pairs = Arc::new(Pairs::new((0..count).map(pair).collect()).map_err(VhostUserError::Host)?);
        let rings = Rings::open(&frontend, memory)?;
        let commands = (count > 1).then(|| Commands::open(&pairs)).transpose().map_err(VhostUserError::Host)?;
        Ok(Self {
            registers: Registers::new(config, count, frontend.features() & tap_features(true)),
            commands: commands.map(|commands| Worker::new("net-control", commands, Arc::clone(rings.metrics()))),
            pairs,
            rings,
        })
    }

    fn start(&mut self, active: Active) -> Result<(), VhostUserError> {
        let Active { mut queues, features, interrupt } = active;
        let session = self.registers.session(features, &queues);
        let control = session.control.and_then(|control| queues[control].take());
        let count = queues.len();
        // Those of pairs that the driver cannot use are not the backend's.
        queues.truncate(2 * session.pairs);
        self.pairs.begin(session.pairs).map_err(VhostUserError::Host)?;
        self.rings.start(Active { queues, features, interrupt: Arc::clone(&interrupt) }, &|ring| ring < 2)?;
        self.give(session.pairs);
        if let (Some(commands), Some(queue)) = (&mut self.commands, control) {
            let mut own: Vec<Option<Virtqueue>> = (0..count).map(|_| None).collect();
            let at = usize::from(queue.index());
            own[at] = Some(queue);
            commands.start(Active { queues: own, features, interrupt }).map_err(VhostUserError::Host)?;
        }
        Ok(())
    }

    /// The backend has the first `count` pairs.
    fn give(&self, count: usize) {
        let pairs = self.pairs.all().iter().enumerate();
        pairs.for_each(|(index, pair)| pair.given.store(index < count, Ordering::Release));
    }
}

impl VirtioDevice for VhostUserNet {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.registers.features
    }

    fn ring_features(&self) -> u64 {
        self.rings.ring_features()
    }

    fn may_be_notified_here(&self) -> bool {
        false
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.registers.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&self.registers.config, offset, data);
    }

    fn activate(&mut self, active: Active) -> io::Result<()> {
        let started = self.start(active).map_err(io::Error::other);
        if started.is_err() {
            self.stop();
        }
        started
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        // First, so that commands which wait in the ring say nothing to the backend any more: each could take its time.
        self.give(0);
        let mut queues: Vec<_> = self.commands.iter_mut().flat_map(Worker::stop).collect();
        // The backend lets go of all rings, whether they are on or off.
        queues.extend(self.rings.stop());
        queues.sort_by_key(Virtqueue::index);
        queues
    }

    fn vector_changed(&mut self, queue: u16) {
        self.rings.vector_changed(queue);
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        self.rings.metrics()
    }
}
