//! Guests without PCI, which have their devices by virtio-mmio.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::tools::{numbered_file, same_bytes, with_tap};
use bedplate_tests::patience::until;
use serde_json::{Value, json};

use crate::network::{in_bulk, rebind};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 16;
const CONSOLE: &str = "/run/mmio-hvc.sock";
/// What a guest has bound to the driver of the windows.
const BOUND: &str = "ls /sys/bus/platform/drivers/virtio-mmio | grep -c LNRO || true";

fn dir() -> Result<PathBuf> {
    let dir = PathBuf::from("/run/mmio");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// No device has seen a fault.
pub fn no_faults(guest: &Guest) -> Result<()> {
    let status: Value = serde_json::from_str(&guest.api("GET", "/bedplate/status", "", 200)?)?;
    let devices = status["devices"].as_object().into_iter().flatten();
    for (name, device) in devices {
        for counter in ["guest_faults", "host_faults"] {
            ensure!(device[counter].as_u64().unwrap_or_default() == 0, "{name}: {device}");
        }
    }
    Ok(())
}

/// Every kind of device at work in a guest that was told to do without PCI, as nearly every client of Firecracker does.
pub fn without_pci() -> Result<()> {
    with_tap("tap-w", "10.14.0.1/24", || {
        all_devices("pci=off", |guest| {
            ensure!(guest.run("ls /sys/bus/pci/devices 2> /dev/null | wc -l")? == "0", "there is a device on PCI");
            // Two disks, interface, randomness, console, persistent memory, sockets, memory that is added, balloon.
            ensure!(guest.run(BOUND)? == "9", "{}", guest.run("dmesg | tail")?);
            Ok(())
        })
    })
}

/// Has every kind of device work in a guest with this word on its command line, of which `found` says that it has them as it
/// shall. Needs a `tap-w` with 10.14.0.1.
pub fn all_devices(word: &str, found: impl FnOnce(&Guest) -> Result<()>) -> Result<()> {
    let dir = dir()?;
    let (from, to, pmem) = (dir.join("from"), dir.join("to"), dir.join("pmem"));
    numbered_file(&from, MIB)?;
    numbered_file(&pmem, MIB)?;
    fs::File::create(&to)?.set_len(MIB << 20)?;
    let words = format!("{word} memhp_default_state=online_movable tiny.ip=10.14.0.2/24");
    let guest = GuestSpec::new("mmio").cpus(2).cmdline(&words);
    let guest = guest.drive(&from, true).drive(&to, false).network("tap-w", "02:00:00:00:0e:02");
    let guest =
        guest.section("entropy", json!({})).section("console", json!({"socket": CONSOLE, "columns": 80, "rows": 24}));
    let guest = guest.section("pmem", json!([{"id": "p", "path_on_host": pmem, "read_only": true}]));
    let guest = guest.section("vsock", json!({"guest_cid": 14, "uds_path": "/run/mmio/vsock"}));
    let guest = guest.section("memory-hotplug", json!({"total_size_mib": 256}));
    let mut guest = guest.options(&["--visible", "/run/mmio"]).boot()?;
    found(&guest)?;

    guest.run("dd if=/dev/vda of=/dev/vdb bs=64k conv=fsync 2> /dev/null")?;
    same_bytes(&from, &to)?;
    in_bulk(&guest, 14, &["wget"])?;
    // The driver lets go of the device, which is reset, and comes back.
    rebind(&guest, 14)?;
    ensure!(guest.run("head -c 4096 /dev/hwrng | wc -c")? == "4096");
    ensure!(guest.run("cmp /dev/pmem0 /dev/vda && echo the same")? == "the same");
    guest.run("echo a word > /dev/hvc0")?;
    ensure!(guest.count("console", "output_bytes")? >= 7);

    // The device's own registers change, and its interrupt says so.
    fs::File::options().write(true).open(&to)?.set_len((MIB + 4) << 20)?;
    guest.api("PATCH", "/drives/disk1", &json!({"drive_id": "disk1", "path_on_host": to}).to_string(), 204)?;
    guest.run(&format!("until [ $(cat /sys/block/vdb/size) = {} ]; do usleep 100000; done", (MIB + 4) << 11))?;
    guest.api("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 128}"#, 204)?;
    until("128 MiB more", PATIENCE, || {
        let memory: Value = serde_json::from_str(&guest.api("GET", "/hotplug/memory", "", 200)?)?;
        Ok((memory["plugged_size_mib"] == 128).then_some(()))
    })?;

    no_faults(&guest)?;
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

/// The kernel signals the interface's one interrupt itself.
pub fn with_vhost() -> Result<()> {
    with_tap("tap-w", "10.14.0.1/24", || vhost("pci=off", "IO-APIC.*edge.*virtio"))
}

/// The same for a guest with this word on its command line, which has `interrupts`. Needs a `tap-w` with 10.14.0.1.
pub fn vhost(word: &str, interrupts: &str) -> Result<()> {
    let guest = GuestSpec::new("mmio-vhost").cmdline(&format!("{word} tiny.ip=10.14.0.2/24"));
    let guest = guest.network("tap-w", "02:00:00:00:0e:02").network_option("vhost", json!(true)).boot()?;
    guest.run(&format!("grep '{interrupts}' /proc/interrupts"))?;
    in_bulk(&guest, 14, &["wget"])?;
    rebind(&guest, 14)?;
    in_bulk(&guest, 14, &["wget"])?;
    no_faults(&guest)
}

/// Interrupts as a PC had them before there were APICs.
pub fn without_apics() -> Result<()> {
    let file = dir()?.join("file");
    numbered_file(&file, MIB)?;
    let guest = GuestSpec::new("mmio-pic").cmdline("pci=off nolapic noapic").drive(&file, true).boot()?;
    guest.run("dd if=/dev/vda of=/dev/null bs=64k 2> /dev/null")?;
    ensure!(guest.run("grep -c 'XT-PIC.*virtio' /proc/interrupts")? == "2", "{}", guest.run("cat /proc/interrupts")?);
    no_faults(&guest)
}

/// A guest that has PCI finds its devices there, once: the driver of the windows, which is loaded, has none.
pub fn beside_pci() -> Result<()> {
    let file = dir()?.join("file");
    numbered_file(&file, MIB)?;
    let mut guest = GuestSpec::new("mmio-pci").drive(&file, true).boot()?;
    ensure!(guest.try_run(BOUND)?.0 == "0", "a device is taken twice");
    ensure!(guest.run("ls /sys/block | grep -c vd")? == "1");
    let kind = guest.run("cat /sys/bus/pci/devices/0000:00:01.0/virtio0/device")?;
    ensure!(kind == "0x0002", "in the disk's registers there is a {kind}");
    let said = guest.run("dmesg | grep -ci 'wrong magic' || true")?;
    ensure!(said == "0", "{}", guest.run("dmesg | grep -i magic")?);
    no_faults(&guest)?;
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}
