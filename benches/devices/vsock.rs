//! Bytes between a driver and a program of the host's, by virtio-vsock.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use bedplate_benches::{Pair, Unit, nanos};
use bedplate_devices::testing::{Driver, DriverQueue, Piece};
use bedplate_devices::virtio::vsock::{Vsock, VsockConfig};
use criterion::Criterion;

const RX: usize = 0;
const TX: usize = 1;
const CID: u64 = 42;
const PORT: u32 = 9;
/// Virtio 1.2, 5.10.6: header, operations.
const HEADER: u64 = 44;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const DATA: u16 = 5;
const STREAM: u16 = 1;

/// Packets to the guest go here, one in each place; those of the guest behind them.
const IN: u64 = Driver::BUFFERS;
const PLACES: u64 = 64;
const PLACE: u64 = 0x2000;
const OUT: u64 = IN + PLACES * PLACE;

const PING: usize = 64;
const BULK: usize = 64 << 10;

pub fn benchmark(c: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let listener = UnixListener::bind(directory.path().join(format!("v_{PORT}"))).unwrap();

    let (mut guest, host) = Guest::connect(path.clone(), &listener);
    let answering = answer(host);
    let (mut near, far) = UnixStream::pair().unwrap();
    let other = answer(far);
    let mut buffer = [0; PING];
    Pair { what: "64 bytes to the host and back", ours: "vsock device", bare: "Unix socket", unit: Unit::Operations }
        .run(
            c,
            |count| nanos(|| (0..count).for_each(|_| guest.ping())),
            |count| {
                nanos(|| {
                    for _ in 0..count {
                        near.write_all(&buffer).unwrap();
                        near.read_exact(&mut buffer).unwrap();
                    }
                })
            },
        );
    drop((guest, near));
    [answering, other].into_iter().for_each(|thread| thread.join().unwrap());

    let (mut guest, host) = Guest::connect(path, &listener);
    let taking = take(host);
    let (mut near, far) = UnixStream::pair().unwrap();
    let other = take(far);
    let bytes = vec![0x5a; BULK];
    Pair { what: "64 KiB to the host", ours: "vsock device", bare: "Unix socket", unit: Unit::Bytes(BULK as u64) }.run(
        c,
        |count| nanos(|| (0..count).for_each(|_| guest.bulk())),
        |count| nanos(|| (0..count).for_each(|_| near.write_all(&bytes).unwrap())),
    );
    drop((guest, near));
    [taking, other].into_iter().for_each(|thread| thread.join().unwrap());
}

/// Sends back what comes, until the other side is gone.
fn answer(mut stream: UnixStream) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; PING];
        while stream.read_exact(&mut buffer).is_ok() && stream.write_all(&buffer).is_ok() {}
    })
}

/// Takes what comes.
fn take(mut stream: UnixStream) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; BULK];
        while stream.read(&mut buffer).is_ok_and(|len| len > 0) {}
    })
}

/// A driver with one connection to the host.
struct Guest {
    driver: Driver,
    rx: DriverQueue,
    tx: DriverQueue,
    offered: u64,
    /// Bytes that were sent, and taken, so far; both wrap.
    sent: u32,
    received: u32,
    /// What the host says that it has room for, and has passed on.
    room: u32,
    passed: u32,
}

impl Guest {
    fn connect(uds_path: PathBuf, listener: &UnixListener) -> (Self, UnixStream) {
        let device = Vsock::new(VsockConfig { guest_cid: CID as u32, uds_path }).unwrap();
        let mut driver = Driver::attach(device);
        let mut queues = driver.up();
        let (tx, rx) = (queues.swap_remove(TX), queues.swap_remove(RX));
        let mut guest = Self { driver, rx, tx, offered: 0, sent: 0, received: 0, room: 0, passed: 0 };
        (0..PLACES).for_each(|_| guest.offer());
        guest.driver.kick(&guest.rx);
        guest.send(REQUEST, 0);
        let (host, _) = listener.accept().unwrap();
        assert_eq!(guest.next(), RESPONSE);
        (guest, host)
    }

    fn offer(&mut self) {
        self.rx.add(&[Piece::Write(IN + self.offered % PLACES * PLACE, PLACE as u32)]);
        self.offered += 1;
    }

    fn send(&mut self, operation: u16, len: usize) {
        let mut header = Vec::with_capacity(HEADER as usize);
        header.extend([CID, 2].map(u64::to_le_bytes).as_flattened());
        header.extend([1000, PORT, len as u32].map(u32::to_le_bytes).as_flattened());
        header.extend([STREAM, operation].map(u16::to_le_bytes).as_flattened());
        header.extend([0, 1 << 20, self.received].map(u32::to_le_bytes).as_flattened());
        self.driver.put(OUT, &header);
        let mut chain = vec![Piece::Read(OUT, HEADER as u32)];
        if len > 0 {
            chain.push(Piece::Read(OUT + PLACE, len as u32));
        }
        self.driver.run(&mut self.tx, &chain);
        self.sent = self.sent.wrapping_add(len as u32);
    }

    /// Takes the next packet from the host; its operation.
    fn next(&mut self) -> u16 {
        let (head, _) = self.rx.wait();
        let header = self.driver.get(IN + u64::from(head) % PLACES * PLACE, HEADER as usize);
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        (self.room, self.passed) = (word(36), word(40));
        self.received = self.received.wrapping_add(word(24));
        self.offer();
        self.driver.kick(&self.rx);
        (word(28) >> 16) as u16
    }

    fn ping(&mut self) {
        let before = self.received;
        self.send(DATA, PING);
        while self.received.wrapping_sub(before) < PING as u32 {
            self.next();
        }
    }

    fn bulk(&mut self) {
        while self.room.saturating_sub(self.sent.wrapping_sub(self.passed)) < BULK as u32 {
            self.next();
        }
        self.send(DATA, BULK);
    }
}
