//! Guests that have PCI and no messages for its interrupts: they have pins, which devices share.

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::GuestSpec;
use bedplate_tests::inside::tools::{numbered_file, with_tap};

use crate::mmio::{all_devices, no_faults, vhost};
use crate::plug::{appears, delete, dir, disappears, file, put_drive};

const MIB: u64 = 16;

/// Every kind of device at work, on two pins.
pub fn without_messages() -> Result<()> {
    all("pci=nomsi", "IO-APIC .*-fasteoi")
}

/// The same for a kernel that does not go by ACPI here: it has the PICs, and the devices' own registers.
pub fn without_messages_and_acpi_for_pci() -> Result<()> {
    all("pci=nomsi,noacpi", "XT-PIC")
}

fn all(word: &str, controller: &str) -> Result<()> {
    with_tap("tap-w", "10.14.0.1/24", || {
        all_devices(word, |guest| {
            // Levels, nine devices on both of the pins, and no message.
            let count = |what: &str| guest.run(&format!("grep -c '{what}' /proc/interrupts || true"));
            ensure!(count(&format!("{controller} .*virtio"))? == "2", "{}", guest.run("cat /proc/interrupts")?);
            ensure!(count("MSI.*virtio")? == "0", "{}", guest.run("cat /proc/interrupts")?);
            ensure!(guest.run("grep -o 'virtio[0-9]*' /proc/interrupts | wc -l")? == "9");
            Ok(())
        })
    })
}

/// The host's kernel carries frames, and asserts no pin by itself.
pub fn with_vhost() -> Result<()> {
    with_tap("tap-w", "10.14.0.1/24", || vhost("pci=nomsi", "IO-APIC.*fasteoi.*virtio"))
}

/// What comes while the guest runs has the pin of its slot, and gives it back.
pub fn plugged() -> Result<()> {
    let dir = dir("intx")?;
    let guest = GuestSpec::new("intx-plug").cmdline("pci=nomsi").drive(&file(&dir, "first")?, true);
    let mut guest = guest.options(&["--visible", "/run/plug"]).boot()?;
    for (name, device) in [("second", "vdb"), ("third", "vdb")] {
        put_drive(&guest, name, &file(&dir, name)?, 204)?;
        appears(&guest, &format!("/dev/{device}"))?;
        ensure!(guest.run(&format!("head -c {} /dev/{device}", name.len()))? == name);
        delete(&guest, &format!("/drives/{name}"), 204)?;
        disappears(&guest, &format!("/sys/block/{device}"))?;
    }
    // On the same pin.
    ensure!(guest.run("echo 3 > /proc/sys/vm/drop_caches; head -c 5 /dev/vda")? == "first");
    no_faults(&guest)?;
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

/// By the interrupt controllers of the first PCs, with ACPI and without it, by the register that firmware would have filled.
pub fn without_apics() -> Result<()> {
    let dir = dir("pic")?;
    let path = dir.join("file");
    numbered_file(&path, MIB)?;
    for words in ["nolapic noapic", "acpi=off", "acpi=off nolapic"] {
        let guest = GuestSpec::new("intx-pic").cmdline(words).drive(&path, true).boot()?;
        guest.run("dd if=/dev/vda of=/dev/null bs=64k 2> /dev/null").context(words)?;
        let interrupts = guest.run("cat /proc/interrupts")?;
        ensure!(guest.run("grep -c 'XT-PIC.*virtio' /proc/interrupts")? == "2", "{words}: {interrupts}");
        no_faults(&guest).context(words)?;
    }
    Ok(())
}
