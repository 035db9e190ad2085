//! What is worth telling people about the difference between two reports of one node. Pure.

use std::collections::BTreeMap;

use bedplate_api::VmId;
use bedplate_api::node::{NodeStatus, VmPhase, VmStatus};

use crate::records::NodeNumber;

/// Lines for the log of decisions: subject and message.
pub(super) fn between(node: NodeNumber, before: Option<&NodeStatus>, after: &NodeStatus) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    if let Some(before) = before.filter(|b| b.boot_id != after.boot_id) {
        let was = before.vms.len();
        lines.push((node.to_string(), format!("was booted again; it had {was} VMs before")));
    }
    // Without an earlier report nothing is known to have changed: the control node was started again, or the node is new.
    let Some(before) = before else { return lines };
    let known: BTreeMap<VmId, &VmStatus> = before.vms.iter().map(|vm| (vm.id, vm)).collect();
    for vm in &after.vms {
        let old = known.get(&vm.id).copied();
        lines.extend(of_vm(node, old, vm).into_iter().map(|message| (vm.name.clone(), message)));
    }
    lines
}

fn of_vm(node: NodeNumber, old: Option<&VmStatus>, vm: &VmStatus) -> Vec<String> {
    let mut lines = Vec::new();
    let why = vm.detail.as_deref().unwrap_or("no reason given");
    if old.is_none_or(|old| old.phase != vm.phase) {
        lines.extend(match vm.phase {
            VmPhase::Copying => Some(format!("{node} copies its image")),
            VmPhase::Running => Some(format!("runs on {node}")),
            VmPhase::BackOff => Some(format!("ended or did not start on {node}, tried again soon: {why}")),
            VmPhase::Failed => Some(format!("cannot run on {node}: {why}")),
            VmPhase::Stopped => Some(format!("has ended on {node}: {why}")),
            VmPhase::Pending | VmPhase::Starting | VmPhase::Stopping => None,
        });
    } else if old.is_some_and(|old| old.restarts < vm.restarts) {
        lines.push(format!("was started again on {node}, {} times by now: {why}", vm.restarts));
    }
    let taken = old.is_some_and(|old| old.address_taken && old.address == vm.address);
    if let Some(address) = vm.address.filter(|_| vm.address_taken && !taken) {
        lines.push(format!("its guest has taken the address {address}"));
    }
    lines
}
