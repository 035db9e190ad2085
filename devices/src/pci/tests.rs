use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::testing::{FakeHost, Machine, configuration};

const IDENTITY: Identity =
    Identity { vendor: 0x1af4, device: 0x1042, revision: 3, class: 0x01_8000, subsystem_vendor: 7, subsystem: 8 };
const SIZES: [u64; 2] = [0x8000, 0x10];

/// A function with two BARs that counts what reaches it.
struct Probe {
    config: ConfigSpace,
    mapped: Arc<Mutex<[Option<u64>; BAR_COUNT]>>,
    accesses: Arc<AtomicU64>,
}

impl Probe {
    fn new() -> Self {
        let mut config = ConfigSpace::new(&IDENTITY);
        config.add_memory_bar(0, SIZES[0]);
        config.add_memory_bar(4, SIZES[1]);
        config.add_capability(0x09, &[1, 2, 3], &[0, 0xff]);
        config.add_capability(0x10, &[0; 4], &[]);
        Self { config, mapped: Arc::default(), accesses: Arc::default() }
    }
}

impl PciFunction for Probe {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        data.fill(bar as u8 + offset as u8);
    }
    fn bar_moved(&mut self, bar: usize, address: Option<u64>) {
        let before = std::mem::replace(&mut self.mapped.lock().unwrap()[bar], address);
        assert!(before.is_none() || address.is_none(), "moved without being unmapped first");
    }
}

#[test]
fn the_header_is_what_guests_look_for() {
    let machine = Machine::new();
    let slot = machine.add(Probe::new());
    assert_eq!((slot.number(), slot.to_string()), (1, "00:01.0".to_owned()));
    let read = |register| machine.read_config(slot, register);
    assert_eq!(read(0), 0x1042_1af4);
    assert_eq!(read(4), 0x0010_0000);
    assert_eq!(read(8), 0x0180_0003);
    assert_eq!(read(0xc), 0, "a single function with a type 0 header");
    assert_eq!(read(0x2c), 0x0008_0007);
    assert_eq!(read(0x34), 0x40);
    assert_eq!(read(0x40), 0x0201_4809);
    assert_eq!(read(0x48), 0x0000_0010);
    assert_eq!(read(0x100), 0, "no extended capabilities");
    // The host bridge, and slots without anybody.
    assert_eq!(machine.read::<8>(Machine::ECAM), [0x36, 0x1b, 8, 0, 0, 0, 0, 0]);
    assert_eq!(machine.read::<4>(Machine::ECAM + (2 << 15)), [0xff; 4]);
    assert_eq!(machine.read::<4>(Machine::ECAM + (1 << 15) + (1 << 12)), [0xff; 4]);
    // An access that runs into the next function.
    assert_eq!(machine.read::<8>(Machine::ECAM + (1 << 15) + 0xffc), [0xff; 8]);
    machine.write(Machine::ECAM + (1 << 15) + 0xffc, &[1; 8]);
}

#[test]
fn the_reset_register_lies_among_the_ports_where_it_is_wanted() {
    use crate::bus::BusDevice;
    let machine = Machine::new();
    let ports = machine.root.config_ports();
    let mut ports = ports.lock().unwrap();
    ports.write(1, &[6]);
    let (sender, seen) = std::sync::mpsc::channel();
    ports.set_reset(Box::new(move |request| sender.send(request).unwrap()));
    ports.write(1, &[2]);
    ports.write(0, &0x8000_0600u32.to_le_bytes());
    ports.write(1, &[6, 6]);
    assert!(seen.try_recv().is_err());
    ports.write(1, &[6]);
    assert_eq!(seen.try_recv(), Ok(crate::platform::PowerRequest::Reset));
}

#[test]
fn ports_reach_the_same_registers() {
    let machine = Machine::new();
    let slot = machine.add(Probe::new());
    let ports = machine.root.config_ports();
    let mut ports = ports.lock().unwrap();
    let read = |ports: &mut ConfigPorts, offset: u64, len: usize| {
        let mut data = [0; 4];
        crate::bus::BusDevice::read(ports, offset, &mut data[..len]);
        data[..len].to_vec()
    };
    let select = |ports: &mut ConfigPorts, address: u32| {
        crate::bus::BusDevice::write(ports, 0, &address.to_le_bytes());
    };
    assert_eq!(read(&mut ports, 4, 4), [0xff; 4], "not enabled");
    select(&mut ports, 0xff00_0803);
    assert_eq!(read(&mut ports, 0, 4), 0x8000_0800u32.to_le_bytes(), "what does not exist reads as zero");
    assert_eq!(read(&mut ports, 4, 4), 0x1042_1af4u32.to_le_bytes());
    assert_eq!(read(&mut ports, 6, 2), [0x42, 0x10]);
    assert_eq!(read(&mut ports, 7, 1), [0x10]);
    assert_eq!(read(&mut ports, 7, 2), [0xff; 2], "past the data port");
    assert_eq!(read(&mut ports, 0, 1), [0xff]);
    for nobody in [0x8000_1000, 0x8000_0900, 0x8001_0800, 0x0000_0800] {
        select(&mut ports, nobody);
        assert_eq!(read(&mut ports, 4, 4), [0xff; 4], "{nobody:#x}");
    }
    select(&mut ports, 0x8000_083c);
    crate::bus::BusDevice::write(&mut *ports, 4, &[11]);
    crate::bus::BusDevice::write(&mut *ports, 0, &[0, 0]);
    assert_eq!(machine.read_config(slot, 0x3c), 11);
}

#[test]
fn sizing_and_moving_a_bar() {
    let machine = Machine::new();
    let probe = Probe::new();
    let mapped = Arc::clone(&probe.mapped);
    let slot = machine.add(probe);
    let first = Machine::WINDOW.start;
    assert_eq!(machine.read_config(slot, 0x10), first as u32 | 0xc);
    assert!(!machine.bus.read(first, &mut [0]), "decoded only when the guest says so");
    machine.write_config(slot, 4, 2);
    assert_eq!(machine.read::<1>(first + 5), [5]);
    assert_eq!(machine.read::<1>(first + SIZES[0]), [4], "the second BAR follows");

    machine.write_config(slot, 0x10, !0);
    machine.write_config(slot, 0x14, !0);
    assert_eq!((machine.read_config(slot, 0x10), machine.read_config(slot, 0x14)), (0xffff_800c, !0));
    assert_eq!(mapped.lock().unwrap()[0], None, "nothing is decoded outside of the windows");
    machine.write_config(slot, 0x18, !0);
    assert_eq!(machine.read_config(slot, 0x18), 0, "there is no such BAR");

    let elsewhere = first + 0x10_0000;
    machine.write_config(slot, 0x14, (elsewhere >> 32) as u32);
    machine.write_config(slot, 0x10, elsewhere as u32 | 0x1234);
    assert_eq!(mapped.lock().unwrap()[0], Some(elsewhere));
    assert_eq!(machine.read::<2>(elsewhere + 1), [1, 1]);
    assert!(!machine.bus.read(first, &mut [0]));
    machine.write_config(slot, 4, 0);
    assert_eq!(*mapped.lock().unwrap(), [None; BAR_COUNT]);
}

#[test]
fn two_bars_in_one_place_leave_the_first_where_it_is() {
    let machine = Machine::new();
    let (one, two) = (machine.add(Probe::new()), machine.add(Probe::new()));
    for slot in [one, two] {
        machine.write_config(slot, 4, 2);
    }
    let place = machine.read_config(one, 0x10);
    machine.write_config(two, 0x10, place);
    assert_eq!(machine.read::<1>(Machine::WINDOW.start), [0]);
    // When the first leaves, the second is decoded at its next change.
    machine.write_config(one, 4, 0);
    assert!(!machine.bus.read(Machine::WINDOW.start, &mut [0]));
    machine.write_config(two, 4, 2);
    assert!(machine.bus.read(Machine::WINDOW.start, &mut [0]));
}

#[test]
fn slots_and_windows_end() {
    let machine = Machine::new();
    for _ in 1..32 {
        machine.add(Probe::new());
    }
    assert!(matches!(machine.root.add(Probe::new()), Err(PciError::NoSlot)));
    let root = PciRoot::new((&machine.bus, vec![0x1000..0x1008, 0x1_0000..0x1_8008]), (&machine.ports, Vec::new()));
    assert!(matches!(root.add(Probe::new()), Err(PciError::NoSpace { size: 0x10 })));
}

#[test]
fn what_is_plugged_lies_nowhere_until_the_guest_says_where() {
    let machine = Machine::new();
    let slot = machine.root.plug(Arc::new(Mutex::new(Probe::new()))).unwrap();
    assert_eq!((machine.read_config(slot, 0x10), machine.read_config(slot, 0x14)), (0xc, 0));
    machine.write_config(slot, 4, 2);
    assert!(!machine.bus.read(0, &mut [0]));
    let place = Machine::WINDOW.start + 0x4_0000;
    machine.write_config(slot, 0x14, (place >> 32) as u32);
    machine.write_config(slot, 0x10, place as u32);
    assert_eq!(machine.read::<1>(place + 5), [5]);
}

#[test]
fn what_is_removed_answers_nowhere_and_its_slot_is_the_next_one_s() {
    let machine = Machine::new();
    let probe = Probe::new();
    let (mapped, accesses) = (Arc::clone(&probe.mapped), Arc::clone(&probe.accesses));
    let (first, second) = (machine.add(probe), machine.add(Probe::new()));
    machine.write_config(first, 4, 2);
    let place = mapped.lock().unwrap()[0].unwrap();
    // Another vCPU, which uses the BAR all the time.
    let stop = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while stop.load(Ordering::Relaxed) == 0 {
                machine.bus.read(place, &mut [0; 4]);
            }
        });
        while accesses.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        machine.root.remove(first);
        let reached = accesses.load(Ordering::Relaxed);
        (0..1000).for_each(|_| _ = machine.bus.read(place, &mut [0; 4]));
        assert_eq!(accesses.load(Ordering::Relaxed), reached, "it was reached after it had gone");
        stop.store(1, Ordering::Relaxed);
    });
    assert_eq!((*mapped.lock().unwrap(), machine.root.is_occupied(first)), ([None; BAR_COUNT], false));
    assert_eq!((machine.read_config(first, 0), machine.read_config(second, 0)), (!0, 0x1042_1af4));
    machine.write_config(first, 4, 2);
    machine.root.remove(first);
    machine.root.remove(Slot::new(0).unwrap());
    assert_eq!(machine.read_config(Slot::new(0).unwrap(), 0), 0x0008_1b36, "the host bridge stays");
    assert_eq!(machine.root.plug(Arc::new(Mutex::new(Probe::new()))).unwrap(), first);
    assert!(Slot::new(32).is_none());
}

/// What the registers say about a BAR, from the outside.
fn decoded(machine: &Machine, slot: Slot, index: u64, size: u64) -> Option<u64> {
    let low = machine.read_config(slot, 0x10 + index * 4) & !0xf;
    let address = u64::from(machine.read_config(slot, 0x14 + index * 4)) << 32 | u64::from(low);
    let inside = address >= Machine::WINDOW.start && address.checked_add(size)? <= Machine::WINDOW.end;
    (inside && machine.read_config(slot, 4) & 2 != 0).then_some(address)
}

/// Writes that matter to BARs: command and base registers, mostly to places inside the window.
fn bar_write() -> impl Strategy<Value = (u64, u64, usize)> {
    let value = prop_oneof![
        any::<u64>(),
        Just(u64::MAX),
        (0..0x400u64).prop_map(|page| Machine::WINDOW.start + page * 0x4000),
        Just(0x80),
        Just(2)
    ];
    (prop_oneof![4u64..8, 0x10u64..0x28], value, prop_oneof![Just(1usize), Just(2), Just(4), Just(8)])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn read_only_bits_stay_and_wide_accesses_are_their_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let machine = Machine::new();
        let slot = machine.add(Probe::new());
        configuration(&machine, slot, &bytes);
        for (register, mask, value) in [
            (0, !0, 0x1042_1af4), (4, !0x547, 0x0010_0000), (8, !0, 0x0180_0003), (0xc, !0xff, 0), (0x2c, !0, 0x0008_0007),
            (0x10, 0x7fff, 0xc), (0x20, 0xf, 0xc), (0x18, !0, 0), (0x30, !0, 0), (0x34, !0, 0x40), (0x3c, !0xff, 0),
            (0x40, !0xff00_0000u32, 0x0001_4809), (0x44, !0, 3), (0x48, !0, 0x10), (0xf00, !0, 0),
        ] {
            let mask: u32 = mask;
            // The writable byte of the first capability is the fourth of its double word.
            prop_assert_eq!(machine.read_config(slot, register) & mask, value & mask, "register {:#x}", register);
        }
        for register in 0..0x50u64 {
            let wide: [u8; 8] = machine.read(Machine::config(slot, register));
            for (at, byte) in (0..).zip(wide) {
                prop_assert_eq!(machine.read::<1>(Machine::config(slot, register + at)), [byte]);
            }
        }
    }

    #[test]
    fn what_is_decoded_is_what_the_registers_say(writes in proptest::collection::vec(bar_write(), 0..60)) {
        let machine = Machine::new();
        let probe = Probe::new();
        let (mapped, accesses) = (Arc::clone(&probe.mapped), Arc::clone(&probe.accesses));
        let slot = machine.add(probe);
        for (register, value, width) in writes {
            machine.write(Machine::config(slot, register), &value.to_le_bytes()[..width]);
            let says = [(0, SIZES[0]), (4, SIZES[1])].map(|(index, size)| decoded(&machine, slot, index, size));
            let mapped = *mapped.lock().unwrap();
            for (index, place) in [0, 4].into_iter().zip(says) {
                let overlap = matches!(says, [Some(a), Some(b)] if b >= a && b - a < SIZES[0]);
                prop_assert!(mapped[index] == place || (overlap && mapped[index].is_none()));
                if let Some(place) = mapped[index] {
                    let before = accesses.load(Ordering::Relaxed);
                    prop_assert!(machine.bus.read(place, &mut [0; 4]));
                    prop_assert_eq!(accesses.load(Ordering::Relaxed), before + 1);
                }
            }
        }
    }
}

fn msix(count: usize) -> (FakeHost, Msix) {
    let host = FakeHost::default();
    let lines = (0..count).map(|_| crate::host::TransportHost::msi_vector(&host).unwrap()).collect();
    (host, Msix::new(lines))
}

#[test]
fn masked_signals_wait_in_the_pending_bits() {
    let (host, mut msix) = msix(10);
    let vectors = msix.vectors();
    let line = |index: usize| Arc::clone(&host.vectors.lock().unwrap()[index]);
    let pending = |msix: &Msix| {
        let mut data = [0; 8];
        msix.read_pending(0, &mut data);
        u64::from_le_bytes(data)
    };
    vectors.signal(9).unwrap();
    assert_eq!((line(9).take(), pending(&msix)), (0, 0), "off: there is no interrupt to be late");
    vectors.signal(10).unwrap();
    vectors.signal(0xffff).unwrap();

    msix.set_control(0x8000).unwrap();
    vectors.signal(9).unwrap();
    assert_eq!((line(9).take(), pending(&msix)), (0, 1 << 9), "entries start masked");
    msix.write_table(9 * 16, &0xfee0_1000_u64.to_le_bytes()).unwrap();
    msix.write_table(9 * 16 + 8, &(0x41u64).to_le_bytes()).unwrap();
    assert_eq!((line(9).take(), pending(&msix)), (1, 0));
    assert_eq!(line(9).route(), Some((0xfee0_1000, 0x41)));
    vectors.signal(9).unwrap();
    assert_eq!(line(9).take(), 1);

    msix.set_control(0xc000).unwrap();
    vectors.signal(9).unwrap();
    assert_eq!((line(9).take(), pending(&msix)), (0, 1 << 9), "the whole function is masked");
    msix.set_control(0x8000).unwrap();
    assert_eq!((line(9).take(), pending(&msix)), (1, 0));

    // Masked, moved, unmasked: the signal that came meanwhile goes to the new place.
    msix.write_table(9 * 16 + 12, &1u32.to_le_bytes()).unwrap();
    vectors.signal(9).unwrap();
    msix.write_table(9 * 16, &0xfee0_2003u32.to_le_bytes()).unwrap();
    assert_eq!(line(9).route(), Some((0xfee0_1000, 0x41)));
    msix.write_table(9 * 16 + 12, &0xffff_fffeu32.to_le_bytes()).unwrap();
    assert_eq!(line(9).route(), Some((0xfee0_2000, 0x41)), "the two low bits are not there");
    assert_eq!(line(9).take(), 1);

    msix.set_control(0).unwrap();
    assert_eq!(line(9).route(), None);
    vectors.signal(9).unwrap();
    assert_eq!((line(9).take(), pending(&msix)), (0, 0));
}

#[test]
fn the_table_takes_aligned_words_only_and_ends() {
    let (_, mut msix) = msix(2);
    let table = |msix: &Msix| {
        let mut data = [0xaa; 40];
        msix.read_table(0, &mut data);
        data
    };
    let before = table(&msix);
    assert_eq!(before[12], 1);
    assert_eq!(before[32..], [0; 8]);
    for (offset, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (6, 2), (32, 4), (0x1_0000, 8)] {
        msix.write_table(offset, &[0xff; 8][..len]).unwrap();
    }
    assert_eq!(table(&msix), before);
    msix.write_table(16, &[0xff; 8]).unwrap();
    assert_eq!(table(&msix)[16..24], [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(msix.capability(0, 0x4000, 0x5000), ([1, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0], [0, 0xc0]));
}
