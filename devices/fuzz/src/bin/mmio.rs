//! Any sequence of accesses to a device by its memory-mapped registers, and to the same device by PCI; afterwards a reset must
//! bring back what was there at first.
#![no_main]

use std::sync::{Arc, Mutex};

use bedplate_devices::pci::PciFunction;
use bedplate_devices::testing::Machine;
use bedplate_devices::virtio::limiter::LimiterConfig;
use bedplate_devices::virtio::mmio::{Place, WINDOW_LEN, Window};
use bedplate_devices::virtio::pci::VirtioPciDevice;
use bedplate_devices::virtio::rng::Rng;

const PLACE: Place = Place { address: 0xc000_1000, pin: 5 };
const STATUS: u64 = PLACE.address + 0x70;
const QUEUE_READY: u64 = PLACE.address + 0x44;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let machine = Machine::new();
    let rng = Rng::new(LimiterConfig::NONE).expect("descriptors are left");
    let device = VirtioPciDevice::new(rng, &machine.memory, &machine.transport_host()).expect("descriptors are left");
    let device = Arc::new(Mutex::new(device));
    let window = Arc::new(Mutex::new(Window::new(&device, PLACE, machine.root.written())));
    machine.bus.insert(PLACE.address, WINDOW_LEN, window).expect("nothing else is there");
    let slot = machine.root.add_shared(device as Arc<Mutex<dyn PciFunction>>).expect("slots are free");
    let identity = machine.read_config(slot, 0);
    for access in bytes.chunks_exact(8) {
        let &[kind, place, a, b, c, d, e, f] = access else { continue };
        let value = [a, b, c, d, e, f, 0, 0];
        // Mostly the registers, which are the first 0x100 bytes, and mostly whole.
        let register = u64::from(place) << (kind >> 6 & 1) & if kind & 0x80 == 0 { !3 } else { !0 };
        let len = [4, 1, 2, 8][usize::from(kind >> 2 & 3) * usize::from(kind & 0x20 != 0)];
        match kind & 3 {
            0 => drop(machine.read::<4>(PLACE.address + register)),
            3 => machine.write_config(slot, register & 0xfc, u32::from_le_bytes([a, b, c, d])),
            _ => machine.write(PLACE.address + register, &value[..len]),
        }
    }
    machine.write(STATUS, &[0; 4]);
    assert_eq!(machine.read::<4>(STATUS), [0; 4]);
    assert_eq!(machine.read::<4>(QUEUE_READY), [0; 4]);
    assert!(machine.host.doorbells().len() <= 1, "but for the port's");
    assert_eq!(machine.read_config(slot, 0), identity);
    machine.root.shutdown();
});
