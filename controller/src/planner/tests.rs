//! Each rule by tables of small worlds.

use bedplate_api::control::{NodeState, TierSpec};
use bedplate_api::node::{Capacity, DiskMode, NodeStatus, Power, VmPhase, VmStatus};
use bedplate_api::{Digest, NodeId, VmId};
use uuid::Uuid;

use super::*;

/// Ids that say in a failure which VM is meant.
pub(super) fn vm_id(n: u32) -> VmId {
    VmId::from_uuid(Uuid::from_u128(n.into()))
}

pub(super) fn tier(name: &str, target: u32) -> TierRecord {
    let spec = TierSpec {
        name: name.into(),
        image: name.into(),
        target,
        cpus: 1,
        memory_mib: 512,
        disk: DiskMode::NonPersistent,
        active: true,
    };
    TierRecord { spec, digest: Digest::from_bytes([1; 32]) }
}

pub(super) fn node(number: u32, slots: u32, memory_mib: u64) -> Node {
    let id = NodeId::from_uuid(Uuid::from_u128(number.into()));
    let capacity = Capacity { cpus: 2, memory_mib, slots, disk_free: 1 << 40 };
    let mut record = NodeRecord::new(NodeNumber(number));
    record.id = Some(id);
    record.state = NodeState::Ready;
    record.capacity = Some(capacity.clone());
    let report = NodeStatus {
        id,
        boot_id: "b".into(),
        version: "1".into(),
        generation: 0,
        capacity,
        vms: Vec::new(),
        images: Vec::new(),
    };
    Node { record, report: Some(report), silent: 0, booting: None }
}

pub(super) fn report(id: VmId, name: &str, phase: VmPhase) -> VmStatus {
    VmStatus {
        id,
        name: name.into(),
        phase,
        detail: Some("because".into()),
        address: None,
        address_taken: false,
        pid: None,
        restarts: 0,
        copy: None,
    }
}

/// VM `n` of `tier` in a slot, reported as `phase`.
fn assigned(world: &mut World, tier: &TierRecord, n: u32, at: (u32, u32), phase: VmPhase) -> VmId {
    let (id, name) = (vm_id(n), format!("{}-{n}", tier.spec.name));
    let vm = tier.vm(id, name.clone());
    let (node, slot) = (NodeNumber(at.0), at.1);
    world.assignments.push(Assignment {
        vm,
        tier: tier.spec.name.clone(),
        node,
        slot,
        left_at: None,
        has_run: phase == VmPhase::Running,
    });
    let node = world.nodes.iter_mut().find(|n| n.record.number == node).unwrap();
    node.report.as_mut().unwrap().vms.push(report(id, &name, phase));
    id
}

fn world(nodes: Vec<Node>, tiers: Vec<TierRecord>) -> World {
    World { nodes, tiers, lost_after: 15, boot_deadline: 300, ..World::default() }
}

fn actions(world: &World) -> Vec<Action> {
    plan(world).actions.into_iter().map(|(action, _)| action).collect()
}

fn place(tier: &str, name: &str, node: u32, slot: u32) -> Action {
    Action::Place { tier: tier.into(), name: name.into(), node: NodeNumber(node), slot }
}

fn leave(id: VmId, name: &str) -> Action {
    Action::Leave { vm: id, name: name.into(), failed: None }
}

#[test]
fn a_tier_spreads_over_nodes_then_goes_where_memory_is() {
    let world = world(vec![node(1, 8, 4096), node(2, 8, 8192)], vec![tier("web", 3)]);
    let wanted = [place("web", "web-1", 2, 0), place("web", "web-2", 1, 0), place("web", "web-3", 2, 1)];
    assert_eq!(actions(&world), wanted);
    assert!(plan(&world).shortfalls.is_empty());
}

#[test]
fn nothing_is_placed_on_a_node_that_is_not_there_for_sure() {
    let mut silent = node(1, 8, 4096);
    silent.report = None;
    let mut lost = node(2, 8, 4096);
    lost.record.state = NodeState::Lost;
    let mut booting = node(3, 8, 4096);
    booting.record.state = NodeState::Booting;
    let world = world(vec![silent, lost, booting], vec![tier("web", 1)]);
    assert_eq!(actions(&world), []);
    assert!(plan(&world).shortfalls["web"].contains("no node is ready"));
}

#[test]
fn slots_and_memory_are_never_overdrawn_and_the_reason_says_which() {
    // Two fit into the memory of the first, one into the slots of the second.
    let memory = NODE_RESERVE_MIB + 2 * (512 + VM_OVERHEAD_MIB);
    let world = world(vec![node(1, 8, memory), node(2, 1, 1 << 20)], vec![tier("web", 9)]);
    assert_eq!(actions(&world).len(), 3);
    let shortfall = &plan(&world).shortfalls["web"];
    assert_eq!(shortfall, "web-4 has no slot: node-1 has 0 of 544 MiB free, node-2 has no free slot (and 5 more)");
}

#[test]
fn vms_that_nobody_knows_take_up_slots() {
    let mut world = world(vec![node(1, 2, 8192)], vec![tier("web", 2)]);
    let stranger = report(vm_id(99), "old-1", VmPhase::Running);
    world.nodes[0].report.as_mut().unwrap().vms.push(stranger);
    assert_eq!(actions(&world), [place("web", "web-1", 1, 0)]);
}

#[test]
fn a_silent_node_is_lost_and_its_vms_go_elsewhere_at_once() {
    let web = tier("web", 1);
    let mut world = world(vec![node(1, 8, 4096), node(2, 8, 4096)], vec![web.clone()]);
    let id = assigned(&mut world, &web, 1, (1, 3), VmPhase::Running);
    world.nodes[0].silent = 15;
    assert_eq!(actions(&world), []);
    world.nodes[0].silent = 16;
    let wanted = [Action::Lose(NodeNumber(1)), leave(id, "web-1"), place("web", "web-1", 2, 0)];
    assert_eq!(actions(&world), wanted);
}

#[test]
fn a_vm_whose_disk_is_kept_waits_for_its_node_until_people_give_it_up() {
    let mut web = tier("web", 1);
    web.spec.disk = DiskMode::Persistent;
    let mut world = world(vec![node(1, 8, 4096), node(2, 8, 4096)], vec![web.clone()]);
    let id = assigned(&mut world, &web, 1, (2, 3), VmPhase::Running);
    world.nodes[1].silent = 16;
    assert_eq!(actions(&world), [Action::Lose(NodeNumber(2))]);
    world.nodes[1].record.state = NodeState::Lost;
    // Whatever it said last.
    for phase in [VmPhase::Running, VmPhase::Failed] {
        world.nodes[1].report.as_mut().unwrap().vms[0].phase = phase;
        assert_eq!(actions(&world), []);
        assert_eq!(plan(&world).shortfalls["web"], "web-1 keeps its disk on node-2, which is lost");
    }
    // Others of the tier go on, and a new image does not make it leave.
    world.tiers[0].spec.target = 2;
    assert_eq!(actions(&world), [place("web", "web-2", 1, 0)]);
    world.tiers[0].spec.target = 1;
    world.tiers[0].digest = Digest::from_bytes([2; 32]);
    assert_eq!(actions(&world), []);
    // The way out: asking for fewer.
    world.tiers[0].spec.target = 0;
    assert_eq!(actions(&world), [leave(id, "web-1")]);
    world.tiers.clear();
    assert_eq!(actions(&world), [leave(id, "web-1")]);
    // It comes back: all is as it was.
    world.tiers = vec![web];
    world.nodes[1].record.state = NodeState::Ready;
    world.nodes[1].silent = 0;
    world.nodes[1].report.as_mut().unwrap().vms[0].phase = VmPhase::Running;
    assert_eq!(actions(&world), []);
    assert!(plan(&world).shortfalls.is_empty());
}

#[test]
fn a_disk_that_was_written_is_given_up_by_people_only() {
    let mut db = tier("db", 1);
    db.spec.disk = DiskMode::Persistent;
    let mut world = world(vec![node(1, 8, 4096), node(2, 8, 4096)], vec![db.clone()]);
    let id = assigned(&mut world, &db, 1, (1, 3), VmPhase::Failed);
    // It never ran: there is nothing to lose, and it may do better elsewhere.
    assert!(matches!(&actions(&world)[..], [Action::Leave { vm, .. }] if *vm == id));
    world.nodes[0].report.as_mut().unwrap().vms[0].phase = VmPhase::Running;
    assert_eq!(actions(&world), [Action::Settle { vm: id, name: "db-1".into() }]);
    world.assignments[0].has_run = true;
    assert_eq!(actions(&world), []);

    // It cannot run where it is; the node has fewer slots; the tier has a new image: it stays, and people are told.
    world.nodes[0].report.as_mut().unwrap().vms[0].phase = VmPhase::Failed;
    assert_eq!(actions(&world), []);
    assert!(plan(&world).shortfalls["db"].starts_with("db-1 keeps its disk on node-1, which cannot run it: "));
    world.nodes[0].report.as_mut().unwrap().vms[0].phase = VmPhase::Running;
    world.nodes[0].report.as_mut().unwrap().capacity.slots = 2;
    assert_eq!(actions(&world), []);
    world.tiers[0].digest = Digest::from_bytes([2; 32]);
    assert_eq!(actions(&world), []);
    assert!(plan(&world).shortfalls["db"].starts_with("db-1 keeps its disk, and its old image or size with it"));
    // The tier keeps no disks from now on, and rests: its new VMs would not be kept, this one is.
    world.tiers[0].spec.disk = DiskMode::NonPersistent;
    world.tiers[0].spec.active = false;
    assert_eq!(actions(&world), [Action::SetPower { vm: id, name: "db-1".into(), power: Power::Stopped }]);
    world.tiers[0].spec.target = 0;
    assert_eq!(actions(&world), [leave(id, "db-1")]);
}

#[test]
fn a_slot_is_free_only_when_the_node_says_that_the_vm_is_gone() {
    let web = tier("web", 0);
    let mut world = world(vec![node(1, 1, 4096)], vec![web.clone()]);
    let id = assigned(&mut world, &web, 1, (1, 0), VmPhase::Running);
    assert_eq!(actions(&world), [leave(id, "web-1")]);
    world.assignments[0].left_at = Some(5);
    world.nodes[0].record.generation = 5;
    let gone = Action::Release { vm: id, name: "web-1".into() };
    // (generation reported, VM reported, node ready) → free
    for (generation, there, ready, free) in
        [(5, true, true, false), (4, false, true, false), (5, false, false, false), (5, false, true, true)]
    {
        let node = &mut world.nodes[0];
        node.record.state = if ready { NodeState::Ready } else { NodeState::Lost };
        let status = node.report.as_mut().unwrap();
        status.generation = generation;
        status.vms = if there { vec![report(id, "web-1", VmPhase::Stopping)] } else { vec![] };
        let wanted = if free { vec![gone.clone()] } else { vec![] };
        assert_eq!(actions(&world), wanted, "{generation} {there} {ready}");
    }
}

#[test]
fn a_name_is_not_given_again_while_its_bearer_leaves_a_node_that_is_up() {
    let web = tier("web", 1);
    let mut world = world(vec![node(1, 2, 4096)], vec![web.clone()]);
    assigned(&mut world, &web, 1, (1, 0), VmPhase::Stopping);
    world.assignments[0].left_at = Some(1);
    assert_eq!(actions(&world), []);
    // The same, on a node that is lost: its bearer is out of reach, and this one is needed.
    world.nodes[0].record.state = NodeState::Lost;
    world.nodes.push(node(2, 2, 4096));
    assert_eq!(actions(&world), [place("web", "web-1", 2, 0)]);
}

#[test]
fn a_vm_that_cannot_run_is_tried_elsewhere_later_and_later_and_then_no_more() {
    let web = tier("web", 1);
    let mut world = world(vec![node(1, 8, 8192), node(2, 8, 4096)], vec![web.clone()]);
    let id = assigned(&mut world, &web, 1, (1, 0), VmPhase::Failed);
    let failed = Action::Leave { vm: id, name: "web-1".into(), failed: Some("because".into()) };
    assert_eq!(actions(&world), [failed]);

    world.assignments.clear();
    world.nodes[0].report.as_mut().unwrap().vms.clear();
    for count in 1..=FAILURES_MAX {
        let failure = Failure {
            name: "web-1".into(),
            tier: "web".into(),
            count,
            at: 0,
            node: NodeNumber(1),
            reason: "because".into(),
        };
        world.failures = vec![(failure.clone(), retry_after(count) - 1)];
        assert_eq!(actions(&world), [], "{count}");
        assert!(plan(&world).shortfalls["web"].contains("because"));
        world.failures = vec![(failure, retry_after(count))];
        // Not where it failed, although that node has more memory.
        let wanted = if count < FAILURES_MAX { vec![place("web", "web-1", 2, 0)] } else { vec![] };
        assert_eq!(actions(&world), wanted, "{count}");
    }
    assert!(plan(&world).shortfalls["web"].contains("re-apply"));
}

#[test]
fn a_vm_that_runs_long_enough_has_a_clean_record() {
    let web = tier("web", 1);
    let mut world = world(vec![node(1, 8, 8192)], vec![web.clone()]);
    assigned(&mut world, &web, 1, (1, 0), VmPhase::Running);
    let failure =
        Failure { name: "web-1".into(), tier: "web".into(), count: 2, at: 0, node: NodeNumber(1), reason: "x".into() };
    world.failures = vec![(failure, 299)];
    assert_eq!(actions(&world), []);
    world.failures[0].1 = 300;
    assert_eq!(actions(&world), [Action::Forgive { name: "web-1".into() }]);
}

#[test]
fn what_no_tier_asks_for_leaves() {
    let web = tier("web", 3);
    let mut world = world(vec![node(1, 8, 8192)], vec![web.clone()]);
    let ids: Vec<VmId> = (1..=3).map(|n| assigned(&mut world, &web, n, (1, n), VmPhase::Running)).collect();
    assert_eq!(actions(&world), []);
    world.tiers[0].spec.target = 1;
    assert_eq!(actions(&world), [leave(ids[1], "web-2"), leave(ids[2], "web-3")]);
    world.tiers[0].spec.active = false;
    assert_eq!(actions(&world).len(), 3);
    world.tiers.clear();
    assert_eq!(actions(&world).len(), 3);
}

#[test]
fn an_inactive_tier_with_kept_disks_is_powered_off_and_on_where_it_is() {
    let mut web = tier("web", 1);
    web.spec.disk = DiskMode::Persistent;
    web.spec.active = false;
    let mut world = world(vec![node(1, 8, 8192)], vec![web.clone()]);
    let id = assigned(&mut world, &web, 1, (1, 0), VmPhase::Running);
    let set = |power| Action::SetPower { vm: id, name: "web-1".into(), power };
    assert_eq!(actions(&world), [set(Power::Stopped)]);
    world.assignments[0].vm.power = Power::Stopped;
    assert_eq!(actions(&world), []);
    world.tiers[0].spec.active = true;
    assert_eq!(actions(&world), [set(Power::Running)]);
}

#[test]
fn a_new_image_replaces_one_vm_at_a_time_and_only_while_all_is_well() {
    let old = tier("web", 3);
    let mut new = old.clone();
    new.digest = Digest::from_bytes([2; 32]);
    let mut world = world(vec![node(1, 8, 8192)], vec![new.clone()]);
    let ids: Vec<VmId> = (1..=3).map(|n| assigned(&mut world, &old, n, (1, n), VmPhase::Running)).collect();
    assert_eq!(actions(&world), [leave(ids[0], "web-1")]);
    // It is on its way out: the next one waits.
    world.assignments[0].left_at = Some(1);
    assert_eq!(actions(&world), []);
    // Its replacement starts: the next one waits.
    world.assignments.remove(0);
    let status = world.nodes[0].report.as_mut().unwrap();
    status.vms.remove(0);
    let replacement = vm_id(11);
    status.vms.push(report(replacement, "web-1", VmPhase::Starting));
    let vm = new.vm(replacement, "web-1".into());
    let (tier, node) = ("web".into(), NodeNumber(1));
    world.assignments.push(Assignment { vm, tier, node, slot: 0, left_at: None, has_run: false });
    assert_eq!(actions(&world), []);
    // It runs: the next one goes. One that does not run goes before one that does.
    world.nodes[0].report.as_mut().unwrap().vms[2].phase = VmPhase::Running;
    assert_eq!(actions(&world), [leave(ids[1], "web-2")]);
    world.nodes[0].report.as_mut().unwrap().vms[1].phase = VmPhase::BackOff;
    assert_eq!(actions(&world), [leave(ids[2], "web-3")]);
    // The new image does not work: the rest keep the old one.
    let failure =
        Failure { name: "web-1".into(), tier: "web".into(), count: 1, at: 0, node: NodeNumber(1), reason: "x".into() };
    world.failures = vec![(failure, 1)];
    assert_eq!(actions(&world), []);
}

#[test]
fn a_vm_is_not_taken_down_for_a_replacement_that_fits_nowhere() {
    let old = tier("web", 1);
    let mut new = old.clone();
    new.spec.memory_mib = 1 << 20;
    let mut world = world(vec![node(1, 8, 8192)], vec![new]);
    assigned(&mut world, &old, 1, (1, 0), VmPhase::Running);
    assert_eq!(actions(&world), []);
    assert!(plan(&world).shortfalls["web"].contains("no room for its replacement"));
}

#[test]
fn machines_that_never_register_and_nodes_that_know_more_than_we_do() {
    let mut booting = node(1, 8, 4096);
    booting.record.state = NodeState::Booting;
    booting.report = None;
    booting.booting = Some(300);
    let mut ahead = node(2, 8, 4096);
    ahead.report.as_mut().unwrap().generation = 7;
    ahead.record.generation = 6;
    let mut world = world(vec![booting, ahead], vec![]);
    let renumber = Action::Renumber { node: NodeNumber(2), reported: 7 };
    assert!(actions(&world) == [renumber]);
    world.nodes[0].booting = Some(301);
    assert_eq!(actions(&world)[0], Action::GiveUpBoot(NodeNumber(1)));
}

#[test]
fn every_action_says_why_in_a_sentence() {
    let web = tier("web", 2);
    let mut world = world(vec![node(1, 8, 4096), node(2, 8, 4096)], vec![web.clone()]);
    assigned(&mut world, &web, 1, (1, 3), VmPhase::Running);
    world.nodes[0].silent = 20;
    let lines: Vec<String> =
        plan(&world).actions.iter().map(|(action, why)| format!("{}: {action}: {why}", action.subject())).collect();
    assert_eq!(
        lines,
        [
            "node-1: counts as lost: no word for 20 s, the limit is 15 s",
            "web-1: is to be removed: node-1 is lost",
            "web-1: gets slot node-2/0: tier web asks for 2 VMs; node-2 has 8 free slots, 3840 MiB free and 0 VMs of this tier",
            "web-2: gets slot node-2/1: tier web asks for 2 VMs; node-2 has 7 free slots, 3296 MiB free and 1 VMs of this tier",
        ]
    );
}
