//! vCPUs that come while the guest runs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::DISK;
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::patience::until;
use serde_json::{Value, json};

/// For a guest to take a vCPU, in an emulated node.
const PATIENCE: Duration = Duration::from_secs(60);

fn spec(name: &str, count: u8, max: u8) -> GuestSpec {
    let machine = json!({"vcpu_count": count, "max_vcpu_count": max, "mem_size_mib": 256});
    GuestSpec::new(name).section("machine-config", machine)
}

fn put(guest: &Guest, count: u8, status: u16) -> Result<String> {
    guest.api("PUT", "/bedplate/vcpus", &json!({"count": count}).to_string(), status)
}

fn json_of(guest: &Guest, path: &str) -> Result<Value> {
    Ok(serde_json::from_str(&guest.api("GET", path, "", 200)?)?)
}

/// Exits of one vCPU so far; none of one that is not there.
fn exits(guest: &Guest, index: usize) -> Result<Option<u64>> {
    let inspection = json_of(guest, "/bedplate/inspect")?;
    let exits = inspection["vcpus"][index]["exits"].as_object().cloned();
    Ok(exits.map(|exits| exits.values().filter_map(Value::as_u64).sum()))
}

/// Waits, in the guest, until the kernel knows a processor, and takes it into use: no rule of Debian does that.
fn bring_online(guest: &Guest, number: u8) -> Result<()> {
    let online = format!("/sys/devices/system/cpu/cpu{number}/online");
    guest.run(&format!("until [ -e {online} ]; do usleep 50000; done; echo 1 > {online}")).map(drop)
}

pub fn come() -> Result<()> {
    let mut guest = spec("vcpus-come", 1, 3).drive(DISK.as_ref(), true).boot()?;
    let cpus = |which: &str| guest.run(&format!("cat /sys/devices/system/cpu/{which}"));
    ensure!(cpus("present")? == "0" && cpus("possible")? == "0-2", "{} of {}", cpus("present")?, cpus("possible")?);
    ensure!(json_of(&guest, "/bedplate/vcpus")? == json!({"count": 1, "max_count": 3}));
    ensure!(exits(&guest, 1)?.is_none(), "a vCPU that is not there is shown");
    // What there may be has queues already.
    ensure!(guest.run("ls /sys/block/vda/mq | wc -l")? == "3");

    for (count, words) in [(4, "more than 3"), (0, "none is taken away")] {
        let said = put(&guest, count, 400)?;
        ensure!(said.contains(words), "{words:?} is missing in {said}");
    }
    ensure!(guest.api("PUT", "/bedplate/vcpus", r#"{"count": 2, "max": 3}"#, 400)?.contains("max"));
    let machine = json!({"vcpu_count": 2}).to_string();
    ensure!(guest.api("PATCH", "/machine-config", &machine, 400)?.contains("not supported after starting"));

    // One, then another one while the VM stands still.
    put(&guest, 2, 204)?;
    bring_online(&guest, 1)?;
    guest.api("PATCH", "/vm", r#"{"state": "Paused"}"#, 204)?;
    put(&guest, 3, 204)?;
    guest.api("PATCH", "/vm", r#"{"state": "Resumed"}"#, 204)?;
    bring_online(&guest, 2)?;
    ensure!(guest.run("nproc")? == "3" && cpus("online")? == "0-2");
    // Each does work of its own, and gets its timer's interrupts.
    for number in 0..3 {
        let work = format!(
            "taskset {:x} sh -c 'seq 2000 | md5sum > /dev/null; cut -d \" \" -f 39 /proc/self/stat'",
            1 << number
        );
        ensure!(guest.run(&work)? == number.to_string(), "processor {number} does not work");
    }
    let ids = guest.run("grep 'initial apicid' /proc/cpuinfo | cut -d : -f 2 | tr -d ' \\n'")?;
    ensure!(ids == "012", "the APIC ids are {ids}");
    ensure!(exits(&guest, 2)?.is_some_and(|exits| exits > 0), "the last vCPU has not been seen");

    // There are three now, wherever it is asked; asked for again, the guest is told again and has them already.
    put(&guest, 3, 204)?;
    ensure!(put(&guest, 1, 400)?.contains("none is taken away"));
    let status = json_of(&guest, "/bedplate/status")?;
    ensure!(status["vcpus"] == json!({"count": 3, "max_count": 3}), "{status}");
    ensure!(json_of(&guest, "/machine-config")?["vcpu_count"] == 3);
    let errors = "dmesg | grep -c -e 'ACPI.*Error' -e 'ACPI BIOS' || true";
    ensure!(guest.run(errors)? == "0", "the kernel dislikes our tables: {}", guest.run("dmesg | grep ACPI")?);

    // One leaves the rest alone when it is off, and comes back.
    guest.run("echo 0 > /sys/devices/system/cpu/cpu1/online")?;
    ensure!(cpus("online")? == "0,2");
    bring_online(&guest, 1)?;
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

/// A guest cannot wake a vCPU that its owner has not given it, and firmware waits for none.
pub fn firmware() -> Result<()> {
    let machine = json!({"vcpu_count": 1, "max_vcpu_count": 2, "mem_size_mib": 512});
    let guest = GuestSpec::new("vcpus-firmware").firmware(bedplate_tests::inside::FIRMWARE);
    let guest =
        guest.drive(bedplate_tests::inside::GRUB_DISK.as_ref(), true).section("machine-config", machine).boot()?;
    ensure!(guest.run("nproc")? == "1");
    // The firmware has sent its start-up message to everybody: it must not be what the vCPU begins with now.
    put(&guest, 2, 204)?;
    bring_online(&guest, 1)?;
    ensure!(guest.run("nproc")? == "2");
    until("the VM to show both", PATIENCE, || {
        let inspection = json_of(&guest, "/bedplate/inspect")?;
        let vcpus = inspection["vcpus"].as_array().context("no vCPUs")?.len();
        Ok((vcpus == 2).then_some(()))
    })
}
