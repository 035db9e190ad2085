//! Interfaces whose frames the node's kernel carries: vhost-net.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::tools::{remove_tap, tap, with_tap};
use bedplate_tests::patience::until;
use serde_json::{Value, json};

use crate::network::{in_bulk, rebind, tap_of_several, used};

const PATIENCE: Duration = Duration::from_secs(60);
const MAC: &str = "02:00:00:00:09:02";

/// A guest with one interface, and as many vCPUs as it shall have pairs of queues.
fn guest(name: &str, tap: &str, pairs: u8) -> GuestSpec {
    let guest = GuestSpec::new(name).cpus(pairs).network(tap, MAC).network_option("vhost", json!(true));
    guest.cmdline("tiny.ip=10.9.0.2/24")
}

/// Names of the VMM's threads, without those of vhost, which are of the process from Linux 6.4 on.
fn threads(guest: &mut Guest) -> Result<Vec<String>> {
    let tasks = fs::read_dir(Path::new("/proc").join(guest.process().pid().to_string()).join("task"))?;
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let mut names: Vec<_> =
        names.map(|name| name.trim().to_owned()).filter(|name| !name.starts_with("vhost")).collect();
    names.sort();
    Ok(names)
}

pub fn both_ways(pairs: u8) -> Result<()> {
    match pairs {
        1 => tap("tap-v", Some("10.9.0.1/24"))?,
        _ => tap_of_several("tap-v", "10.9.0.1/24")?,
    }
    let result = carries(pairs);
    remove_tap("tap-v")?;
    result
}

fn carries(pairs: u8) -> Result<()> {
    let mut guest = guest("vhost", "tap-v", pairs).boot()?;
    let ways: &[&str] = if pairs == 1 { &["wget"] } else { &["taskset 1 wget", "taskset 2 wget"] };
    for round in 0..2 {
        let before = used(&guest, "net_eth0")?;
        in_bulk(&guest, 9, ways)?;
        let after = used(&guest, "net_eth0")?;
        for queue in 0..2 * u64::from(pairs) {
            ensure!(after[&queue] != before[&queue], "round {round}: queue {queue} is idle: {before:?}, {after:?}");
        }
        // The driver lets go of the device, which is reset, and comes back.
        rebind(&guest, 9)?;
    }
    if pairs > 1 {
        // Vectors are masked, rewritten and unmasked while frames come.
        let irqs = "$(grep 'virtio.*put' /proc/interrupts | cut -d: -f1)";
        guest.run(&format!(
            "touch /run/moving; (for n in $(seq 10); do for irq in {irqs}; do \
             echo $((n % 2 + 1)) > /proc/irq/$irq/smp_affinity; done; usleep 20000; done; rm /run/moving) &"
        ))?;
        guest.run("while [ -e /run/moving ]; do ping -c 1 -W 10 10.9.0.1 > /dev/null || exit 1; done")?;
        guest.run("ping -c 2 -W 10 10.9.0.1 > /dev/null")?;
        let counts = guest.run("grep 'virtio.*put' /proc/interrupts")?;
        let column = |n| counts.lines().any(|line| line.split_whitespace().nth(n).is_some_and(|count| count != "0"));
        ensure!(column(1) && column(2), "interrupts did not move: {counts}");
    }
    // Nobody here has touched a frame: no worker, no notification, no chain but those of the control queue.
    let names = threads(&mut guest)?;
    ensure!(!names.iter().any(|name| name == "net"), "{names:?}");
    ensure!(names.iter().filter(|name| *name == "net-control").count() == usize::from(pairs > 1), "{names:?}");
    let most = if pairs > 1 { 16 } else { 0 };
    for counter in ["chains", "notifications", "interrupts"] {
        let count = guest.count("net_eth0", counter)?;
        ensure!(count <= most, "{count} {counter}");
    }
    for counter in ["guest_faults", "host_faults"] {
        ensure!(
            guest.count("net_eth0", counter)? == 0,
            "{counter}: {}",
            guest.api("GET", "/bedplate/status", "", 200)?
        );
    }
    // It can go, and cannot come again.
    let limits = json!({"iface_id": "eth0", "rx_rate_limiter": {"ops": {"size": 1, "refill_time": 1000}}});
    let said = guest.api("PATCH", "/network-interfaces/eth0", &limits.to_string(), 400)?;
    ensure!(said.contains("vhost and rate limiters"), "{said}");
    guest.api("DELETE", "/network-interfaces/eth0", "", 204)?;
    until("the interface to go", PATIENCE, || {
        let config: Value = serde_json::from_str(&guest.api("GET", "/vm/config", "", 200)?)?;
        Ok(config["network-interfaces"].as_array().is_none_or(Vec::is_empty).then_some(()))
    })?;
    ensure!(!threads(&mut guest)?.iter().any(|name| name.starts_with("net")));
    let again = json!({"iface_id": "eth0", "host_dev_name": "tap-v", "vhost": true});
    let said = guest.api("PUT", "/network-interfaces/eth0", &again.to_string(), 400)?;
    ensure!(said.contains("a VM that runs cannot get an interface with vhost"), "{said}");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

/// Frames lie in memory that the guest did not begin with.
pub fn added_memory() -> Result<()> {
    with_tap("tap-v", "10.9.0.1/24", with_added_memory)
}

fn with_added_memory() -> Result<()> {
    let guest = guest("vhost-memory", "tap-v", 1).cmdline("memhp_default_state=online_kernel");
    let guest = guest.section("memory-hotplug", json!({"total_size_mib": 512})).boot()?;
    guest.api("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 256}"#, 204)?;
    until("256 MiB more", PATIENCE, || {
        let status: Value = serde_json::from_str(&guest.api("GET", "/hotplug/memory", "", 200)?)?;
        Ok((status["plugged_size_mib"] == 256).then_some(()))
    })?;
    // What the guest began with is full, so that what it takes now is of the other.
    guest.run("mount -t tmpfs -o size=600m none /mnt")?;
    for part in 0..5 {
        guest.run(&format!("dd if=/dev/zero of=/mnt/{part} bs=1M count=50 2>/dev/null"))?;
    }
    rebind(&guest, 9)?;
    in_bulk(&guest, 9, &["wget"])?;
    ensure!(guest.count("net_eth0", "guest_faults")? + guest.count("net_eth0", "host_faults")? == 0);
    Ok(())
}

pub fn refusals() -> Result<()> {
    tap("tap-v", None)?;
    let refuses = |guest: GuestSpec, words: &[&str]| -> Result<()> {
        let said = guest.refused()?;
        words.iter().try_for_each(|word| {
            ensure!(said.contains(word), "{word:?} is missing in {said:?}");
            Ok(())
        })
    };
    let limiter = json!({"bandwidth": {"size": 1000, "refill_time": 1000}});
    refuses(guest("limited", "tap-v", 1).network_option("rx_rate_limiter", limiter), &["\"eth0\"", "vhost", "tc"])?;
    let mmds = json!({"network_interfaces": ["eth0"]});
    refuses(guest("mmds", "tap-v", 1).section("mmds-config", mmds), &["\"eth0\"", "vhost"])?;
    // As on a host without the module.
    fs::rename("/dev/vhost-net", "/dev/vhost-net.away")?;
    let result = refuses(guest("none", "tap-v", 1), &["eth0", "/dev/vhost-net", "modprobe vhost_net"]);
    fs::rename("/dev/vhost-net.away", "/dev/vhost-net")?;
    remove_tap("tap-v")?;
    result
}
