//! The network device whose frames the kernel carries: vhost-net.
//!
//! ```text
//! guest's notification → ioeventfd → vhost (a thread of the kernel's) ⇄ tap
//!                                      └ event of the MSI-X vector, or of a pin → irqfd → guest
//! ```
//!
//! No thread of this process is in that way, and so nothing here counts, limits, or looks at a frame. What is left is the
//! registers, and the control queue where there are several pairs; each pair is a vhost of its own. A driver that has INTA#
//! is told by a thread of ours (`transport/relay.rs`).
//!
//! **When.** The device is opened before the VMM goes into its sandbox, where it could not be any more. The rest comes with
//! the first driver, on the thread of the vCPU that says that it is ready: from Linux 6.4 on vhost's thread is one of this
//! process, which has to have a single one when it goes into its sandbox.
//!
//! **What is checked.** The kernel knows the rings by addresses of this process and does not look whether they are in
//! guest memory, so that a ring has to lie in one mapping. Buffers it translates itself, by the table of guest memory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::commands::Commands;
use super::pairs::{Pair, Pairs};
use super::registers::Registers;
use super::tap::{Link, Tap};
use super::{MAX_PAIRS, NetConfig};
use crate::Memory;
use crate::metrics::DeviceMetrics;
use crate::virtio::{Active, COMMON_FEATURES, Interrupt, VirtioDevice, Virtqueue, Worker, read_image};

const DEVICE: &str = "/dev/vhost-net";
/// What of the features of a driver concerns vhost; the others are the tap's, or the registers'.
const RING_FEATURES: u64 = COMMON_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// vhost-net cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// No access to the driver.
    #[error("cannot open {DEVICE}: {0}; load the module (`modprobe vhost_net`), and run with the right to use it")]
    Open(#[source] io::Error),
    /// The kernel refused.
    #[error("vhost-net refuses to {what}: {source}")]
    Refused {
        /// What.
        what: &'static str,
        /// Why.
        source: vhost::Error,
    },
    /// It lacks what all of our devices have.
    #[error("vhost-net of this kernel has features {0:#x}, and not all that are needed: use a newer kernel")]
    Features(u64),
    /// No descriptors are left.
    #[error("cannot make what a vhost-net device needs: {0}; raise the limit of open files")]
    Host(#[source] io::Error),
}

/// Memory of this process that the guest sees, beside RAM.
#[derive(Clone)]
pub struct Seen {
    /// Where the guest sees it.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// Where it is here.
    pub host: u64,
    /// Keeps it mapped for as long as the kernel works with a table that it is in.
    pub mapping: Arc<dyn Send + Sync>,
}

/// One `/dev/vhost-net`.
struct Device {
    file: File,
    memory: Memory,
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Device {
    type AS = Memory;

    fn mem(&self) -> &Memory {
        &self.memory
    }

    /// A [`Virtqueue`] is checked when it is made; this trait's own check refuses rings that end where RAM does.
    fn is_valid(&self, _ring: &VringConfigData) -> bool {
        true
    }
}

impl Device {
    fn open(memory: &Memory) -> Result<Self, VhostError> {
        let file = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(VhostError::Open)?;
        Ok(Self { file, memory: Arc::clone(memory) })
    }

    /// What addresses of the guest mean from now on, also to rings that work.
    fn set_table(&self, seen: &[Seen]) -> Result<(), VhostError> {
        let ram = self.memory.iter().map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            ..Default::default()
        });
        let seen = seen.iter().map(|seen| VhostUserMemoryRegionInfo {
            guest_phys_addr: seen.guest,
            memory_size: seen.len,
            userspace_addr: seen.host,
            ..Default::default()
        });
        let table: Vec<_> = ram.chain(seen).collect();
        self.set_mem_table(&table).map_err(refused("take the table of guest memory"))
    }

    fn set_backend(&self, ring: usize, tap: Option<BorrowedFd<'_>>) -> Result<(), vhost::Error> {
        let request = vhost_vring_file { index: ring as u32, fd: tap.map_or(-1, |fd| fd.as_raw_fd()) };
        // SAFETY: the request reads one `vhost_vring_file`, which `request` is.
        match unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &request) } {
            0.. => Ok(()),
            _ => Err(vhost::Error::IoctlError(io::Error::last_os_error())),
        }
    }
}

/// `what`, refused; for `map_err`.
fn refused(what: &'static str) -> impl FnOnce(vhost::Error) -> VhostError {
    move |source| VhostError::Refused { what, source }
}

/// One pair: a vhost between two rings and a queue of the tap.
struct VhostPair {
    device: Device,
    tap: Tap,
    is_first: bool,
    /// Signalled when vhost gives a ring up.
    broken: EventFd,
    /// Takes signals that nobody wants.
    nowhere: EventFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// vhost works for this process, which can be said once.
    owned: bool,
    /// What it works in, beside RAM.
    seen: Arc<[Seen]>,
    /// Rings that are set up, receive and transmit, while there is a driver.
    rings: [bool; 2],
    connected: bool,
}

impl VhostPair {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The guest sees other memory than before. Where that is refused, the table stays and what is in it stays mapped.
    fn see(&self, seen: &Arc<[Seen]>) -> Result<(), VhostError> {
        let mut state = self.lock();
        if state.owned {
            self.device.set_table(seen)?;
        }
        state.seen = Arc::clone(seen);
        Ok(())
    }

    /// Sets the rings up that the driver has enabled; nothing moves yet.
    fn prepare(
        &self,
        queues: [Option<&Virtqueue>; 2],
        features: u64,
        interrupt: &dyn Interrupt,
    ) -> Result<(), VhostError> {
        let mut state = self.lock();
        if !state.owned {
            self.device.set_owner().map_err(refused("work for this process"))?;
            state.owned = true;
        }
        self.device.set_table(&state.seen)?;
        self.device.set_features(features & RING_FEATURES).map_err(refused("take the driver's features"))?;
        for (ring, queue) in queues.into_iter().enumerate() {
            state.rings[ring] = queue.is_some();
            if let Some(queue) = queue {
                self.prepare_ring(ring, queue).map_err(refused("take a virtqueue"))?;
                self.route(ring, queue.index(), interrupt)?;
            }
        }
        Ok(())
    }

    fn prepare_ring(&self, ring: usize, queue: &Virtqueue) -> Result<(), vhost::Error> {
        let state = queue.state();
        let config = VringConfigData {
            queue_max_size: state.max_size,
            queue_size: state.size,
            flags: 0,
            desc_table_addr: state.desc_table,
            used_ring_addr: state.used_ring,
            avail_ring_addr: state.avail_ring,
            log_addr: None,
        };
        self.device.set_vring_num(ring, state.size)?;
        self.device.set_vring_base(ring, state.next_avail)?;
        self.device.set_vring_addr(ring, &config)?;
        self.device.set_vring_err(ring, &self.broken)?;
        self.device.set_vring_kick(ring, queue.notify())
    }

    /// Has vhost raise the vector that the driver has chosen for queue `queue`.
    fn route(&self, ring: usize, queue: u16, interrupt: &dyn Interrupt) -> Result<(), VhostError> {
        let vector = interrupt.direct(queue).map_err(VhostError::Host)?;
        let event = vector.as_ref().unwrap_or(&self.nowhere);
        self.device.set_vring_call(ring, event).map_err(refused("raise an interrupt"))
    }

    /// From now on vhost carries frames, or has stopped when this returns.
    fn connect(&self, on: bool) -> Result<(), vhost::Error> {
        let mut state = self.lock();
        if state.connected == on {
            return Ok(());
        }
        let tap = on.then(|| self.tap.as_fd());
        // All of them, so that none goes on if one is refused.
        let rings = (0..2).filter(|ring| state.rings[*ring]);
        let done = rings.map(|ring| self.device.set_backend(ring, tap)).fold(Ok(()), Result::and);
        // One that was refused may be half off; that it shall be off is what counts.
        state.connected = on;
        done
    }

    /// Whether a ring was given up since the last call.
    fn was_broken(&self) -> bool {
        self.broken.read().is_ok()
    }
}

impl Pair for VhostPair {
    fn switch(&self, on: bool) -> io::Result<()> {
        if on && !self.is_first {
            self.tap.attach(true)?;
        }
        let done = self.connect(on).map_err(io::Error::other);
        if on && done.is_err() {
            // Half of a pair would take frames that nobody carries on.
            let _ = self.connect(false);
        }
        if !self.is_first && (!on || done.is_err()) {
            let detached = self.tap.attach(false);
            return done.and(detached);
        }
        done
    }
}

/// Tells the kernel of memory that has come or gone. Outlives the device harmlessly.
pub struct VhostNetControl {
    pairs: Arc<Pairs<Arc<VhostPair>>>,
}

impl VhostNetControl {
    /// `seen` is all that the guest sees beside RAM. When this returns without an error, the kernel works with nothing else.
    ///
    /// # Errors
    /// The kernel refuses. Some pairs of queues may know of it, and others go on with what was there before.
    pub fn see(&self, seen: &Arc<[Seen]>) -> Result<(), VhostError> {
        self.pairs.all().iter().map(|pair| pair.see(seen)).fold(Ok(()), Result::and)
    }
}

/// A virtio network device over vhost-net.
pub struct VhostNet {
    registers: Registers,
    metrics: Arc<DeviceMetrics>,
    pairs: Arc<Pairs<Arc<VhostPair>>>,
    /// Of the control queue, with several pairs.
    commands: Option<Worker<Commands<Arc<VhostPair>>>>,
    /// Of the driver that is there.
    queues: Vec<Virtqueue>,
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl VhostNet {
    /// A device with a pair of queues for each of `taps`, 1 to [`MAX_PAIRS`], the queues of one tap, in `memory` and what
    /// else of this process the guest sees. The limits of `config` are not looked at.
    ///
    /// # Errors
    /// There is no vhost-net, it lacks what is needed, or descriptors have run out.
    pub fn open(taps: Vec<Tap>, config: &NetConfig, memory: &Memory, seen: &Arc<[Seen]>) -> Result<Self, VhostError> {
        let count = taps.len();
        if !(1..=MAX_PAIRS).contains(&count) {
            let why = format!("{count} pairs of queues: a network device has 1 to {MAX_PAIRS}");
            return Err(VhostError::Host(io::Error::other(why)));
        }
        let mut offered = taps[0].features();
        let mut pairs = Vec::with_capacity(count);
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VhostError::Host);
        for (index, tap) in taps.into_iter().enumerate() {
            let device = Device::open(memory)?;
            let features = device.get_features().map_err(refused("say what it can do"))?;
            if features & COMMON_FEATURES != COMMON_FEATURES {
                return Err(VhostError::Features(features));
            }
            // Of what vhost does itself, what it can do; the rest is the tap's.
            offered &= features | !RING_FEATURES;
            pairs.push(Arc::new(VhostPair {
                device,
                tap,
                is_first: index == 0,
                broken: event()?,
                nowhere: event()?,
                state: Mutex::new(State { seen: Arc::clone(seen), ..State::default() }),
            }));
        }
        let metrics = Arc::<DeviceMetrics>::default();
        let pairs = Arc::new(Pairs::new(pairs).map_err(VhostError::Host)?);
        let commands = (count > 1).then(|| Commands::open(&pairs)).transpose().map_err(VhostError::Host)?;
        Ok(Self {
            registers: Registers::new(config, count, offered),
            commands: commands.map(|commands| Worker::new("net-control", commands, Arc::clone(&metrics))),
            metrics,
            pairs,
            queues: Vec::new(),
            interrupt: None,
        })
    }

    /// For changes of memory.
    pub fn control(&self) -> VhostNetControl {
        VhostNetControl { pairs: Arc::clone(&self.pairs) }
    }

    fn start(&mut self, active: Active) -> Result<(), VhostError> {
        let Active { mut queues, features, interrupt } = active;
        let session = self.registers.session(features, &queues);
        let control = session.control.and_then(|control| queues[control].take());
        for (index, pair) in self.pairs.all().iter().enumerate().take(session.pairs) {
            let of = |ring: usize| queues.get(2 * index + ring).and_then(Option::as_ref);
            pair.prepare([of(0), of(1)], features, &*interrupt)?;
        }
        let first = &self.pairs.all()[0];
        first.tap.set_offloads(features).map_err(VhostError::Host)?;
        self.pairs.begin(session.pairs).map_err(VhostError::Host)?;
        first.connect(true).map_err(refused("carry frames"))?;
        if let (Some(commands), Some(queue)) = (&mut self.commands, control) {
            let mut own: Vec<Option<Virtqueue>> = queues.iter().map(|_| None).collect();
            let at = usize::from(queue.index());
            own[at] = Some(queue);
            let interrupt = Arc::clone(&interrupt);
            commands.start(Active { queues: own, features, interrupt }).map_err(VhostError::Host)?;
        }
        self.queues = queues.into_iter().flatten().collect();
        self.interrupt = Some(interrupt);
        Ok(())
    }

    /// The pair and its ring behind a queue of the driver's that vhost works on.
    fn ring(&self, queue: u16) -> Option<(&VhostPair, usize)> {
        let pair = self.pairs.all().get(usize::from(queue / 2))?;
        let ring = usize::from(queue % 2);
        pair.lock().rings[ring].then_some((pair, ring))
    }

    fn host_fault(&self, what: &str, result: Result<(), impl std::fmt::Display>) {
        if let Err(error) = result {
            self.metrics.host_fault(|| format!("cannot {what}: {error}"));
        }
    }
}

impl VirtioDevice for VhostNet {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.registers.features
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
        // First, so that no pair is switched any more.
        let commands: Vec<_> = self.commands.iter_mut().flat_map(Worker::stop).collect();
        self.host_fault("switch pairs of queues off", self.pairs.begin(1));
        for pair in self.pairs.all() {
            self.host_fault("stop vhost-net", pair.connect(false));
            if pair.was_broken() {
                self.metrics.guest_faults.increment();
            }
        }
        let mut queues = std::mem::take(&mut self.queues);
        for queue in &mut queues {
            if let Some((pair, ring)) = self.ring(queue.index()) {
                match pair.device.get_vring_base(ring) {
                    Ok(position) => queue.moved_to(position as u16),
                    Err(error) => self.host_fault("ask vhost-net for a virtqueue's position", Err(error)),
                }
            }
        }
        self.pairs.all().iter().for_each(|pair| pair.lock().rings = [false; 2]);
        self.interrupt = None;
        queues.extend(commands);
        queues.sort_by_key(Virtqueue::index);
        queues
    }

    fn vector_changed(&mut self, queue: u16) {
        if let (Some(interrupt), Some((pair, ring))) = (&self.interrupt, self.ring(queue)) {
            self.host_fault("move an interrupt", pair.route(ring, queue, &**interrupt));
        }
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        &self.metrics
    }
}

impl Drop for VhostNet {
    fn drop(&mut self) {
        // The kernel's threads look at rings and memory until they are told otherwise.
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    #[test]
    fn without_vhost_the_message_says_what_to_do() {
        let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
        if let Err(error) = Device::open(&memory) {
            let error = error.to_string();
            assert!(error.contains("/dev/vhost-net") && error.contains("modprobe vhost_net"), "{error}");
        }
    }
}
