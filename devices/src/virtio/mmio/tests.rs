use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::host::Doorbell;
use crate::metrics::DeviceMetrics;
use crate::pci::{PciFunction, Slot};
use crate::testing::{Driver, DriverQueue, FakeVector, Machine, Piece, RamDisk};
use crate::virtio::block::{Block, BlockConfig, BlockControl};
use crate::virtio::{Interrupt, VirtioDevice};

const PLACE: Place = Place { address: 0xc000_1000, pin: 5 };
const DEADLINE: Duration = Duration::from_secs(20);
const AT: u64 = Driver::BUFFERS;

/// A disk in a window, in a machine that has it on PCI as well.
struct Rig {
    machine: Machine,
    slot: Slot,
    device: Weak<Mutex<VirtioPciDevice>>,
    disk: BlockControl<RamDisk>,
    metrics: Arc<DeviceMetrics>,
}

impl Rig {
    fn new() -> Self {
        let machine = Machine::new();
        let block = Block::new(RamDisk::new(4096), BlockConfig::default()).unwrap();
        let (metrics, disk) = (Arc::clone(block.metrics()), block.control());
        let device = VirtioPciDevice::new(block, &machine.memory, &machine.transport_host()).unwrap();
        let device = Arc::new(Mutex::new(device));
        let window = VirtioMmioWindow::new(&device, PLACE, machine.root.configured());
        let known = Arc::downgrade(&device);
        let slot = machine.root.add_shared(device as Arc<Mutex<dyn PciFunction>>).unwrap();
        machine.bus.insert(PLACE.address, WINDOW_LEN, Arc::new(Mutex::new(window))).unwrap();
        Self { machine, slot, device: known, disk, metrics }
    }

    fn read(&self, register: u64) -> u32 {
        u32::from_le_bytes(self.machine.read(PLACE.address + register))
    }

    fn write(&self, register: u64, value: u32) {
        self.machine.write(PLACE.address + register, &value.to_le_bytes());
    }

    fn offered(&self) -> u64 {
        (0..2).fold(0, |bits, half: u32| {
            self.write(DEVICE_FEATURES_SELECT, half);
            bits | u64::from(self.read(DEVICE_FEATURES)) << (32 * half)
        })
    }

    /// In the order of 4.2.3: features, the queue, and the driver is ready.
    fn up(&self) -> (DriverQueue, Arc<FakeVector>) {
        let features = self.offered();
        self.write(STATUS, 0);
        self.write(STATUS, 3);
        for half in 0..2u32 {
            self.write(DRIVER_FEATURES_SELECT, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, 11);
        assert_eq!(self.read(STATUS), 11);
        self.write(QUEUE_SELECT, 0);
        assert_eq!((self.read(QUEUE_READY), self.read(QUEUE_NUM_MAX)), (0, 1024));
        self.write(QUEUE_NUM, 64);
        let pin = self.machine.host.line(PLACE.pin);
        let queue = DriverQueue::new(0, 64, features, &self.machine.memory, Arc::clone(&pin));
        for (register, address) in [(DESCRIPTORS_LOW, queue.table), (DRIVER_LOW, queue.avail), (DEVICE_LOW, queue.used)]
        {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        assert_eq!(self.read(QUEUE_READY), 1);
        self.write(STATUS, 15);
        assert_eq!(self.read(STATUS), 15);
        (queue, pin)
    }

    fn run(&self, queue: &mut DriverQueue) {
        // A read of the first sector.
        let head = queue.add(&[Piece::Read(AT, 16), Piece::Write(AT + 0x1000, 513)]);
        self.write(QUEUE_NOTIFY, 0);
        assert_eq!(queue.wait(), (u32::from(head), 513));
    }
}

fn doorbell(value: u32) -> Doorbell {
    Doorbell::Register { address: PLACE.address + QUEUE_NOTIFY, value }
}

#[test]
fn a_driver_without_pci_brings_the_device_up() {
    let rig = Rig::new();
    assert_eq!([MAGIC, VERSION, DEVICE_ID].map(|register| rig.read(register)), [MAGIC_VALUE, 2, 2]);
    assert_eq!((rig.read(0x0b0), rig.read(0x0bc)), (u32::MAX, u32::MAX), "no shared memory");
    // The capacity of a disk, in sectors, in two halves.
    assert_eq!((rig.read(CONFIG), rig.read(CONFIG + 4)), (8, 0));
    assert_eq!(rig.machine.host.doorbells(), []);
    let (mut queue, pin) = rig.up();
    assert_eq!(rig.machine.host.doorbells(), [doorbell(0)]);
    rig.run(&mut queue);
    // What was used is the reason of an interrupt, until it is acknowledged.
    assert_eq!(rig.read(INTERRUPT_STATUS), 1);
    rig.write(INTERRUPT_ACKNOWLEDGE, 1);
    assert_eq!(rig.read(INTERRUPT_STATUS), 0);
    rig.run(&mut queue);
    rig.write(INTERRUPT_ACKNOWLEDGE, 1);
    // So is another size, of which the generation tells, too.
    let generation = rig.read(CONFIG_GENERATION);
    pin.take();
    rig.disk.replace(RamDisk::new(8192).into());
    assert!(pin.wait(Instant::now() + DEADLINE));
    assert_eq!((rig.read(INTERRUPT_STATUS), rig.read(CONFIG_GENERATION), rig.read(CONFIG)), (2, generation + 1, 16));
    // A reset ends it all, and the next driver finds what the first one found.
    rig.write(STATUS, 0);
    assert_eq!([STATUS, INTERRUPT_STATUS, QUEUE_READY].map(|register| rig.read(register)), [0; 3]);
    assert_eq!(rig.machine.host.doorbells(), []);
    rig.run(&mut rig.up().0);
    assert_eq!((rig.metrics.guest_faults.value(), rig.metrics.host_faults.value()), (0, 0));
}

#[test]
fn without_an_ioeventfd_a_notification_does_the_same() {
    let rig = Rig::new();
    let (mut queue, _) = rig.up();
    let head = queue.add(&[Piece::Read(AT, 16), Piece::Write(AT + 0x1000, 513)]);
    assert!(rig.machine.bus.write(PLACE.address + QUEUE_NOTIFY, &0u32.to_le_bytes()));
    assert_eq!(queue.wait(), (u32::from(head), 513));
    for value in [1, 0x1_0000, u32::MAX] {
        rig.write(QUEUE_NOTIFY, value);
    }
    assert_eq!(rig.metrics.guest_faults.value(), 3, "there is one queue");
}

#[test]
fn a_guest_that_has_pci_finds_the_window_empty() {
    let rig = Rig::new();
    // To look is nothing, nor to write where there is no device.
    rig.machine.read_config(rig.slot, 0);
    rig.machine.write_config(Slot::new(0).unwrap(), 4, 0);
    rig.machine.write_config(Slot::new(9).unwrap(), 4, 0);
    assert_eq!(rig.read(DEVICE_ID), 2);
    let (mut queue, _) = rig.up();
    rig.machine.write_config(rig.slot, 0x10, u32::MAX);
    assert_eq!(rig.read(DEVICE_ID), 2, "it is at work already");
    rig.run(&mut queue);
    rig.write(STATUS, 0);
    let registers = [MAGIC, VERSION, DEVICE_ID, DEVICE_FEATURES, QUEUE_NUM_MAX, CONFIG];
    assert_eq!(registers.map(|register| rig.read(register)), [MAGIC_VALUE, 2, 0, 0, 0, 0]);
    // What is written there reaches nobody: neither a driver by PCI that is at work, nor the interrupts' pin.
    rig.write(STATUS, 4);
    assert_eq!((rig.read(DEVICE_ID), rig.metrics.guest_faults.value()), (0, 0));
}

#[test]
fn a_device_that_is_off_the_bus_has_no_window() {
    let rig = Rig::new();
    let (mut queue, _) = rig.up();
    // Others may know it still.
    let device = rig.device.upgrade().unwrap();
    rig.machine.root.remove(rig.slot);
    assert_eq!(rig.machine.host.doorbells(), []);
    for register in [DEVICE_ID, STATUS, CONFIG] {
        rig.write(register, 15);
        assert_eq!(rig.read(register), 0);
    }
    queue.add(&[Piece::Read(AT, 16), Piece::Write(AT + 0x1000, 513)]);
    assert!(device.lock().unwrap().device().stop().is_empty(), "it works on");
}

#[test]
fn a_host_without_a_pin_has_a_device_that_needs_a_reset() {
    let rig = Rig::new();
    rig.machine.host.refuses_pins.store(true, Ordering::SeqCst);
    for round in 1..3 {
        rig.write(STATUS, 0);
        rig.write(STATUS, 3);
        rig.write(DRIVER_FEATURES_SELECT, 1);
        rig.write(DRIVER_FEATURES, 1);
        rig.write(STATUS, 11);
        rig.write(STATUS, 15);
        assert_eq!((rig.read(STATUS), rig.metrics.host_faults.value()), (0x4f, round));
        assert_eq!(rig.machine.host.doorbells(), []);
    }
    rig.machine.host.refuses_pins.store(false, Ordering::SeqCst);
    rig.run(&mut rig.up().0);
}

#[test]
fn a_queue_can_be_given_back_before_the_device_works() {
    let rig = Rig::new();
    rig.write(STATUS, 3);
    rig.write(DRIVER_FEATURES_SELECT, 1);
    rig.write(DRIVER_FEATURES, 1);
    rig.write(STATUS, 11);
    rig.write(QUEUE_READY, 1);
    let before = rig.metrics.guest_faults.value();
    rig.write(QUEUE_NUM, 32);
    assert_eq!(rig.metrics.guest_faults.value(), before + 1, "it is ready");
    rig.write(QUEUE_READY, 0);
    rig.write(QUEUE_NUM, 32);
    assert_eq!((rig.read(QUEUE_READY), rig.metrics.guest_faults.value()), (0, before + 1));
}

#[test]
fn registers_follow_the_rules() {
    let rig = Rig::new();
    let faults = || rig.metrics.guest_faults.value();
    // Other widths, and places that nothing is at.
    for (register, len) in [(STATUS, 1), (STATUS, 8), (QUEUE_SELECT, 2), (0x031, 4), (0x0f8, 4), (DEVICE_ID, 4)] {
        let before = faults();
        rig.machine.write(PLACE.address + register, &[1; 8][..len]);
        assert_eq!(faults(), before + 1, "{register:#x} {len}");
    }
    let before = faults();
    assert_eq!(rig.machine.read::<2>(PLACE.address + STATUS), [0; 2]);
    assert_eq!(faults(), before + 1);
    // Queues that there are not.
    for queue in [1, 0x1_0000, u32::MAX] {
        rig.write(QUEUE_SELECT, queue);
        assert_eq!((rig.read(QUEUE_NUM_MAX), rig.read(QUEUE_READY)), (0, 0), "{queue:#x}");
    }
    let (mut queue, _) = rig.up();
    let before = faults();
    rig.write(QUEUE_NUM, 0x1_0040);
    rig.write(QUEUE_READY, 0);
    assert_eq!((faults(), rig.read(QUEUE_READY)), (before + 2, 1), "the device works");
    rig.run(&mut queue);
    rig.write(STATUS, 0);
    rig.write(QUEUE_READY, 0);
    assert_eq!((faults(), rig.read(QUEUE_READY)), (before + 2, 0));
}

#[test]
fn somebody_else_who_uses_buffers_is_always_a_reason_and_has_a_way_of_his_own() {
    let rig = Rig::new();
    let direct = || {
        let device = rig.device.upgrade().unwrap();
        let device = device.lock().unwrap();
        device.transport.lines.direct(0).unwrap()
    };
    assert!(direct().is_some(), "until there is a driver of the window, it is INTA#'s");
    let (_, pin) = rig.up();
    assert_eq!(rig.read(INTERRUPT_STATUS), 0);
    direct().unwrap().write(1).unwrap();
    assert!(pin.take() > 0);
    rig.write(INTERRUPT_ACKNOWLEDGE, 3);
    assert_eq!(rig.read(INTERRUPT_STATUS), 1);
    rig.write(STATUS, 0);
    assert_eq!(rig.read(INTERRUPT_STATUS), 0);
}

/// What a guest does to a device.
#[derive(Debug, Clone, Copy)]
enum Access {
    Read(u64, usize),
    Write(u64, usize, u64),
    /// By configuration space of PCI.
    Configure(u64, u32),
}

fn access() -> impl Strategy<Value = Access> {
    let width = (0u32..4).prop_map(|power| 1usize << power);
    prop_oneof![
        (0u64..0x140, width.clone()).prop_map(|(register, width)| Access::Read(register, width)),
        (0u64..0x140, width, any::<u64>()).prop_map(|(register, width, value)| Access::Write(register, width, value)),
        // Small values where they mean something.
        (0u64..0x50, 0u64..16).prop_map(|(register, value)| Access::Write(register * 4, 4, value)),
    ]
}

fn configure() -> impl Strategy<Value = Access> {
    (0u64..16, any::<u32>()).prop_map(|(register, value)| Access::Configure(register * 4, value))
}

fn perform(rig: &Rig, access: Access) {
    match access {
        Access::Read(register, width) => {
            rig.machine.bus.read(PLACE.address + register, &mut [0; 8][..width]);
        }
        Access::Write(register, width, value) => {
            rig.machine.write(PLACE.address + register, &value.to_le_bytes()[..width]);
        }
        Access::Configure(register, value) => rig.machine.write_config(rig.slot, register, value),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever was read and written, a driver brings the device up afterwards.
    #[test]
    fn no_guest_breaks_the_device(accesses in proptest::collection::vec(access(), 0..200)) {
        let rig = Rig::new();
        accesses.into_iter().for_each(|access| perform(&rig, access));
        rig.write(STATUS, 0);
        rig.run(&mut rig.up().0);
    }

    /// A guest that configures it by PCI finds nothing in the window, unless it is at work there.
    #[test]
    fn nor_by_both_ways(accesses in proptest::collection::vec(prop_oneof![4 => access(), 1 => configure()], 0..200)) {
        let rig = Rig::new();
        accesses.into_iter().for_each(|access| perform(&rig, access));
        rig.machine.write_config(rig.slot, 4, 0);
        rig.write(STATUS, 0);
        prop_assert_eq!([DEVICE_ID, STATUS, CONFIG].map(|register| rig.read(register)), [0; 3]);
        prop_assert_eq!(rig.machine.host.doorbells(), []);
    }
}
