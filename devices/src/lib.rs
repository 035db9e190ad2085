//! What a guest sees: platform devices, PCI and virtio.
//!
//! Nothing here names KVM, reads a configuration file or runs an async runtime. What a device needs from its host comes
//! in through the two traits of [`host`]; what the guest does to it arrives through [`bus::BusDevice`].
//!
//! Guest memory is [`Memory`] everywhere: one type, chosen here, because a device that is generic over memory buys
//! nothing in a VMM that has one kind.

use std::sync::Arc;

pub mod bus;
pub mod door;
pub mod files;
pub mod host;
pub mod metadata;
pub mod metrics;
pub mod pci;
pub mod platform;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod threads;
pub mod virtio;

/// A VM's RAM, shared between the machine and its devices. The mapping outlives every holder of the handle.
pub type Memory = Arc<vm_memory::GuestMemoryMmap<()>>;
