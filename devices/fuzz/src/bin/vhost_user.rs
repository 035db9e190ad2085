//! A backend that answers anything, and any driver over its disk, its network device or its file system.
#![no_main]

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use bedplate_devices::testing::{Driver, Hostile, Machine};
use bedplate_devices::virtio::block::Cache;
use bedplate_devices::virtio::net::{NetConfig, VhostUserNet};
use bedplate_devices::virtio::vhost_user::{Frontend, VhostUser};

/// Requests that have an answer, by their numbers in the protocol.
const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_CONFIG: u32 = 24;
/// Of the protocol: several queues, acknowledgements, configuration.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9;
const NEEDS_REPLY: u32 = 1 << 3;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let (backends, drivers) = bytes.split_at(bytes.len() / 2);
    let dir = tempfile::tempdir().expect("there is room for a socket");
    let path = dir.path().join("b.sock");
    let listener = UnixListener::bind(&path).expect("a socket can be made");
    thread::scope(|scope| {
        scope.spawn(move || {
            let (stream, _) = listener.accept().expect("somebody connects");
            // Ends where the frontend does.
            let _ = serve(stream, backends);
        });
        let frontend = Frontend::connect(&path);
        if let Ok(frontend) = frontend
            && let Some(driver) = device(*kind, frontend)
        {
            Hostile::new(driver).run(drivers);
        }
    });
});

fn device(kind: u8, frontend: Frontend) -> Option<Driver> {
    let machine = Machine::new();
    let memory = machine.memory.clone();
    Some(match kind % 3 {
        0 => Driver::attach_to(machine, VhostUser::block(frontend, &memory, Cache::Writeback, 4).ok()?.0),
        1 => {
            let config = NetConfig::default();
            Driver::attach_to(machine, VhostUserNet::new(frontend, &config, &memory, None, 2).ok()?)
        }
        _ => Driver::attach_to(machine, VhostUser::file_system(frontend, &memory, "tag").ok()?),
    })
}

/// Answers what comes, as `bytes` say; well, when they are used up.
fn serve(mut stream: UnixStream, bytes: &[u8]) -> io::Result<()> {
    let mut bytes = bytes.iter().copied();
    loop {
        let mut header = [0; 12];
        stream.read_exact(&mut header)?;
        let field = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
        let (request, flags, len) = (field(0), field(4), field(8));
        assert!(len < 4096, "request {request} has {len} bytes");
        let mut payload = vec![0; len as usize];
        stream.read_exact(&mut payload)?;
        let mut good = match request {
            GET_FEATURES => u64::MAX.to_ne_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => PROTOCOL.to_ne_bytes().to_vec(),
            GET_QUEUE_NUM => 4u64.to_ne_bytes().to_vec(),
            // Blocks of 512 bytes, if it is a disk.
            GET_CONFIG => {
                payload[12 + 21] = 2;
                payload
            }
            GET_VRING_BASE => payload,
            _ if flags & NEEDS_REPLY != 0 => vec![0; 8],
            _ => continue,
        };
        let mut header = [request, 5, good.len() as u32];
        match bytes.next().unwrap_or_default() {
            0..=127 => {}
            128..=215 => good.iter_mut().for_each(|byte| *byte = bytes.next().unwrap_or(*byte)),
            216..=239 => {
                let at = usize::from(bytes.next().unwrap_or_default()) % 3;
                header[at] = u32::from(bytes.next().unwrap_or_default());
                // What is missing then is not waited for.
                write(&mut stream, header, &good)?;
                return Ok(());
            }
            _ => return stream.write_all(&bytes.by_ref().take(20).collect::<Vec<_>>()),
        }
        write(&mut stream, header, &good)?;
    }
}

fn write(stream: &mut UnixStream, header: [u32; 3], payload: &[u8]) -> io::Result<()> {
    stream.write_all(&[header.map(u32::to_ne_bytes).concat(), payload.to_vec()].concat())
}
