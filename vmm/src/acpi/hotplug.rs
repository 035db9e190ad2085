//! What the guest does when devices come and go, and when processors come, as code in the DSDT over the registers of
//! `devices::platform::HotplugPort`.
//!
//! ```text
//! \_GPE._L01            the event → \_SB.PCI0.HPEV
//! \_SB.PCI0.HPEV        reads which slots and processors, clears what it has read, and has the system look at each (Notify)
//! \_SB.PCI0.Snnn        slot nnn: _ADR and _SUN, its number; _EJ0, by which the system lets go of the device
//! \_SB.Cnnn             a processor that may come: _STA, whether it has; _MAT, what the MADT would say of it. No _EJ0: none goes
//! ```
//! Every slot has the same: which devices may go is not the guest's to decide, and not told to it.

use std::ops::Range;

use acpi_tables::aml::{
    And, BufferData, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
    MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path, Return, Scope, Store, Zero,
};
use acpi_tables::{Aml, AmlSink};
use bedplate_devices::pci::SLOTS;
use bedplate_devices::platform::{
    CAME_OFFSET, EJECT_OFFSET, GPE_HOTPLUG, HOTPLUG_LEN, VCPUS_CAME_OFFSET, VCPUS_OFFSET, WANTED_OFFSET,
};

use super::dsdt::{processor_name, processor_text};
use super::{HOTPLUG_PORT, tables};

/// Look at the device (ACPI 6.4, table 5.183, device check).
const DEVICE_CHECK: u8 = 1;
/// Let go of the device (there, eject request).
const EJECT_REQUEST: u8 = 3;

// The registers follow each other in the order of the fields.
const _: () = assert!(CAME_OFFSET == 0 && WANTED_OFFSET == 4 && EJECT_OFFSET == 8);
const _: () = assert!(VCPUS_CAME_OFFSET == 12 && VCPUS_OFFSET == 16 && HOTPLUG_LEN == 20);
/// Present, enabled, to be shown, working.
const IS_THERE: u8 = 0xf;

/// The handler of the event.
pub(super) struct Event;

impl Aml for Event {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let look = MethodCall::new(Path::new("\\_SB_.PCI0.HPEV"), Vec::new());
        let handler = Method::new(Path::new(&format!("_L{GPE_HOTPLUG:02X}")), 0, false, vec![&look]);
        Scope::new(Path::new("\\_GPE"), vec![&handler]).to_aml_bytes(sink);
    }
}

/// Registers, slots, and what looks at them; inside of the root bridge.
pub(super) struct Slots {
    /// Numbers of those that may come.
    pub processors: Range<u8>,
}

impl Aml for Slots {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (port, len) = (HOTPLUG_PORT, HOTPLUG_LEN as u8);
        OpRegion::new(Path::new("HPRG"), OpRegionSpace::SystemIO, &port, &len).to_aml_bytes(sink);
        let register = |name| FieldEntry::Named(name, 32);
        Field::new(
            Path::new("HPRG"),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            [*b"HPCM", *b"HPWT", *b"HPEJ", *b"HPVC", *b"HPVP"].map(register).into(),
        )
        .to_aml_bytes(sink);
        // The host bridge has no slot.
        (1..SLOTS).for_each(|slot| Slot(slot).to_aml_bytes(sink));
        let slots = || (1..SLOTS).map(|slot| (slot, name_of(slot))).collect::<Vec<_>>();
        let (came, wanted) = (Tell::new("HPCM", DEVICE_CHECK, slots()), Tell::new("HPWT", EJECT_REQUEST, slots()));
        let name = |id| (id, Path::new(&format!("\\_SB_.{}", processor_text(id))));
        let processors = Tell::new("HPVC", DEVICE_CHECK, self.processors.clone().map(name).collect());
        let mut tells: Vec<&dyn Aml> = vec![&came, &wanted];
        if !self.processors.is_empty() {
            tells.push(&processors);
        }
        Method::new(Path::new("HPEV"), 0, true, tells).to_aml_bytes(sink);
    }
}

fn name_of(slot: u8) -> Path {
    Path::new(&format!("S{slot:03}"))
}

struct Slot(u8);

impl Aml for Slot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (address, bit) = (u32::from(self.0) << 16, 1u32 << self.0);
        let register = Path::new("HPEJ");
        let eject = Store::new(&register, &bit);
        Device::new(
            name_of(self.0),
            vec![
                &Name::new(Path::new("_ADR"), &address),
                &Name::new(Path::new("_SUN"), &self.0),
                // Its argument says that it is to happen; the registers know nothing else.
                &Method::new(Path::new("_EJ0"), 1, false, vec![&eject]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Processors that may come, by their numbers; beside the root bridge.
pub(super) struct LaterProcessors(pub Range<u8>);

impl Aml for LaterProcessors {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        for id in self.0.clone() {
            let (register, bit) = (Path::new("\\_SB_.PCI0.HPVP"), 1u32 << id);
            let has_come = And::new(&Zero {}, &register, &bit);
            let (there, not_there) = (Return::new(&IS_THERE), Return::new(&0u8));
            let state = If::new(&has_come, vec![&there]);
            let entry = BufferData::new(tables::present_processor(id));
            Device::new(
                processor_name(id),
                vec![
                    &Name::new(Path::new("_HID"), &"ACPI0007"),
                    &Name::new(Path::new("_UID"), &id),
                    &Method::new(Path::new("_STA"), 0, false, vec![&state, &not_there]),
                    &Name::new(Path::new("_MAT"), &entry),
                ],
            )
            .to_aml_bytes(sink);
        }
    }
}

/// Reads a register, clears what was read, and has the system look at what each bit of it stands for.
struct Tell {
    register: Path,
    notification: u8,
    /// Number of the bit, and the device.
    devices: Vec<(u8, Path)>,
}

impl Tell {
    fn new(register: &str, notification: u8, devices: Vec<(u8, Path)>) -> Self {
        Self { register: Path::new(register), notification, devices }
    }
}

impl Aml for Tell {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let bits = Local(0);
        Store::new(&bits, &self.register).to_aml_bytes(sink);
        Store::new(&self.register, &bits).to_aml_bytes(sink);
        for (number, device) in &self.devices {
            let bit = 1u32 << number;
            let is_meant = And::new(&Zero {}, &bits, &bit);
            let notify = Notify::new(device, &self.notification);
            If::new(&is_meant, vec![&notify]).to_aml_bytes(sink);
        }
    }
}
