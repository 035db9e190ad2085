//! The agent is killed as hard as can be, at any moment, and what it left is taken up.

use std::collections::BTreeSet;
use std::time::Duration;

use bedplate_api::client::ClientError;
use bedplate_api::node::{Desired, VmPhase, VmSpec};

use crate::support::{Node, SLEEP, image, kvm, spec};

#[tokio::test]
async fn a_restarted_agent_adopts_its_vms_without_disturbing_them() {
    if !kvm() {
        return;
    }
    let mut node = Node::running(&[]).await;
    let image = image(&node.store(), &[SLEEP]);
    let vms = [spec("one", image), spec("two", image)];
    node.put(1, &vms).await;
    let all_run =
        |s: &bedplate_api::node::NodeStatus| s.vms.len() == 2 && s.vms.iter().all(|v| v.phase == VmPhase::Running);
    let before = node.until("both run", all_run).await;
    node.kill();
    assert_eq!(node.processes().len(), 2, "VMs go on without their agent");
    node.start().await;
    let after = node.client().node_status().await.unwrap();
    assert_eq!(after.vms, before.vms);
    assert_eq!(after.generation, 1);

    // One ends while the agent is away: that is seen, and it is started again.
    node.kill();
    crate::support::kill(before.vms[0].pid.unwrap());
    node.start().await;
    let id = before.vms[0].id;
    let again = node.until_vm("it runs again", id, |v| v.phase == VmPhase::Running && v.restarts == 1).await;
    assert_ne!(again.pid, before.vms[0].pid);
    let other = node.until_phase(before.vms[1].id, VmPhase::Running).await;
    assert_eq!((other.pid, other.restarts), (before.vms[1].pid, 0));

    // An adopted VM can be stopped and removed like any other.
    node.put(2, &[]).await;
    node.until("both are gone", |s| s.vms.is_empty()).await;
    assert!(node.processes().is_empty());
}

/// Wishes change and the agent is killed at some moment after each change, a little later each time, so that over the
/// rounds every step of a start, a stop and a removal is hit. At the end what runs is what was asked for last.
#[tokio::test]
async fn killed_at_any_moment_it_converges_and_no_vm_runs_twice() {
    if !kvm() {
        return;
    }
    let mut node = Node::new(&[]);
    let image = image(&node.store(), &[SLEEP]);
    let vms: Vec<VmSpec> = (1..=3).map(|n| spec(&format!("vm-{n}"), image)).collect();
    let wishes: [&[usize]; 4] = [&[0, 1], &[1, 2], &[], &[0, 1, 2]];
    let mut generation = 0;
    let mut wanted = Vec::new();
    for round in 0..24u64 {
        node.start().await;
        assert_at_most_one_each(&node);
        generation += 1;
        wanted = wishes[(round % 4) as usize].iter().map(|n| vms[*n].clone()).collect();
        put_or_be_killed(&node, generation, &wanted).await;
        // The moment of the kill is the point of the test; nothing is assumed of it.
        tokio::time::sleep(Duration::from_millis(round * 7 % 60)).await;
        node.kill();
        assert_at_most_one_each(&node);
    }
    node.start().await;
    let ids: BTreeSet<_> = wanted.iter().map(|vm| vm.id).collect();
    let status = node
        .until("what runs is what was asked for", |s| {
            s.vms.iter().all(|v| v.phase == VmPhase::Running)
                && s.vms.iter().map(|v| v.id).collect::<BTreeSet<_>>() == ids
        })
        .await;
    assert_eq!(status.generation, generation);
    let pids: BTreeSet<_> = status.vms.iter().filter_map(|v| v.pid).collect();
    assert_eq!(node.processes().into_iter().map(|(_, pid)| pid).collect::<BTreeSet<_>>(), pids);
}

async fn put_or_be_killed(node: &Node, generation: u64, vms: &[VmSpec]) {
    let answer = node.client().put_desired(&Desired { generation, vms: vms.to_vec() }).await;
    assert!(!matches!(answer, Err(ClientError::Api(_))), "{answer:?}");
}

fn assert_at_most_one_each(node: &Node) {
    let processes = node.processes();
    let distinct: BTreeSet<_> = processes.iter().map(|(path, _)| path).collect();
    assert_eq!(distinct.len(), processes.len(), "a VM runs twice: {processes:?}");
}

#[tokio::test]
async fn two_agents_never_share_a_state_directory() {
    let node = Node::running(&[]).await;
    let second = node.command().output().unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains("in use by another bedplate-node"), "{said}");
    assert!(node.client().node_status().await.is_ok(), "the first one goes on");
}
