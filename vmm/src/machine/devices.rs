//! The devices of a machine, as its control thread knows them: what can be changed while they work, and what they count.

use std::collections::BTreeMap;

use bedplate_devices::virtio::block::{Backend, BlockControl};
use bedplate_devices::virtio::net::NetControl;

/// What changes a disk while its VM runs.
pub type DiskControl = BlockControl<Box<dyn Backend>>;

/// By the names that the configuration gives them.
#[derive(Default)]
pub struct Devices {
    pub(super) disks: BTreeMap<String, DiskControl>,
    pub(super) nets: BTreeMap<String, NetControl>,
    /// What the host could not do as it was asked for, in words.
    pub(super) warnings: Vec<String>,
}

impl Devices {
    /// The disk of a drive, if there is such a drive.
    pub fn disk(&self, drive_id: &str) -> Option<&DiskControl> {
        self.disks.get(drive_id)
    }

    /// A network interface, if there is such a one.
    pub fn net(&self, iface_id: &str) -> Option<&NetControl> {
        self.nets.get(iface_id)
    }

    /// What the host could not do as it was asked for and does otherwise.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}
