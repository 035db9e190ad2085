//! Kernels, processors, entropy.

use anyhow::{Result, ensure};
use bedplate_tests::inside::guest::GuestSpec;
use serde_json::json;

pub fn boots(kernel: &str) -> Result<()> {
    let mut guest = GuestSpec::new("boots").kernel(kernel).cmdline("systemd.hostname=named").start()?;
    let facts = guest.ready()?;
    ensure!(facts.contains("name=named cpus=1"), "the guest says {facts:?}");
    let cmdline = guest.run("cat /proc/cmdline")?;
    ensure!(cmdline.ends_with("systemd.hostname=named"), "its command line is {cmdline:?}");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

pub fn vcpus(count: u8) -> Result<()> {
    let guest = GuestSpec::new("vcpus").cpus(count).boot()?;
    let online = guest.run("nproc")?;
    ensure!(online == count.to_string(), "{online} of {count} vCPUs are online");
    // Each does work, and gets its timer interrupts.
    let busy = format!("for i in $(seq {count}); do (seq 2000 | md5sum > /dev/null) & done; wait; echo all");
    ensure!(guest.run(&busy)? == "all");
    Ok(())
}

pub fn entropy() -> Result<()> {
    let guest = GuestSpec::new("entropy").section("entropy", json!({})).boot()?;
    let source = guest.run("cat /sys/class/misc/hw_random/rng_current")?;
    ensure!(source.starts_with("virtio_rng"), "the guest's random source is {source:?}");
    let draw = "dd if=/dev/hwrng bs=64 count=1 2>/dev/null | md5sum";
    let (first, second) = (guest.run(draw)?, guest.run(draw)?);
    ensure!(first != second, "the same bytes twice: {first}");
    Ok(())
}
