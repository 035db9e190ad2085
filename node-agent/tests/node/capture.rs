//! A running VM's disk is copied and sent, and the VM goes on.

use std::ops::ControlFlow;

use bedplate_api::VmId;
use bedplate_api::node::VmPhase;
use bedplate_api::vmm::RunState;
use bedplate_images::disk::Disk;
use futures_util::TryStreamExt;

use crate::support::{Node, SLEEP, eventually, image_with, kvm, spec};

async fn state(node: &Node, id: VmId) -> Option<RunState> {
    node.client().node_vm_inspect(id).await.ok().map(|seen| seen.state)
}

#[tokio::test]
async fn a_running_vms_disk_arrives_and_the_vm_goes_on() {
    if !kvm() {
        return;
    }
    let node = Node::running(&[]).await;
    let content: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let vm = spec("one", image_with(&node.store(), &[SLEEP], &content));
    let client = node.client();
    let unknown = client.node_vm_capture(vm.id).await.map(drop).unwrap_err().to_string();
    assert!(unknown.contains("has no VM"), "{unknown}");
    node.put(1, std::slice::from_ref(&vm)).await;
    node.until_phase(vm.id, VmPhase::Running).await;

    let (unfrozen, disk) = client.node_vm_capture(vm.id).await.unwrap();
    assert_eq!(unfrozen.as_deref(), Some("no guest agent answers on vsock port 9100"));
    let bytes: Vec<u8> = disk.map_ok(|piece| piece.to_vec()).try_concat().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut go_on = |_, _| ControlFlow::Continue(());
    let to = dir.path().join("disk");
    let mut disk = Disk::receive(&mut &bytes[..], &to, &node.store(), &vm.image, &mut go_on).unwrap();
    let mut read = vec![0; content.len()];
    disk.read_at(&mut read, 0).unwrap();
    assert!(read == content);

    assert_eq!(state(&node, vm.id).await, Some(RunState::Running));
    let copy = node.vm_dir(vm.id).join("capture");
    eventually("the copy goes", async || (!copy.exists()).then_some(())).await;
    drop(client.node_vm_capture(vm.id).await.unwrap());
    eventually("the copy goes though nobody took it", async || (!copy.exists()).then_some(())).await;
}

#[tokio::test]
async fn a_guest_that_a_killed_agent_held_goes_on() {
    if !kvm() {
        return;
    }
    let mut node = Node::running(&[]).await;
    let vm = spec("held", image_with(&node.store(), &[SLEEP], &[0; 65536]));
    node.put(1, std::slice::from_ref(&vm)).await;
    node.until_phase(vm.id, VmPhase::Running).await;
    node.kill();
    // As an agent that was killed in the middle of a capture leaves it.
    let dir = node.vm_dir(vm.id);
    std::fs::create_dir_all(dir.join("capture/disk")).unwrap();
    bedplate_node::vm::api::pause(&dir.join("vmm/api.sock")).await.unwrap();
    node.start().await;
    eventually("the guest goes on", async || state(&node, vm.id).await.filter(|s| *s == RunState::Running)).await;
    eventually("the copy goes", async || (!dir.join("capture").exists()).then_some(())).await;
    assert!(node.client().node_vm_capture(vm.id).await.is_ok());
}
