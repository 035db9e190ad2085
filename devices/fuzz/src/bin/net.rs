//! Any driver over wires whose other ends talk and listen: of one pair of queues, or of three with a control queue.
#![no_main]

use bedplate_devices::metadata::Responder;
use bedplate_devices::testing::{Driver, Echo, Hostile, SERVER, Wire, honest};
use bedplate_devices::virtio::net::{Net, NetConfig};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let count = if first % 2 == 0 { 1 } else { 3 };
    let (wires, peers): (Vec<_>, Vec<_>) = (0..count).map(|_| Wire::new()).map(|(wire, peer, _)| (wire, peer)).unzip();
    for peer in &peers {
        peer.set_nonblocking(true).expect("a socket can be set not to block");
        // Frames for the driver to receive, of which the input says how long they are.
        for len in bytes.iter().take(4) {
            let _ = peer.send(&vec![0; 12 + usize::from(*len) * 16]);
        }
    }
    let mut net = Net::new(wires, NetConfig::default()).expect("descriptors are left");
    net.set_responder(Responder::new(SERVER, Box::new(Echo))).expect("a timer can be had");
    let mut hostile = Hostile::new(Driver::attach(net));
    let (driver, mut queues) = hostile.run(bytes);
    for peer in &peers {
        while peer.recv(&mut [0; 64]).is_ok() {}
    }
    honest(driver, &mut queues);
});
