//! A guest on a node that has nothing of its image: it is up before the copy is complete, gets what it reads, waits while
//! the repository or the agent is away, is told of an error when that takes too long, and never reads anything wrong.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bedplate_api::node::{NodeStatus, VmPhase, VmSpec, VmStatus};
use bedplate_api::{Digest, VmId};
use bedplate_images::Store;
use bedplate_lab::Process;
use bedplate_tests::inside::{say, tools};
use bedplate_tests::patience::until;

use crate::agent::{Agent, PATIENCE};
use crate::eight::{is_up, spec};
use crate::repository::{self, Content};

const STATE: &str = "/run/lazy";
/// The disk: what boots, then bytes that do not compress.
const RAW: &str = "/run/lazy.raw";
const BOOTS_MIB: u64 = 96;
const MORE_MIB: u64 = 40;
/// Long enough for an emulated node to do other things, short enough to wait for in a test.
const WAIT_SECONDS: &str = "15";

pub fn life() -> Result<()> {
    tools::tun()?;
    let image =
        repository::image("lazy", &Content { raw: RAW, boots_mib: BOOTS_MIB, more_mib: MORE_MIB, size_mib: None })?;
    let control = repository::serve()?;
    // So slow that it does not complete before all has been tried.
    let slow = ["--copy-rate", "32", "--copy-parallel", "1", "--chunk-wait-seconds", WAIT_SECONDS];
    let agent = Agent::start_from(Path::new(STATE), repository::SOCKET, &slow)?;
    let vm = spec("lazy", image);
    agent.put(1, std::slice::from_ref(&vm))?;
    let up = agent.until_all("a guest with an address", is_up)?;
    is_partial(&up, image)?;
    say(&format!("up with {:?} of its image", up.vms[0].copy));

    // From the back: the copy goes from the front.
    let mut last = (BOOTS_MIB + MORE_MIB) * 16;
    let mut another = || {
        last -= 16;
        last
    };
    read_and_compare(&agent, vm.id, another())?;
    let control = the_repository_is_away_for_a_moment(&agent, &vm, control, another())?;
    let control = the_repository_is_away_for_long(&agent, &vm, control, another())?;
    let (agent, mut control) = the_agent_is_killed(agent, &vm, control, another())?;
    is_whole(&agent, &vm, image)?;
    agent.put(2, &[])?;
    until("nothing is left", PATIENCE, || Ok(agent.status()?.vms.is_empty().then_some(())))?;
    agent.kill()?;
    control.kill()?;
    Ok(())
}

/// The VM runs, and people see that its image is not here whole.
fn is_partial(status: &NodeStatus, image: Digest) -> Result<()> {
    let copy = status.vms.first().and_then(|vm| vm.copy).with_context(|| format!("no copy in {status:?}"))?;
    ensure!(copy.done < copy.total && !status.images.contains(&image), "it is complete: {status:?}");
    Ok(())
}

/// The command by which a guest reads a chunk past every cache.
fn read_chunk(chunk: u64) -> String {
    format!("dd if=/dev/vda bs=65536 skip={chunk} count=1 iflag=direct 2>/dev/null | md5sum")
}

/// What that prints, where the chunk is what it should be.
fn sum_of(chunk: u64) -> Result<String> {
    let mut file = File::open(RAW)?;
    file.seek(SeekFrom::Start(chunk << 16))?;
    let mut bytes = vec![0; 1 << 16];
    file.read_exact(&mut bytes)?;
    let part = Path::new("/run/part");
    File::create(part)?.write_all(&bytes)?;
    Ok(tools::busybox(&["md5sum", "/run/part"])?.split_whitespace().next().unwrap_or_default().to_owned())
}

fn read_and_compare(agent: &Agent, id: VmId, chunk: u64) -> Result<()> {
    let read = agent.type_to(id, &read_chunk(chunk))?;
    same(chunk, &read)
}

fn same(chunk: u64, printed: &str) -> Result<()> {
    let wanted = sum_of(chunk)?;
    ensure!(printed.starts_with(&wanted), "chunk {chunk} is read as {printed:?} and should have the sum {wanted}");
    Ok(())
}

fn the_repository_is_away_for_a_moment(
    agent: &Agent,
    vm: &VmSpec,
    mut control: Process,
    chunk: u64,
) -> Result<Process> {
    control.kill()?;
    let mut console = agent.begin(vm.id, &read_chunk(chunk))?;
    // People see it where they look.
    let seen = until("why the guest waits", PATIENCE, || Ok(only(&agent.status()?)?.detail))?;
    ensure!(seen.contains("a guest waits"), "{seen}");
    // Shorter than the guest's patience: the emulated node notices within a few seconds.
    let control = repository::serve()?;
    same(chunk, &console.finish()?)?;
    Ok(control)
}

fn the_repository_is_away_for_long(agent: &Agent, vm: &VmSpec, mut control: Process, chunk: u64) -> Result<Process> {
    control.kill()?;
    let no_data = "d41d8cd98f00b204e9800998ecf8427e";
    let read = agent.type_to(vm.id, &read_chunk(chunk))?;
    ensure!(read.contains(no_data), "the read did not fail: {read}");
    ensure!(only(&agent.status()?)?.phase == VmPhase::Running);
    let control = repository::serve()?;
    // It waits in the network until the connection is tried again; then everything is as before. For a second after the
    // failure the same chunk fails at once, so that a guest that reads on is not held up once for each of its requests.
    until("the chunk", PATIENCE, || Ok(read_and_compare(agent, vm.id, chunk).ok()))?;
    Ok(control)
}

/// A guest waits, nobody is there to serve it, and then somebody is; without limits it completes the image.
fn the_agent_is_killed(agent: Agent, vm: &VmSpec, mut control: Process, chunk: u64) -> Result<(Agent, Process)> {
    let before = only(&agent.status()?)?.pid;
    control.kill()?;
    let mut console = agent.begin(vm.id, &read_chunk(chunk))?;
    agent.kill()?;
    let control = repository::serve()?;
    let agent = Agent::start_from(Path::new(STATE), repository::SOCKET, &[])?;
    same(chunk, &console.finish()?)?;
    ensure!(only(&agent.status()?)?.pid == before, "it is the same VM all the time");
    Ok((agent, control))
}

fn is_whole(agent: &Agent, vm: &VmSpec, image: Digest) -> Result<()> {
    let status = until("the whole image", PATIENCE, || {
        let status = agent.status()?;
        Ok(status.images.contains(&image).then_some(status))
    })?;
    ensure!(only(&status)?.copy.is_none() && only(&status)?.restarts == 0, "{status:?}");
    Store::open(Path::new(STATE).join("images"))?.verify(&image)?;
    let whole = agent.type_to(vm.id, "md5sum < /dev/vda")?;
    let wanted = tools::busybox(&["md5sum", RAW])?;
    ensure!(whole.split_whitespace().next() == wanted.split_whitespace().next(), "{whole} instead of {wanted}");
    Ok(())
}

fn only(status: &NodeStatus) -> Result<VmStatus> {
    status.vms.first().cloned().context("the VM is gone")
}
