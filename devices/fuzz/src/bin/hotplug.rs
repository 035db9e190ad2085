//! Devices that come and go, and vCPUs that come, under any guest: its accesses to the hot-plug registers, to configuration
//! space and to the windows, and an owner who plugs and asks. Afterwards the bus must empty for a guest that does as it is told.
#![no_main]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bedplate_devices::bus::BusDevice;
use bedplate_devices::pci::{SLOTS, Slot};
use bedplate_devices::platform::{
    EJECT_OFFSET, HotplugPort, HotplugSignals, IrqLine, MAX_VCPUS, VCPUS_CAME_OFFSET, VCPUS_OFFSET,
};
use bedplate_devices::testing::Machine;
use bedplate_devices::virtio::limiter::LimiterConfig;
use bedplate_devices::virtio::pci::VirtioPciDevice;
use bedplate_devices::virtio::rng::Rng;

struct Line(Arc<AtomicBool>);

impl IrqLine for Line {
    fn set(&self, asserted: bool) {
        self.0.store(asserted, Ordering::Relaxed);
    }
}

fn device(machine: &Machine) -> Arc<Mutex<VirtioPciDevice>> {
    let rng = Rng::new(LimiterConfig::NONE).expect("descriptors are left");
    let function = VirtioPciDevice::new(rng, &machine.memory, &machine.transport_host()).expect("descriptors are left");
    Arc::new(Mutex::new(function))
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let machine = Machine::new();
    let (line, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let signals = HotplugSignals::new(Box::new(Line(Arc::clone(&line))), 1);
    let (root, theirs) = (machine.root.clone(), Arc::clone(&asked));
    let sink = move |slot: Slot| {
        let bit = 1 << slot.number();
        if theirs.fetch_and(!bit, Ordering::Relaxed) & bit != 0 {
            root.remove(slot);
        }
    };
    let mut port = HotplugPort::new(signals.clone(), Box::new(sink));
    let slots = || (1..SLOTS).filter_map(Slot::new);
    let ask = |slot: Slot| {
        if machine.root.is_occupied(slot) {
            asked.fetch_or(1 << slot.number(), Ordering::Relaxed);
            signals.wanted(slot);
        }
    };
    let mut vcpus = 1;
    for step in bytes.chunks_exact(12) {
        let (kind, width, at) = (step[0] % 8, 1 << (step[1] % 4), step[2]);
        let mut data = [0; 8];
        data.copy_from_slice(&step[4..]);
        let slot = Slot::new(at % SLOTS).expect("it is below the end");
        match kind {
            0 => {
                if let Ok(slot) = machine.root.plug(device(&machine)) {
                    signals.came(slot);
                }
            }
            1 => ask(slot),
            2 => port.write(u64::from(at % 24), &data[..width]),
            3 => port.read(u64::from(at % 24), &mut data[..width]),
            4 => machine.write(Machine::config(slot, u64::from(step[3])), &data[..width]),
            5 => {
                let place = Machine::WINDOW.start + u64::from(step[3] % 4) * 0x8000;
                machine.write_config(slot, 0x14, (place >> 32) as u32);
                machine.write_config(slot, 0x10, place as u32);
                machine.write_config(slot, 0x18, Machine::PORTS.start as u32 + u32::from(step[3] % 8) * 0x40);
                machine.write_config(slot, 4, 7);
            }
            6 => {
                vcpus = vcpus.max(at.clamp(1, MAX_VCPUS));
                signals.vcpus_came(at);
            }
            _ => machine.write(Machine::WINDOW.start + u64::from(at) * 0x100, &data[..width]),
        }
    }
    slots().for_each(ask);
    port.write(EJECT_OFFSET, &u32::MAX.to_le_bytes());
    port.write(0, &[0xff; 8]);
    port.write(VCPUS_CAME_OFFSET, &[0xff; 8]);
    let mut present = [0; 4];
    port.read(VCPUS_OFFSET, &mut present);
    assert_eq!(u32::from_le_bytes(present), u32::MAX >> (MAX_VCPUS - vcpus), "vCPUs are not those that came");
    assert!(!line.load(Ordering::Relaxed), "there is nothing to be told");
    assert!(slots().all(|slot| !machine.root.is_occupied(slot)), "a device has stayed");
    assert!(machine.host.doorbells().is_empty(), "ioeventfds are left");
    let again = machine.root.plug(device(&machine)).expect("the bus is empty");
    assert_eq!(again.number(), 1);
});
