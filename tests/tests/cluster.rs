//! The main job on whole machines: blank ones become nodes, a tier fills, and stays filled whatever is killed. What the
//! host does is here; what a guest does is the tiny image's init: it takes its address by DHCP and serves a page with
//! its name.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_lab::Firmware;
use bedplate_tests::cluster::Vm;
use bedplate_tests::patience::until;
use bedplate_tests::{Artifacts, Cluster, http};
use serde_json::Value;

/// For emulated machines to boot, and for VMs to boot in them, several at a time on two processors.
const PATIENCE: Duration = Duration::from_secs(420);
const MACHINE_MIB: u64 = 2048;
/// So that one node can take all VMs of the other.
const SLOTS: &str = "3";
const TARGET: usize = 3;

#[test]
fn a_tier_stays_filled_when_the_control_node_a_vm_and_a_node_die() -> Result<()> {
    let Some(artifacts) = Artifacts::or_skip("cluster") else { return Ok(()) };
    let mut cluster = Cluster::new(&artifacts, &["--slots-per-node", SLOTS, "--lost-after-seconds", "15"])?;
    let done = life_of_a_tier(&mut cluster, &artifacts);
    if done.is_err() {
        println!("the consoles of the machines and the control node's log are in {}", cluster.keep_logs().display());
        if let Ok(events) = cluster.control().and_then(|control| control.run(&["events"])) {
            println!("{events}");
        }
    }
    done
}

#[test]
fn a_machine_with_uefi_firmware_becomes_a_node() -> Result<()> {
    let Some(artifacts) = Artifacts::or_skip("cluster (UEFI)") else { return Ok(()) };
    let mut cluster = Cluster::new(&artifacts, &[])?;
    cluster.push_vmm_image()?;
    cluster.power_on(Firmware::Uefi, MACHINE_MIB)?;
    let ready = cluster.wait_for_nodes(1, PATIENCE).map(drop);
    if ready.is_err() {
        println!("the machine's console is in {}", cluster.keep_logs().display());
    }
    ready
}

fn life_of_a_tier(cluster: &mut Cluster, artifacts: &Artifacts) -> Result<()> {
    cluster.push_vmm_image()?;
    cluster.push_disk_image("tiny", &artifacts.tiny_disk)?;
    cluster.power_on(Firmware::Bios, MACHINE_MIB)?;
    cluster.power_on(Firmware::Bios, MACHINE_MIB)?;
    physical_machines_wait_in_the_pool(cluster)?;
    cluster.wait_for_nodes(2, PATIENCE)?;
    ensure!(pool(cluster)? == vec![("virtual".to_owned(), 6)], "the pool has {:?}", pool(cluster)?);

    let target = TARGET.to_string();
    let create = ["tier", "create", "tiny", "--image", "tiny", "--target", &target, "--memory", "256M", "--active"];
    cluster.control()?.run(&create)?;
    let first = cluster.wait_for_vms(TARGET, PATIENCE)?;
    pages_name_their_vms(cluster, &first)?;
    let nodes: BTreeSet<_> = first.iter().map(|vm| &vm.node).collect();
    ensure!(nodes.len() == 2, "a tier is spread over the nodes, but all its VMs are on {nodes:?}");

    a_vm_becomes_an_image(cluster, &first)?;
    vms_go_on_without_a_control_node(cluster, &first)?;
    survivors_stay_when_a_node_dies(cluster, &first)?;

    cluster.control()?.run(&["tier", "rm", "tiny"])?;
    until("the slots are free again", PATIENCE, || {
        Ok((pool(cluster)?.contains(&("virtual".to_owned(), 3)) && cluster.vms()?.is_empty()).then_some(()))
    })
}

/// Before they boot, machines are in the pool as physical.
fn physical_machines_wait_in_the_pool(cluster: &Cluster) -> Result<()> {
    until("two physical machines in the pool", PATIENCE, || {
        let pool = pool(cluster)?;
        // A quick one may have become a node already, and its slots stand for it.
        let physical = pool.iter().find(|(kind, _)| kind == "physical").map_or(0, |(_, count)| *count);
        Ok((physical >= 1).then_some(()))
    })
}

/// Kinds in the pool, and how many of each.
fn pool(cluster: &Cluster) -> Result<Vec<(String, usize)>> {
    let mut counts = BTreeMap::<String, usize>::new();
    for entry in cluster.control()?.list(&["pool", "ls"])? {
        *counts.entry(entry["kind"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    Ok(counts.into_iter().collect())
}

fn pages_name_their_vms(cluster: &Cluster, vms: &[Vm]) -> Result<()> {
    for vm in vms {
        let address = vm.web()?;
        // The address is taken a moment before the web server listens.
        let page =
            until(&format!("the page of {}", vm.name), PATIENCE, || Ok(http::get(&cluster.network, address).ok()))?;
        ensure!(page.trim() == format!("tiny {}", vm.name), "the page of {} is {page:?}", vm.name);
    }
    Ok(())
}

/// A running VM is captured and goes on, and another one boots from what was captured.
fn a_vm_becomes_an_image(cluster: &Cluster, vms: &[Vm]) -> Result<()> {
    let (control, vm) = (cluster.control()?, vms.first().context("no VM")?);
    // The tiny image's disk holds a kernel and no system that could have an identity.
    let said = control.run(&["-o", "json", "vm", "capture", &vm.name, "golden", "--keep-identity"])?;
    let captured: Value = serde_json::from_str(&said).with_context(|| format!("what capture said: {said}"))?;
    ensure!(captured["image"]["direct_boot"] == true, "what was captured does not boot: {captured}");
    pages_name_their_vms(cluster, vms).context("after the capture")?;
    let create = ["tier", "create", "golden", "--image", "golden", "--target", "1", "--memory", "256M", "--active"];
    control.run(&create)?;
    let all = cluster.wait_for_vms(TARGET + 1, PATIENCE)?;
    let golden = all.iter().find(|vm| vm.name.starts_with("golden")).context("no VM of the captured image")?;
    pages_name_their_vms(cluster, std::slice::from_ref(golden))?;
    control.run(&["tier", "rm", "golden"])?;
    cluster.wait_for_vms(TARGET, PATIENCE).map(drop)
}

fn vms_go_on_without_a_control_node(cluster: &mut Cluster, before: &[Vm]) -> Result<()> {
    cluster.control.take().context("the control node is away already")?.kill()?;
    // The routes to the VMs' networks outlive a control node that is killed.
    pages_name_their_vms(cluster, before).context("while the control node is away")?;
    cluster.start_control()?;
    cluster.wait_for_nodes(2, PATIENCE)?;
    let after = cluster.wait_for_vms(TARGET, PATIENCE)?;
    ensure!(ids(&after) == ids(before), "other VMs run after a restart of the control node: {after:?}");
    ensure!(after.iter().all(|vm| vm.restarts == 0), "a VM was started again: {after:?}");
    pages_name_their_vms(cluster, &after)
}

fn survivors_stay_when_a_node_dies(cluster: &mut Cluster, before: &[Vm]) -> Result<()> {
    let victim = &before.first().context("no VM")?.node;
    let nodes = cluster.control()?.list(&["node", "ls"])?;
    let mac = nodes.iter().find(|node| node["name"] == victim.as_str()).and_then(|node| node["mac"].as_str());
    // Machines have the MAC addresses …:01, …:02, in the order in which they were powered on.
    let number: usize = mac.and_then(|mac| mac.rsplit(':').next()).context("a node without a MAC")?.parse()?;
    // Dropped: its power is cut.
    drop(cluster.machines.remove(number - 1));
    let after = until("the tier full again on the other node", PATIENCE, || {
        let vms = cluster.vms()?;
        let running = vms.iter().filter(|vm| vm.phase == "running" && vm.address.is_some() && &vm.node != victim);
        Ok((running.count() == TARGET && vms.len() == TARGET).then_some(vms))
    })?;
    for vm in before {
        let now = after.iter().find(|other| other.name == vm.name).context("a name is gone")?;
        ensure!((now.id == vm.id) == (&vm.node != victim), "{} was {vm:?} and is {now:?}", vm.name);
    }
    pages_name_their_vms(cluster, &after)
}

fn ids(vms: &[Vm]) -> BTreeMap<&str, &str> {
    vms.iter().map(|vm| (vm.name.as_str(), vm.id.as_str())).collect()
}
