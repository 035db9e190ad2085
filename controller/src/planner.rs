//! What shall be done now, and why: a pure function from a [`World`] to a [`Plan`]. No I/O, no clock, no chance: the same
//! world gives the same plan, so a dry run shows what the executor is going to do.
//!
//! The rules, in the order in which they are applied to one draft of the world, each seeing what those before it did:
//!
//! 1. [`rules::nodes`]: a node that is silent for too long is lost; its VMs are let go, but for those that keep their
//!    disk: a VM of a tier with persistent disks that has run. It stays where it is until people give its disk up.
//! 2. [`rules::release`]: a slot is free when the node has reported that the VM is gone.
//! 3. [`rules::failures`]: a VM that cannot run where it is leaves, and is counted.
//! 4. [`rules::surplus`]: VMs that no tier asks for leave; those of an inactive tier that keeps disks are powered off.
//! 5. [`rules::fill`]: a name that a tier asks for and nothing bears gets a slot, chosen in [`place`].
//! 6. [`rules::roll`]: VMs of an older spec are replaced, one at a time, where their replacement is sure to fit.

mod draft;
mod place;
mod rules;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod walk;

use std::collections::BTreeMap;
use std::fmt;

use bedplate_api::VmId;
use bedplate_api::node::{NodeStatus, Power};

pub use place::{NODE_RESERVE_MIB, VM_OVERHEAD_MIB};
pub use rules::{FAILURES_MAX, retry_after};

use crate::records::{Assignment, Failure, NodeNumber, NodeRecord, TierRecord};

/// Everything that a plan depends on.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// All tiers.
    pub tiers: Vec<TierRecord>,
    /// All machines.
    pub nodes: Vec<Node>,
    /// All VMs that hold a slot.
    pub assignments: Vec<Assignment>,
    /// VMs that could not run, each with the seconds since the last time.
    pub failures: Vec<(Failure, u64)>,
    /// How long a node may be silent, in seconds.
    pub lost_after: u64,
    /// How long a machine may take from its boot script to its registration, in seconds.
    pub boot_deadline: u64,
}

/// A machine as the planner sees it.
#[derive(Debug, Clone)]
pub struct Node {
    /// As remembered.
    pub record: NodeRecord,
    /// Its last report to this process; none since the control node was started means that nothing may be concluded.
    pub report: Option<NodeStatus>,
    /// Seconds since its last word, or since the control node was started.
    pub silent: u64,
    /// Seconds since it was given something to boot, if it is booting.
    pub booting: Option<u64>,
}

/// Actions with no choices left, in the order in which to do them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What to do, each with its reason.
    pub actions: Vec<(Action, String)>,
    /// Why a tier is not full, by its name.
    pub shortfalls: BTreeMap<String, String>,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A node counts as lost until it reports again.
    Lose(NodeNumber),
    /// A machine that was booting is back where it was before.
    GiveUpBoot(NodeNumber),
    /// A node knows a later generation than this control node ever made; numbers go on from there.
    Renumber {
        /// The node.
        node: NodeNumber,
        /// What it reported.
        reported: u64,
    },
    /// A slot is free again.
    Release {
        /// The VM that was in it.
        vm: VmId,
        /// Its name, for people.
        name: String,
    },
    /// A VM leaves the desired set of its node.
    Leave {
        /// The VM.
        vm: VmId,
        /// Its name, for people.
        name: String,
        /// Where and why it cannot run, where that is the reason.
        failed: Option<String>,
    },
    /// A VM has run, so its disk is where it is from now on.
    Settle {
        /// The VM.
        vm: VmId,
        /// Its name, for people.
        name: String,
    },
    /// A VM is powered on or off where it is.
    SetPower {
        /// The VM.
        vm: VmId,
        /// Its name, for people.
        name: String,
        /// What is wanted.
        power: Power,
    },
    /// A VM gets a slot.
    Place {
        /// Name of the tier.
        tier: String,
        /// Name of the VM.
        name: String,
        /// The node.
        node: NodeNumber,
        /// The slot.
        slot: u32,
    },
    /// A VM has run for long enough for its failures to be forgotten.
    Forgive {
        /// Name of the VM.
        name: String,
    },
}

impl Action {
    /// What an event about this action is about.
    pub fn subject(&self) -> String {
        match self {
            Self::Lose(node) | Self::GiveUpBoot(node) | Self::Renumber { node, .. } => node.to_string(),
            Self::Release { name, .. }
            | Self::Leave { name, .. }
            | Self::Settle { name, .. }
            | Self::SetPower { name, .. }
            | Self::Place { name, .. }
            | Self::Forgive { name } => name.clone(),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lose(_) => f.write_str("counts as lost"),
            Self::GiveUpBoot(_) => f.write_str("is no longer expected to register"),
            Self::Renumber { reported, .. } => write!(f, "generations go on from {reported}"),
            Self::Release { .. } => f.write_str("its slot is free"),
            Self::Leave { .. } => f.write_str("is to be removed"),
            Self::Settle { .. } => f.write_str("its disk is kept from now on"),
            Self::SetPower { power: Power::Running, .. } => f.write_str("is to be powered on"),
            Self::SetPower { power: Power::Stopped, .. } => f.write_str("is to be powered off"),
            Self::Place { node, slot, .. } => write!(f, "gets slot {node}/{slot}"),
            Self::Forgive { .. } => f.write_str("its failures are forgotten"),
        }
    }
}

/// Decides.
pub fn plan(world: &World) -> Plan {
    let mut draft = draft::Draft::new(world);
    rules::settle(&mut draft);
    rules::nodes(&mut draft);
    rules::release(&mut draft);
    rules::failures(&mut draft);
    rules::surplus(&mut draft);
    rules::fill(&mut draft);
    rules::roll(&mut draft);
    draft.plan
}
