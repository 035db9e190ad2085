//! `bedplate-vmm` with real guests, in an emulated node. Each scenario is both halves: what the node does, and what is
//! typed in the guest.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use bedplate_tests::inside::guest::GuestSpec;
use bedplate_tests::inside::{BZIMAGE, ELF};
use bedplate_tests::suite::{self, NodeSpec, Scenario};

fn main() -> ExitCode {
    let node = NodeSpec { memory_mib: 3072, programs: &["bedplate-vmm"], patience: Duration::from_secs(300) };
    suite::main(
        "vmm",
        &node,
        &[
            Scenario { name: "boots_the_bzimage_as_shipped", run: || boots(BZIMAGE) },
            Scenario { name: "boots_the_elf_kernel", run: || boots(ELF) },
            Scenario { name: "runs_2_vcpus", run: || vcpus(2) },
            Scenario { name: "runs_8_vcpus", run: || vcpus(8) },
        ],
    )
}

fn boots(kernel: &str) -> Result<()> {
    let mut guest = GuestSpec::new("boots").kernel(kernel).cmdline("systemd.hostname=named").start()?;
    let facts = guest.ready()?;
    ensure!(facts.contains("name=named cpus=1"), "the guest says {facts:?}");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

fn vcpus(count: u8) -> Result<()> {
    let guest = GuestSpec::new("vcpus").cpus(count).boot()?;
    let online = guest.run("nproc")?;
    ensure!(online == count.to_string(), "{online} of {count} vCPUs are online");
    Ok(())
}
