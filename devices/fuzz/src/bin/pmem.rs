//! Any driver over persistent memory, which a hostile one must not reach by the device's own hand.
#![no_main]

use std::os::unix::fs::FileExt;

use bedplate_devices::testing::{Driver, Hostile, honest};
use bedplate_devices::virtio::limiter::LimiterConfig;
use bedplate_devices::virtio::pmem::{Pmem, PmemConfig};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(b"content", 0).expect("it has room");
    let config = PmemConfig { address: 5 << 30, len: 2 << 20, flush_cost: 2 << 20, limits: LimiterConfig::NONE };
    let device = Pmem::new(config, file.try_clone().ok()).expect("descriptors are left");
    let mut hostile = Hostile::new(Driver::attach(device));
    let (driver, mut queues) = hostile.run(bytes);
    honest(driver, &mut queues);
    let mut content = [0; 8];
    assert_eq!(file.read_at(&mut content, 0).ok(), Some(7));
    assert_eq!(&content[..7], b"content");
});
