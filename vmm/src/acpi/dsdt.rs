//! The DSDT: what cannot be discovered by looking.
//!
//! ```text
//! \_S5            soft off
//! \_SB.Cxxx       processors
//! \_SB.PCI0       PCI Express root bridge: bus 0, both windows, the configuration ports; _PRT: the pin of each slot, a level
//! \_SB.PCI0.Snnn  slots, whose devices come and go ([`super::hotplug`]); no _OSC, so that this is how they do
//! \_SB.MBRD       what the chipset itself takes: ECAM, ACPI registers, those for hot-plug
//! \_SB.COM1 RTC_  serial port and clock
//! \_SB.Vnnn       virtio devices by their memory-mapped registers, for a guest without PCI
//! ```
//! The power button is fixed hardware and needs no device here.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, PackageBuilder,
    Path, ResourceTemplate,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, aml};
use bedplate_devices::pci::{CONFIG_PORT, CONFIG_PORTS};
use bedplate_devices::platform::{HOTPLUG_LEN, PM_BLOCK_LEN, RTC_LEN, SERIAL_LEN, SLEEP_TYPE_S5};
use bedplate_devices::virtio::mmio::{Place, WINDOW_LEN};

use super::tables::{OEM, OEM_REVISION, OEM_TABLE};
use super::{Description, ECAM_LEN, HOTPLUG_PORT, PM_PORT, hotplug};
use crate::kvm::intx_pins;
use crate::machine::ports;
use crate::memory::layout;

const HEADER_LEN: u32 = 36;
/// AML integers have 64 bits from this revision on.
const REVISION: u8 = 2;

pub(super) fn dsdt(description: &Description) -> Sdt {
    let mut aml = Vec::new();
    let later = description.present..description.vcpus;
    sleep_states(&mut aml);
    aml::Scope::new(
        Path::new("_SB_"),
        vec![
            &Processors { present: description.present },
            &hotplug::LaterProcessors(later.clone()),
            &RootBridge { mmio32: &description.mmio32, mmio64: &description.mmio64, later },
            &Board,
            &Serial,
            &Clock,
            // After PCI: what is found there is not here any more.
            &VirtioDevices(&description.virtio),
        ],
    )
    .to_aml_bytes(&mut aml);
    hotplug::Event.to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

fn sleep_states(aml: &mut Vec<u8>) {
    let package = Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8]);
    Name::new(Path::new("_S5_"), &package).to_aml_bytes(aml);
}

/// Those that are there from the start, and stay.
struct Processors {
    present: u8,
}

impl Aml for Processors {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        for id in 0..self.present {
            Device::new(
                processor_name(id),
                vec![&Name::new(Path::new("_HID"), &"ACPI0007"), &Name::new(Path::new("_UID"), &id)],
            )
            .to_aml_bytes(sink);
        }
    }
}

/// Name of a processor's device, without its path;
pub(super) fn processor_text(id: u8) -> String {
    format!("C{id:03}")
}

/// and as code.
pub(super) fn processor_name(id: u8) -> Path {
    Path::new(&processor_text(id))
}

struct RootBridge<'a> {
    mmio32: &'a [std::ops::Range<u64>],
    mmio64: &'a [std::ops::Range<u64>],
    later: std::ops::Range<u8>,
}

impl Aml for RootBridge<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (buses, config) = (
            AddressSpace::new_bus_number(0u16, 0u16),
            IO::new(CONFIG_PORT as u16, CONFIG_PORT as u16, 1, CONFIG_PORTS as u8),
        );
        let memory = AddressSpaceCacheable::NotCacheable;
        // Both ends of each 32-bit window are constants below 4 GiB.
        let window = |range: &std::ops::Range<u64>| {
            AddressSpace::new_memory(memory, true, range.start as u32, (range.end - 1) as u32, None)
        };
        let low: Vec<_> = self.mmio32.iter().map(window).collect();
        let window =
            |range: &std::ops::Range<u64>| AddressSpace::new_memory(memory, true, range.start, range.end - 1, None);
        let high: Vec<_> = self.mmio64.iter().map(window).collect();
        // Its end is the last of all ports.
        let window = AddressSpace::new_io(ports::PCI.start as u16, (ports::PCI.end - 1) as u16, None);
        let mut resources: Vec<&dyn Aml> = vec![&buses, &config, &window];
        resources.extend(low.iter().map(|window| window as &dyn Aml));
        resources.extend(high.iter().map(|window| window as &dyn Aml));
        Device::new(
            Path::new("PCI0"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                &Name::new(Path::new("_SEG"), &0u8),
                &Name::new(Path::new("_BBN"), &0u8),
                &Name::new(Path::new("_UID"), &0u8),
                // Coherent for DMA.
                &Name::new(Path::new("_CCA"), &1u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
                &InterruptPins,
                &hotplug::Slots { processors: self.later.clone() },
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Which pin of the I/O APIC is INTA# of a slot (ACPI 6.4, 6.2.13): low and a level, as on every PC.
struct InterruptPins;

impl Aml for InterruptPins {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        /// Every function of the slot.
        const FUNCTIONS: u32 = 0xffff;
        const INTA: u8 = 0;
        /// The pin is named by its number, not by a device that has it.
        const NUMBER: u8 = 0;
        let mut pins = PackageBuilder::new();
        for (slot, pin) in intx_pins() {
            let address = u32::from(slot.number()) << 16 | FUNCTIONS;
            pins.add_element(&Package::new(vec![&address, &INTA, &NUMBER, &pin]));
        }
        Name::new(Path::new("_PRT"), &pins).to_aml_bytes(sink);
    }
}

struct Board;

impl Aml for Board {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            Path::new("MBRD"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, layout::ECAM as u32, ECAM_LEN as u32),
                        &IO::new(PM_PORT, PM_PORT, 1, PM_BLOCK_LEN as u8),
                        &IO::new(HOTPLUG_PORT, HOTPLUG_PORT, 1, HOTPLUG_LEN as u8),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Serial;

impl Aml for Serial {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &IO::new(ports::SERIAL, ports::SERIAL, 1, SERIAL_LEN as u8),
                        &Interrupt::new(true, true, false, false, ports::SERIAL_IRQ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Clock;

impl Aml for Clock {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            Path::new("RTC_"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&IO::new(ports::RTC, ports::RTC, 1, RTC_LEN as u8)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct VirtioDevices<'a>(&'a [Place]);

impl Aml for VirtioDevices<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        for (index, place) in (0u8..).zip(self.0) {
            Device::new(
                Path::new(&format!("V{index:03}")),
                vec![
                    &Name::new(Path::new("_HID"), &"LNRO0005"),
                    &Name::new(Path::new("_UID"), &index),
                    // Coherent for DMA.
                    &Name::new(Path::new("_CCA"), &1u8),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![
                            // Below 4 GiB.
                            &Memory32Fixed::new(true, place.address as u32, WINDOW_LEN as u32),
                            &Interrupt::new(true, true, false, false, place.pin),
                        ]),
                    ),
                ],
            )
            .to_aml_bytes(sink);
        }
    }
}
