//! What devices ask of their host. Implemented once, over KVM, in `vmm`; tests implement it over plain event descriptors.

use std::io;

use vmm_sys_util::eventfd::EventFd;

use crate::pci::Slot;
use crate::platform::IrqLine;

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

/// A way to a pin of the host's interrupt controllers. It ends when this is dropped, whoever else has the descriptor.
pub trait Pin: Send + Sync {
    /// The descriptor whose signal is an edge on the pin.
    fn trigger(&self) -> &EventFd;
}

/// Where a guest notifies a device of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doorbell {
    /// A write of any width and value to this port.
    Port(u16),
    /// A write of these 32 bits to this address.
    Register {
        /// Guest-physical.
        address: u64,
        /// What is written.
        value: u32,
    },
}

/// What a virtio transport needs from the machine.
pub trait TransportHost: Send + Sync {
    /// A new message-signalled interrupt.
    ///
    /// # Errors
    /// The host has none left.
    fn msi_vector(&self) -> io::Result<Box<dyn MsiVector>>;

    /// Another way to this pin of the interrupt controllers (GSI).
    ///
    /// # Errors
    /// The host has no descriptors left, or refused.
    fn pin(&self, gsi: u32) -> io::Result<Box<dyn Pin>>;

    /// INTA# of the device in `slot`: the number of its pin, and the way there. Devices share it: it is high as long as one of
    /// them asserts it.
    fn intx(&self, slot: Slot) -> (u8, Box<dyn IrqLine>);

    /// From now on a guest's write to `doorbell` signals `event` instead of going to a device.
    ///
    /// # Errors
    /// It is taken, or the host refused.
    fn add_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()>;

    /// Undoes [`TransportHost::add_doorbell`] with the same arguments.
    ///
    /// # Errors
    /// There was no such registration.
    fn remove_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()>;
}
