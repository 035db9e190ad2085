//! VMs from the wish to the process and back.

use bedplate_api::node::{Power, RestartPolicy, VmPhase};

use crate::support::{AWAIT_BUTTON, Node, POWER_OFF, RESET, SAY_X, SLEEP, image, kill, kvm, spec};

#[tokio::test]
async fn a_vm_is_started_stopped_by_its_button_started_again_and_removed() {
    if !kvm() {
        return;
    }
    let node = Node::running(&[]).await;
    let vm = spec("one", image(&node.store(), &[SAY_X, AWAIT_BUTTON, POWER_OFF]));
    let answer = node.put(1, std::slice::from_ref(&vm)).await;
    assert_eq!(answer.generation, 1);
    let running = node.until_phase(vm.id, VmPhase::Running).await;
    assert_eq!(node.processes().len(), 1);
    assert_eq!(node.processes()[0].1, running.pid.unwrap());
    let client = node.client();
    crate::support::eventually("the guest speaks", async || {
        client.node_vm_log(vm.id).await.ok().filter(|log| log.starts_with('x'))
    })
    .await;
    assert_eq!(client.desired().await.unwrap().vms, std::slice::from_ref(&vm));

    let mut off = vm.clone();
    off.power = Power::Stopped;
    node.put(2, std::slice::from_ref(&off)).await;
    let stopped = node.until_phase(vm.id, VmPhase::Stopped).await;
    assert_eq!(stopped.detail.as_deref().map(|d| d.starts_with("the guest powered off")), Some(true), "{stopped:?}");
    assert!(node.processes().is_empty() && node.vm_dir(vm.id).join("disk/disk.json").exists());

    node.put(3, std::slice::from_ref(&vm)).await;
    let again = node.until_phase(vm.id, VmPhase::Running).await;
    assert_eq!(again.restarts, 0, "a start that was asked for is no restart");

    node.put(4, &[]).await;
    node.until("the VM is gone", |s| s.vms.is_empty()).await;
    assert!(node.processes().is_empty() && !node.vm_dir(vm.id).exists());
}

#[tokio::test]
async fn a_vmm_is_alone_in_namespaces_of_its_own() {
    if !kvm() {
        return;
    }
    let node = Node::running(&[]).await;
    let vm = spec("alone", image(&node.store(), &[SLEEP]));
    node.put(1, std::slice::from_ref(&vm)).await;
    let pid = node.until_phase(vm.id, VmPhase::Running).await.pid.unwrap();
    let is_root = rustix::process::geteuid().is_root();
    for kind in ["user", "mnt", "net", "ipc", "uts", "pid"] {
        let of = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/{kind}")).unwrap();
        // To be born into a pid namespace takes a parent that is root.
        assert_eq!(of(&pid.to_string()) != of("self"), is_root || kind != "pid", "{kind}");
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
    assert_eq!(numbers.split_whitespace().last() == Some("1"), is_root, "{numbers}");
}

#[tokio::test]
async fn a_guest_that_ignores_its_button_is_stopped_all_the_same() {
    if !kvm() {
        return;
    }
    let node = Node::running(&[]).await;
    let vm = spec("deaf", image(&node.store(), &[SLEEP]));
    node.put(1, std::slice::from_ref(&vm)).await;
    node.until_phase(vm.id, VmPhase::Running).await;
    node.put(2, &[]).await;
    node.until("the VM is gone", |s| s.vms.is_empty()).await;
}

#[tokio::test]
async fn eight_vms_run_at_once_and_the_ninth_is_told_why_not() {
    if !kvm() {
        return;
    }
    let node = Node::running(&[]).await;
    let image = image(&node.store(), &[SLEEP]);
    let vms: Vec<_> = (1..=9).map(|n| spec(&format!("vm-{n}"), image)).collect();
    node.put(1, &vms).await;
    let status = node.until("eight run", |s| s.vms.iter().filter(|v| v.phase == VmPhase::Running).count() == 8).await;
    let ninth = status.vms.iter().find(|v| v.id == vms[8].id).unwrap();
    assert_eq!(ninth.phase, VmPhase::Failed);
    assert!(ninth.detail.as_deref().unwrap().contains("configured for 8 VMs"), "{ninth:?}");
    // One less, and there is room for it.
    node.put(2, &vms[1..]).await;
    node.until_phase(vms[8].id, VmPhase::Running).await;
}

#[tokio::test]
async fn a_vmm_that_is_killed_is_reported_and_started_again() {
    if !kvm() {
        return;
    }
    let node = Node::running(&[]).await;
    let vm = spec("one", image(&node.store(), &[SLEEP]));
    node.put(1, std::slice::from_ref(&vm)).await;
    let first = node.until_phase(vm.id, VmPhase::Running).await;
    kill(first.pid.unwrap());
    let waits = node.until_vm("its end is reported", vm.id, |v| v.restarts == 1).await;
    assert!(waits.detail.as_deref().unwrap().contains("signal 9 (SIGKILL)"), "{waits:?}");
    let second = node.until_vm("it runs again", vm.id, |v| v.phase == VmPhase::Running && v.pid != first.pid).await;
    assert_eq!(second.restarts, 1);
}

#[tokio::test]
async fn a_guest_that_resets_itself_starts_again_or_not_as_its_policy_says() {
    if !kvm() {
        return;
    }
    let node = Node::running(&[]).await;
    let image = image(&node.store(), &[RESET]);
    let mut once = spec("once", image);
    once.restart = RestartPolicy::Never;
    let for_ever = spec("for-ever", image);
    node.put(1, &[once.clone(), for_ever.clone()]).await;
    let ended = node.until_phase(once.id, VmPhase::Stopped).await;
    assert!(ended.detail.as_deref().unwrap().starts_with("the guest reset itself"), "{ended:?}");
    assert_eq!(ended.restarts, 0);
    let again = node.until_vm("it was started again twice", for_ever.id, |v| v.restarts >= 2).await;
    assert!(again.detail.is_some());
}

#[tokio::test]
async fn a_machine_that_goes_down_stops_its_vms_and_the_agent_ends() {
    if !kvm() {
        return;
    }
    let mut node = Node::running(&[]).await;
    let vm = spec("one", image(&node.store(), &[SLEEP]));
    node.put(1, std::slice::from_ref(&vm)).await;
    node.until_phase(vm.id, VmPhase::Running).await;
    node.signal(bedplate_node::service::LEAVE_SIGNAL);
    assert!(node.wait_end().success());
    assert!(node.processes().is_empty());
    // It is still wanted: when the machine is back, so is the VM.
    node.start().await;
    node.until_phase(vm.id, VmPhase::Running).await;
}

#[tokio::test]
async fn what_cannot_run_here_fails_with_the_reason() {
    let node = Node::running(&["--vmm", "/nonexistent/bedplate-vmm"]).await;
    let vm = spec("one", image(&node.store(), &[SLEEP]));
    node.put(1, std::slice::from_ref(&vm)).await;
    let failed = node.until_phase(vm.id, VmPhase::Failed).await;
    assert!(failed.detail.as_deref().unwrap().contains("/nonexistent/bedplate-vmm"), "{failed:?}");

    let node = Node::running(&[]).await;
    let unknown = spec("two", bedplate_api::Digest::from_bytes([7; 32]));
    let mut greedy = spec("three", image(&node.store(), &[SLEEP]));
    greedy.memory_mib = 1 << 20;
    node.put(1, &[unknown.clone(), greedy.clone()]).await;
    let failed = node.until_phase(unknown.id, VmPhase::Failed).await;
    let reason = failed.detail.unwrap();
    assert!(reason.contains("no control node") || reason.contains("/dev/kvm"), "{reason}");
    let failed = node.until_phase(greedy.id, VmPhase::Failed).await;
    let reason = failed.detail.unwrap();
    assert!(reason.contains("1048608 MiB") || reason.contains("/dev/kvm"), "{reason}");
}
