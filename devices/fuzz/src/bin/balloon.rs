//! Any driver over a balloon that offers everything, and a host that changes its mind.
#![no_main]

use std::time::Duration;

use bedplate_devices::testing::{Driver, Hostile, honest};
use bedplate_devices::virtio::balloon::{Balloon, BalloonConfig};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let stats_interval = Duration::from_secs(1);
    let config = BalloonConfig { stats_interval, hinting: true, reporting: true, ..BalloonConfig::default() };
    let device = Balloon::new(config).expect("descriptors are left");
    let control = device.control();
    let mut hostile = Hostile::new(Driver::attach(device));
    control.start_hinting(true);
    control.set_target(bytes.len() as u32);
    let (driver, mut queues) = hostile.run(bytes);
    honest(driver, &mut queues);
});
