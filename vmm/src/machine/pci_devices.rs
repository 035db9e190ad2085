//! Attaching the devices on the PCI bus, one function each.

use std::ffi::CString;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bedplate_api::socket;
use bedplate_devices::Memory;
use bedplate_devices::host::PciHost;
use bedplate_devices::metadata::Responder;
use bedplate_devices::pci::PciRoot;
use bedplate_devices::virtio::VirtioDevice;
use bedplate_devices::virtio::block::{Backend, Block, BlockConfig, BlockControl, OpenError};
use bedplate_devices::virtio::net::{Net, NetConfig, Tap, TapError};
use bedplate_devices::virtio::pci::{VirtioPciDevice, VirtioPciError};
use bedplate_devices::virtio::rng::Rng;
use bedplate_devices::virtio::vsock::{Vsock, VsockConfig, VsockError};
use bedplate_images::disk::DiskError;

use super::BuildError;
use crate::block;
use crate::config::{self, DriveConfig};
use crate::metadata::{GuestView, Metadata};

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
        source: DiskError,
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
    /// The tap of a network interface cannot be used.
    #[error("network interface {id}: {source}")]
    Net {
        /// `iface_id`.
        id: String,
        /// Names the tap.
        source: TapError,
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

/// What changes a disk while its VM runs.
pub type DiskControl = BlockControl<Box<dyn Backend>>;

/// What every attachment needs.
pub(super) struct Attach<'a> {
    pub pci: &'a PciRoot,
    pub host: Arc<dyn PciHost>,
    pub memory: &'a Memory,
    pub metadata: &'a Metadata,
}

impl Attach<'_> {
    pub fn drive(&self, drive: &DriveConfig) -> Result<DiskControl, BuildError> {
        let backend = block::open(drive)?;
        let config = BlockConfig { read_only: drive.read_only, cache: drive.cache, serial: drive.id.clone() };
        let device = Block::new(backend, config);
        let control = device.control();
        self.virtio(device)?;
        Ok(control)
    }

    pub fn net(&self, net: &config::NetConfig) -> Result<(), BuildError> {
        let (id, tap) = (net.id.clone(), net.tap.clone());
        // Opening a tap that is not there would make one that leads nowhere.
        if !interface_exists(&tap) {
            return Err(DeviceError::NoTap { id, tap }.into());
        }
        let tap = Tap::open(&tap).map_err(|source| DeviceError::Net { id, source })?;
        let mut device = Net::new(tap, NetConfig { mac: net.mac, mtu: net.mtu });
        if let Some(address) = net.metadata {
            let view = Box::new(GuestView::new(self.metadata.clone()));
            device.set_responder(Responder::new(address, view)).map_err(BuildError::Host)?;
        }
        self.virtio(device)
    }

    pub fn vsock(&self, vsock: &config::VsockConfig) -> Result<(), BuildError> {
        let path = vsock.path.clone();
        socket::remove_dead(&path).map_err(|source| DeviceError::SocketInUse { path, source })?;
        let config = VsockConfig { guest_cid: vsock.cid, uds_path: vsock.path.clone() };
        self.virtio(Vsock::new(config).map_err(DeviceError::Vsock)?)
    }

    pub fn rng(&self) -> Result<(), BuildError> {
        self.virtio(Rng::new())
    }

    fn virtio(&self, device: impl VirtioDevice + 'static) -> Result<(), BuildError> {
        let function = VirtioPciDevice::new(device, self.memory, &self.host).map_err(DeviceError::Transport)?;
        self.pci.add(function)?;
        Ok(())
    }
}

fn interface_exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else { return false };
    // SAFETY: a terminated string that lives through the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}
