//! Why a vCPU left the guest.

use super::DebugExit;

/// One exit. Data that it borrows lies in the vCPU's run page: what a read exit wants is written there before the next
/// run.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port: `data` holds one access of `width` bytes, or several for a string instruction.
    PortRead {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        width: usize,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// The guest writes a port; the fields are as in [`Exit::PortRead`].
    PortWrite {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        width: usize,
        /// What it writes.
        data: &'a [u8],
    },
    /// The guest reads memory that is not RAM.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// To be filled; 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// The guest writes memory that is not RAM.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// What it writes; 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The guest reads or writes a model-specific register that KVM does not have. It is answered already.
    Msr {
        /// Number of the register.
        register: u32,
        /// Whether it is a write.
        write: bool,
        /// Whether the guest gets a fault.
        faults: bool,
    },
    /// Something that a debugger may have asked for: [`super::Vcpu::sort_out`] says.
    Debug(DebugExit),
    /// A signal or a [`super::Kicker`] interrupted the run.
    Interrupted,
    /// KVM has not run it: another vCPU is about to start it, or KVM lacks something.
    NotRun,
    /// The guest executed `HLT` on a VM without interrupt controller.
    Halted,
    /// The processor shut down: a triple fault.
    Shutdown,
    /// The guest asked KVM itself for a reset.
    Reset,
    /// The guest asked KVM itself for power off.
    PowerOff,
    /// The guest told KVM that it has crashed, or something else that has a number.
    SystemEvent(u32),
    /// KVM cannot go on; the text is its sub-error and data.
    InternalError(String),
    /// The processor refused the guest's state.
    FailedEntry {
        /// What the processor gave as reason.
        reason: u64,
    },
    /// Nothing that needs an answer.
    Other(&'static str),
}
