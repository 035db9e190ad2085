//! Memory that the guest gives back.

use serde::{Deserialize, Serialize};

/// A memory balloon. Where none is configured a VM has one that only reports free pages; a document without one says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// MiB that the guest shall do without.
    pub amount_mib: u32,
    /// The guest takes some of them back before it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two reports of the guest on its memory. Absent or 0: none, also later.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Runs of hinting can be started.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// The guest tells of pages as they become free, and they go back to the host. Firecracker's default is `false`;
    /// ours is `true`.
    #[serde(default = "yes")]
    pub free_page_reporting: bool,
}

const fn yes() -> bool {
    true
}

/// Another size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// MiB that the guest shall do without.
    pub amount_mib: u32,
}

/// Another interval.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    /// Seconds between two reports.
    pub stats_polling_interval_s: u16,
}

/// What the guest said of its memory last. Numbers that it has not given are absent; memory is in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct BalloonStats {
    /// Pages of 4 KiB that the balloon shall hold.
    pub target_pages: u32,
    /// That it holds.
    pub actual_pages: u32,
    pub target_mib: u32,
    pub actual_mib: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

/// How a run of hinting is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    /// The guest gets its pages back as soon as it has told of all; otherwise when the run is stopped.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for HintingStart {
    fn default() -> Self {
        Self { acknowledge_on_stop: true }
    }
}

/// Where hinting stands: 0 nothing, 1 done, otherwise the number of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HintingStatus {
    /// The host's last command.
    pub host_cmd: u32,
    /// The guest's last word.
    pub guest_cmd: u32,
}
