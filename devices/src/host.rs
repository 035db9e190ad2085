//! What devices ask of their host. Implemented once, over KVM, in `vmm`; tests implement it over plain event descriptors.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt of the host's interrupt controller.
///
/// Allocated when a device is built, one per MSI-X vector; the guest decides later where it goes. Signalling it is a write
/// to [`MsiVector::trigger`], from any thread, without a lock and without a system call of a vCPU.
pub trait MsiVector: Send + Sync {
    /// The descriptor whose signal raises the interrupt while it is routed.
    fn trigger(&self) -> &EventFd;

    /// Sends later signals to `address` with `data` (Intel SDM vol. 3, 11.11). Called on a vCPU thread when the guest
    /// writes or unmasks a table entry; idempotent.
    ///
    /// # Errors
    /// The host refused the route: a host fault, the vector stays as it was.
    fn route(&self, address: u64, data: u32) -> io::Result<()>;

    /// Stops delivery. Signals that arrive meanwhile are the caller's to remember (the pending bit array).
    ///
    /// # Errors
    /// The host refused.
    fn unroute(&self) -> io::Result<()>;
}

/// What a PCI function needs from the machine.
pub trait PciHost: Send + Sync {
    /// A new interrupt vector.
    ///
    /// # Errors
    /// The host has none left.
    fn msi_vector(&self) -> io::Result<Box<dyn MsiVector>>;

    /// From now on a guest write of any width to `port` signals `event` instead of going to a device.
    ///
    /// # Errors
    /// The port is taken, or the host refused.
    fn add_notify(&self, port: u16, event: &EventFd) -> io::Result<()>;

    /// Undoes [`PciHost::add_notify`] with the same arguments.
    ///
    /// # Errors
    /// There was no such registration.
    fn remove_notify(&self, port: u16, event: &EventFd) -> io::Result<()>;
}
