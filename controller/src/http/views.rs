//! What people look at: everything here is computed from one snapshot and the last reports, and changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use bedplate_api::VmId;
use bedplate_api::control::{Event, NodeState, NodeView, PlanView, PoolEntry, PoolKind, TierView, VmView};
use bedplate_api::error::ErrorKind;
use bedplate_api::node::{VmPhase, VmStatus};
use serde::Deserialize;

use super::Shared;
use super::answer::Refusal;
use crate::control::Control;
use crate::planner::{Node, World, plan};
use crate::records::{Assignment, NodeNumber};
use crate::store::rows::event_key;
use crate::store::{EVENTS, Read, StoreError};

/// Everything that there is to look at, as of one moment.
pub struct View {
    /// Physical machines.
    pub nodes: Vec<NodeView>,
    /// Free pool.
    pub pool: Vec<PoolEntry>,
    /// Tiers.
    pub tiers: Vec<TierView>,
    /// Virtual machines.
    pub vms: Vec<VmView>,
}

impl View {
    /// Looks.
    pub async fn take(control: &Arc<Control>) -> Result<Self, StoreError> {
        let shared = Arc::clone(control);
        let world = control.read(move |snapshot| shared.world(snapshot)).await?;
        Ok(Self::of(&world))
    }

    fn of(world: &World) -> Self {
        Self {
            nodes: world.nodes.iter().map(|node| node_view(world, node)).collect(),
            pool: world.nodes.iter().flat_map(|node| pool_of(world, node)).collect(),
            tiers: tiers(world),
            vms: vms(world),
        }
    }
}

fn held(world: &World, node: NodeNumber) -> impl Iterator<Item = &Assignment> {
    world.assignments.iter().filter(move |a| a.node == node)
}

fn node_view(world: &World, node: &Node) -> NodeView {
    let record = &node.record;
    NodeView {
        name: record.number.to_string(),
        id: record.id,
        mac: record.mac.clone(),
        address: record.address,
        state: record.state,
        // The report has the space that is free now.
        capacity: node.report.as_ref().map(|r| r.capacity.clone()).or_else(|| record.capacity.clone()),
        slots_used: u32::try_from(held(world, record.number).count()).unwrap_or(u32::MAX),
        last_seen_seconds: node.silent,
    }
}

/// What `node` adds to the free pool: itself while it has no hypervisor, its free slots once it has.
fn pool_of(world: &World, node: &Node) -> Vec<PoolEntry> {
    let record = &node.record;
    let name = record.number.to_string();
    match record.state {
        NodeState::Blank | NodeState::Booting => {
            vec![PoolEntry { name: name.clone(), kind: PoolKind::Physical, node: name }]
        }
        NodeState::Ready => {
            let slots = record.capacity.as_ref().map_or(0, |c| c.slots);
            let free = (0..slots).filter(|slot| held(world, record.number).all(|a| a.slot != *slot));
            free.map(|slot| PoolEntry { name: format!("{name}/{slot}"), kind: PoolKind::Virtual, node: name.clone() })
                .collect()
        }
        NodeState::Lost => Vec::new(),
    }
}

fn reports(world: &World) -> BTreeMap<VmId, &VmStatus> {
    // What a node said before it was lost is no longer so.
    let ready = world.nodes.iter().filter(|n| n.record.state == NodeState::Ready);
    ready.flat_map(|n| n.report.iter().flat_map(|r| &r.vms)).map(|vm| (vm.id, vm)).collect()
}

fn tiers(world: &World) -> Vec<TierView> {
    let reports = reports(world);
    let shortfalls = plan(world).shortfalls;
    let view = |tier: &crate::records::TierRecord| {
        let assigned: Vec<_> = world.assignments.iter().filter(|a| a.wanted() && a.tier == tier.spec.name).collect();
        let running = assigned.iter().filter(|a| reports.get(&a.vm.id).is_some_and(|r| r.phase == VmPhase::Running));
        TierView {
            digest: tier.digest,
            assigned: u32::try_from(assigned.len()).unwrap_or(u32::MAX),
            running: u32::try_from(running.count()).unwrap_or(u32::MAX),
            detail: shortfalls.get(&tier.spec.name).cloned(),
            spec: tier.spec.clone(),
        }
    };
    world.tiers.iter().map(view).collect()
}

fn vms(world: &World) -> Vec<VmView> {
    let reports = reports(world);
    let ready =
        |a: &Assignment| world.nodes.iter().any(|n| n.record.number == a.node && n.record.state == NodeState::Ready);
    let mut views: Vec<_> = world
        .assignments
        .iter()
        // Of one that is leaving a lost node, nobody knows anything, and another one may bear its name by now.
        .filter(|a| a.wanted() || ready(a))
        .map(|a| vm_view(a, ready(a), reports.get(&a.vm.id).copied()))
        .collect();
    views.sort_by_cached_key(|vm| (vm.tier.clone(), vm.name.len(), vm.name.clone()));
    views
}

fn vm_view(assignment: &Assignment, ready: bool, report: Option<&VmStatus>) -> VmView {
    let phase = report.map_or(VmPhase::Pending, |r| r.phase);
    VmView {
        id: assignment.vm.id,
        name: assignment.vm.name.clone(),
        tier: assignment.tier.clone(),
        node: assignment.node.to_string(),
        slot: assignment.slot,
        phase: if assignment.wanted() { phase } else { VmPhase::Stopping },
        detail: if ready {
            report.and_then(|r| r.detail.clone())
        } else {
            Some(format!("keeps its disk on {}, which is lost", assignment.node))
        },
        address: report.filter(|r| r.address_taken).and_then(|r| r.address),
        restarts: report.map_or(0, |r| r.restarts),
        copy: report.and_then(|r| r.copy),
    }
}

/// `?after=N`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct After {
    #[serde(default)]
    after: u64,
}

/// `GET /v1/events`.
pub async fn events(
    State(control): Shared,
    query: Result<Query<After>, QueryRejection>,
) -> Result<Json<Vec<Event>>, Refusal> {
    let Query(After { after }) = query.map_err(|e| Refusal::new(ErrorKind::BadRequest, e.body_text()))?;
    Ok(Json(control.read(move |snapshot| snapshot.after(&EVENTS, &event_key(after))).await?))
}

/// `GET /v1/plan`.
pub async fn dry_run(State(control): Shared) -> Result<Json<PlanView>, Refusal> {
    let shared = Arc::clone(&control);
    let plan = control.read(move |snapshot| Ok(plan(&shared.world(snapshot)?))).await?;
    let actions = plan.actions.iter().map(|(action, why)| format!("{}: {action}: {why}", action.subject()));
    let shortfalls = plan.shortfalls.iter().map(|(tier, why)| format!("tier {tier} stays short: {why}"));
    Ok(Json(PlanView { actions: actions.chain(shortfalls).collect() }))
}
