//! Any driver over a disk in memory.
#![no_main]

use bedplate_devices::testing::{Driver, Hostile, RamDisk, honest};
use bedplate_devices::virtio::block::{Block, BlockConfig};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let disk = Block::new(RamDisk::new(1 << 20), BlockConfig::default()).expect("descriptors are left");
    let mut hostile = Hostile::new(Driver::attach(disk));
    let (driver, mut queues) = hostile.run(bytes);
    honest(driver, &mut queues);
});
