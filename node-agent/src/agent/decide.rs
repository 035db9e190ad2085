//! Decides, and does nothing: from what is desired, what is observed and the time, what to do next.
//!
//! Called after every event. Each action starts something whose end is an event again, so that what was decided once is
//! not decided a second time while it is under way: the state of the VM or image says that it is.

use std::collections::{BTreeMap, BTreeSet};

use bedplate_api::node::{Desired, Power, VmSpec};
use bedplate_api::{Digest, VmId};

use super::model::{Asked, ImageState, Step, Vm};
use crate::clock::Millis;
use crate::host::{RESERVED_MIB, VMM_MIB};

/// How long a VMM has to end after it was told to.
pub const STOP_MILLIS: u64 = 3_000;
/// After this long a kill is repeated; the kernel needs a moment to take down a large process.
pub const KILL_MILLIS: u64 = 5_000;

/// Everything that a decision depends on.
pub struct World<'a> {
    /// What shall run here.
    pub desired: &'a Desired,
    /// What is here.
    pub vms: &'a BTreeMap<VmId, Vm>,
    /// Images that VMs ask for.
    pub images: &'a BTreeMap<Digest, ImageState>,
    /// Images that are here whole, sorted.
    pub complete: &'a [Digest],
    /// What there is to run VMs on.
    pub host: &'a Host,
    /// The time.
    pub now: Millis,
    /// The machine is going down: nothing shall run.
    pub leaving: bool,
}

/// What there is to run VMs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// VMs that may be here at a time.
    pub slots: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Online processors.
    pub cpus: u32,
    /// Why no VM can run here, if so.
    pub obstacle: Option<String>,
    /// What a start has to wait for, if for anything.
    pub not_yet: Option<String>,
    /// Milliseconds that a guest gets to power off.
    pub button_millis: u64,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Accept a new VM: make its directory and journal it.
    Accept(VmSpec),
    /// Note a changed wish for a VM that is here.
    Respec(VmSpec),
    /// Get an image: whatever of it is missing here.
    Fetch(Digest),
    /// Stop getting an image, and forget about it.
    Drop(Digest),
    /// Start the VM's process.
    Start(VmId),
    /// Ask a VM to end.
    Stop(VmId, Asked),
    /// Note that a VM without a process shall be off.
    TurnOff(VmId),
    /// Note that a VM that was off, refused or waiting shall be started.
    Rouse(VmId),
    /// Note why a VM waits.
    Hold(VmId, String),
    /// Note why a VM cannot run here.
    Refuse(VmId, String),
    /// Remove a VM that has no process.
    Remove(VmId),
}

/// What to do, and when to decide again though nothing happened.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// In this order.
    pub actions: Vec<Action>,
    /// The next moment at which time alone changes the decision.
    pub wake: Option<Millis>,
}

impl Decision {
    fn wake_at(&mut self, at: Millis) {
        self.wake = Some(self.wake.map_or(at, |w| w.min(at)));
    }
}

/// What to do now.
pub fn decide(world: &World<'_>) -> Decision {
    let mut decision = Decision::default();
    let wanted: BTreeMap<VmId, &VmSpec> = world.desired.vms.iter().map(|spec| (spec.id, spec)).collect();
    for (id, vm) in world.vms {
        let spec = wanted.get(id).copied();
        if let Some(spec) = spec.filter(|spec| **spec != vm.spec) {
            decision.actions.push(Action::Respec(spec.clone()));
        }
        let runs = spec.is_some_and(|spec| spec.power == Power::Running) && !world.leaving;
        // A stop that was begun goes on to its end even if the VM is wanted again: the guest may have heard of it.
        if !runs || matches!(vm.step, Step::Stopping { .. }) {
            quiet(world, vm, spec.is_none() && !world.leaving, &mut decision);
        }
    }
    if !world.leaving {
        drop_images(world, &mut decision);
        for spec in &world.desired.vms {
            if !world.vms.contains_key(&spec.id) {
                decision.actions.push(Action::Accept(spec.clone()));
            }
        }
        start(world, &mut decision);
        complete(world, &mut decision);
    }
    decision
}

/// Images of which VMs run that were started from a part of them, by an earlier agent perhaps: the copy goes on.
fn complete(world: &World<'_>, decision: &mut Decision) {
    for spec in &world.desired.vms {
        let is_partial = !world.images.contains_key(&spec.image) && world.complete.binary_search(&spec.image).is_err();
        let fetch = Action::Fetch(spec.image);
        if is_partial && world.vms.get(&spec.id).is_some_and(Vm::is_active) && !decision.actions.contains(&fetch) {
            decision.actions.push(fetch);
        }
    }
}

/// One VM that shall not run: stop it, ever harder; once it has no process, remove it if it is `gone` from the wishes.
fn quiet(world: &World<'_>, vm: &Vm, gone: bool, decision: &mut Decision) {
    let id = vm.spec.id;
    match vm.step {
        Step::Running { .. } => decision.actions.push(Action::Stop(id, Asked::Button)),
        Step::Stopping { asked, since, .. } => {
            let (limit, next) = match asked {
                Asked::Button => (world.host.button_millis, Asked::Stop),
                Asked::Stop => (STOP_MILLIS, Asked::Kill),
                Asked::Kill => (KILL_MILLIS, Asked::Kill),
            };
            if world.now.since(since) >= limit {
                decision.actions.push(Action::Stop(id, next));
            } else {
                decision.wake_at(since.plus(limit));
            }
        }
        // A start ends by itself within its deadline, and what it leaves is stopped then.
        Step::Starting | Step::Removing => {}
        _ if gone => decision.actions.push(Action::Remove(id)),
        Step::Off => {}
        _ => decision.actions.push(Action::TurnOff(id)),
    }
}

/// Images that are being copied, or could not be, and that nobody asks for any more.
fn drop_images(world: &World<'_>, decision: &mut Decision) {
    let wanted: BTreeSet<Digest> = world.desired.vms.iter().map(|spec| spec.image).collect();
    let stale = world.images.iter().filter(|(digest, state)| {
        let failed_before =
            matches!(state, ImageState::Failed { generation, .. } if *generation != world.desired.generation);
        failed_before || (!wanted.contains(digest) && !matches!(state, ImageState::Ready))
    });
    decision.actions.extend(stale.map(|(digest, _)| Action::Drop(*digest)));
}

/// Every VM that shall run and does not, in the order of the wishes, those that run already having their room for sure.
fn start(world: &World<'_>, decision: &mut Decision) {
    let runs = |spec: &&VmSpec| spec.power == Power::Running;
    let active = |spec: &&VmSpec| world.vms.get(&spec.id).is_some_and(Vm::is_active);
    let capacity = world.host.memory_mib.saturating_sub(RESERVED_MIB);
    // What those who stay take, and what takes memory now though it shall not stay.
    let mut promised: u64 = world.desired.vms.iter().filter(runs).filter(active).map(need).sum();
    let held = world.desired.vms.iter().filter(active).count();
    let leaving: u64 = leaving(world).map(|vm| need(&vm.spec)).sum();
    for (slots, spec) in (held + 1..).zip(world.desired.vms.iter().filter(|s| !active(s))) {
        if spec.power != Power::Running {
            continue;
        }
        let Some(vm) = world.vms.get(&spec.id) else { continue };
        if !roused(world, vm, decision) {
            continue;
        }
        let obstacle = world.host.obstacle.clone().or_else(|| refusal(world, spec, slots, capacity, promised));
        if let Some(detail) = obstacle {
            decision.actions.push(Action::Refuse(spec.id, detail));
            continue;
        }
        promised = promised.saturating_add(need(spec));
        if let Some(action) = next_step(world, vm, promised.saturating_add(leaving) <= capacity, decision) {
            decision.actions.push(action);
        }
    }
}

/// VMs that take memory though they shall not run.
fn leaving<'a>(world: &'a World<'_>) -> impl Iterator<Item = &'a Vm> {
    world.vms.values().filter(|vm| {
        let stays = world.desired.vms.iter().any(|s| s.id == vm.spec.id && s.power == Power::Running);
        vm.is_active() && !stays
    })
}

/// Whether `vm`, which shall run and has no process, may be looked at for a start now.
fn roused(world: &World<'_>, vm: &Vm, decision: &mut Decision) -> bool {
    let id = vm.spec.id;
    match vm.step {
        Step::Ready => true,
        Step::Off => {
            decision.actions.push(Action::Rouse(id));
            false
        }
        Step::Refused { generation } if generation != world.desired.generation => {
            decision.actions.push(Action::Rouse(id));
            false
        }
        Step::BackOff { until } if until <= world.now => {
            decision.actions.push(Action::Rouse(id));
            false
        }
        Step::BackOff { until } => {
            decision.wake_at(until);
            false
        }
        _ => false,
    }
}

/// Why the VM of `spec` can never run beside the others that are desired, if so.
fn refusal(world: &World<'_>, spec: &VmSpec, slots: usize, capacity: u64, promised: u64) -> Option<String> {
    if slots > world.host.slots as usize {
        return Some(format!(
            "this node is configured for {} VMs and this would be number {slots}; remove one, or give the node more slots",
            world.host.slots
        ));
    }
    if u32::from(spec.cpus) > world.host.cpus {
        return Some(format!(
            "asks for {} vCPUs, but this node has {} processors; ask for fewer vCPUs or place it elsewhere",
            spec.cpus, world.host.cpus
        ));
    }
    let need = need(spec);
    let left = capacity.saturating_sub(promised);
    if need > left {
        return Some(format!(
            "needs {need} MiB ({} MiB of RAM and {VMM_MIB} MiB for its VMM), but {left} MiB are left: the node has {} MiB, \
             of which {RESERVED_MIB} MiB are its own and {promised} MiB are other VMs'",
            spec.memory_mib, world.host.memory_mib
        ));
    }
    None
}

/// The next step of a VM that is ready and may run here.
fn next_step(world: &World<'_>, vm: &Vm, has_room: bool, decision: &Decision) -> Option<Action> {
    let (id, image) = (vm.spec.id, vm.spec.image);
    let hold = |why: &str| (vm.detail.as_deref() != Some(why)).then(|| Action::Hold(id, why.to_owned()));
    match world.images.get(&image) {
        None => {
            let fetch = Action::Fetch(image);
            (!decision.actions.contains(&fetch)).then_some(fetch)
        }
        Some(ImageState::Copying { .. }) => None,
        Some(ImageState::Failed { detail, generation }) if *generation == world.desired.generation => {
            Some(Action::Refuse(id, detail.clone()))
        }
        // It is dropped in this very decision, and fetched again in the next.
        Some(ImageState::Failed { .. }) => None,
        Some(ImageState::Partial { .. } | ImageState::Ready) => match &world.host.not_yet {
            Some(why) => hold(why),
            None if has_room => Some(Action::Start(id)),
            None => hold("waits for the memory of a VM that is being stopped"),
        },
    }
}

fn need(spec: &VmSpec) -> u64 {
    spec.memory_mib.saturating_add(VMM_MIB)
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
