//! Any driver over a region of memory that it may have half of.
#![no_main]

use bedplate_devices::testing::{Driver, Hostile, Machine, honest};
use bedplate_devices::virtio::mem::{Mem, MemConfig};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let config = MemConfig { address: Machine::RAM as u64 / 2, len: 4 << 20, block: 1 << 20 };
    let device = Mem::new(config).expect("descriptors are left");
    let control = device.control();
    control.request(2 << 20);
    let mut hostile = Hostile::new(Driver::attach(device));
    let (driver, mut queues) = hostile.run(bytes);
    honest(driver, &mut queues);
    assert!(control.plugged() <= 2 << 20);
});
