use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::connection::BUFFER_LEN;
use super::hub::MAX_CLIENTS;
use super::packet::{HEADER_LEN, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::testing::{Driver, DriverQueue, Piece};

const CID: u64 = 42;
const OUT: u64 = Driver::BUFFERS;
const IN: u64 = Driver::BUFFERS + 0x10_0000;
const IN_LEN: u32 = 4096;

/// A guest with a device, and a directory for its sockets.
struct Guest {
    driver: Driver,
    queues: Vec<DriverQueue>,
    metrics: Arc<DeviceMetrics>,
    directory: tempfile::TempDir,
    next_buffer: u64,
}

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = VsockConfig { guest_cid: CID as u32, uds_path: directory.path().join("v") };
        let device = Vsock::new(config).unwrap();
        let metrics = Arc::clone(device.metrics());
        let mut driver = Driver::attach(device);
        assert_eq!(u64::from_le_bytes(driver.machine.read(driver.device_config(0))), CID);
        let queues = driver.up();
        let mut guest = Self { driver, queues, metrics, directory, next_buffer: 0 };
        (0..128).for_each(|_| guest.offer());
        guest.driver.kick(&guest.queues[RX]);
        guest
    }

    /// One more buffer for packets to the guest, its header apart from its data as older drivers do it.
    fn offer(&mut self) {
        let at = IN + self.next_buffer % 128 * 0x2000;
        self.next_buffer += 1;
        self.queues[RX].add(&[Piece::Write(at, HEADER_LEN as u32), Piece::Write(at + HEADER_LEN as u64, IN_LEN)]);
    }

    fn header(&self, ports: (u32, u32), op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: ports.1,
            dst_port: ports.0,
            socket_type: TYPE_STREAM,
            op,
            buf_alloc: 1 << 20,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..header };
        self.driver.put(OUT, &header.bytes());
        self.driver.put(OUT + 0x1000, data);
        let mut chain = vec![Piece::Read(OUT, HEADER_LEN as u32)];
        if !data.is_empty() {
            chain.push(Piece::Read(OUT + 0x1000, data.len() as u32));
        }
        assert_eq!(self.driver.run(&mut self.queues[TX], &chain), 0);
    }

    fn say(&mut self, ports: (u32, u32), op: u16) {
        self.send(self.header(ports, op), &[]);
    }

    /// The next packet from the device.
    fn next(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = self.queues[RX].wait();
        // Two descriptors for each buffer, and both rings wrap together.
        let at = IN + u64::from(head) / 2 * 0x2000;
        let bytes = self.driver.get(at, len as usize);
        let mut list = crate::virtio::Buffers::new(Arc::clone(&self.driver.machine.memory));
        list.push(vm_memory::GuestAddress(at), len).unwrap();
        let (header, _) = Header::parse(list.view()).unwrap();
        assert_eq!((header.src_cid, header.dst_cid, header.len as usize), (2, CID, bytes.len() - HEADER_LEN));
        self.offer();
        self.driver.kick(&self.queues[RX]);
        (header, bytes[HEADER_LEN..].to_vec())
    }

    fn expect(&mut self, ports: (u32, u32), op: u16) -> Header {
        let (header, _) = self.next();
        assert_eq!((header.op, header.src_port, header.dst_port), (op, ports.0, ports.1), "{header:?}");
        header
    }

    fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("v")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("v_{port}"))).unwrap()
    }

    /// A connection that the host has made to port 7.
    fn connected(&mut self) -> (UnixStream, (u32, u32)) {
        let mut client = self.client();
        client.write_all(b"CONNECT 7\nearly").unwrap();
        let (request, _) = self.next();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, 7));
        let ports = (request.src_port, 7);
        self.say(ports, op::RESPONSE);
        assert_eq!(line(&mut client), format!("OK {}\n", ports.0));
        let (header, data) = self.next();
        assert_eq!((header.op, &data[..]), (op::DATA, &b"early"[..]));
        (client, ports)
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn accept(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

#[test]
fn the_host_connects_and_both_sides_talk_and_close() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    guest.send(guest.header(ports, op::DATA), b"hello host");
    let mut bytes = [0; 10];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello host");

    // The host has said all; the guest may still speak, then it ends too.
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(ports, op::SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.send(guest.header(ports, op::DATA), b"bye");
    let shutdown = Header { flags: SHUTDOWN_BOTH, ..guest.header(ports, op::SHUTDOWN) };
    guest.send(shutdown, &[]);
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "bye");
    guest.expect(ports, op::RESET);
    assert_eq!(guest.metrics.guest_faults.value(), 0);
}

#[test]
fn a_host_that_reads_no_more_may_still_write_and_its_end_is_seen() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    client.shutdown(std::net::Shutdown::Read).unwrap();
    guest.send(guest.header(ports, op::DATA), b"nobody reads this");
    assert_eq!(guest.expect(ports, op::SHUTDOWN).flags, SHUTDOWN_RECEIVE);
    guest.send(guest.header(ports, op::DATA), b"nor this");
    client.write_all(b"still here").unwrap();
    let (header, data) = guest.next();
    assert_eq!((header.op, &data[..]), (op::DATA, &b"still here"[..]));
    drop(client);
    assert_eq!(guest.expect(ports, op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    assert_eq!(guest.metrics.guest_faults.value(), 0);
}

#[test]
fn the_guest_connects_to_a_listener_and_is_refused_where_there_is_none() {
    let mut guest = Guest::new();
    guest.say((9, 1000), op::REQUEST);
    guest.expect((9, 1000), op::RESET);
    let listener = guest.listen(9);
    guest.say((9, 1000), op::REQUEST);
    assert_eq!(guest.expect((9, 1000), op::RESPONSE).buf_alloc, BUFFER_LEN);
    let mut stream = accept(&listener);
    stream.write_all(&[5; 10_000]).unwrap();
    let mut arrived = Vec::new();
    while arrived.len() < 10_000 {
        let (header, data) = guest.next();
        assert_eq!(header.op, op::DATA);
        arrived.extend(data);
    }
    assert_eq!(arrived, [5; 10_000]);
    drop(stream);
    assert_eq!(guest.expect((9, 1000), op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    guest.say((9, 1000), op::RESET);
    // The ports are free again.
    guest.say((9, 1000), op::REQUEST);
    guest.expect((9, 1000), op::RESPONSE);
    drop(accept(&listener));
    // A second request for a connection that exists ends it.
    guest.expect((9, 1000), op::SHUTDOWN);
    guest.say((9, 1000), op::REQUEST);
    guest.expect((9, 1000), op::RESET);
    assert_eq!(guest.metrics.guest_faults.value(), 1);
}

#[test]
fn the_guests_credit_is_kept() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let ports = (9, 1000);
    let mut request = guest.header(ports, op::REQUEST);
    request.buf_alloc = 100;
    guest.send(request, &[]);
    guest.expect(ports, op::RESPONSE);
    let mut stream = accept(&listener);
    stream.write_all(&[1; 250]).unwrap();
    for taken in [100, 200] {
        let (header, data) = guest.next();
        assert_eq!((header.op, data.len()), (op::DATA, 100));
        guest.expect(ports, op::CREDIT_REQUEST);
        guest.send(Header { buf_alloc: 100, fwd_cnt: taken, ..guest.header(ports, op::CREDIT_UPDATE) }, &[]);
    }
    assert_eq!(guest.next().1.len(), 50);
    // A guest that claims to have taken more than there was gets nothing, and harms nobody.
    stream.write_all(&[1; 10]).unwrap();
    guest.send(Header { buf_alloc: 100, fwd_cnt: 9999, ..guest.header(ports, op::CREDIT_REQUEST) }, &[]);
    let header = loop {
        let (header, data) = guest.next();
        // The ten bytes may have been on their way before the claim.
        assert!(header.op == op::CREDIT_UPDATE || data.len() == 10);
        if header.op == op::CREDIT_UPDATE {
            break header;
        }
    };
    assert_eq!(header.buf_alloc, BUFFER_LEN);
}

#[test]
fn the_hosts_credit_is_announced_and_whoever_breaks_it_is_reset() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let ports = (9, 1000);
    guest.say(ports, op::REQUEST);
    guest.expect(ports, op::RESPONSE);
    let mut stream = accept(&listener);
    // More than the host's socket holds, but no more than was granted: nothing is lost, and news of room comes.
    let chunk: Vec<u8> = (0..32768).map(|at| (at / 7) as u8).collect();
    let (mut sent, mut granted, mut read) = (0u32, BUFFER_LEN, 0u32);
    let mut bytes = vec![0; chunk.len()];
    while sent < 1 << 20 {
        if granted - sent >= chunk.len() as u32 {
            guest.send(guest.header(ports, op::DATA), &chunk);
            sent += chunk.len() as u32;
        } else {
            while read < sent {
                stream.read_exact(&mut bytes).unwrap();
                assert!(bytes == chunk, "data was changed");
                read += bytes.len() as u32;
            }
            guest.say(ports, op::CREDIT_REQUEST);
            let (header, _) = guest.next();
            assert_eq!(header.op, op::CREDIT_UPDATE);
            granted = header.fwd_cnt + header.buf_alloc;
        }
    }
    let before = guest.metrics.guest_faults.value();
    assert_eq!(before, 0);
    // Now without regard for what was granted.
    let mut packets = 0;
    while guest.metrics.guest_faults.value() == before {
        guest.send(guest.header(ports, op::DATA), &chunk);
        packets += 1;
        assert!(packets < 100, "the host's buffer has no end");
    }
    while guest.next().0.op != op::RESET {}
}

#[test]
fn packets_against_the_rules_are_refused() {
    let mut guest = Guest::new();
    let ports = (5, 6);
    // Of no connection: answered, and no fault.
    for op in [op::DATA, op::RESPONSE, op::SHUTDOWN, op::CREDIT_UPDATE, 99] {
        guest.say(ports, op);
        guest.expect(ports, op::RESET);
    }
    assert_eq!(guest.metrics.guest_faults.value(), 0);
    guest.say(ports, op::RESET);
    let mut faults = 0;
    for header in [
        Header { socket_type: 2, ..guest.header(ports, op::REQUEST) },
        Header { dst_cid: 77, ..guest.header(ports, op::REQUEST) },
    ] {
        guest.send(header, &[]);
        let (reset, _) = (guest.queues[RX].wait(), guest.offer());
        assert_eq!(reset.1 as usize, HEADER_LEN);
        faults += 1;
    }
    let spoofed = Header { src_cid: CID + 1, ..guest.header(ports, op::REQUEST) };
    guest.send(spoofed, &[]);
    // Shorter than a header, and than it says.
    for (chain, len) in [(vec![Piece::Read(OUT, 20)], 0), (vec![Piece::Read(OUT, 44), Piece::Read(OUT, 9)], 10)] {
        let header = Header { len, ..guest.header(ports, op::DATA) };
        guest.driver.put(OUT, &header.bytes());
        guest.driver.run(&mut guest.queues[TX], &chain);
    }
    assert_eq!(guest.metrics.guest_faults.value(), faults + 3);
    // Of a connection: it is reset.
    let (mut client, ports) = guest.connected();
    guest.say(ports, op::RESPONSE);
    guest.expect(ports, op::RESET);
    assert_eq!(client.read(&mut [0; 16]).unwrap(), 0);
}

#[test]
fn clients_are_bounded_and_wait_for_their_turn() {
    let mut guest = Guest::new();
    let mut clients: Vec<UnixStream> = (0..MAX_CLIENTS + 8).map(|_| guest.client()).collect();
    let mut last = clients.pop().unwrap();
    last.write_all(b"CONNECT 7\n").unwrap();
    // Nobody in front of it has said anything; when they leave, it is served.
    drop(clients);
    let (request, _) = guest.next();
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 7));
    // A client that leaves before the guest has answered.
    drop(last);
    guest.expect((request.src_port, 7), op::RESET);
}

#[test]
fn a_reset_ends_all_connections_and_a_new_session_can_begin() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.connected();
    guest.driver.set_status(0);
    assert_eq!(client.read(&mut [0; 16]).unwrap(), 0);
    let waiting = guest.client();
    guest.queues = guest.driver.up();
    guest.next_buffer = 0;
    (0..128).for_each(|_| guest.offer());
    guest.driver.kick(&guest.queues[RX]);
    drop(waiting);
    guest.connected();
    let path = guest.directory.path().join("v");
    assert!(path.exists());
    let Guest { driver, directory, .. } = guest;
    drop(driver);
    assert!(!directory.path().join("v").exists(), "the socket goes with its device");
}

#[test]
fn wrong_addresses_and_taken_paths_are_explained() {
    let directory = tempfile::tempdir().unwrap();
    let uds_path = directory.path().join("v");
    for guest_cid in [0, 2, u32::MAX] {
        assert!(matches!(Vsock::new(VsockConfig { guest_cid, uds_path: uds_path.clone() }), Err(VsockError::Cid(_))));
    }
    std::fs::write(&uds_path, "").unwrap();
    let error = Vsock::new(VsockConfig { guest_cid: 3, uds_path: uds_path.clone() }).err().unwrap();
    assert!(error.to_string().contains("remove what is there"), "{error}");
    assert!(uds_path.exists(), "it was not ours to remove");
    for (path, remedy) in [("/x".repeat(100), "at most 107 bytes"), ("/nowhere/v".into(), "a directory that exists")] {
        let error = Vsock::new(VsockConfig { guest_cid: 3, uds_path: path.into() }).err().unwrap().to_string();
        assert!(error.contains(remedy) && !error.contains("remove"), "{error}");
    }
}
