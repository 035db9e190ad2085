//! Any driver over a wire whose other end talks and listens.
#![no_main]

use bedplate_devices::metadata::Responder;
use bedplate_devices::testing::{Driver, Echo, Hostile, SERVER, Wire, honest};
use bedplate_devices::virtio::net::{Net, NetConfig};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (wire, peer, _) = Wire::new();
    peer.set_nonblocking(true).expect("a socket can be set not to block");
    // Frames for the driver to receive, of which the input says how long they are.
    for len in bytes.iter().take(4) {
        let _ = peer.send(&vec![0; 12 + usize::from(*len) * 16]);
    }
    let mut net = Net::new(wire, NetConfig::default()).expect("descriptors are left");
    net.set_responder(Responder::new(SERVER, Box::new(Echo))).expect("a timer can be had");
    let mut hostile = Hostile::new(Driver::attach(net));
    let (driver, mut queues) = hostile.run(bytes);
    while peer.recv(&mut [0; 64]).is_ok() {}
    honest(driver, &mut queues);
});
