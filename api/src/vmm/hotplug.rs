//! Memory that is added to a VM that runs, and taken away again; and vCPUs that are added.

use serde::{Deserialize, Serialize};

/// A region for such memory, empty at the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplug {
    /// MiB that can be added at most.
    pub total_size_mib: u64,
    /// MiB of the pieces that the guest adds and returns.
    #[serde(default = "block_size_mib")]
    pub block_size_mib: u64,
    /// Checked as Firecracker does, and without effect: a guest gets and returns blocks.
    #[serde(default = "slot_size_mib")]
    pub slot_size_mib: u64,
}

const fn block_size_mib() -> u64 {
    2
}

const fn slot_size_mib() -> u64 {
    128
}

/// Another size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugUpdate {
    /// MiB that the guest shall have of the region: whole blocks.
    pub requested_size_mib: u64,
}

/// The region, and how far the guest is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MemoryHotplugStatus {
    pub total_size_mib: u64,
    pub block_size_mib: u64,
    pub slot_size_mib: u64,
    /// MiB that the guest has.
    pub plugged_size_mib: u64,
    /// MiB that it shall have.
    pub requested_size_mib: u64,
}

/// The vCPUs of a VM that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vcpus {
    /// Those that there are, from the first on. Which of them the guest uses is its own choice.
    pub count: u8,
    /// Those that there may be.
    pub max_count: u8,
}

/// More vCPUs; none goes. As many as there are: the guest is told again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpusUpdate {
    /// How many there shall be.
    pub count: u8,
}
