use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::limiter::BucketConfig;
use super::*;
use crate::testing::{Driver, DriverQueue, Echo, Piece, SERVER, Wire};

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const DATA: u64 = Driver::BUFFERS;
const CONFIG: NetConfig = NetConfig {
    mac: [2, 0, 0, 0, 0, 7],
    mtu: Some(1400),
    rx_limits: LimiterConfig::NONE,
    tx_limits: LimiterConfig::NONE,
};

fn frame(len: usize) -> Vec<u8> {
    (0..HEADER_LEN + len).map(|at| if at < HEADER_LEN { 0 } else { (at / 3) as u8 }).collect()
}

/// Waits for one used chain and returns the bytes that were written to `buffers`, by head.
fn received(driver: &Driver, queue: &mut DriverQueue, buffers: &[(u64, u32)]) -> Vec<u8> {
    let (head, len) = queue.wait();
    let (address, size) = buffers[head as usize];
    assert!(len <= size);
    driver.get(address, len as usize)
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs_and_they_appear_together() {
    let (wire, peer, offloads) = Wire::new();
    let net = Net::new(wire, CONFIG).unwrap();
    let counts = Arc::clone(net.net_metrics());
    let mut driver = Driver::attach(net);
    assert_eq!(driver.machine.read::<12>(driver.device_config(0)), [2, 0, 0, 0, 0, 7, 1, 0, 0, 0, 0x78, 5]);
    let mut queues = driver.up();
    let queue = &mut queues[RX];
    let buffers: Vec<(u64, u32)> = (0..100).map(|n| (DATA + n * 0x1000, 1000)).collect();
    for (address, len) in &buffers {
        queue.add(&[Piece::Write(*address, *len)]);
    }
    driver.kick(queue);
    for (len, chains) in [(60, 1), (988, 1), (989, 2), (2500, 3), (65535, 66), (14, 1)] {
        peer.send(&frame(len)).unwrap();
        let mut bytes = received(&driver, queue, &buffers);
        assert_eq!(u16::from_le_bytes([bytes[10], bytes[11]]), chains);
        bytes[10] = 0;
        for _ in 1..chains {
            // The driver may look for the rest as soon as it sees the first.
            let (head, len) = queue.take().unwrap();
            bytes.extend(driver.get(buffers[head as usize].0, len as usize));
        }
        assert!(bytes == frame(len), "a frame of {len} bytes was changed");
    }
    assert_eq!((counts.rx_frames.value(), counts.rx_dropped.value()), (6, 0));
    assert_eq!(*offloads.lock().unwrap(), [driver.features]);
}

#[test]
fn the_guest_sends_from_any_pieces_and_bad_chains_are_returned() {
    let (wire, peer, _) = Wire::new();
    let net = Net::new(wire, CONFIG).unwrap();
    let (counts, metrics) = (Arc::clone(net.net_metrics()), Arc::clone(net.metrics()));
    let mut driver = Driver::attach(net);
    let mut queues = driver.up();
    let bytes = frame(3000);
    driver.put(DATA, &bytes);
    let pieces = [Piece::Read(DATA, 5), Piece::Read(DATA + 5, 7), Piece::Read(DATA + 12, 3000)];
    assert_eq!(driver.run(&mut queues[TX], &pieces), 0);
    let mut arrived = vec![0; 4000];
    let len = peer.recv(&mut arrived).unwrap();
    assert_eq!(arrived[..len], bytes);
    for chain in [
        vec![Piece::Read(DATA, 11)],
        vec![Piece::Write(DATA, 2000)],
        vec![Piece::Read(DATA, MAX_FRAME_LEN as u32 + 1)],
        vec![Piece::Read(1 << 40, 2000)],
    ] {
        assert_eq!(driver.run(&mut queues[TX], &chain), 0);
    }
    assert_eq!((metrics.guest_faults.value(), counts.tx_frames.value()), (4, 1));
}

#[test]
fn without_room_frames_wait_or_are_dropped_whole() {
    let (wire, peer, _) = Wire::new();
    let net = Net::new(wire, CONFIG).unwrap();
    let (counts, metrics) = (Arc::clone(net.net_metrics()), Arc::clone(net.metrics()));
    let mut driver = Driver::attach(net);
    let mut queues = driver.prepare_all(MERGEABLE);
    driver.start();
    let queue = &mut queues[RX];
    peer.send(&frame(100)).unwrap();
    peer.send(&frame(1501)).unwrap();
    peer.send(&frame(200)).unwrap();
    // Readable, too short for a header, outside of RAM: returned without a frame.
    for chain in [Piece::Read(DATA, 2000), Piece::Write(DATA, 11), Piece::Write(1 << 40, 2000)] {
        assert_eq!(driver.run(queue, &[chain]), 0);
    }
    assert_eq!(metrics.guest_faults.value(), 3);
    assert_eq!(driver.run(queue, &[Piece::Write(DATA, 12), Piece::Write(DATA + 12, 1500)]), 112);
    assert_eq!(driver.get(DATA + 10, 2), [1, 0], "one buffer");
    // The second is too long for this one, and dropped; the third comes.
    assert_eq!(driver.run(queue, &[Piece::Write(DATA, 1512)]), 212);
    assert_eq!((counts.rx_frames.value(), counts.rx_dropped.value()), (2, 1));
}

#[test]
fn frames_for_the_metadata_server_go_aside_and_its_answers_come_back() {
    let (wire, peer, _) = Wire::new();
    let mut net = Net::new(wire, CONFIG).unwrap();
    net.set_responder(Responder::new(SERVER, Box::new(Echo))).unwrap();
    let mut driver = Driver::attach(net);
    // Who has the server's address? 10.0.0.2 asks. And a frame of the same kind for somebody else.
    let mut ask = frame(42);
    ask[12..26].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7, 8, 6]);
    ask[26..44].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 7, 10, 0, 0, 2]);
    ask[44..50].fill(0);
    ask[50..].copy_from_slice(&SERVER.octets());
    let mut other = ask.clone();
    other[50] = 10;
    driver.put(DATA, &ask);
    driver.put(DATA + 0x1000, &other);
    for without in [0, MERGEABLE] {
        let mut queues = driver.prepare_all(without);
        driver.start();
        // The answer waits for a buffer, and then comes before anything else.
        assert_eq!(driver.run(&mut queues[TX], &[Piece::Read(DATA, 54)]), 0);
        assert_eq!(driver.run(&mut queues[TX], &[Piece::Read(DATA + 0x1000, 54)]), 0);
        peer.send(&frame(100)).unwrap();
        let answer = driver.run(&mut queues[RX], &[Piece::Write(DATA + 0x2000, 1526)]);
        assert_eq!(answer, 54);
        let answer = driver.get(DATA + 0x2000, 54);
        assert_eq!(answer[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(answer[24..28], [8, 6, 0, 1]);
        assert_eq!((answer[33], &answer[40..44]), (2, &SERVER.octets()[..]), "a reply of the server");
        assert_eq!(driver.run(&mut queues[RX], &[Piece::Write(DATA + 0x2000, 1526)]), 112);
        let mut arrived = [0; 100];
        assert_eq!(peer.recv(&mut arrived).unwrap(), 54);
        assert_eq!(arrived[..54], other, "only what is for others has reached the link");
        driver.set_status(0);
    }
}

#[test]
fn buffers_in_hand_are_given_back_at_reset() {
    let (wire, peer, _) = Wire::new();
    let mut driver = Driver::attach(Net::new(wire, CONFIG).unwrap());
    for round in 0..3u8 {
        let mut queues = driver.up();
        let queue = &mut queues[RX];
        for n in 0..8 {
            queue.add(&[Piece::Write(DATA + n * 0x1000, 2048)]);
        }
        driver.kick(queue);
        peer.send(&frame(64)).unwrap();
        assert_eq!(queue.wait(), (0, 76), "round {round}");
        driver.set_status(0);
        assert_eq!(queue.take(), None);
    }
}

/// A tap in a network namespace of this thread only, so that nothing is left behind.
#[test]
fn frames_cross_a_real_tap() {
    // SAFETY: changes only which namespace this test's thread is in.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 || !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("skipped: needs the right to make a network namespace, and /dev/net/tun");
        return;
    }
    assert!(matches!(Tap::open("0123456789abcdef"), Err(TapError::Name(_))));
    let socket = UnixDatagram::unbound().unwrap();
    assert!(matches!(Tap::from_fd(socket.into()), Err(TapError::Kind)));
    let tap = Tap::open("probe0").unwrap();
    let error = Tap::open("probe0").unwrap_err();
    assert!(error.to_string().contains("cannot attach to tap probe0"), "{error}");
    let tap = Tap::from_fd(tap.as_fd().try_clone_to_owned().unwrap()).unwrap();
    for args in ["link set probe0 up", "addr add 192.0.2.1/24 dev probe0"] {
        let output = std::process::Command::new("ip").args(args.split(' ')).output();
        if !output.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: needs the command ip");
            return;
        }
    }
    let net = Net::new(tap, CONFIG).unwrap();
    let (counts, metrics) = (Arc::clone(net.net_metrics()), Arc::clone(net.metrics()));
    let mut driver = Driver::attach(net);
    let mut queues = driver.up();
    queues[RX].add(&[Piece::Write(DATA + 0x1000, 2048)]);
    driver.kick(&queues[RX]);
    let mut bytes = frame(60);
    bytes[12..26].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7, 0x88, 0xb5]);
    driver.put(DATA, &bytes);
    assert_eq!(driver.run(&mut queues[TX], &[Piece::Read(DATA, 72)]), 0);
    assert_eq!((counts.tx_frames.value(), counts.tx_dropped.value()), (1, 0));
    // A header that asks for a checksum behind the frame's end is the kernel's to refuse.
    driver.put(DATA, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0, 0, 0]);
    assert_eq!(driver.run(&mut queues[TX], &[Piece::Read(DATA, 72)]), 0);
    assert_eq!((counts.tx_frames.value(), counts.tx_dropped.value()), (1, 1));
    // The host has to ask for the neighbour's address first, or has spoken before.
    let host = std::net::UdpSocket::bind("192.0.2.1:0").unwrap();
    host.send_to(b"?", "192.0.2.2:9").unwrap();
    let (_, len) = queues[RX].wait();
    assert!(len as usize > HEADER_LEN);
    assert_eq!(metrics.first_host_fault(), None);
}

#[test]
fn limits_hold_frames_back_in_both_directions_until_they_are_lifted() {
    let bucket = |size, millis| BucketConfig { size, one_time_burst: 0, refill_time: Duration::from_millis(millis) };
    let limits = LimiterConfig { bandwidth: None, operations: Some(bucket(2, 200)) };
    let (wire, peer, _) = Wire::new();
    let net = Net::new(wire, NetConfig { rx_limits: limits, tx_limits: limits, ..CONFIG }).unwrap();
    let (counts, control) = (Arc::clone(net.net_metrics()), net.control());
    let mut driver = Driver::attach(net);
    let mut queues = driver.up();
    let start = Instant::now();
    driver.put(DATA, &frame(60));
    (0..4).for_each(|_| assert_eq!(driver.run(&mut queues[TX], &[Piece::Read(DATA, 72)]), 0));
    assert!(start.elapsed() > Duration::from_millis(150), "two of four frames have to be earned");
    let buffers: Vec<(u64, u32)> = (1..9).map(|n| (DATA + n * 0x1000, 1000)).collect();
    for (address, len) in &buffers {
        queues[RX].add(&[Piece::Write(*address, *len)]);
    }
    driver.kick(&queues[RX]);
    let start = Instant::now();
    (0..4).for_each(|_| assert_eq!(peer.send(&frame(60)).unwrap(), 72));
    (0..4).for_each(|_| assert_eq!(received(&driver, &mut queues[RX], &buffers).len(), 72));
    assert!(start.elapsed() > Duration::from_millis(150));
    assert!(counts.rx_throttled.value() > 0 && counts.tx_throttled.value() > 0);
    // An hour for one frame; then no limit.
    let hour = LimiterUpdate { operations: Some(bucket(1, 3_600_000)), ..LimiterUpdate::default() };
    control.limit(hour, hour);
    for _ in 0..2 {
        peer.send(&frame(60)).unwrap();
        queues[TX].add(&[Piece::Read(DATA, 72)]);
    }
    driver.kick(&queues[TX]);
    let none = LimiterUpdate { operations: Some(bucket(0, 0)), ..LimiterUpdate::default() };
    control.limit(none, none);
    (0..2).for_each(|_| assert_eq!(received(&driver, &mut queues[RX], &buffers).len(), 72));
    (0..2).for_each(|_| assert_eq!(queues[TX].wait().1, 0));
}
