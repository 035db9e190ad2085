//! Attaching the devices on the PCI bus, one function each.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bedplate_api::socket;
use bedplate_devices::Memory;
use bedplate_devices::bus::Bus;
use bedplate_devices::host::TransportHost;
use bedplate_devices::metadata::Responder;
use bedplate_devices::pci::{PciFunction, PciRoot, Slot};
use bedplate_devices::virtio::VirtioDevice;
use bedplate_devices::virtio::balloon::{Balloon, BalloonConfig};
use bedplate_devices::virtio::block::{Block, BlockConfig, OpenError};
use bedplate_devices::virtio::console::{Console, WindowSize};
use bedplate_devices::virtio::mem::{Mem, MemConfig};
use bedplate_devices::virtio::mmio::{Place, VirtioMmioWindow, WINDOW_LEN};
use bedplate_devices::virtio::net::{Net, NetConfig, TapError, VhostError, VhostNet, VhostUserNet};
use bedplate_devices::virtio::pci::{VirtioPciDevice, VirtioPciError};
use bedplate_devices::virtio::pmem::{Pmem, PmemConfig};
use bedplate_devices::virtio::rng::Rng;
use bedplate_devices::virtio::vhost_user::{Frontend, VhostUser, VhostUserError};
use bedplate_devices::virtio::vsock::{Vsock, VsockConfig, VsockError};
use bedplate_images::disk::DiskError;

use super::BuildError;
use super::devices::{Counts, Devices};
use super::taps::Taps;
use crate::block;
use crate::config::{
    self, BackendDriveConfig, DiskConfig, DriveConfig, EntropyConfig, FileSystemConfig, HotplugConfig, NetLink,
};
use crate::console::Sink;
use crate::kvm::Vm;
use crate::metadata::{GuestView, Metadata};
use crate::pmem::PmemFile;

/// Why a device cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The raw file or block device of a drive.
    #[error("drive {id}: {source}")]
    Drive {
        /// `drive_id`.
        id: String,
        /// Names the path.
        source: OpenError,
    },
    /// The copy-on-write disk of a drive.
    #[error("drive {id}: {source}")]
    ImageDisk {
        /// `drive_id`.
        id: String,
        /// Names the path.
        source: Box<DiskError>,
    },
    /// Chunks come to a node's own disks only.
    #[error("drive {id}: a disk that several nodes share needs its whole image here: leave chunk_source out")]
    SharedChunks {
        /// `drive_id`.
        id: String,
    },
    /// A file has no chunks.
    #[error("drive {id}: path_on_host is a file, which lacks nothing that somebody could get: leave chunk_source out")]
    FileChunks {
        /// `drive_id`.
        id: String,
    },
    /// What tells the nodes apart cannot be seen from inside of the sandbox.
    #[error(
        "drive {id}: a disk that several nodes share can only be there from the start: name it before InstanceStart"
    )]
    SharedLater {
        /// `drive_id`.
        id: String,
    },
    /// Nothing is at the path.
    #[error("drive {id}: {path}: {source}; check the path and who may read it")]
    Path {
        /// `drive_id`.
        id: String,
        /// `path_on_host`.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The tap of a network interface is not there.
    #[error(
        "network interface {id}: there is no tap device {tap}: make it (`ip tuntap add {tap} mode tap`) and set it up"
    )]
    NoTap {
        /// `iface_id`.
        id: String,
        /// `host_dev_name`.
        tap: String,
    },
    /// Inside of the sandbox there are only the taps that were named before.
    #[error(
        "network interface {id}: Open tap device failed: a VM that runs reaches no tap but those that it was started with: \
         give bedplate-vmm --tap {tap}"
    )]
    SealedTap {
        /// `iface_id`.
        id: String,
        /// `host_dev_name`.
        tap: String,
    },
    /// More queues of a kept tap are asked for than there are.
    #[error(
        "network interface {id}: Open tap device failed: queue_pairs {wanted} are asked for, and {kept} of tap {tap} are \
         kept for this VM (one for each vCPU, up to 8, of a tap that was made with multi_queue): ask for {kept} at most"
    )]
    KeptQueues {
        /// `iface_id`.
        id: String,
        /// `host_dev_name`.
        tap: String,
        /// `queue_pairs`.
        wanted: usize,
        /// Queues that there are.
        kept: usize,
    },
    /// The tap of a network interface cannot be used.
    #[error("network interface {id}: {source}")]
    Net {
        /// `iface_id`.
        id: String,
        /// Names the tap.
        source: TapError,
    },
    /// The host's kernel cannot carry frames of an interface.
    #[error("network interface {id}: {source}")]
    Vhost {
        /// `iface_id`.
        id: String,
        /// Why.
        source: VhostError,
    },
    /// Frames may lie in the memory of pmem devices.
    #[error(
        "network interface {id}, which has vhost, cannot be told of a pmem device's memory: {source}; remove one of the two, \
         or configure the pmem device before the start"
    )]
    VhostMemory {
        /// `iface_id`.
        id: String,
        /// Why.
        source: VhostError,
    },
    /// vhost-net is opened before the sandbox only.
    #[error(
        "network interface {id}: a VM that runs cannot get an interface with vhost: configure it before the start, or leave \
         vhost out"
    )]
    VhostLater {
        /// `iface_id`.
        id: String,
    },
    /// The other process that does the work of a device cannot be used.
    #[error("{what} {id}: {source}")]
    VhostUser {
        /// Kind of the device.
        what: &'static str,
        /// Its name.
        id: String,
        /// Names the socket.
        source: VhostUserError,
    },
    /// Such devices are there from the start only.
    #[error(
        "{what} {id}: a VM that runs cannot get a vhost-user device, because it reaches no new socket: configure it before \
         the start"
    )]
    VhostUserLater {
        /// Kind of the device.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// Somebody else has the socket.
    #[error("vsock: {path}: {source}; choose another uds_path")]
    SocketInUse {
        /// `uds_path`.
        path: PathBuf,
        /// Who.
        source: io::Error,
    },
    /// The vsock device cannot listen.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// Vectors or descriptors ran out.
    #[error("{0}")]
    Transport(#[from] VirtioPciError),
}

/// When a device is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// Before the guest runs, which finds it where we put it.
    Start,
    /// Later: where it lies is the guest's to say.
    Running,
}

/// What every attachment needs, and what knows the devices afterwards. An attachment that fails leaves nothing behind, except
/// where it says so.
pub(super) struct Attach<'a> {
    pub when: When,
    pub pci: &'a PciRoot,
    pub host: Arc<dyn TransportHost>,
    pub memory: &'a Memory,
    pub vcpus: u8,
    pub metadata: &'a Metadata,
    pub taps: &'a Taps,
    /// In the guest's address space beside its memory.
    pub files: &'a [PmemFile],
    /// For a guest without PCI: the bus of memory, and the places there that are left.
    pub places: Option<(&'a Bus, std::slice::Iter<'a, Place>)>,
    pub devices: &'a mut Devices,
}

impl Attach<'_> {
    pub fn disk(&mut self, disk: &DiskConfig) -> Result<Slot, BuildError> {
        match disk {
            DiskConfig::File(drive) => self.drive(drive),
            DiskConfig::Backend(drive) => self.backend_drive(drive),
        }
    }

    fn drive(&mut self, drive: &DriveConfig) -> Result<Slot, BuildError> {
        let (medium, warning) = block::open(drive)?;
        let config = BlockConfig {
            read_only: drive.read_only,
            cache: drive.cache,
            serial: drive.id.clone(),
            queues: self.vcpus.into(),
            limits: drive.limits,
        };
        let device = Block::over(medium, config).map_err(BuildError::Host)?;
        let (control, counts) = (device.control(), Counts::Block(Arc::clone(device.block_metrics())));
        let slot = self.virtio(Devices::name_of_disk(&drive.id), device, counts)?;
        self.devices.disks.insert(drive.id.clone(), control);
        self.devices.warnings.extend(warning);
        Ok(slot)
    }

    pub fn net(&mut self, net: &config::NetConfig) -> Result<Slot, BuildError> {
        if net.vhost && self.when == When::Running {
            return Err(DeviceError::VhostLater { id: net.id.clone() }.into());
        }
        let config = NetConfig { mac: net.mac, mtu: net.mtu, rx_limits: net.rx_limits, tx_limits: net.tx_limits };
        let tap = match &net.link {
            NetLink::Tap(tap) => tap,
            NetLink::Backend(socket) => return self.backend_net(net, &config, socket),
        };
        let queues = self.taps.open(net, tap)?;
        if net.vhost {
            let files = self.files.iter().map(PmemFile::seen).collect();
            let device = VhostNet::open(queues, &config, self.memory, &files)
                .map_err(|source| DeviceError::Vhost { id: net.id.clone(), source })?;
            let control = device.control();
            let slot = self.virtio(Devices::name_of_net(&net.id), device, Counts::Elsewhere)?;
            self.devices.vhost_nets.insert(net.id.clone(), control);
            return Ok(slot);
        }
        let mut device = Net::new(queues, config).map_err(BuildError::Host)?;
        if let Some(address) = net.metadata {
            let view = Box::new(GuestView::new(self.metadata.clone()));
            device.set_responder(Responder::new(address, view)).map_err(BuildError::Host)?;
        }
        let (control, counts) = (device.control(), Counts::Net(Arc::clone(device.net_metrics())));
        let slot = self.virtio(Devices::name_of_net(&net.id), device, counts)?;
        self.devices.nets.insert(net.id.clone(), control);
        Ok(slot)
    }

    /// The backend carries the frames.
    fn backend_net(&mut self, net: &config::NetConfig, config: &NetConfig, socket: &Path) -> Result<Slot, BuildError> {
        let (memory, usual) = (self.memory, self.vcpus.into());
        let device = self.over_backend("network interface", &net.id, socket, |frontend| {
            VhostUserNet::new(frontend, config, memory, net.queue_pairs, usual)
        })?;
        self.virtio(Devices::name_of_net(&net.id), device, Counts::Elsewhere)
    }

    /// The backend has the disk.
    fn backend_drive(&mut self, drive: &BackendDriveConfig) -> Result<Slot, BuildError> {
        let (memory, queues) = (self.memory, self.vcpus.into());
        let (device, control) = self.over_backend("drive", &drive.id, &drive.socket, |frontend| {
            VhostUser::block(frontend, memory, drive.cache, queues)
        })?;
        let slot = self.virtio(Devices::name_of_disk(&drive.id), device, Counts::Elsewhere)?;
        self.devices.backend_disks.insert(drive.id.clone(), control);
        Ok(slot)
    }

    pub fn file_system(&mut self, file_system: &FileSystemConfig) -> Result<(), BuildError> {
        let FileSystemConfig { tag, socket } = file_system;
        let memory = self.memory;
        let device =
            self.over_backend("file system", tag, socket, |frontend| VhostUser::file_system(frontend, memory, tag))?;
        self.virtio(format!("filesystem_{tag}"), device, Counts::Elsewhere).map(drop)
    }

    /// What `make` makes of the backend at `socket`.
    fn over_backend<D>(
        &self,
        what: &'static str,
        id: &str,
        socket: &Path,
        make: impl FnOnce(Frontend) -> Result<D, VhostUserError>,
    ) -> Result<D, DeviceError> {
        if self.when == When::Running {
            return Err(DeviceError::VhostUserLater { what, id: id.into() });
        }
        let device = Frontend::connect(socket).and_then(make);
        device.map_err(|source| DeviceError::VhostUser { what, id: id.into(), source })
    }

    /// The file becomes memory of `vm`, and stays that if this fails later; what the guest writes to one that it may only read
    /// leaves it and is counted.
    pub fn pmem(&mut self, file: &PmemFile, vm: &mut Vm, mmio: &Bus) -> Result<Slot, BuildError> {
        let PmemFile { config, region, mapping, file, file_len } = file;
        let (address, len) = (region.start, region.end - region.start);
        let flushed = (!config.read_only).then(|| file.try_clone()).transpose().map_err(BuildError::Host)?;
        // As for Firecracker, a flush costs all of the file.
        let device = PmemConfig { address, len, flush_cost: *file_len, limits: config.limits };
        let device = Pmem::new(device, flushed).map_err(BuildError::Host)?;
        vm.add_file(mapping, address)?;
        if config.read_only {
            mmio.insert(address, len, device.write_counter())?;
        }
        let (control, counts) = (device.control(), Counts::Pmem(Arc::clone(device.pmem_metrics())));
        let slot = self.virtio(Devices::name_of_pmem(&config.id), device, counts)?;
        self.devices.pmems.insert(config.id.clone(), control);
        Ok(slot)
    }

    pub fn vsock(&mut self, vsock: &config::VsockConfig) -> Result<(), BuildError> {
        let path = vsock.path.clone();
        socket::remove_dead(&path).map_err(|source| DeviceError::SocketInUse { path, source })?;
        let config = VsockConfig { guest_cid: vsock.cid, uds_path: vsock.path.clone() };
        let device = Vsock::new(config).map_err(DeviceError::Vsock)?;
        let counts = Counts::Vsock;
        self.virtio("vsock".into(), device, counts).map(drop)
    }

    pub fn rng(&mut self, entropy: &EntropyConfig) -> Result<(), BuildError> {
        let device = Rng::new(entropy.limits).map_err(BuildError::Host)?;
        let counts = Counts::Rng(Arc::clone(device.bytes()));
        self.virtio("entropy".into(), device, counts).map(drop)
    }

    pub fn balloon(&mut self, balloon: BalloonConfig) -> Result<(), BuildError> {
        let device = Balloon::new(balloon).map_err(BuildError::Host)?;
        self.devices.balloon = Some(device.control());
        let counts = Counts::Balloon(Arc::clone(device.balloon_metrics()));
        self.virtio("balloon".into(), device, counts).map(drop)
    }

    pub fn mem(&mut self, hotplug: HotplugConfig, region: Range<u64>) -> Result<(), BuildError> {
        let (len, block) = (region.end - region.start, hotplug.block_mib << 20);
        let device = Mem::new(MemConfig { address: region.start, len, block }).map_err(BuildError::Host)?;
        self.devices.mem = Some(device.control());
        let counts = Counts::Mem(Arc::clone(device.mem_metrics()));
        self.virtio("memory_hotplug".into(), device, counts).map(drop)
    }

    /// A console whose output goes to `sink`.
    pub fn console(&mut self, sink: Sink, size: WindowSize) -> Result<(), BuildError> {
        let device = Console::new(sink, size).map_err(BuildError::Host)?;
        self.devices.console = Some(device.control());
        let counts = Counts::Console(Arc::clone(device.console_metrics()));
        self.virtio("console".into(), device, counts).map(drop)
    }

    /// Puts a device on the bus, and notes what it counts and where its queues are.
    fn virtio(
        &mut self,
        name: String,
        device: impl VirtioDevice + 'static,
        counts: Counts,
    ) -> Result<Slot, BuildError> {
        let metrics = Arc::clone(device.metrics());
        let function = VirtioPciDevice::new(device, self.memory, &self.host).map_err(DeviceError::Transport)?;
        let function = Arc::new(Mutex::new(function));
        if let Some((bus, places)) = &mut self.places
            && let Some(place) = places.next()
        {
            let window = VirtioMmioWindow::new(&function, *place, self.pci.configured());
            bus.insert(place.address, WINDOW_LEN, Arc::new(Mutex::new(window)))?;
        }
        let shared = Arc::clone(&function) as Arc<Mutex<dyn PciFunction>>;
        let slot = match self.when {
            When::Start => self.pci.add_shared(shared)?,
            When::Running => self.pci.plug(shared)?,
        };
        self.devices.counts.insert(name.clone(), (metrics, counts));
        self.devices.transports.insert(name, (slot, function));
        Ok(slot)
    }
}
