//! The ways in which a VM ends, and what its process says of them.

use anyhow::{Result, ensure};
use bedplate_tests::inside::guest::GuestSpec;
use rustix::process::Signal;

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

/// A VM that stands still types nothing; one that goes on has lost nothing.
pub fn pause_and_resume() -> Result<()> {
    let mut guest = GuestSpec::new("pauses").cpus(2).boot()?;
    guest.api("PATCH", "/vm", r#"{"state": "Paused"}"#, 204)?;
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
