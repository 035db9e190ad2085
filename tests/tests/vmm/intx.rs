//! Guests that have PCI and no messages for its interrupts: they have pins, which devices share.

use anyhow::{Result, ensure};
use bedplate_tests::inside::guest::GuestSpec;
use bedplate_tests::inside::tools::with_tap;

use crate::mmio::{all_devices, no_faults, vhost};
use crate::plug::{appears, delete, dir, disappears, file, put_drive};

/// Every kind of device at work, on four pins.
pub fn without_messages() -> Result<()> {
    with_tap("tap-w", "10.14.0.1/24", || {
        all_devices("pci=nomsi", |guest| {
            // Levels, nine devices on all of the pins, and no message.
            let count = |what: &str| guest.run(&format!("grep -c '{what}' /proc/interrupts || true"));
            ensure!(count("IO-APIC .*-fasteoi .*virtio")? == "4", "{}", guest.run("cat /proc/interrupts")?);
            ensure!(count("MSI.*virtio")? == "0", "{}", guest.run("cat /proc/interrupts")?);
            ensure!(guest.run("grep -o 'virtio[0-9]*' /proc/interrupts | wc -l")? == "9");
            Ok(())
        })
    })
}

/// The host's kernel carries frames, and asserts no pin by itself.
pub fn with_vhost() -> Result<()> {
    with_tap("tap-w", "10.14.0.1/24", || vhost("pci=nomsi"))
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
    ensure!(guest.run("head -c 5 /dev/vda")? == "first");
    no_faults(&guest)?;
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}
