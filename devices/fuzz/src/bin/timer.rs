//! The interval timer and port 0x61 under any guest: any accesses, of any width. Afterwards a guest that does as it is told has a
//! count.
#![no_main]

use std::sync::{Arc, Mutex};

use bedplate_devices::bus::BusDevice;
use bedplate_devices::platform::{IrqLine, PIT_LEN, Pit, Speaker};

struct Nowhere;

impl IrqLine for Nowhere {
    fn set(&self, _asserted: bool) {}
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let pit = Arc::new(Mutex::new(Pit::new(Box::new(Nowhere))));
    let mut speaker = Speaker::new(Arc::clone(&pit));
    let access = |device: &mut dyn BusDevice, writes: bool, port: u64, data: &mut [u8]| {
        if writes { device.write(port, data) } else { device.read(port, data) }
    };
    for step in bytes.chunks_exact(2) {
        // Wide ones seldom: they do nothing.
        let width = if step[0] >= 0xf0 { 1 << (step[0] % 4) } else { 1 };
        let (writes, port) = (step[0] & 1 != 0, u64::from(step[0] >> 1) % (PIT_LEN + 1));
        let data = &mut [step[1]; 8][..width];
        if port == PIT_LEN {
            access(&mut speaker, writes, 0, data);
        } else {
            access(&mut *pit.lock().expect("nobody has panicked"), writes, port, data);
        }
    }
    // With its gate low it stands still.
    speaker.write(0, &[0]);
    let mut pit = pit.lock().expect("nobody has panicked");
    for (port, byte) in [(3, 0xb0), (2, 0x34), (2, 0x12)] {
        pit.write(port, &[byte]);
    }
    let mut read = || {
        let mut byte = [0];
        pit.read(2, &mut byte);
        byte[0]
    };
    assert_eq!([read(), read()], [0x34, 0x12]);
});
