//! Any frames to the guest's metadata server, then an honest request.
#![no_main]

use bedplate_devices::metadata::Responder;
use bedplate_devices::testing::{Echo, SERVER, WebClient, disturb};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut server = Responder::new(SERVER, Box::new(Echo));
    disturb(&mut server, bytes);
    server.reset();
    let answer = WebClient::new(2000).ask(&mut server, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(answer.ends_with("GET / none"), "{answer}");
});
