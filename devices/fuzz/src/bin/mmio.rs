//! Any sequence of accesses to a device by its memory-mapped registers, and to the same device by PCI; afterwards a reset must
//! bring back what was there at first.
#![no_main]

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use bedplate_devices::pci::PciFunction;
use bedplate_devices::testing::Machine;
use bedplate_devices::virtio::limiter::LimiterConfig;
use bedplate_devices::virtio::mmio::{Place, VirtioMmioWindow, WINDOW_LEN};
use bedplate_devices::virtio::pci::VirtioPciDevice;
use bedplate_devices::virtio::rng::Rng;

const PLACE: Place = Place { address: 0xc000_1000, pin: 5 };
const STATUS: u64 = PLACE.address + 0x70;

/// Every register below the device's own configuration.
fn registers(machine: &Machine) -> Vec<u32> {
    (PLACE.address..PLACE.address + 0x100).step_by(4).map(|at| u32::from_le_bytes(machine.read(at))).collect()
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let machine = Machine::new();
    let rng = Rng::new(LimiterConfig::NONE).expect("descriptors are left");
    let device = VirtioPciDevice::new(rng, &machine.memory, &machine.transport_host()).expect("descriptors are left");
    let device = Arc::new(Mutex::new(device));
    let window = Arc::new(Mutex::new(VirtioMmioWindow::new(&device, PLACE, machine.root.configured())));
    machine.bus.insert(PLACE.address, WINDOW_LEN, window).expect("nothing else is there");
    let slot = machine.root.add_shared(device as Arc<Mutex<dyn PciFunction>>).expect("slots are free");
    let fresh = registers(&machine);
    for access in bytes.chunks_exact(8) {
        let &[kind, place, a, b, c, d, e, f] = access else { continue };
        let value = [a, b, c, d, e, f, 0, 0];
        // Mostly the registers, which are the first 0x100 bytes, and mostly whole.
        let register = u64::from(place) << (kind >> 6 & 1) & if kind & 0x80 == 0 { !3 } else { !0 };
        let len = [4, 1, 2, 8][usize::from(kind >> 2 & 3) * usize::from(kind & 0x20 != 0)];
        match kind & 3 {
            0 => drop(machine.bus.read(PLACE.address + register, &mut [0; 8][..len])),
            3 => machine.write_config(slot, register & 0xfc, u32::from_le_bytes([a, b, c, d])),
            _ => machine.write(PLACE.address + register, &value[..len]),
        }
    }
    machine.write(STATUS, &[0; 4]);
    if machine.root.configured().load(Ordering::SeqCst) {
        // By PCI then: what the window has are magic, version and vendor.
        let empty = [&fresh[..2], &[0], &fresh[3..4], &[0; 60]].concat();
        assert_eq!(registers(&machine), empty);
        machine.write_config(slot, 4, 0);
    } else {
        assert_eq!(registers(&machine), fresh);
    }
    assert_eq!(machine.host.doorbells(), []);
    machine.root.shutdown();
});
