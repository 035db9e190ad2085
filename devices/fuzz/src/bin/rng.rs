//! Any driver over the entropy device.
#![no_main]

use bedplate_devices::testing::{Driver, Hostile, honest};
use bedplate_devices::virtio::limiter::LimiterConfig;
use bedplate_devices::virtio::rng::Rng;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let device = Rng::new(LimiterConfig::NONE).expect("descriptors are left");
    let mut hostile = Hostile::new(Driver::attach(device));
    let (driver, mut queues) = hostile.run(bytes);
    honest(driver, &mut queues);
});
