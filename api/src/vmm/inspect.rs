//! What a VM is doing at this moment: for people who want to know why it does nothing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ExitCounts, RunState};

/// `GET /bedplate/inspect`. Not one instant: vCPUs and queues go on while they are looked at, unless the VM is paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// As in the status.
    pub state: RunState,
    /// In the order of their numbers.
    pub vcpus: Vec<VcpuInspection>,
    /// Virtqueues by device; a device whose driver has not set up any has none.
    pub queues: BTreeMap<String, Vec<QueueInspection>>,
}

/// One vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuInspection {
    /// Its number, which is its APIC id.
    pub index: u8,
    /// Absent where it did not come out of the guest in time, which a host short of processors can cause, or has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registers: Option<Registers>,
    /// Exits to this process so far.
    pub exits: ExitCounts,
    /// The last of them, the newest first. Those that are not here were handled by KVM.
    pub last_exits: Vec<ExitRecord>,
}

/// Registers of an x86-64 vCPU, as numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Registers {
    pub rip: u64,
    pub rflags: u64,
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// Selectors; the base of `fs` and `gs` is where kernels and threads keep what is their own.
    pub cs: u16,
    pub ss: u16,
    pub fs_base: u64,
    pub gs_base: u64,
}

/// One exit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Why.
    pub kind: ExitKind,
    /// Port or guest-physical address, where the reason has one; of an address, the low 48 bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
    /// Bytes, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub len: Option<u8>,
}

/// Why a vCPU came to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum ExitKind {
    PortRead,
    PortWrite,
    MmioRead,
    MmioWrite,
    /// Of a model-specific register that KVM does not have; the address is its number.
    MsrRead,
    MsrWrite,
    /// Kicked, to be paused or looked at, or by a signal.
    Interrupted,
    Other,
}

/// One virtqueue, as its rings in guest memory say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueInspection {
    /// Its number in the device.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Requests that the driver has made available, modulo 65536; absent where the ring lies outside of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available: Option<u16>,
    /// Requests that the device has finished, modulo 65536.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<u16>,
    /// The difference: at rest, what a device waits with; of a receive queue, the buffers that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outstanding: Option<u16>,
}
