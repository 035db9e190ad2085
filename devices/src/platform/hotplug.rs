//! Hot-plug by ACPI: PCI devices that came, that are wanted back, and that the guest lets go of; and vCPUs that came.
//!
//! Registers of 32 bits, a bit for each slot of the bus, or for each vCPU. The code that works with them is in the guest's
//! DSDT, which the VMM writes: an event sends it here, it clears what it has read, and has the system look at those.
//!
//! | offset | read | write |
//! | --- | --- | --- |
//! | 0 | slots in which there is a device that the guest was not told of | ones clear |
//! | 4 | slots whose device is wanted back, which the guest was not told | ones clear |
//! | 8 | zeroes | the guest has let go of the devices in these slots |
//! | 12 | vCPUs that came and that the guest was not told of | ones clear |
//! | 16 | vCPUs that are there | nothing |
//!
//! | a hostile guest may | answer |
//! | --- | --- |
//! | read and write at any offset and width | bytes; past the end ones are read and writes are dropped |
//! | clear bits and look at nothing | the device or vCPU is not seen, or stays; it can be told again |
//! | let go of anything at any time | the [`EjectSink`] decides; nothing here changes |

use std::sync::{Arc, Mutex, MutexGuard};

use super::IrqLine;
use crate::bus::BusDevice;
use crate::pci::{SLOTS, Slot};

/// Offset of the register of devices that came.
pub const CAME_OFFSET: u64 = 0;
/// Offset of the register of devices that are wanted back.
pub const WANTED_OFFSET: u64 = 4;
/// Offset of the register of devices that the guest lets go of.
pub const EJECT_OFFSET: u64 = 8;
/// Offset of the register of vCPUs that came.
pub const VCPUS_CAME_OFFSET: u64 = 12;
/// Offset of the register of vCPUs that are there.
pub const VCPUS_OFFSET: u64 = 16;
/// Number of ports.
pub const HOTPLUG_LEN: u64 = 20;
/// vCPUs that the registers have bits for.
pub const MAX_VCPUS: u8 = 32;

/// Told which slot's device the guest lets go of, on the vCPU thread that says so, with the port locked and the signals not.
pub type EjectSink = Box<dyn Fn(Slot) + Send>;

/// What the guest shall be told: the machine's side. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct HotplugSignals {
    pending: Arc<Mutex<Pending>>,
}

struct Pending {
    came: u32,
    wanted: u32,
    /// As [`VCPUS_CAME_OFFSET`] and [`VCPUS_OFFSET`] show them.
    vcpus_came: u32,
    vcpus: u32,
    /// Those of `vcpus` that were there at the start.
    first_vcpus: u32,
    line: Box<dyn IrqLine>,
}

impl Pending {
    fn update(&self) {
        self.line.set(self.came | self.wanted | self.vcpus_came != 0);
    }
}

fn bit(slot: Slot) -> u32 {
    1 << slot.number()
}

/// The first so many vCPUs.
fn first(vcpus: u8) -> u32 {
    u32::MAX.checked_shr(u32::from(MAX_VCPUS.saturating_sub(vcpus))).unwrap_or(0)
}

impl HotplugSignals {
    /// Nothing to be told; `line` is up as long as there is something. So many vCPUs are there from the start.
    pub fn new(line: Box<dyn IrqLine>, vcpus: u8) -> Self {
        let vcpus = first(vcpus);
        let pending = Pending { came: 0, wanted: 0, vcpus_came: 0, vcpus, first_vcpus: vcpus, line };
        Self { pending: Arc::new(Mutex::new(pending)) }
    }

    /// The first so many vCPUs are there; none goes. Where there were as many before, the guest is told again of all that
    /// came since the start.
    pub fn vcpus_came(&self, vcpus: u8) {
        self.change(|pending| {
            let new = first(vcpus) & !pending.vcpus;
            pending.vcpus |= new;
            pending.vcpus_came |= if new == 0 { pending.vcpus & !pending.first_vcpus } else { new };
        });
    }

    /// There is a device in `slot`.
    pub fn came(&self, slot: Slot) {
        self.change(|pending| pending.came |= bit(slot));
    }

    /// The device in `slot` is wanted back. Asking again tells the guest again.
    pub fn wanted(&self, slot: Slot) {
        self.change(|pending| pending.wanted |= bit(slot));
    }

    /// There is nothing in `slot` any more, and nothing to be told of it.
    pub fn gone(&self, slot: Slot) {
        self.change(|pending| {
            pending.came &= !bit(slot);
            pending.wanted &= !bit(slot);
        });
    }

    fn change(&self, change: impl FnOnce(&mut Pending)) {
        let mut pending = self.lock();
        change(&mut pending);
        pending.update();
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The registers: the guest's side.
pub struct HotplugPort {
    signals: HotplugSignals,
    sink: EjectSink,
}

impl HotplugPort {
    /// Shows what `signals` say, and reports to `sink`.
    pub fn new(signals: HotplugSignals, sink: EjectSink) -> Self {
        Self { signals, sink }
    }

    fn write_byte(&mut self, offset: u64, byte: u8) {
        let bits = u32::from(byte) << (offset % 4 * 8);
        match offset & !3 {
            CAME_OFFSET => self.signals.change(|pending| pending.came &= !bits),
            WANTED_OFFSET => self.signals.change(|pending| pending.wanted &= !bits),
            VCPUS_CAME_OFFSET => self.signals.change(|pending| pending.vcpus_came &= !bits),
            VCPUS_OFFSET => {}
            _ => (0..SLOTS).filter_map(Slot::new).filter(|slot| bits & bit(*slot) != 0).for_each(&self.sink),
        }
    }
}

impl BusDevice for HotplugPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut registers = [0; HOTPLUG_LEN as usize];
        {
            let pending = self.signals.lock();
            registers[..4].copy_from_slice(&pending.came.to_le_bytes());
            registers[4..8].copy_from_slice(&pending.wanted.to_le_bytes());
            registers[12..16].copy_from_slice(&pending.vcpus_came.to_le_bytes());
            registers[16..].copy_from_slice(&pending.vcpus.to_le_bytes());
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| registers.get(at)).copied().unwrap_or(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..HOTPLUG_LEN).zip(data) {
            self.write_byte(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use super::*;

    struct Line(Arc<AtomicBool>);
    impl IrqLine for Line {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::SeqCst);
        }
    }

    struct Bench {
        signals: HotplugSignals,
        port: HotplugPort,
        line: Arc<AtomicBool>,
        ejected: mpsc::Receiver<u8>,
    }

    impl Bench {
        fn new() -> Self {
            let (sender, ejected) = mpsc::channel();
            let line = Arc::new(AtomicBool::new(false));
            let signals = HotplugSignals::new(Box::new(Line(Arc::clone(&line))), 1);
            let port = HotplugPort::new(signals.clone(), Box::new(move |slot| sender.send(slot.number()).unwrap()));
            Self { signals, port, line, ejected }
        }

        fn register(&mut self, offset: u64) -> u32 {
            let mut bytes = [0; 4];
            self.port.read(offset, &mut bytes);
            u32::from_le_bytes(bytes)
        }

        fn is_up(&self) -> bool {
            self.line.load(Ordering::SeqCst)
        }
    }

    fn slot(number: u8) -> Slot {
        Slot::new(number).unwrap()
    }

    #[test]
    fn the_guest_is_told_until_it_has_read_and_cleared_everything() {
        let mut bench = Bench::new();
        bench.signals.came(slot(1));
        bench.signals.came(slot(31));
        bench.signals.wanted(slot(9));
        assert!(bench.is_up());
        assert_eq!((bench.register(CAME_OFFSET), bench.register(WANTED_OFFSET)), (1 << 31 | 2, 1 << 9));
        bench.port.write(CAME_OFFSET, &2u32.to_le_bytes());
        // Another one comes in between, and is not cleared with the others.
        bench.signals.came(slot(2));
        bench.port.write(CAME_OFFSET, &(1u32 << 31).to_le_bytes());
        bench.port.write(WANTED_OFFSET, &u32::MAX.to_le_bytes());
        assert!(bench.is_up());
        assert_eq!((bench.register(CAME_OFFSET), bench.register(WANTED_OFFSET)), (4, 0));
        bench.port.write(CAME_OFFSET, &[4]);
        assert!(!bench.is_up());
        bench.signals.wanted(slot(9));
        assert!(bench.is_up(), "asking again tells again");
        bench.signals.gone(slot(9));
        assert!(!bench.is_up());
        assert!(bench.ejected.try_recv().is_err());
    }

    #[test]
    fn vcpus_that_come_stay_and_are_told_again_when_asked() {
        let mut bench = Bench::new();
        let shows = |bench: &mut Bench| (bench.register(VCPUS_CAME_OFFSET), bench.register(VCPUS_OFFSET));
        assert_eq!((shows(&mut bench), bench.is_up()), ((0, 1), false));
        bench.signals.vcpus_came(3);
        assert_eq!((shows(&mut bench), bench.is_up()), ((0b110, 0b111), true));
        bench.port.write(VCPUS_CAME_OFFSET, &6u32.to_le_bytes());
        assert_eq!((shows(&mut bench), bench.is_up()), ((0, 0b111), false));
        bench.signals.vcpus_came(4);
        assert_eq!(shows(&mut bench), (0b1000, 0b1111));
        bench.signals.vcpus_came(4);
        assert_eq!(shows(&mut bench), (0b1110, 0b1111));
        bench.port.write(VCPUS_OFFSET, &[0xff; 4]);
        bench.port.write(VCPUS_CAME_OFFSET, &[0xff]);
        bench.signals.vcpus_came(2);
        assert_eq!(shows(&mut bench).1, 0b1111, "none goes");
        bench.signals.vcpus_came(MAX_VCPUS);
        assert_eq!(bench.register(VCPUS_OFFSET), u32::MAX);
        assert_eq!((first(0), first(32), first(200)), (0, u32::MAX, u32::MAX));
    }

    #[test]
    fn every_bit_of_the_third_register_is_a_slot_that_the_guest_lets_go_of() {
        let mut bench = Bench::new();
        bench.port.write(EJECT_OFFSET, &(1u32 << 31 | 1 << 8 | 1).to_le_bytes());
        assert_eq!(bench.ejected.try_iter().collect::<Vec<_>>(), [0, 8, 31]);
        bench.port.write(EJECT_OFFSET + 1, &[3]);
        assert_eq!(bench.ejected.try_iter().collect::<Vec<_>>(), [8, 9]);
        assert_eq!(bench.register(EJECT_OFFSET), 0);
    }

    #[test]
    fn widths_and_offsets_that_no_register_has_do_no_harm() {
        let mut bench = Bench::new();
        bench.signals.came(slot(1));
        bench.signals.wanted(slot(1));
        let mut wide = [0; 8];
        bench.port.read(16, &mut wide);
        assert_eq!(wide, [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        bench.port.read(1 << 40, &mut wide[..4]);
        assert_eq!(wide[..4], [0xff; 4]);
        bench.port.write(HOTPLUG_LEN, &[0xff; 8]);
        bench.port.write(u64::MAX, &[0xff; 1]);
        bench.port.write(2, &[0xff; 2]);
        assert_eq!((bench.register(CAME_OFFSET), bench.register(WANTED_OFFSET)), (2, 2));
        // Across registers: each byte is that of its register.
        bench.port.write(3, &[0xff, 2]);
        assert_eq!((bench.register(CAME_OFFSET), bench.register(WANTED_OFFSET)), (2, 0));
    }
}
