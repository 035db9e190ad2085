//! How a configuration becomes a running VM, from top to bottom.

use std::io::Write;
use std::sync::Arc;

use bedplate_devices::pci::{self, PciRoot};
use bedplate_devices::platform::Booted;
use vmm_sys_util::eventfd::EventFd;

use super::lifecycle::Lifecycle;
use super::pci_devices::Attach;
use super::vcpu::Buses;
use super::{BuildError, Devices, Machine, platform};
use crate::acpi;
use crate::boot;
use crate::config::Config;
use crate::kvm::{Vm, install_kick_signal};
use crate::memory::{Ram, layout};
use crate::metadata::Metadata;
use crate::sandbox::Sandbox;

/// What a VM is connected to, and what it is kept in.
pub struct Outlets<'a> {
    /// The guest's serial output; must not block.
    pub serial: Box<dyn Write + Send>,
    /// Signalled when the VM has ended.
    pub ended: &'a EventFd,
    /// There is a boot timer, and this is told its time. Called once, on a vCPU's thread.
    pub booted: Option<Booted>,
    /// What the guest can ask for.
    pub metadata: Metadata,
    /// What the process goes into before the guest runs, if it shall.
    pub sandbox: Option<Sandbox>,
}

/// Builds and starts the VM that `config` describes.
///
/// # Errors
/// The host cannot give what is asked, or a file is not what it should be. Nothing is left running.
pub fn start(config: &Config, outlets: Outlets<'_>) -> Result<Machine, BuildError> {
    // Memory, and the VM around it with interrupt controllers and timer.
    let mut ram = Ram::new(config.memory_mib, config.pages)?;
    if let Some(hotplug) = config.hotplug {
        ram = ram.with_hotplug(hotplug.total_mib)?;
    }
    let vm = Vm::new(Arc::clone(&ram.memory), &config.kvm)?;
    let interrupts = vm.interrupts();
    let mmio64 = ram.mmio64(vm.address_bits())?;

    // What can end it.
    install_kick_signal()?;
    let life = Arc::new(Lifecycle::new(outlets.ended.try_clone().map_err(BuildError::Host)?));

    // The platform: devices at fixed places.
    let buses = Buses::new();
    let serial = platform::attach_serial(&buses.ports, &interrupts, outlets.serial)?;
    platform::attach_rtc(&buses.ports)?;
    platform::attach_i8042(&buses.ports, &life)?;
    let power = platform::attach_acpi(&buses.ports, &interrupts, &life)?;
    if let Some(booted) = outlets.booted {
        platform::attach_boot_timer(&buses.mmio, booted)?;
    }

    // PCI, and on it the devices, in the order in which the guest shall see them.
    let pci = PciRoot::new(&buses.mmio, vec![mmio64.clone(), layout::MMIO32]);
    buses.mmio.insert(layout::ECAM, pci::ECAM_LEN, pci.ecam())?;
    buses.ports.insert(pci::CONFIG_PORT, pci::CONFIG_PORTS, pci.config_ports())?;
    let (host, devices) = (Arc::new(interrupts.clone()), Devices::default());
    let (vcpus, metadata) = (config.topology.vcpus, &outlets.metadata);
    let mut attach = Attach { pci: &pci, host, memory: &ram.memory, vcpus, metadata, devices };
    for drive in &config.drives {
        attach.drive(drive)?;
    }
    for net in &config.nets {
        attach.net(net)?;
    }
    if let Some(vsock) = &config.vsock {
        attach.vsock(vsock)?;
    }
    if let Some(entropy) = &config.entropy {
        attach.rng(entropy)?;
    }
    if let Some(balloon) = config.balloon {
        attach.balloon(balloon)?;
    }
    if let (Some(hotplug), Some(region)) = (config.hotplug, ram.hotplug()) {
        attach.mem(hotplug, region)?;
    }
    let devices = attach.devices;

    // What the guest is told, and what it boots.
    let description = acpi::Description { vcpus: config.topology.vcpus, mmio32: layout::MMIO32, mmio64 };
    let rsdp = acpi::write(&ram.memory, &description)?;
    let entry = boot::load(&ram, &config.boot, rsdp)?;

    // Processors, the first of them at the kernel's entry, the others waiting for it.
    let vcpus = vm.create_vcpus(config.topology)?;
    if let Some(first) = vcpus.first() {
        first.enter_at(entry)?;
    }

    // All that the VM needs is open, and there is no second thread yet.
    if let Some(sandbox) = outlets.sandbox {
        sandbox.enter()?;
    }
    let (threads, counters) = (Vec::new(), Vec::new());
    Machine { _vm: vm, ram, buses, life, pci, devices, serial, power, threads, counters, started: None }.run(vcpus)
}
