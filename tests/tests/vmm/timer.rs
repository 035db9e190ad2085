//! Guests that have nothing but the interval timer to be woken by.

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::GuestSpec;

use crate::mmio::no_faults;

/// Through the PIC, and through the I/O APIC.
pub fn wakes() -> Result<()> {
    for (words, controller) in [("no-kvmclock nolapic noapic", "XT-PIC"), ("no-kvmclock nolapic_timer", "IO-APIC")] {
        let guest = GuestSpec::new("timer").cmdline(words).boot().context(words)?;
        let interrupts = || -> Result<u64> {
            let line = guest.run("grep timer$ /proc/interrupts")?;
            ensure!(line.contains(controller), "{words}: {line:?}");
            let count = line.split_whitespace().nth(1).and_then(|count| count.parse().ok());
            count.with_context(|| format!("{words}: {line:?}"))
        };
        let before = interrupts()?;
        guest.run("sleep 1").context(words)?;
        let after = interrupts()?;
        ensure!(after > before, "{words}: nothing came after {before} interrupts");
        no_faults(&guest).context(words)?;
    }
    Ok(())
}
