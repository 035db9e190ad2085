//! What the control node remembers across restarts. Each type is one row of the store; nothing here is observed, except
//! where a comment says that a decision depends on it.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};

use bedplate_api::control::{NodeState, TierSpec};
use bedplate_api::node::{Capacity, DiskMode, Ipv4Net, Power, RestartPolicy, VmSpec};
use bedplate_api::{Digest, NodeId, VmId};
use serde::{Deserialize, Serialize};

/// A physical machine's number, given at first sight and never again to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeNumber(pub u32);

impl fmt::Display for NodeNumber {
    /// The name that people use.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node-{}", self.0)
    }
}

/// A physical machine, from the first time that it asked for an address or registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRecord {
    /// Its number, which is also its name.
    pub number: NodeNumber,
    /// Its id, once it has registered.
    pub id: Option<NodeId>,
    /// MAC address that it booted from, where known.
    pub mac: Option<String>,
    /// Where its agent serves, once it has registered.
    pub endpoint: Option<SocketAddr>,
    /// Address leased to it, or that it registered with.
    pub address: Option<std::net::IpAddr>,
    /// Network for its VMs, once it has registered; kept from then on.
    pub vm_network: Option<Ipv4Net>,
    /// Where it stands. Kept, so that a node lost before a restart is not taken for a ready one after it.
    pub state: NodeState,
    /// Seconds since 1970 when it was given something to boot, while `state` is `Booting`.
    pub booting_since: Option<u64>,
    /// As last reported; kept so that the page can show a lost node's size.
    pub capacity: Option<Capacity>,
    /// Generation of its desired set; grows with each change of that set.
    pub generation: u64,
}

impl NodeRecord {
    /// A machine of which nothing is known yet.
    pub const fn new(number: NodeNumber) -> Self {
        Self {
            number,
            id: None,
            mac: None,
            endpoint: None,
            address: None,
            vm_network: None,
            state: NodeState::Blank,
            booting_since: None,
            capacity: None,
            generation: 0,
        }
    }
}

/// A tier, as asked for, with its image resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierRecord {
    /// As asked for.
    pub spec: TierSpec,
    /// What `spec.image` pointed to when the tier was created or replaced.
    pub digest: Digest,
}

impl TierRecord {
    /// The VM of this tier called `name`.
    pub fn vm(&self, id: VmId, name: String) -> VmSpec {
        VmSpec {
            id,
            name,
            image: self.digest,
            cpus: self.spec.cpus,
            memory_mib: self.spec.memory_mib,
            disk: self.spec.disk,
            power: Power::Running,
            restart: RestartPolicy::Always,
            cmdline: String::new(),
        }
    }

    /// `vm` is what this tier asks for today.
    pub fn matches(&self, vm: &VmSpec) -> bool {
        vm.image == self.digest
            && vm.cpus == self.spec.cpus
            && vm.memory_mib == self.spec.memory_mib
            && vm.disk == self.spec.disk
    }

    /// A tier that is not active holds its VMs' disks only where their changes are to be kept.
    pub fn keeps_disks(&self) -> bool {
        self.spec.disk == DiskMode::Persistent
    }
}

/// A VM bound to a slot of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assignment {
    /// As handed to the node.
    pub vm: VmSpec,
    /// Its tier, which may be gone.
    pub tier: String,
    /// Its node.
    pub node: NodeNumber,
    /// Its slot on that node.
    pub slot: u32,
    /// Set when the VM is no longer wanted: from this generation on, the node's desired set lacks it. The slot stays
    /// taken until the node has reported that the VM is gone.
    pub left_at: Option<u64>,
    /// It has run there, so a persistent disk has something on it that is nowhere else.
    #[serde(default)]
    pub has_run: bool,
}

impl Assignment {
    /// It belongs to its node's desired set.
    pub const fn wanted(&self) -> bool {
        self.left_at.is_none()
    }
}

/// How often a VM of one name could not run, in a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// Name of the VM.
    pub name: String,
    /// Its tier.
    pub tier: String,
    /// How often.
    pub count: u32,
    /// Seconds since 1970 of the last time.
    pub at: u64,
    /// Where that was.
    pub node: NodeNumber,
    /// What the node said.
    pub reason: String,
}

/// An address given to a machine on the provisioning network, for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// Lower case, with colons.
    pub mac: String,
    /// Its address.
    pub address: Ipv4Addr,
}
