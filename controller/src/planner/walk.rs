//! Random walks: whatever people, nodes and time do, a plan never overdraws a node and never makes two of one name; and
//! once nothing moves any more, the plans come to an end with everything in place.

use std::collections::{BTreeMap, BTreeSet};

use bedplate_api::control::NodeState;
use bedplate_api::node::{DiskMode, NodeStatus, VmPhase};
use bedplate_api::{Digest, VmId};
use proptest::prelude::*;

use super::tests::{node, report, tier, vm_id};
use super::*;

/// Something that happens between two plans.
#[derive(Debug, Clone)]
enum Move {
    /// A person sets a tier's target, memory, image, and whether it is active.
    Ask { tier: usize, target: u32, memory: u64, image: u8, active: bool },
    /// A person deletes a tier.
    Forget { tier: usize },
    /// A node works on its newest desired set and reports.
    Report { node: usize },
    /// A VM of a node turns out not to be able to run there.
    Fail { node: usize, vm: usize },
    /// A node goes silent.
    Vanish { node: usize },
    /// A node is booted again, having forgotten everything.
    Reboot { node: usize },
    /// Time passes for failures.
    Wait,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        3 => (0..2usize, 0..6u32, prop_oneof![Just(256), Just(1024)], 0..3u8, any::<bool>())
            .prop_map(|(tier, target, memory, image, active)| Move::Ask { tier, target, memory, image, active }),
        1 => (0..2usize).prop_map(|tier| Move::Forget { tier }),
        8 => (0..3usize).prop_map(|node| Move::Report { node }),
        1 => (0..3usize, 0..4usize).prop_map(|(node, vm)| Move::Fail { node, vm }),
        1 => (0..3usize).prop_map(|node| Move::Vanish { node }),
        1 => (0..3usize).prop_map(|node| Move::Reboot { node }),
        2 => Just(Move::Wait),
    ];
    proptest::collection::vec(one, 1..60)
}

/// The cluster, and what really is on each node.
struct Cluster {
    world: World,
    vms: BTreeMap<NodeNumber, Vec<(VmId, String, VmPhase)>>,
    next_vm: u32,
}

impl Cluster {
    fn new() -> Self {
        let nodes = vec![node(1, 3, 3000), node(2, 4, 2500), node(3, 2, 9000)];
        let world = World { nodes, lost_after: 15, boot_deadline: 300, ..World::default() };
        Self { world, vms: BTreeMap::new(), next_vm: 1 }
    }

    fn happen(&mut self, what: Move) {
        let world = &mut self.world;
        match what {
            Move::Ask { tier: n, target, memory, image, active } => {
                let mut asked = tier(["web", "db"][n], target);
                asked.spec.memory_mib = memory;
                asked.spec.active = active;
                asked.spec.disk = [DiskMode::NonPersistent, DiskMode::Persistent][n];
                asked.digest = Digest::from_bytes([image; 32]);
                world.failures.retain(|(f, _)| f.tier != asked.spec.name);
                world.tiers.retain(|t| t.spec.name != asked.spec.name);
                world.tiers.push(asked);
            }
            Move::Forget { tier } => world.tiers.retain(|t| t.spec.name != ["web", "db"][tier]),
            Move::Report { node } => self.report(node),
            Move::Fail { node, vm } => {
                let number = world.nodes[node].record.number;
                if let Some((_, _, phase)) = self.vms.get_mut(&number).and_then(|vms| vms.get_mut(vm)) {
                    *phase = VmPhase::Failed;
                }
            }
            Move::Vanish { node } => world.nodes[node].silent = 99,
            Move::Reboot { node } => {
                self.vms.remove(&world.nodes[node].record.number);
                if let Some(report) = &mut world.nodes[node].report {
                    report.generation = 0;
                    report.vms.clear();
                }
            }
            Move::Wait => world.failures.iter_mut().for_each(|(_, seconds)| *seconds += 100),
        }
    }

    /// What an agent and the pushes do together: the node has its set, every VM of it runs or has failed for good.
    fn report(&mut self, index: usize) {
        let node = &mut self.world.nodes[index];
        let number = node.record.number;
        let before = self.vms.remove(&number).unwrap_or_default();
        let wanted = self.world.assignments.iter().filter(|a| a.node == number && a.wanted());
        let now: Vec<_> = wanted
            .map(|a| {
                let phase = before.iter().find(|(id, ..)| *id == a.vm.id).map(|(.., phase)| *phase);
                (a.vm.id, a.vm.name.clone(), phase.unwrap_or(VmPhase::Running))
            })
            .collect();
        node.silent = 0;
        node.record.state = NodeState::Ready;
        if let Some(NodeStatus { generation, vms, .. }) = &mut node.report {
            *generation = node.record.generation;
            *vms = now.iter().map(|(id, name, phase)| report(*id, name, *phase)).collect();
        }
        self.vms.insert(number, now);
    }

    /// What the executor does.
    fn carry_out(&mut self, plan: &Plan) {
        let mut touched = BTreeSet::new();
        for (action, _) in &plan.actions {
            let world = &mut self.world;
            let find = |world: &World, vm: VmId| world.assignments.iter().position(|a| a.vm.id == vm).unwrap();
            match action {
                Action::Lose(node) => {
                    let lost = world.nodes.iter_mut().find(|n| n.record.number == *node).unwrap();
                    lost.record.state = NodeState::Lost;
                }
                Action::GiveUpBoot(_) | Action::Renumber { .. } => unreachable!("nothing here leads to {action:?}"),
                Action::Release { vm, .. } => drop(world.assignments.remove(find(world, *vm))),
                Action::Leave { vm, name, failed } => {
                    let index = find(world, *vm);
                    let assignment = &mut world.assignments[index];
                    let node = assignment.node;
                    touched.insert(node);
                    let at = world.nodes.iter().find(|n| n.record.number == node).unwrap().record.generation + 1;
                    assignment.left_at = Some(at);
                    if let Some(reason) = failed {
                        let tier = assignment.tier.clone();
                        let before = world.failures.iter().position(|(f, _)| f.name == *name);
                        let count = before.map_or(0, |i| world.failures.remove(i).0.count) + 1;
                        let failure = Failure { name: name.clone(), tier, count, at: 0, node, reason: reason.clone() };
                        world.failures.push((failure, 0));
                    }
                }
                Action::Settle { vm, .. } => {
                    let index = find(world, *vm);
                    world.assignments[index].has_run = true;
                }
                Action::SetPower { vm, power, .. } => {
                    let index = find(world, *vm);
                    world.assignments[index].vm.power = *power;
                    touched.insert(world.assignments[index].node);
                }
                Action::Place { tier, name, node, slot } => {
                    let record = world.tiers.iter().find(|t| t.spec.name == *tier).unwrap();
                    let vm = record.vm(vm_id(self.next_vm), name.clone());
                    self.next_vm += 1;
                    let (tier, node, slot) = (tier.clone(), *node, *slot);
                    world.assignments.push(Assignment { vm, tier, node, slot, left_at: None, has_run: false });
                    touched.insert(node);
                }
                Action::Forgive { name } => world.failures.retain(|(f, _)| f.name != *name),
            }
        }
        for node in self.world.nodes.iter_mut().filter(|n| touched.contains(&n.record.number)) {
            node.record.generation += 1;
        }
    }

    fn check(&self) {
        let world = &self.world;
        let mut names = BTreeSet::new();
        for assignment in world.assignments.iter().filter(|a| a.wanted()) {
            assert!(names.insert(&assignment.vm.name), "two VMs are called {}", assignment.vm.name);
        }
        for node in &world.nodes {
            let here: Vec<_> = world.assignments.iter().filter(|a| a.node == node.record.number).collect();
            let capacity = node.record.capacity.as_ref().unwrap();
            let slots: BTreeSet<u32> = here.iter().map(|a| a.slot).collect();
            assert_eq!(slots.len(), here.len(), "two VMs in one slot of {}", node.record.number);
            assert!(slots.iter().all(|slot| *slot < capacity.slots));
            let memory: u64 = here.iter().map(|a| a.vm.memory_mib + VM_OVERHEAD_MIB).sum();
            assert!(memory + NODE_RESERVE_MIB <= capacity.memory_mib, "{} is overdrawn", node.record.number);
        }
    }

    /// One plan, checked and carried out.
    fn step(&mut self) -> usize {
        let plan = plan(&self.world);
        self.carry_out(&plan);
        self.check();
        plan.actions.len()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn never_overdrawn_never_two_of_a_name_and_always_an_end(moves in moves()) {
        let mut cluster = Cluster::new();
        for what in moves {
            cluster.happen(what);
            cluster.step();
        }
        // Calm: nodes report, failures are forgiven in the end. Each round replaces at most one VM of each tier, in
        // three steps, and there are at most nine VMs.
        let mut rounds = 0;
        loop {
            (0..3).for_each(|node| cluster.happen(Move::Report { node }));
            (0..4).for_each(|_| cluster.happen(Move::Wait));
            if cluster.step() == 0 && cluster.step() == 0 {
                break;
            }
            rounds += 1;
            prop_assert!(rounds < 100, "still busy: {:?}", plan(&cluster.world).actions);
        }
        let last = plan(&cluster.world);
        for tier in &cluster.world.tiers {
            let have = cluster.world.assignments.iter().filter(|a| a.tier == tier.spec.name && a.wanted());
            let current = have.clone().filter(|a| tier.matches(&a.vm)).count();
            let wanted = if tier.spec.active { tier.spec.target as usize } else { 0 };
            let kept = !tier.spec.active && tier.keeps_disks() && have.count() <= tier.spec.target as usize;
            prop_assert!(kept || current == wanted || last.shortfalls.contains_key(&tier.spec.name), "{:?}", tier.spec);
        }
        for assignment in &cluster.world.assignments {
            prop_assert!(cluster.world.tiers.iter().any(|t| t.spec.name == assignment.tier), "{assignment:?}");
        }
    }

    #[test]
    fn a_full_plan_is_a_function_of_the_world(moves in moves()) {
        let mut cluster = Cluster::new();
        for what in moves {
            cluster.happen(what);
            prop_assert_eq!(plan(&cluster.world), plan(&cluster.world));
            cluster.step();
        }
    }
}
