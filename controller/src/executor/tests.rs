//! From a tier to what nodes are told, over real sockets: retries, losses, restarts.

use std::time::Duration;

use bedplate_api::control::{NodeState, PoolKind};
use bedplate_api::image::ImageKind;
use bedplate_api::node::VmPhase;

use crate::testing::{Bench, SmallNode, options, tier, until};

#[tokio::test]
async fn a_tier_fills_shrinks_and_goes() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    let (one, two) =
        (SmallNode::start(&bench.serving.control.token).await, SmallNode::start(&bench.serving.control.token).await);
    assert_eq!(one.register(&bench.nodes, None).await.name, "node-1");
    let second = two.register(&bench.nodes, None).await;
    assert_eq!((second.name.as_str(), second.vm_network.address), ("node-2", [10, 78, 2, 0].into()));
    let pool = bench.people.pool().await.unwrap();
    assert_eq!(pool.len(), 8);
    assert!(pool.iter().all(|entry| entry.kind == PoolKind::Virtual));

    let view = bench.people.create_tier(&tier("web", "web", 4)).await.unwrap();
    assert_eq!(view.spec.target, 4);
    until("four VMs", async || (bench.people.tier("web").await.unwrap().running == 4).then_some(())).await;
    assert_eq!((one.names().len(), two.names().len()), (2, 2));
    let vms = bench.people.vms().await.unwrap();
    assert_eq!(vms.iter().map(|vm| vm.name.as_str()).collect::<Vec<_>>(), ["web-1", "web-2", "web-3", "web-4"]);
    assert!(vms.iter().all(|vm| vm.phase == VmPhase::Running && vm.address.is_some()));
    assert_eq!(bench.people.pool().await.unwrap().len(), 4);
    assert!(bench.people.plan().await.unwrap().actions.is_empty());

    bench.people.put_tier(&tier("web", "web", 1)).await.unwrap();
    until("three gone", async || (bench.people.vms().await.unwrap().len() == 1).then_some(())).await;
    bench.people.delete_tier("web").await.unwrap();
    until("all gone", async || (one.names().is_empty() && two.names().is_empty()).then_some(())).await;
    let told: Vec<String> = bench.events().await.into_iter().map(|e| format!("{}: {}", e.subject, e.message)).collect();
    assert!(told.iter().any(|line| line.starts_with("web-1: gets slot node-")), "{told:?}");
    bench.serving.stop().await;
}

#[tokio::test]
async fn a_node_that_refuses_is_told_again_until_it_takes_its_set() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    let node = SmallNode::start(&bench.serving.control.token).await;
    node.heard.lock().unwrap().refuse = 2;
    node.register(&bench.nodes, None).await;
    bench.people.create_tier(&tier("web", "web", 1)).await.unwrap();
    until("the VM", async || (node.names() == ["web-1"]).then_some(())).await;
    assert!(node.heard.lock().unwrap().puts >= 3);
    until("the end of it in the log", async || {
        bench.events().await.iter().any(|e| e.message.contains("takes its desired set again")).then_some(())
    })
    .await;
    let complaints = bench.events().await.into_iter().filter(|e| e.message.contains("does not take")).count();
    assert_eq!(complaints, 1, "said once, not at every try");
    bench.serving.stop().await;
}

#[tokio::test]
async fn a_restart_changes_nothing_and_finishes_what_was_begun() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    let node = SmallNode::start(&bench.serving.control.token).await;
    node.register(&bench.nodes, None).await;
    bench.people.create_tier(&tier("web", "web", 2)).await.unwrap();
    until("two VMs", async || (bench.people.tier("web").await.unwrap().running == 2).then_some(())).await;
    let before = node.heard.lock().unwrap().desired.clone();

    // Decided, but the node does not hear of it before the control node ends.
    node.heard.lock().unwrap().refuse = u32::MAX;
    bench.people.put_tier(&tier("web", "web", 3)).await.unwrap();
    until("the decision", async || (bench.people.vms().await.unwrap().len() == 3).then_some(())).await;
    let bench = bench.restart().await;
    node.heard.lock().unwrap().refuse = 0;
    until("the third VM", async || (node.names().len() == 3).then_some(())).await;
    let after = node.heard.lock().unwrap().desired.clone();
    assert!(before.vms.iter().all(|vm| after.vms.contains(vm)), "VMs that ran go on as they are");
    let view = &bench.people.nodes().await.unwrap()[0];
    assert_eq!((view.name.as_str(), view.state), ("node-1", NodeState::Ready));
    bench.serving.stop().await;
}

#[tokio::test]
async fn vms_of_a_lost_node_go_elsewhere_and_it_gives_them_up_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(&dir);
    options.lost_after = 2;
    let bench = Bench::start_in(dir, options).await;
    bench.push("web", ImageKind::Disk).await;
    let (one, two) =
        (SmallNode::start(&bench.serving.control.token).await, SmallNode::start(&bench.serving.control.token).await);
    one.register(&bench.nodes, None).await;
    bench.people.create_tier(&tier("web", "web", 1)).await.unwrap();
    until("the VM", async || (one.names() == ["web-1"]).then_some(())).await;
    let first = one.heard.lock().unwrap().desired.vms[0].id;
    two.register(&bench.nodes, None).await;

    // The first goes silent; the second keeps reporting.
    until("the VM on the other node", async || {
        bench.nodes.report(two.id, &two.status()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        (two.names() == ["web-1"]).then_some(())
    })
    .await;
    assert_ne!(two.heard.lock().unwrap().desired.vms[0].id, first, "a fresh incarnation");
    assert_eq!(bench.people.nodes().await.unwrap()[0].state, NodeState::Lost);
    assert_eq!(one.names(), ["web-1"], "nobody has told it yet");

    until("the lost node to be rid of its VM", async || {
        bench.nodes.report(one.id, &one.status()).await.unwrap();
        bench.nodes.report(two.id, &two.status()).await.unwrap();
        one.names().is_empty().then_some(())
    })
    .await;
    assert_eq!(two.names(), ["web-1"]);
    bench.serving.stop().await;
}

#[tokio::test]
async fn a_vm_that_cannot_run_on_one_node_is_tried_on_another() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    let (bad, good) =
        (SmallNode::start(&bench.serving.control.token).await, SmallNode::start(&bench.serving.control.token).await);
    bad.heard.lock().unwrap().fail.push("web-1".into());
    bad.register(&bench.nodes, None).await;
    bench.people.create_tier(&tier("web", "web", 1)).await.unwrap();
    until("the failure", async || {
        bench.people.tier("web").await.unwrap().detail.filter(|d| d.contains("no such luck"))
    })
    .await;
    good.register(&bench.nodes, None).await;
    until("the VM on the good node", async || (good.names() == ["web-1"]).then_some(())).await;
    until("the bad node to be rid of it", async || bad.names().is_empty().then_some(())).await;
    bench.serving.stop().await;
}

#[tokio::test]
async fn generations_go_on_from_a_node_that_knows_more() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    let node = SmallNode::start(&bench.serving.control.token).await;
    node.heard.lock().unwrap().desired.generation = 41;
    node.register(&bench.nodes, None).await;
    bench.people.create_tier(&tier("web", "web", 1)).await.unwrap();
    until("the VM", async || (node.names() == ["web-1"]).then_some(())).await;
    assert!(node.heard.lock().unwrap().desired.generation > 41);
    bench.serving.stop().await;
}
