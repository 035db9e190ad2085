//! What devices count.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
    /// What the first of those was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_host_fault: Option<String>,
    /// What only this kind of device counts; by Firecracker's name where that counts the same.
    #[serde(flatten)]
    pub counters: BTreeMap<String, u64>,
}
