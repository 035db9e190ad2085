//! The world as it will be once the actions planned so far are done. Rules change the draft only through these methods,
//! so that a later rule never sees a slot or a name that an earlier one has taken.

use std::collections::{BTreeMap, BTreeSet};

use bedplate_api::VmId;
use bedplate_api::control::NodeState;
use bedplate_api::node::{DiskMode, Power, VmPhase, VmStatus};

use super::{Action, Plan, World};
use crate::records::{Assignment, Failure, NodeNumber, TierRecord};

/// Holds `world` apart from what is drafted over it.
pub(super) struct Draft<'w> {
    pub world: &'w World,
    pub plan: Plan,
    /// State of each node, as drafted.
    states: BTreeMap<NodeNumber, NodeState>,
    /// VMs that hold a slot, as drafted.
    pub held: Vec<Held<'w>>,
    /// VMs that fail, as drafted: those remembered and those counted by this plan (with 0 seconds since).
    pub failing: BTreeMap<String, (Failure, u64)>,
    reports: BTreeMap<VmId, &'w VmStatus>,
    /// Indices into `held` by node; without it, placing is quadratic in the size of the cluster.
    here: BTreeMap<NodeNumber, Vec<usize>>,
    /// By node, the number of VMs that it reports and that hold no slot: they are on their way out, and take up room
    /// until then.
    strangers: BTreeMap<NodeNumber, usize>,
}

/// A slot that is taken.
pub(super) struct Held<'w> {
    pub name: String,
    pub tier: String,
    pub node: NodeNumber,
    pub slot: u32,
    pub memory_mib: u64,
    pub wanted: bool,
    /// Its disk is persistent and has something on it.
    pub keeps_disk: bool,
    /// None for one that this very plan has placed.
    pub assignment: Option<&'w Assignment>,
}

impl Held<'_> {
    /// Its id; one that was placed just now has none yet.
    pub fn id(&self) -> Option<VmId> {
        self.assignment.map(|a| a.vm.id)
    }
}

impl<'w> Draft<'w> {
    pub fn new(world: &'w World) -> Self {
        let held = world.assignments.iter().map(|a| Held {
            name: a.vm.name.clone(),
            tier: a.tier.clone(),
            node: a.node,
            slot: a.slot,
            memory_mib: a.vm.memory_mib,
            wanted: a.wanted(),
            keeps_disk: a.has_run && a.vm.disk == DiskMode::Persistent,
            assignment: Some(a),
        });
        let reports = world.nodes.iter().flat_map(|n| n.report.iter().flat_map(|r| &r.vms));
        let mut draft = Self {
            world,
            plan: Plan::default(),
            states: world.nodes.iter().map(|n| (n.record.number, n.record.state)).collect(),
            held: held.collect(),
            failing: world.failures.iter().map(|f| (f.0.name.clone(), f.clone())).collect(),
            reports: reports.map(|vm| (vm.id, vm)).collect(),
            here: BTreeMap::new(),
            strangers: strangers(world),
        };
        draft.index();
        draft
    }

    fn index(&mut self) {
        self.here.clear();
        for (index, held) in self.held.iter().enumerate() {
            self.here.entry(held.node).or_default().push(index);
        }
    }

    /// Slots of `node` that are taken, with their places in `held`.
    pub fn here(&self, node: NodeNumber) -> impl Iterator<Item = (usize, &Held<'w>)> {
        self.here.get(&node).into_iter().flatten().map(|index| (*index, &self.held[*index]))
    }

    /// VMs that `node` reports and that hold no slot.
    pub fn strangers(&self, node: NodeNumber) -> usize {
        self.strangers.get(&node).copied().unwrap_or(0)
    }

    fn act(&mut self, action: Action, reason: impl Into<String>) {
        self.plan.actions.push((action, reason.into()));
    }

    /// The node is up, as drafted: its reports count and it may be given work.
    pub fn ready(&self, node: NodeNumber) -> bool {
        self.states.get(&node) == Some(&NodeState::Ready)
    }

    /// The last report on a VM.
    pub fn report(&self, vm: VmId) -> Option<&'w VmStatus> {
        self.reports.get(&vm).copied()
    }

    /// The VM runs, by the last report of a node that is up.
    pub fn running(&self, held: &Held<'_>) -> bool {
        held.id()
            .filter(|_| self.ready(held.node))
            .and_then(|id| self.report(id))
            .is_some_and(|vm| vm.phase == VmPhase::Running)
    }

    /// Tiers by name.
    pub fn tier(&self, name: &str) -> Option<&'w TierRecord> {
        self.world.tiers.iter().find(|t| t.spec.name == name)
    }

    pub fn lose(&mut self, node: NodeNumber, reason: String) {
        self.states.insert(node, NodeState::Lost);
        self.act(Action::Lose(node), reason);
    }

    pub fn give_up_boot(&mut self, node: NodeNumber, reason: String) {
        self.act(Action::GiveUpBoot(node), reason);
    }

    pub fn renumber(&mut self, node: NodeNumber, reported: u64, reason: String) {
        self.act(Action::Renumber { node, reported }, reason);
    }

    /// The VM at `index` of `held` has run where it is, and keeps its disk.
    pub fn settle(&mut self, index: usize, reason: String) {
        let held = &mut self.held[index];
        held.keeps_disk = true;
        let name = held.name.clone();
        if let Some(vm) = held.id() {
            self.act(Action::Settle { vm, name }, reason);
        }
    }

    /// The VM at `index` of `held` is no longer wanted; it goes on holding its slot.
    pub fn leave(&mut self, index: usize, reason: String) {
        self.drop_wanted(index, None, reason);
    }

    /// The same, because it cannot run there; counts.
    pub fn fail(&mut self, index: usize, why: String, reason: String) {
        let held = &self.held[index];
        let count = self.failing.get(&held.name).map_or(0, |(failure, _)| failure.count).saturating_add(1);
        let failure = Failure {
            name: held.name.clone(),
            tier: held.tier.clone(),
            count,
            at: 0,
            node: held.node,
            reason: why.clone(),
        };
        self.failing.insert(held.name.clone(), (failure, 0));
        self.drop_wanted(index, Some(why), reason);
    }

    fn drop_wanted(&mut self, index: usize, failed: Option<String>, reason: String) {
        let held = &mut self.held[index];
        held.wanted = false;
        let name = held.name.clone();
        if let Some(vm) = held.id() {
            self.act(Action::Leave { vm, name, failed }, reason);
        }
    }

    /// Frees every slot that `gone` picks, with the reason that it gives.
    pub fn release(&mut self, gone: impl Fn(&Self, &Held<'w>) -> Option<String>) {
        let reasons: Vec<_> = self.held.iter().map(|held| gone(self, held)).collect();
        let mut reasons = reasons.into_iter();
        let mut actions = Vec::new();
        self.held.retain(|held| {
            let (Some(Some(reason)), Some(vm)) = (reasons.next(), held.id()) else { return true };
            actions.push((Action::Release { vm, name: held.name.clone() }, reason));
            false
        });
        self.plan.actions.append(&mut actions);
        self.index();
    }

    pub fn set_power(&mut self, index: usize, power: Power, reason: String) {
        let held = &self.held[index];
        if let Some(vm) = held.id() {
            let name = held.name.clone();
            self.act(Action::SetPower { vm, name, power }, reason);
        }
    }

    pub fn place(&mut self, tier: &TierRecord, name: String, (node, slot): (NodeNumber, u32), reason: String) {
        self.here.entry(node).or_default().push(self.held.len());
        self.held.push(Held {
            name: name.clone(),
            tier: tier.spec.name.clone(),
            node,
            slot,
            memory_mib: tier.spec.memory_mib,
            wanted: true,
            keeps_disk: false,
            assignment: None,
        });
        self.act(Action::Place { tier: tier.spec.name.clone(), name, node, slot }, reason);
    }

    pub fn forgive(&mut self, name: String, reason: String) {
        self.failing.remove(&name);
        self.act(Action::Forgive { name }, reason);
    }
}

fn strangers(world: &World) -> BTreeMap<NodeNumber, usize> {
    let known: BTreeSet<VmId> = world.assignments.iter().map(|a| a.vm.id).collect();
    let count =
        |node: &super::Node| node.report.iter().flat_map(|r| &r.vms).filter(|vm| !known.contains(&vm.id)).count();
    world.nodes.iter().map(|node| (node.record.number, count(node))).collect()
}
