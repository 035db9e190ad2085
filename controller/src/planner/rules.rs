//! The rules. Each reads the draft, decides by itself, and writes to the draft; [`super::plan`] calls them in order.

use std::collections::{BTreeMap, BTreeSet};

use bedplate_api::control::NodeState;
use bedplate_api::node::{DiskMode, Power, VmPhase};

use super::draft::{Draft, Held};
use super::place;
use crate::records::{NodeNumber, TierRecord};

/// A VM of one name that could not run this often in a row is not tried again until its tier is changed.
pub const FAILURES_MAX: u32 = 5;

/// A VM that runs and whose last failure is this many seconds ago has a clean record.
const FORGIVEN_AFTER: u64 = 300;

/// Seconds to wait after the `count`th failure in a row.
pub fn retry_after(count: u32) -> u64 {
    5u64 << count.saturating_sub(1).min(6)
}

/// VMs with persistent disks that run for the first time.
pub(super) fn settle(draft: &mut Draft<'_>) {
    for index in 0..draft.held.len() {
        let held = &draft.held[index];
        let persistent = held.assignment.is_some_and(|a| a.vm.disk == DiskMode::Persistent && !a.has_run);
        if held.wanted && persistent && draft.running(held) {
            let reason = format!("it runs on {}", held.node);
            draft.settle(index, reason);
        }
    }
}

/// Nodes that went silent, machines that never came, numbers that are behind.
pub(super) fn nodes(draft: &mut Draft<'_>) {
    for node in &draft.world.nodes {
        let record = &node.record;
        if record.state == NodeState::Ready && node.silent > draft.world.lost_after {
            let reason = format!("no word for {} s, the limit is {} s", node.silent, draft.world.lost_after);
            draft.lose(record.number, reason);
        }
        if let Some(seconds) =
            node.booting.filter(|s| record.state == NodeState::Booting && *s > draft.world.boot_deadline)
        {
            draft.give_up_boot(
                record.number,
                format!("has not registered {seconds} s after it fetched its boot script"),
            );
        }
        if let Some(reported) = node.report.as_ref().map(|r| r.generation).filter(|g| *g > record.generation) {
            let reason =
                format!("it reports generation {reported}, this control node has made {} only", record.generation);
            draft.renumber(record.number, reported, reason);
        }
    }
    for index in 0..draft.held.len() {
        let (node, wanted) = (draft.held[index].node, draft.held[index].wanted);
        if wanted && !draft.ready(node) && !draft.held[index].keeps_disk {
            draft.leave(index, format!("{node} is lost"));
        }
    }
}

/// Slots whose VM has left and is gone.
pub(super) fn release(draft: &mut Draft<'_>) {
    let nodes: BTreeMap<NodeNumber, _> = draft.world.nodes.iter().map(|n| (n.record.number, n)).collect();
    draft.release(|draft, held| {
        let left_at = held.assignment.and_then(|a| a.left_at)?;
        let report = nodes.get(&held.node).filter(|_| draft.ready(held.node))?.report.as_ref()?;
        let gone = report.generation >= left_at && held.id().is_some_and(|id| draft.report(id).is_none());
        gone.then(|| format!("{} reports that the VM is gone", held.node))
    });
}

/// VMs that cannot run where they are, and those that have done well for long enough.
pub(super) fn failures(draft: &mut Draft<'_>) {
    for index in 0..draft.held.len() {
        let held = &draft.held[index];
        // Elsewhere it would be another VM, with an empty disk.
        let current = held.wanted && draft.ready(held.node) && !held.keeps_disk;
        let Some(report) = held.id().filter(|_| current).and_then(|id| draft.report(id)) else { continue };
        if report.phase == VmPhase::Failed {
            let why = report.detail.clone().unwrap_or_else(|| "it gave no reason".into());
            let reason = format!("{} cannot run it: {why}", held.node);
            draft.fail(index, why, reason);
        }
    }
    let forgiven: Vec<String> = draft
        .held
        .iter()
        .filter(|held| held.wanted && draft.running(held))
        .filter(|held| draft.failing.get(&held.name).is_some_and(|(_, seconds)| *seconds >= FORGIVEN_AFTER))
        .map(|held| held.name.clone())
        .collect();
    for name in forgiven {
        draft.forgive(name, format!("it runs, and has not failed for {FORGIVEN_AFTER} s"));
    }
}

/// VMs that no tier asks for.
pub(super) fn surplus(draft: &mut Draft<'_>) {
    for index in 0..draft.held.len() {
        if !draft.held[index].wanted {
            continue;
        }
        match draft.tier(&draft.held[index].tier) {
            None => draft.leave(index, "its tier is gone".into()),
            Some(tier) => against_tier(draft, index, tier),
        }
    }
}

fn against_tier(draft: &mut Draft<'_>, index: usize, tier: &TierRecord) {
    let held = &draft.held[index];
    let Some(assignment) = held.assignment else { return };
    let (name, node) = (&tier.spec.name, held.node);
    if ordinal(held).is_none_or(|n| n == 0 || n > tier.spec.target) {
        return draft.leave(index, format!("tier {name} asks for {} VMs", tier.spec.target));
    }
    if !tier.spec.active && !tier.keeps_disks() && !held.keeps_disk {
        return draft.leave(index, format!("tier {name} is not active"));
    }
    let slots = draft.world.nodes.iter().find(|n| n.record.number == node).and_then(|n| n.report.as_ref());
    if let Some(slots) = slots.map(|r| r.capacity.slots).filter(|slots| held.slot >= *slots && !held.keeps_disk) {
        return draft.leave(index, format!("{node} has {slots} slots now"));
    }
    let power = if tier.spec.active { Power::Running } else { Power::Stopped };
    if assignment.vm.power != power {
        let state = if tier.spec.active { "active" } else { "not active, and keeps its disks" };
        draft.set_power(index, power, format!("tier {name} is {state}"));
    }
}

/// The number at the end of a VM's name.
fn ordinal(held: &Held<'_>) -> Option<u32> {
    held.name.strip_prefix(&held.tier)?.strip_prefix('-')?.parse().ok()
}

/// Names that a tier asks for and nothing bears.
pub(super) fn fill(draft: &mut Draft<'_>) {
    for tier in draft.world.tiers.iter().filter(|t| t.spec.active) {
        let borne: BTreeSet<String> = draft
            .held
            .iter()
            // A VM that is leaving a node that is up still bears its name; one on a lost node does not.
            .filter(|held| held.tier == tier.spec.name && (held.wanted || draft.ready(held.node)))
            .map(|held| held.name.clone())
            .collect();
        let names = (1..=tier.spec.target).map(|n| format!("{}-{n}", tier.spec.name));
        fill_tier(draft, tier, names.filter(|name| !borne.contains(name)));
        bound(draft, tier);
    }
}

fn fill_tier(draft: &mut Draft<'_>, tier: &TierRecord, mut names: impl Iterator<Item = String>) {
    let mut first = None;
    let mut missing = 0usize;
    while let Some(name) = names.next() {
        let placed = match held_back(draft, &name) {
            Some(why) => Err(why),
            // What has no room for one has none for the next, whatever its name.
            None => place::choose(draft, tier, &name, None).inspect_err(|_| missing += names.by_ref().count()),
        };
        match placed {
            Ok(choice) => {
                let reason = format!("tier {} asks for {} VMs; {}", tier.spec.name, tier.spec.target, choice.because);
                draft.place(tier, name, choice.slot, reason);
            }
            Err(why) => {
                missing += 1;
                first.get_or_insert(format!("{name} has no slot: {why}"));
            }
        }
    }
    if let Some(first) = first {
        let more = if missing > 1 { format!(" (and {} more)", missing - 1) } else { String::new() };
        draft.plan.shortfalls.insert(tier.spec.name.clone(), format!("{first}{more}"));
    }
}

/// VMs that nothing can stand in for, because they keep their disk: people are told where they are and what is wrong.
fn bound(draft: &mut Draft<'_>, tier: &TierRecord) {
    let trouble = |held: &Held<'_>| {
        let (name, node) = (&held.name, held.node);
        if !draft.ready(node) {
            return Some(format!("{name} keeps its disk on {node}, which is lost"));
        }
        let report = held.id().and_then(|id| draft.report(id)).filter(|vm| vm.phase == VmPhase::Failed)?;
        let why = report.detail.as_deref().unwrap_or("it gave no reason");
        Some(format!(
            "{name} keeps its disk on {node}, which cannot run it: {why}; mend that, then deactivate and activate the tier"
        ))
    };
    let bound = draft.held.iter().filter(|held| held.tier == tier.spec.name && held.wanted && held.keeps_disk);
    let mut troubles = bound.filter_map(trouble);
    let Some(first) = troubles.next() else { return };
    let others = troubles.count();
    let more = if others > 0 { format!(" (and {others} more)") } else { String::new() };
    let detail = format!("{first}{more}");
    let shortfall = draft.plan.shortfalls.entry(tier.spec.name.clone());
    shortfall.and_modify(|other| *other = format!("{detail}; {other}")).or_insert(detail);
}

/// Why a VM called `name` is not tried now.
fn held_back(draft: &Draft<'_>, name: &str) -> Option<String> {
    let (failure, since) = draft.failing.get(name)?;
    let (count, reason) = (failure.count, &failure.reason);
    if count >= FAILURES_MAX {
        return Some(format!(
            "it could not run {count} times, last: {reason}; change or re-apply its tier to try again"
        ));
    }
    let wait = retry_after(count).checked_sub(*since).filter(|wait| *wait > 0)?;
    Some(format!("it could not run ({reason}), next try in {wait} s"))
}

/// VMs of an older spec. One leaves only when everything newer runs, so that a bad image costs one VM and no more.
pub(super) fn roll(draft: &mut Draft<'_>) {
    for tier in draft.world.tiers.iter().filter(|t| t.spec.active) {
        let name = &tier.spec.name;
        if draft.failing.values().any(|(failure, _)| failure.tier == *name) {
            continue;
        }
        let fresh = |held: &Held<'_>| held.assignment.is_none_or(|a| tier.matches(&a.vm));
        let busy = draft.held.iter().filter(|held| held.tier == *name).any(|held| {
            let leaving = !held.wanted && draft.ready(held.node);
            leaving || (held.wanted && fresh(held) && !draft.running(held))
        });
        if busy {
            continue;
        }
        // One on a node that is lost is left alone: it could not be told to go.
        let stale = draft.held.iter().enumerate();
        let stale = stale.filter(|(_, h)| h.tier == *name && h.wanted && !fresh(h) && draft.ready(h.node));
        // One that does not run serves nobody: it goes first.
        let Some((index, held)) = stale.min_by_key(|(_, h)| (h.keeps_disk, draft.running(h), ordinal(h))) else {
            continue;
        };
        if held.keeps_disk {
            let detail = format!(
                "{} keeps its disk, and its old image or size with it; to give the disk up, lower the target or delete \
                 the tier",
                held.name
            );
            draft.plan.shortfalls.entry(name.clone()).or_insert(detail);
            continue;
        }
        match place::choose(draft, tier, &held.name, Some(index)) {
            Ok(_) => {
                draft.leave(index, format!("tier {name} has a new image or size; its VMs are replaced one by one"))
            }
            Err(why) => {
                let detail =
                    format!("{} keeps its old image or size, there is no room for its replacement: {why}", held.name);
                draft.plan.shortfalls.entry(name.clone()).or_insert(detail);
            }
        }
    }
}
