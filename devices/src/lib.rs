//! What a guest sees: platform devices, PCI and virtio.
//!
//! Nothing here names KVM, reads a configuration file or runs an async runtime. What a device needs from its host comes
//! in through the two traits of [`host`]; what the guest does to it arrives through [`bus::BusDevice`].

pub mod bus;
pub mod host;
