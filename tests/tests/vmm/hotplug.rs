//! Memory that is added to a guest that runs, and taken away again.

use std::time::Duration;

use anyhow::{Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::patience::until;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

fn status(guest: &Guest) -> Result<Value> {
    Ok(serde_json::from_str(&guest.api("GET", "/hotplug/memory", "", 200)?)?)
}

fn total_kib(guest: &Guest) -> Result<u64> {
    Ok(guest.run("awk '/MemTotal/ {print $2}' /proc/meminfo")?.parse()?)
}

pub fn grows_and_shrinks() -> Result<()> {
    let section = json!({"total_size_mib": 512});
    let guest = GuestSpec::new("hotplug")
        .cmdline("memhp_default_state=online_movable")
        .section("memory-hotplug", section)
        .boot()?;
    let before = total_kib(&guest)?;
    let first = status(&guest)?;
    ensure!(first["plugged_size_mib"] == 0 && first["total_size_mib"] == 512, "{first}");
    guest.api("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 256}"#, 204)?;
    until("256 MiB more", PATIENCE, || Ok((status(&guest)?["plugged_size_mib"] == 256).then_some(())))?;
    until("MemTotal to grow", PATIENCE, || Ok((total_kib(&guest)? >= before + (240 << 10)).then_some(())))?;
    // More than there was: some of it is in the new memory.
    guest.run("mount -t tmpfs -o size=400m none /mnt && dd if=/dev/zero of=/mnt/x bs=1M count=260 2>/dev/null")?;
    guest.run("dd if=/dev/urandom of=/mnt/y bs=1M count=8 2>/dev/null")?;
    let sums = guest.run("md5sum < /mnt/y; md5sum < /mnt/y")?;
    ensure!(sums.lines().next() == sums.lines().last(), "memory has changed: {sums}");
    guest.run("rm /mnt/x /mnt/y")?;
    guest.api("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 0}"#, 204)?;
    until("none of it", PATIENCE, || Ok((status(&guest)?["plugged_size_mib"] == 0).then_some(())))?;
    ensure!(total_kib(&guest)? <= before + 4096, "MemTotal is {} and was {before}", total_kib(&guest)?);
    ensure!(guest.count("memory_hotplug", "guest_faults")? == 0);
    guest.api("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 513}"#, 400)?;
    Ok(())
}
