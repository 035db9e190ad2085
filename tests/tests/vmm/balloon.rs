//! Memory that a guest does not need goes back to the node.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::patience::until;
use serde_json::{Value, json};

/// For memory to move, in an emulated node: Linux reports what was free for two seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// Fills and frees so much.
const MIB: u64 = 128;

/// MiB of guest memory that the VMM holds.
fn held_mib(guest: &mut Guest) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.process().pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).context("no RssShmem")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? >> 10)
}

fn wait_until_below(guest: &mut Guest, mib: u64) -> Result<u64> {
    let below = until(&format!("less than {mib} MiB of guest memory"), PATIENCE, || {
        let held = held_mib(guest)?;
        Ok((held < mib).then_some(held))
    });
    let mut counters = || Ok::<_, anyhow::Error>((held_mib(guest)?, guest.count("balloon", "reported_bytes")?));
    below.with_context(|| format!("MiB held and bytes reported: {:?}", counters()))
}

/// Without a word in its configuration.
pub fn reports_free_pages() -> Result<()> {
    let mut guest = GuestSpec::new("reporting").boot()?;
    guest.run(&format!(
        "mount -t tmpfs -o size=200m none /mnt && dd if=/dev/zero of=/mnt/x bs=1M count={MIB} 2>/dev/null"
    ))?;
    let full = held_mib(&mut guest)?;
    // Some of them are pages that the guest had used before and that were not reported yet.
    ensure!(full >= MIB, "the guest has filled {MIB} MiB, and the VMM holds {full}");
    guest.run("rm /mnt/x && sync")?;
    let after = wait_until_below(&mut guest, full - MIB * 7 / 10)?;
    ensure!(guest.count("balloon", "reported_bytes")? > MIB << 19, "nothing was reported");
    bedplate_tests::inside::figure(&format!("held MiB: {full} full, {after} after"));
    // The guest takes them again, and finds what it writes.
    let sum = guest.run(&format!(
        "dd if=/dev/urandom of=/mnt/x bs=1M count={} 2>/dev/null; md5sum < /mnt/x; md5sum < /mnt/x",
        MIB / 8
    ))?;
    let sums: Vec<_> = sum.lines().collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "memory has changed: {sum}");
    ensure!(guest.api("GET", "/balloon", "", 400)?.contains("No balloon device found."));
    Ok(())
}

/// Firecracker's way: a size, a smaller one, numbers.
pub fn inflates_and_says_how_it_is() -> Result<()> {
    let section = json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1,
        "free_page_reporting": false, "free_page_hinting": true});
    let mut guest = GuestSpec::new("balloon").section("balloon", section).boot()?;
    guest.run(&format!(
        "mount -t tmpfs -o size=200m none /mnt && dd if=/dev/zero of=/mnt/x bs=1M count={MIB} 2>/dev/null && rm /mnt/x"
    ))?;
    let full = held_mib(&mut guest)?;
    guest.api("PATCH", "/balloon", &json!({"amount_mib": 100}).to_string(), 204)?;
    wait_until_below(&mut guest, full - 60)?;
    let stats = |guest: &Guest| -> Result<Value> {
        Ok(serde_json::from_str(&guest.api("GET", "/balloon/statistics", "", 200)?)?)
    };
    until("a full balloon", PATIENCE, || Ok((stats(&guest)?["actual_mib"] == 100).then_some(())))?;
    let total = until("statistics", PATIENCE, || Ok(stats(&guest)?["total_memory"].as_u64()))?;
    ensure!(total > 64 << 20 && total < 256 << 20, "total_memory {total}");
    guest.api("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s": 2}"#, 204)?;
    guest.api("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s": 0}"#, 400)?;
    guest.api("PATCH", "/balloon", r#"{"amount_mib": 0}"#, 204)?;
    until("an empty balloon", PATIENCE, || Ok((stats(&guest)?["actual_mib"] == 0).then_some(())))?;
    guest.api("PATCH", "/balloon", r#"{"amount_mib": 300}"#, 400)?;
    let balloon: Value = serde_json::from_str(&guest.api("GET", "/balloon", "", 200)?)?;
    ensure!(balloon["amount_mib"] == 0 && balloon["stats_polling_interval_s"] == 2, "GET /balloon: {balloon}");

    // A run of hinting: what is free now, at once.
    guest.run(&format!("dd if=/dev/zero of=/mnt/x bs=1M count={MIB} 2>/dev/null && rm /mnt/x"))?;
    let full = held_mib(&mut guest)?;
    guest.api("PATCH", "/balloon/hinting/start", r#"{"acknowledge_on_stop": true}"#, 204)?;
    wait_until_below(&mut guest, full - 60)?;
    until("the end of the run", PATIENCE, || {
        let status: Value = serde_json::from_str(&guest.api("GET", "/balloon/hinting/status", "", 200)?)?;
        Ok((status["host_cmd"] == 1 && status["guest_cmd"] == 0).then_some(()))
    })?;
    guest.api("PATCH", "/balloon/hinting/stop", "", 204)?;
    ensure!(guest.run("echo well")? == "well");
    Ok(())
}
