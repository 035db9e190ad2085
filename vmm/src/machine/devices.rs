//! The devices of a machine, as its control thread knows them: what can be changed while they work, and what they count.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bedplate_api::vmm::{DeviceStatus, QueueInspection};
use bedplate_devices::metrics::{Counter, DeviceMetrics};
use bedplate_devices::pci::Slot;
use bedplate_devices::virtio::QueuePosition;
use bedplate_devices::virtio::balloon::{BalloonControl, BalloonMetrics};
use bedplate_devices::virtio::block::{Backend, BlockControl, BlockMetrics};
use bedplate_devices::virtio::console::{ConsoleControl, ConsoleMetrics};
use bedplate_devices::virtio::mem::{MemControl, MemMetrics};
use bedplate_devices::virtio::net::{NetControl, NetMetrics, Seen, VhostNetControl};
use bedplate_devices::virtio::pci::VirtioPciDevice;
use bedplate_devices::virtio::pmem::{PmemControl, PmemMetrics};
use bedplate_devices::virtio::vhost_user::VhostUserBlockControl;

use super::pci_devices::DeviceError;

/// What changes a disk while its VM runs.
pub type DiskControl = BlockControl<Box<dyn Backend>>;

/// By the names that the configuration gives them.
#[derive(Default)]
pub struct Devices {
    pub(super) disks: BTreeMap<String, DiskControl>,
    pub(super) backend_disks: BTreeMap<String, VhostUserBlockControl>,
    pub(super) nets: BTreeMap<String, NetControl>,
    pub(super) vhost_nets: BTreeMap<String, VhostNetControl>,
    pub(super) pmems: BTreeMap<String, PmemControl>,
    pub(super) balloon: Option<BalloonControl>,
    pub(super) mem: Option<MemControl>,
    pub(super) console: Option<ConsoleControl>,
    pub(super) counts: BTreeMap<String, (Arc<DeviceMetrics>, Counts)>,
    pub(super) transports: BTreeMap<String, (Slot, Arc<Mutex<VirtioPciDevice>>)>,
    /// What the host could not do as it was asked for, in words.
    pub(super) warnings: Vec<String>,
}

/// What only one kind of device counts.
pub(super) enum Counts {
    Block(Arc<BlockMetrics>),
    Net(Arc<NetMetrics>),
    Pmem(Arc<PmemMetrics>),
    Balloon(Arc<BalloonMetrics>),
    Mem(Arc<MemMetrics>),
    Console(Arc<ConsoleMetrics>),
    Rng(Arc<Counter>),
    Vsock,
    /// The kernel counts, by the tap; or a backend.
    Elsewhere,
}

impl Devices {
    /// What the disk of a drive is called here, and wherever its counters are shown.
    pub fn name_of_disk(drive_id: &str) -> String {
        format!("block_{drive_id}")
    }

    /// Likewise, a network interface.
    pub fn name_of_net(iface_id: &str) -> String {
        format!("net_{iface_id}")
    }

    /// Likewise, a pmem device.
    pub fn name_of_pmem(id: &str) -> String {
        format!("pmem_{id}")
    }

    /// Tells the kernel, where it carries frames, what the guest sees beside RAM.
    ///
    /// # Errors
    /// It refuses for an interface, which is named. The others are told.
    pub(super) fn see(&self, seen: &Arc<[Seen]>) -> Result<(), DeviceError> {
        let told = self
            .vhost_nets
            .iter()
            .map(|(id, vhost)| vhost.see(seen).map_err(|source| DeviceError::VhostMemory { id: id.clone(), source }));
        told.fold(Ok(()), Result::and)
    }

    /// Where the device of this name is on the bus.
    pub(super) fn slot(&self, name: &str) -> Option<Slot> {
        self.transports.get(name).map(|(slot, _)| *slot)
    }

    /// Lets go of a device that is off the bus, and closes what it had open.
    pub(super) fn forget(&mut self, name: &str) {
        self.transports.remove(name);
        self.counts.remove(name);
        self.disks.retain(|id, _| Self::name_of_disk(id) != name);
        self.backend_disks.retain(|id, _| Self::name_of_disk(id) != name);
        self.nets.retain(|id, _| Self::name_of_net(id) != name);
        self.vhost_nets.retain(|id, _| Self::name_of_net(id) != name);
        self.pmems.retain(|id, _| Self::name_of_pmem(id) != name);
    }

    /// The disk of a drive, if there is such a drive.
    pub fn disk(&self, drive_id: &str) -> Option<&DiskControl> {
        self.disks.get(drive_id)
    }

    /// The disk of a drive that a backend has, if there is such a drive.
    pub fn backend_disk(&self, drive_id: &str) -> Option<&VhostUserBlockControl> {
        self.backend_disks.get(drive_id)
    }

    /// A network interface, if there is such a one.
    pub fn net(&self, iface_id: &str) -> Option<&NetControl> {
        self.nets.get(iface_id)
    }

    /// A pmem device, if there is such a one.
    pub fn pmem(&self, id: &str) -> Option<&PmemControl> {
        self.pmems.get(id)
    }

    /// The memory balloon.
    pub const fn balloon(&self) -> Option<&BalloonControl> {
        self.balloon.as_ref()
    }

    /// The memory that can be added.
    pub const fn mem(&self) -> Option<&MemControl> {
        self.mem.as_ref()
    }

    /// The virtio console.
    pub const fn console(&self) -> Option<&ConsoleControl> {
        self.console.as_ref()
    }

    /// What the host could not do as it was asked for and does otherwise, since the last call.
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// How far the queues of each device are; without a device that a vCPU has in hand for longer than `patience`, as a reset
    /// may take.
    pub fn queues(&self, patience: Duration) -> BTreeMap<String, Vec<QueueInspection>> {
        let deadline = Instant::now() + patience;
        let queues = |(name, (_, device)): (&String, &(Slot, Arc<Mutex<VirtioPciDevice>>))| loop {
            match device.try_lock() {
                Ok(device) => return Some((name.clone(), device.queue_positions().iter().map(inspected).collect())),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => sleep(Duration::from_millis(1)),
                Err(_) => return None,
            }
        };
        self.transports.iter().filter_map(queues).collect()
    }

    /// All counters, as they stand.
    pub(super) fn status(&self) -> BTreeMap<String, DeviceStatus> {
        let status = |(metrics, counts): &(Arc<DeviceMetrics>, Counts)| DeviceStatus {
            notifications: metrics.notifications.value(),
            chains: metrics.chains.value(),
            interrupts: metrics.interrupts.value(),
            guest_faults: metrics.guest_faults.value(),
            host_faults: metrics.host_faults.value(),
            unplugging: false,
            first_host_fault: metrics.first_host_fault().map(str::to_owned),
            counters: counts.named().into_iter().map(|(name, counter)| (name.to_owned(), counter.value())).collect(),
        };
        self.counts.iter().map(|(name, counts)| (name.clone(), status(counts))).collect()
    }
}

impl Counts {
    /// The counters by the names that they have outside: Firecracker's, where it counts the same.
    fn named(&self) -> Vec<(&'static str, &Counter)> {
        match self {
            Self::Block(block) => vec![
                ("read_count", &block.reads),
                ("read_bytes", &block.read_bytes),
                ("write_count", &block.writes),
                ("write_bytes", &block.write_bytes),
                ("flush_count", &block.flushes),
                ("execute_fails", &block.failures),
                ("rate_limiter_throttled_events", &block.throttled),
            ],
            Self::Net(net) => vec![
                ("rx_packets_count", &net.rx_frames),
                ("rx_bytes_count", &net.rx_bytes),
                ("rx_fails", &net.rx_dropped),
                ("rx_rate_limiter_throttled", &net.rx_throttled),
                ("tx_packets_count", &net.tx_frames),
                ("tx_bytes_count", &net.tx_bytes),
                ("tx_fails", &net.tx_dropped),
                ("tx_rate_limiter_throttled", &net.tx_throttled),
            ],
            Self::Pmem(pmem) => vec![
                ("flush_count", &pmem.flushes),
                ("flush_fails", &pmem.failures),
                ("rate_limiter_throttled_events", &pmem.throttled),
                ("refused_writes", &pmem.refused_writes),
            ],
            Self::Balloon(balloon) => vec![
                ("inflated_pages", &balloon.inflated),
                ("deflated_pages", &balloon.deflated),
                ("released_bytes", &balloon.released_bytes),
                ("reported_bytes", &balloon.reported_bytes),
                ("hinted_bytes", &balloon.hinted_bytes),
                ("stats_updates_count", &balloon.stats_updates),
            ],
            Self::Mem(mem) => vec![
                ("plugged_blocks", &mem.plugged),
                ("unplugged_blocks", &mem.unplugged),
                ("refused_requests", &mem.refused),
            ],
            Self::Console(console) => vec![
                ("input_bytes", &console.input_bytes),
                ("output_bytes", &console.output_bytes),
                ("dropped_bytes", &console.dropped_bytes),
            ],
            Self::Rng(bytes) => vec![("entropy_bytes", bytes)],
            Self::Vsock | Self::Elsewhere => Vec::new(),
        }
    }
}

fn inspected(queue: &QueuePosition) -> QueueInspection {
    QueueInspection {
        index: queue.index,
        size: queue.size,
        descriptors: queue.descriptors,
        available: queue.available,
        used: queue.used,
        outstanding: queue.available.zip(queue.used).map(|(available, used)| available.wrapping_sub(used)),
    }
}
