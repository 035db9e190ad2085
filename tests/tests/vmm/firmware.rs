//! A disk's own boot loader, through firmware.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::{BOOT, GuestSpec};
use bedplate_tests::inside::{FIRMWARE, GRUB_DISK};
use serde_json::json;

/// SeaBIOS, GRUB, Linux, on two processors; then the guest resets itself. Linux reaches all devices where firmware has put
/// them, and knows the machine by the tables that firmware was given.
pub fn boots() -> Result<()> {
    let dir = Path::new("/run/firmware");
    fs::create_dir_all(dir)?;
    fs::write(dir.join("data"), "not for booting".repeat(1024))?;
    let guest = GuestSpec::new("firmware").firmware(FIRMWARE).cpus(2).section("entropy", json!({}));
    let guest = guest.options(&["--visible", "/run/firmware"]);
    let mut guest = guest.drive(Path::new(GRUB_DISK), true).drive(&dir.join("data"), false).start()?;
    // What GRUB says later is broken up by movements of SeaBIOS's cursor.
    for words in ["SeaBIOS (version", "GRUB loading"] {
        guest.console().wait_for(words, BOOT).with_context(|| guest.last_words())?;
    }
    let facts = guest.ready()?;
    ensure!(facts.contains("cpus=2"), "the guest says {facts:?}");
    ensure!(guest.run("head -c 15 /dev/vdb")? == "not for booting");
    guest.run("dd if=/dev/hwrng bs=64 count=1 of=/dev/null 2>/dev/null")?;
    // A BAR below 4 GiB: SeaBIOS's choice, not ours.
    let bar = guest.run("head -n 1 /sys/bus/pci/devices/0000:00:01.0/resource")?;
    ensure!(bar.starts_with("0x00000000f"), "the first BAR is {bar:?}");
    ensure!(guest.run("cat /sys/class/dmi/id/sys_vendor")? == "Bedplate");
    guest.run("cd /sys/firmware/acpi/tables && ls APIC DSDT FACP MCFG")?;
    for device in ["block_disk0", "block_disk1", "entropy"] {
        ensure!(guest.count(device, "guest_faults")? + guest.count(device, "host_faults")? == 0, "{device} has faults");
        ensure!(guest.count(device, "interrupts")? > 0, "{device} has sent no interrupt");
    }
    // It has the tables that say how devices come and go.
    fs::write(dir.join("later"), "plugged".repeat(1024))?;
    let later = json!({"drive_id": "later", "path_on_host": dir.join("later"), "is_root_device": false});
    guest.api("PUT", "/drives/later", &later.to_string(), 204)?;
    guest.run("until [ -e /sys/block/vdc ]; do usleep 100000; done")?;
    ensure!(guest.run("head -c 7 /dev/vdc")? == "plugged");
    guest.api("DELETE", "/drives/later", "", 204)?;
    guest.run("while [ -e /sys/block/vdc ]; do usleep 100000; done")?;
    guest.begin("reboot -f")?;
    guest.ended_well("guest_reset")
}

pub fn nothing_to_boot() -> Result<()> {
    let disk = Path::new("/run/empty.raw");
    fs::File::create(disk)?.set_len(1 << 20)?;
    let mut guest = GuestSpec::new("unbootable").firmware(FIRMWARE).drive(disk, false).start()?;
    guest.console().wait_for("No bootable device", BOOT)?;
    guest.ended_well("guest_reset")
}
