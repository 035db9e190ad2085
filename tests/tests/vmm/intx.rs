//! Guests that have PCI and no messages for its interrupts: they have pins, which devices share.

use anyhow::{Result, ensure};
use bedplate_tests::inside::tools::with_tap;

use crate::mmio::all_devices;

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
