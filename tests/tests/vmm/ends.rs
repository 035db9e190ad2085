//! The ways in which a VM ends, and what its process says of them.

use anyhow::{Result, ensure};
use bedplate_api::vmm::{Inspection, RunState};
use bedplate_tests::inside::guest::GuestSpec;
use rustix::process::Signal;
use serde_json::json;

pub fn reboot() -> Result<()> {
    let mut guest = GuestSpec::new("reboot").boot()?;
    guest.begin("reboot -f")?;
    guest.ended_well("guest_reset")
}

pub fn power_button() -> Result<()> {
    let mut guest = GuestSpec::new("button").boot()?;
    guest.api("PUT", "/bedplate/power-button", "", 204)?;
    // The guest noticed the press; it was not just stopped.
    guest.console().wait_for("TINY power button", bedplate_tests::inside::guest::BOOT)?;
    guest.ended_well("guest_power_off")
}

pub fn sigterm() -> Result<()> {
    let mut guest = GuestSpec::new("sigterm").boot()?;
    guest.process().signal(Signal::TERM);
    guest.console().wait_for("TINY power button", bedplate_tests::inside::guest::BOOT)?;
    guest.ended_well("guest_power_off")
}

/// A VM that stands still types nothing; one that goes on has lost nothing. Both can be looked into.
pub fn pause_and_resume() -> Result<()> {
    let mut guest = GuestSpec::new("pauses").cpus(2).section("entropy", json!({})).boot()?;
    let inspect =
        || anyhow::Ok(serde_json::from_str::<Inspection>(&guest.api("GET", "/bedplate/inspect", "", 200)?)?);
    let running = inspect()?;
    ensure!(running.state == RunState::Running && running.vcpus.len() == 2, "{running:?}");
    for vcpu in &running.vcpus {
        // Long mode with paging, and by then it has been at the serial port or has been kicked for this look.
        let in_linux = vcpu.registers.as_ref().is_some_and(|r| r.cr0 >> 31 & 1 == 1 && r.efer >> 10 & 1 == 1);
        ensure!(in_linux && !vcpu.last_exits.is_empty(), "{vcpu:?}");
    }
    ensure!(running.vcpus[0].exits.port_write > 0, "{running:?}");
    let queue = running.queues.get("entropy").and_then(|queues| queues.first());
    ensure!(queue.is_some_and(|q| q.available > Some(0) && q.size > 0), "{:?}", running.queues);
    guest.api("PATCH", "/vm", r#"{"state": "Paused"}"#, 204)?;
    let (first, second) = (inspect()?, inspect()?);
    ensure!(first == second && first.state == RunState::Paused, "not at rest: {first:?}, then {second:?}");
    ensure!(first.vcpus.iter().all(|vcpu| vcpu.registers.is_some()), "{first:?}");
    guest.begin("echo went on")?;
    let state = guest.api("GET", "/", "", 200)?;
    ensure!(state.contains("Paused"), "the API says {state}");
    guest.api("PATCH", "/vm", r#"{"state": "Resumed"}"#, 204)?;
    let (printed, _) = guest.finish()?;
    ensure!(printed == "went on", "the guest printed {printed:?}");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

pub fn stop() -> Result<()> {
    let mut guest = GuestSpec::new("stop").boot()?;
    guest.api("PUT", "/bedplate/stop", "", 204)?;
    guest.ended_well("stopped")
}

/// `panic=-1` on the command line: the guest resets at once.
pub fn panic() -> Result<()> {
    let mut guest = GuestSpec::new("panic").boot()?;
    guest.begin("echo c > /proc/sysrq-trigger")?;
    guest.ended_well("guest_reset")
}
