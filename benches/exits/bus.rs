//! Our part of an exit alone, without KVM: finding the device and calling it, against calling it straight.

use std::hint::black_box;
use std::sync::{Arc, Mutex};

use bedplate_benches::{Pair, Unit, nanos};
use bedplate_devices::bus::{Bus, BusDevice};
use criterion::Criterion;

use crate::ours::Counter;

/// Devices on the bus: about as many ranges as a VM with eight PCI devices has.
const DEVICES: u64 = 12;

pub fn benchmark(c: &mut Criterion) {
    let bus = Bus::new();
    for index in 0..DEVICES {
        bus.insert(index * 0x1_0000, 0x8000, Arc::<Mutex<Counter>>::default()).unwrap();
    }
    let device: Arc<Mutex<dyn BusDevice>> = Arc::<Mutex<Counter>>::default();
    Pair { what: "bus dispatch without KVM", ours: "bus", bare: "lock and call", unit: Unit::Operations }.run(
        c,
        |count| {
            nanos(|| {
                for index in 0..count {
                    let address = (index % DEVICES) * 0x1_0000 + 8;
                    assert!(bus.write(black_box(address), black_box(&[1])));
                }
            })
        },
        |count| {
            nanos(|| {
                for index in 0..count {
                    black_box(&device).lock().unwrap().write(black_box(index % DEVICES), black_box(&[1]));
                }
            })
        },
    );
}
