//! Any driver over a directory in which a listener waits on port 1 and a client for port 2.
#![no_main]

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};

use bedplate_devices::testing::{Driver, Hostile, honest};
use bedplate_devices::virtio::vsock::{Vsock, VsockConfig};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let path = directory.path().join("v");
    let device = Vsock::new(VsockConfig { guest_cid: 3, uds_path: path.clone() }).expect("the path is free");
    let _listener = UnixListener::bind(directory.path().join("v_1")).expect("the path is free");
    let mut client = UnixStream::connect(&path).expect("the device listens");
    let _ = client.write_all(b"CONNECT 2\nhello");
    let mut hostile = Hostile::new(Driver::attach(device));
    let (driver, mut queues) = hostile.run(bytes);
    honest(driver, &mut queues);
});
