//! What devices count.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Status;

/// Counters of one virtio device since the start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Times that the driver woke the device.
    pub notifications: u64,
    /// Requests, frames and other chains of buffers that were returned to the driver.
    pub chains: u64,
    /// Interrupts for those.
    pub interrupts: u64,
    /// Times that the driver broke a rule.
    pub guest_faults: u64,
    /// Times that the host let the device down.
    pub host_faults: u64,
    /// The guest was asked to let go of it, and has not yet. Absent: it was not asked, or the VMM cannot ask.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unplugging: bool,
    /// What the first of those was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_host_fault: Option<String>,
    /// What only this kind of device counts; by Firecracker's name where that counts the same.
    #[serde(flatten)]
    pub counters: BTreeMap<String, u64>,
}

/// One line of metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MetricsLine {
    /// Milliseconds since 1970, under Firecracker's name.
    pub utc_timestamp_ms: u64,
    /// As asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
    /// What is counted. Its `id` is there only where it was asked for.
    #[serde(flatten)]
    pub status: Status,
    /// What devices count once more, where Firecracker's readers look for it: `block_{drive_id}`, `net_{iface_id}`,
    /// `block` and `net` for their sums, and so on.
    #[serde(flatten)]
    pub counters: BTreeMap<String, BTreeMap<String, u64>>,
}
