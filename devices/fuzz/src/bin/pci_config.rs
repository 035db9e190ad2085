//! Any sequence of configuration accesses; afterwards the function must still be who it was.
#![no_main]

use bedplate_devices::testing::{Driver, configuration};
use bedplate_devices::virtio::limiter::LimiterConfig;
use bedplate_devices::virtio::rng::Rng;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let driver = Driver::attach(Rng::new(LimiterConfig::NONE).expect("descriptors are left"));
    let identity = driver.machine.read_config(driver.slot, 0);
    configuration(&driver.machine, driver.slot, bytes);
    assert_eq!(driver.machine.read_config(driver.slot, 0), identity);
});
