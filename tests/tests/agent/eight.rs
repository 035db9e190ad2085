//! Eight guests on one node: they boot, are reached and reach each other; a VMM is killed and replaced; the agent is
//! killed and adopts them; one guest is powered off; in the end nothing is left.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bedplate_api::node::{DiskMode, NodeStatus, Power, RestartPolicy, VmPhase, VmSpec, VmStatus};
use bedplate_api::{Digest, VmId};
use bedplate_images::Store;
use bedplate_images::import::{self, Options};
use bedplate_node::vm::outcome::Records;
use bedplate_tests::inside::{DISK, say, tools};
use bedplate_tests::patience::until;
use rustix::process::{Pid, Signal, kill_process};

use crate::agent::{Agent, page};

const COUNT: usize = 8;
const STATE: &str = "/run/agent";

pub fn life() -> Result<()> {
    tools::tun()?;
    let image = import_tiny()?;
    let agent = Agent::start(Path::new(STATE))?;
    let mut vms: Vec<VmSpec> = (1..=COUNT).map(|n| spec(&format!("vm-{n}"), image)).collect();
    agent.put(1, &vms)?;
    let first = agent.until_all("eight guests with an address", is_up)?;
    ensure!(first.vms.len() == COUNT, "{first:?}");
    everybody_answers(&first)?;
    guests_reach_each_other(&agent, &first)?;

    let second = a_vmm_is_killed(&agent, &first)?;
    let agent = agent_is_killed(agent, &second)?;
    let third = an_adopted_vmm_is_killed(&agent, &second)?;
    a_guest_is_powered_off(&agent, &mut vms, &third)?;

    agent.put(3, &[])?;
    until("nothing is left", Duration::from_secs(120), || Ok(agent.status()?.vms.is_empty().then_some(())))?;
    let left: Vec<_> = fs::read_dir(Path::new(STATE).join("vms"))?.flatten().map(|entry| entry.path()).collect();
    ensure!(left.is_empty(), "left: {left:?}");
    let taps: Vec<_> = fs::read_dir("/sys/class/net")?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(!taps.iter().any(|name| name.to_string_lossy().starts_with("bp-")), "left: {taps:?}");
    agent.kill()
}

fn import_tiny() -> Result<Digest> {
    let store = Store::create(Path::new(STATE).join("images"))?;
    let mut quiet = |_: u64, _: u64| ControlFlow::Continue(());
    let options = Options { tag: Some("tiny"), ..Options::default() };
    Ok(import::import_disk(&store, Path::new(DISK), options, &mut quiet)?.digest)
}

pub fn spec(name: &str, image: Digest) -> VmSpec {
    VmSpec {
        id: VmId::random(),
        name: name.to_owned(),
        image,
        cpus: 1,
        memory_mib: 192,
        disk: DiskMode::NonPersistent,
        power: Power::Running,
        restart: RestartPolicy::Always,
        cmdline: String::new(),
    }
}

pub fn is_up(vm: &VmStatus) -> bool {
    vm.phase == VmPhase::Running && vm.address_taken
}

fn addresses(status: &NodeStatus) -> BTreeMap<String, Ipv4Addr> {
    status.vms.iter().filter_map(|vm| Some((vm.name.clone(), vm.address?))).collect()
}

fn pids(status: &NodeStatus) -> BTreeMap<VmId, Option<u32>> {
    status.vms.iter().map(|vm| (vm.id, vm.pid)).collect()
}

/// The node asks every guest for its page.
fn everybody_answers(status: &NodeStatus) -> Result<()> {
    for (name, address) in addresses(status) {
        // The address is taken a moment before the web server listens.
        let said = until(&format!("the page of {name}"), Duration::from_secs(120), || Ok(page(address).ok()))?;
        ensure!(said == format!("tiny {name}"), "{name} at {address} says {said:?}");
    }
    Ok(())
}

/// Each guest asks the next one.
fn guests_reach_each_other(agent: &Agent, status: &NodeStatus) -> Result<()> {
    let next = status.vms.iter().cycle().skip(1);
    for (vm, other) in status.vms.iter().zip(next) {
        let address = other.address.context("no address")?;
        let said = agent.type_to(vm.id, &format!("wget -q -O - http://{address}/"))?;
        ensure!(said == format!("tiny {}", other.name), "{} asked {} and got {said:?}", vm.name, other.name);
    }
    Ok(())
}

/// Guests go on while there is no agent; the next one finds them as they are.
fn agent_is_killed(agent: Agent, before: &NodeStatus) -> Result<Agent> {
    let witness = before.vms[0].id;
    agent.type_to(witness, "echo was here > /run/witness")?;
    agent.kill()?;
    everybody_answers(before).context("while there is no agent")?;
    let agent = Agent::start(Path::new(STATE))?;
    let after = agent.until_all("the guests that ran", is_up)?;
    ensure!(pids(&after) == pids(before), "other processes: {after:?} instead of {before:?}");
    ensure!(addresses(&after) == addresses(before) && after.generation == 1, "{after:?} instead of {before:?}");
    let restarts = |status: &NodeStatus| status.vms.iter().map(|vm| vm.restarts).collect::<Vec<_>>();
    ensure!(restarts(&after) == restarts(before), "a guest was started again: {after:?}");
    ensure!(agent.type_to(witness, "cat /run/witness")? == "was here");
    Ok(agent)
}

/// The agent is the parent: the kernel tells it.
fn a_vmm_is_killed(agent: &Agent, before: &NodeStatus) -> Result<NodeStatus> {
    kill(before, 3)?;
    is_replaced(agent, before, 3)
}

/// Its parent is process 1 now, which is us, and does what the node's process 1 does.
fn an_adopted_vmm_is_killed(agent: &Agent, before: &NodeStatus) -> Result<NodeStatus> {
    let pid = kill(before, 5)?;
    let (_, written) = until("the end of our child", Duration::from_secs(60), || Ok(Records::default().bury(pid)))?;
    written?;
    is_replaced(agent, before, 5)
}

fn kill(status: &NodeStatus, index: usize) -> Result<Pid> {
    let pid = status.vms[index].pid.context("no process")?;
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process")?;
    kill_process(pid, Signal::KILL)?;
    Ok(pid)
}

/// The end is seen and named, and another VMM takes its place; the others notice nothing.
fn is_replaced(agent: &Agent, before: &NodeStatus, index: usize) -> Result<NodeStatus> {
    let victim = &before.vms[index];
    let killed = Instant::now();
    let seen = until("the report of the killed VMM", Duration::from_secs(60), || {
        let status = agent.status()?.vms.into_iter().find(|vm| vm.id == victim.id).context("the VM is gone")?;
        Ok((status.pid != victim.pid).then_some(status))
    })?;
    // For people: how long that took depends on what else the machine does.
    say(&format!("the killed VMM was reported after {:?}: {seen:?}", killed.elapsed()));
    ensure!(seen.detail.as_deref().is_some_and(|why| why.contains("SIGKILL")), "{seen:?}");
    let after = agent.until_all("all eight again", is_up)?;
    for (old, new) in before.vms.iter().zip(&after.vms) {
        let replaced = old.id == victim.id;
        ensure!(
            (new.pid != old.pid) == replaced && new.restarts == old.restarts + u32::from(replaced),
            "{new:?}, was {old:?}"
        );
    }
    ensure!(addresses(&after) == addresses(before), "addresses moved: {after:?}");
    everybody_answers(&after)?;
    Ok(after)
}

/// One guest gets its power button pressed, and ends by itself; the others go on.
fn a_guest_is_powered_off(agent: &Agent, vms: &mut [VmSpec], before: &NodeStatus) -> Result<()> {
    vms[0].power = Power::Stopped;
    let id = vms[0].id;
    agent.put(2, vms)?;
    let after =
        agent.until_all("one that is off", |vm| if vm.id == id { vm.phase == VmPhase::Stopped } else { is_up(vm) })?;
    let off = after.vms.iter().find(|vm| vm.id == id).context("the VM is gone")?;
    ensure!(off.detail.as_deref().is_some_and(|why| why.contains("powered off")), "{off:?}");
    for (old, new) in before.vms.iter().zip(&after.vms).filter(|(old, _)| old.id != id) {
        ensure!(new.pid == old.pid, "{new:?}, was {old:?}");
    }
    Ok(())
}
