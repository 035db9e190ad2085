//! What the guest does when devices come and go, as code in the DSDT over the registers of `devices::platform::HotplugPort`.
//!
//! ```text
//! \_GPE._L01            the event → \_SB.PCI0.HPEV
//! \_SB.PCI0.HPEV        reads which slots, clears what it has read, and has the system look at each (Notify)
//! \_SB.PCI0.Snnn        slot nnn: _ADR and _SUN, its number; _EJ0, by which the system lets go of the device
//! ```
//! Every slot has the same: which devices may go is not the guest's to decide, and not told to it.

use acpi_tables::aml::{
    And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method, MethodCall,
    Name, Notify, OpRegion, OpRegionSpace, Path, Scope, Store, Zero,
};
use acpi_tables::{Aml, AmlSink};
use bedplate_devices::pci::SLOTS;
use bedplate_devices::platform::{CAME_OFFSET, EJECT_OFFSET, GPE_HOTPLUG, HOTPLUG_LEN, WANTED_OFFSET};

use super::HOTPLUG_PORT;

/// Look at the device (ACPI 6.4, table 5.183, device check).
const DEVICE_CHECK: u8 = 1;
/// Let go of the device (there, eject request).
const EJECT_REQUEST: u8 = 3;

// The registers follow each other in the order of the fields.
const _: () = assert!(CAME_OFFSET == 0 && WANTED_OFFSET == 4 && EJECT_OFFSET == 8 && HOTPLUG_LEN == 12);

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
pub(super) struct Slots;

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
            vec![register(*b"HPCM"), register(*b"HPWT"), register(*b"HPEJ")],
        )
        .to_aml_bytes(sink);
        // The host bridge has no slot.
        (1..SLOTS).for_each(|slot| Slot(slot).to_aml_bytes(sink));
        let tells: Vec<_> = [("HPCM", DEVICE_CHECK), ("HPWT", EJECT_REQUEST)].map(Tell::new).into();
        let tells = tells.iter().map(|tell| tell as &dyn Aml).collect();
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

/// Reads a register, clears what was read, and has the system look at each slot of it.
struct Tell {
    register: Path,
    notification: u8,
}

impl Tell {
    fn new((register, notification): (&str, u8)) -> Self {
        Self { register: Path::new(register), notification }
    }
}

impl Aml for Tell {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let slots = Local(0);
        Store::new(&slots, &self.register).to_aml_bytes(sink);
        Store::new(&self.register, &slots).to_aml_bytes(sink);
        for number in 1..SLOTS {
            let (slot, bit) = (name_of(number), 1u32 << number);
            let is_meant = And::new(&Zero {}, &slots, &bit);
            let notify = Notify::new(&slot, &self.notification);
            If::new(&is_meant, vec![&notify]).to_aml_bytes(sink);
        }
    }
}
