//! Between the control node and a node agent.
//!
//! Served by the node agent (`Authorization: Bearer <token>` where it listens on TCP; its Unix socket needs none):
//!
//! | method and path | body → answer |
//! | --- | --- |
//! | `GET /v1/status` | → [`NodeStatus`] |
//! | `GET /v1/desired` | → [`Desired`] |
//! | `PUT /v1/desired` | [`Desired`] → [`NodeStatus`]; the same generation twice is a no-op, an older one is 409 |
//! | `GET /v1/vms/{id}/log` | → text: the last 64 KiB of the serial console |
//! | `GET /v1/vms/{id}/inspect` | → [`Inspection`](crate::vmm::Inspection); 503 where the VM does not run |
//! | `GET /v1/vms/{id}/console` | HTTP upgrade to `bedplate-console`: raw bytes of the serial console both ways |
//! | `POST /v1/vms/{id}/capture` | → the disk as it is now, as `bedplate_images::disk` sends it; the header [`UNFROZEN`] says whether its file systems had come to rest |
//! | `POST /v1/chunks/fetch?wait=N` | as in [`crate::image`], for peers: what is here, or comes within N seconds (30 at most) because it is on its way; the rest is left out |
//! | `POST /v1/chunks/check` | as in [`crate::image`], for peers |
//!
//! Served by the control node for nodes, with the same token: `POST /v1/nodes/register` ([`Register`] → [`Registered`])
//! and `POST /v1/nodes/{id}/status` ([`NodeStatus`] → 204), plus the repository's reading half.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::{Digest, NodeId, VmId};

/// Name of the protocol that a console connection is upgraded to.
pub const CONSOLE_PROTOCOL: &str = "bedplate-console";

/// Header of a captured disk: why its file systems are as after a power cut; empty where they were brought to rest.
pub const UNFROZEN: &str = "bedplate-unfrozen";

/// Everything that shall run on one node. The node agent makes it so, whatever it finds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Desired {
    /// Grows with every change. 0: nothing was ever asked.
    pub generation: u64,
    /// The VMs that shall exist; one that the node has and this lacks is stopped and removed.
    pub vms: Vec<VmSpec>,
}

/// One virtual machine, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// This incarnation.
    pub id: VmId,
    /// Host name and the name that people use; unique in a cluster at any time. Letters, digits and hyphens.
    pub name: String,
    /// Digest of the manifest of a `disk` image.
    pub image: Digest,
    /// Number of vCPUs, 1 to 8.
    pub cpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: u64,
    /// What becomes of the disk's changes.
    pub disk: DiskMode,
    /// Running or powered off.
    pub power: Power,
    /// What to do when the VM ends by itself.
    pub restart: RestartPolicy,
    /// Added to the kernel's command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
}

/// What becomes of the disk's changes when the VM is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskMode {
    /// Kept.
    Persistent,
    /// Dropped: each start wakes on the original image.
    NonPersistent,
}

/// Whether a VM shall run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// Started, and kept so by [`RestartPolicy`].
    Running,
    /// Stopped gracefully; its disk stays.
    Stopped,
}

/// What to do when a VM that shall run ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// Start it again, however it ended.
    Always,
    /// Start it again unless the guest powered off.
    OnFailure,
    /// Leave it ended.
    Never,
}

/// Where a VM stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmPhase {
    /// Accepted, nothing done yet.
    Pending,
    /// Its image's missing chunks are being fetched.
    Copying,
    /// Its VMM process is being started.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Asked to power off.
    Stopping,
    /// Ended and not to be started again.
    Stopped,
    /// Ended or could not be started; will be tried again at a time that grows with each failure.
    BackOff,
    /// Cannot run here; `detail` says why. Not tried again until the desired state changes.
    Failed,
}

/// One virtual machine, as observed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStatus {
    /// This incarnation.
    pub id: VmId,
    /// As in its spec.
    pub name: String,
    /// Where it stands.
    pub phase: VmPhase,
    /// Why it stands there, for a person: the reason of the last end or failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The address that the node's DHCP server holds for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// The guest has taken that address.
    #[serde(default)]
    pub address_taken: bool,
    /// Process id of its VMM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// How often it was started again after it ended by itself.
    #[serde(default)]
    pub restarts: u32,
    /// Progress of the copy of its image, while that lasts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyProgress>,
}

/// Bytes before compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyProgress {
    /// On the node and verified.
    pub done: u64,
    /// In the image.
    pub total: u64,
}

/// Most VMs that one node can provide slots for.
pub const MAX_SLOTS: u32 = 1024;

/// What a node has for VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// Online processors.
    pub cpus: u32,
    /// RAM in MiB, all of it.
    pub memory_mib: u64,
    /// How many VMs it is configured to provide, at most [`MAX_SLOTS`].
    pub slots: u32,
    /// Bytes free where images and disks are kept.
    pub disk_free: u64,
}

/// One node, as observed by its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeStatus {
    /// This node.
    pub id: NodeId,
    /// Changes with every boot of the machine.
    pub boot_id: String,
    /// Version of the agent.
    pub version: String,
    /// Generation of the desired state that the agent works on.
    pub generation: u64,
    /// What it has.
    pub capacity: Capacity,
    /// Every VM that it knows.
    pub vms: Vec<VmStatus>,
    /// Digests of the manifests of images that are complete here.
    pub images: Vec<Digest>,
}

/// A node introduces itself after boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Register {
    /// This node.
    pub id: NodeId,
    /// MAC address of the interface that it booted from, lower case with colons, where it knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Address under which its agent serves.
    pub address: IpAddr,
    /// TCP port of its agent.
    pub port: u16,
    /// Its state now.
    pub status: NodeStatus,
}

/// The control node's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registered {
    /// Name that people use, for example `node-1`.
    pub name: String,
    /// Network for this node's VMs, routed to it by the control node: the bridge takes the first host address.
    pub vm_network: Ipv4Net,
    /// Report at least this often, in seconds.
    pub report_seconds: u32,
}

/// An IPv4 network in CIDR form, for example `10.78.1.0/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ipv4Net {
    /// Network address.
    pub address: Ipv4Addr,
    /// Prefix length in bits, 0 to 32.
    pub prefix: u8,
}
