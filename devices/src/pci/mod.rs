//! PCI: a PCI Express root complex with one bus, on which functions of conventional PCI sit.
//!
//! [`PciRoot`] owns the functions, answers configuration accesses (memory mapped, [`PciRoot::ecam`], and through ports,
//! [`PciRoot::config_ports`]) and keeps the machine's buses in step with the base addresses that the guest
//! programs. A [`PciFunction`] is registers only; everything runs on the vCPU thread that made the access.
//!
//! Absent on purpose: bridges and further buses, option ROMs, function-level reset.

mod access;
mod bridge;
mod config;
mod msix;
mod root;
#[cfg(test)]
mod tests;

pub use access::{ConfigPorts, Ecam};
pub use config::{BAR_COUNT, Bar, CONFIG_LEN, ConfigSpace, Identity, Space};
pub use msix::{Msix, Vectors};
pub use root::{PciError, PciRoot, SLOTS, Slot};

/// Bytes of memory space that the memory-mapped configuration access takes: one bus.
pub const ECAM_LEN: u64 = 1 << 20;
/// First of the ports of the legacy configuration access.
pub const CONFIG_PORT: u64 = 0xcf8;
/// How many ports it takes.
pub const CONFIG_PORTS: u64 = 8;

/// One function of a device. Called with exclusive access, on vCPU threads.
pub trait PciFunction: Send {
    /// It is in `slot` from now on. Called once, before the guest sees it.
    fn placed(&mut self, _slot: Slot) {}

    /// Its configuration space, for the root to look at and to place BARs in.
    fn config(&mut self) -> &mut ConfigSpace;

    /// The guest reads configuration space.
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// The guest writes configuration space. The root moves BARs afterwards; anything else is the function's to notice.
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config().write(offset, data);
    }

    /// The guest reads inside BAR `bar`. All of `data` must be written.
    fn read_bar(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// The guest writes inside BAR `bar`.
    fn write_bar(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}

    /// BAR `bar` is decoded at `address` from now on, or nowhere. Called whenever that changes, with `None` in between.
    fn bar_moved(&mut self, _bar: usize, _address: Option<u64>) {}

    /// The machine is going away: stop threads and give back what the host lent. Idempotent.
    fn shutdown(&mut self) {}
}
