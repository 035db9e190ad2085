//! Between people (the `bedplate` command, the page) and the control node, beside the repository in [`crate::image`].
//!
//! | method and path | body → answer |
//! | --- | --- |
//! | `GET /v1/nodes` | → `[NodeView]` |
//! | `GET /v1/pool` | → `[PoolEntry]`: the free pool |
//! | `GET /v1/tiers` | → `[TierView]` |
//! | `GET /v1/tiers/{name}` | → [`TierView`] |
//! | `POST /v1/tiers` | [`TierSpec`] → [`TierView`]; 409 where the name is taken |
//! | `PUT /v1/tiers/{name}` | [`TierSpec`] → [`TierView`]; creates or replaces |
//! | `DELETE /v1/tiers/{name}` | → 204; its VMs are stopped |
//! | `GET /v1/vms` | → `[VmView]` |
//! | `GET /v1/vms/{name}/log` | → text, from the VM's node |
//! | `GET /v1/vms/{name}/inspect` | → [`Inspection`](crate::vmm::Inspection), likewise |
//! | `GET /v1/vms/{name}/console` | HTTP upgrade, passed on to the VM's node |
//! | `POST /v1/vms/{name}/capture` | [`Capture`] → a line of JSON for each [`CaptureStep`]; who hangs up ends it |
//! | `GET /v1/events?after=N` | → `[Event]`, oldest first, with a number greater than N |
//! | `GET /v1/plan` | → [`PlanView`]: what would be done now, and why; a dry run |
//! | `GET /` | a page for people |

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::image::{ImageSummary, Trace};
use crate::node::{Capacity, CopyProgress, DiskMode, VmPhase};
use crate::{ApiError, Digest, NodeId, VmId};

/// A physical machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Name that people use.
    pub name: String,
    /// Its id, once it has registered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<NodeId>,
    /// MAC address that it booted from, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Where it stands.
    pub state: NodeState,
    /// What it has, once it has registered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Capacity>,
    /// Slots of it that hold a VM.
    pub slots_used: u32,
    /// Seconds since its last word.
    pub last_seen_seconds: u64,
}

/// Where a physical machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Seen by the boot service, nothing given to it yet.
    Blank,
    /// Was given a VMM image to boot, has not registered yet.
    Booting,
    /// Registered and reporting.
    Ready,
    /// Has not reported for longer than the limit.
    Lost,
}

/// What stands in the free pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolEntry {
    /// Name: that of the machine, or of the machine and a slot number, such as `node-1/0`.
    pub name: String,
    /// Physical machines wait for a VMM image, virtual ones for an application image.
    pub kind: PoolKind,
    /// The physical machine.
    pub node: String,
}

/// Two kinds of unallocated node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolKind {
    /// A machine without a hypervisor.
    Physical,
    /// A slot of a hypervisor node.
    Virtual,
}

/// A number of like VMs, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierSpec {
    /// Name; its VMs are `{name}-1`, `{name}-2`, … Letters, digits and hyphens.
    pub name: String,
    /// Tag or digest of a `disk` image in the repository; resolved when the tier is created or replaced.
    pub image: String,
    /// How many VMs to keep running.
    pub target: u32,
    /// vCPUs of each, 1 to 8.
    #[serde(default = "one")]
    pub cpus: u8,
    /// RAM of each in MiB.
    #[serde(default = "default_memory")]
    pub memory_mib: u64,
    /// What becomes of the disks' changes.
    #[serde(default = "non_persistent")]
    pub disk: DiskMode,
    /// Only an active tier is filled.
    #[serde(default)]
    pub active: bool,
}

const fn one() -> u8 {
    1
}
const fn default_memory() -> u64 {
    512
}
const fn non_persistent() -> DiskMode {
    DiskMode::NonPersistent
}

/// A tier, as observed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierView {
    /// As asked for.
    pub spec: TierSpec,
    /// What `spec.image` was resolved to.
    pub digest: Digest,
    /// VMs that have a slot.
    pub assigned: u32,
    /// VMs that run.
    pub running: u32,
    /// Why it is not full, where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// A virtual machine, as seen from the control node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmView {
    /// This incarnation.
    pub id: VmId,
    /// Name, `{tier}-{ordinal}`.
    pub name: String,
    /// Its tier.
    pub tier: String,
    /// Name of its node.
    pub node: String,
    /// Slot number on that node.
    pub slot: u32,
    /// Where it stands, as last reported.
    pub phase: VmPhase,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Its address, once its guest has taken one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// How often its node started it again.
    pub restarts: u32,
    /// Progress of the copy of its image, while that lasts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyProgress>,
}

/// One line of the log of decisions and of what came of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with each event; survives restarts.
    pub number: u64,
    /// Seconds since 1970.
    pub time: u64,
    /// What it is about, such as `node-1` or `web-2`.
    pub subject: String,
    /// What happened and why.
    pub message: String,
}

/// The planner's answer to the state as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanView {
    /// One line per action, each with its reason.
    pub actions: Vec<String>,
}

/// Asks for an image of a running VM's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capture {
    /// Tag that shall point to the image; one that is there is moved.
    pub image: String,
    /// What belongs to this one machine stays in it.
    #[serde(default)]
    pub keep_identity: bool,
}

/// How a capture goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureStep {
    /// It is under way.
    Progress {
        /// With what.
        phase: CapturePhase,
        /// Bytes done.
        done: u64,
        /// Of so many; 0 where nobody knows.
        total: u64,
    },
    /// The last line: it is done.
    Captured(Captured),
    /// The last line: there is no image.
    Failed(ApiError),
}

/// What a capture does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapturePhase {
    /// The guest is brought to rest and its disk copied aside.
    Snapshot,
    /// What was written to the disk comes to the control node.
    Fetch,
    /// Image and what was written become one.
    Merge,
    /// What belongs to one machine is removed.
    Clean,
    /// Chunks that are not there yet are kept.
    Store,
}

/// A captured image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// It.
    pub image: ImageSummary,
    /// Why the guest's file systems are as after a power cut, where they were not brought to rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfrozen: Option<String>,
    /// What belonged to that one machine and is not in the image.
    pub removed: Vec<Trace>,
    /// What belongs to it and is still in the image, and why.
    pub left: Vec<LeftTrace>,
    /// What else to know, one line each.
    pub notes: Vec<String>,
    /// Chunks that the image has.
    pub chunks: u64,
    /// Those of them that were there before.
    pub reused: u64,
}

/// Something that stays in an image although it belongs to one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftTrace {
    /// What.
    #[serde(flatten)]
    pub trace: Trace,
    /// Why it stays.
    pub why: String,
}
