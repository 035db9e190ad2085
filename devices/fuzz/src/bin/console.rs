//! Any driver over a console whose other end types and changes its size.
#![no_main]

use bedplate_devices::testing::{Driver, Hostile, Nowhere, honest};
use bedplate_devices::virtio::console::{Console, WindowSize};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let device = Console::new(Nowhere, WindowSize { columns: 80, rows: 25 }).expect("descriptors are left");
    let control = device.control();
    // Input for the driver to receive, of which the first byte says how long it is.
    let len = bytes.first().map_or(0, |len| usize::from(*len) * 32);
    control.push_input(&vec![b'x'; len]);
    let mut hostile = Hostile::new(Driver::attach(device));
    control.resize(WindowSize { columns: 132, rows: 43 });
    let (driver, mut queues) = hostile.run(bytes);
    control.push_input(b"more");
    honest(driver, &mut queues);
});
