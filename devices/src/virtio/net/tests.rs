use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};

use super::super::limiter::BucketConfig;
use super::*;
use crate::testing::{Driver, DriverQueue, Echo, Piece, SERVER, Wire};

const RX: usize = 0;
const TX: usize = 1;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const DATA: u64 = Driver::BUFFERS;
const CONFIG: NetConfig = NetConfig {
    mac: [2, 0, 0, 0, 0, 7],
    mtu: Some(1400),
    rx_limits: LimiterConfig::NONE,
    tx_limits: LimiterConfig::NONE,
};

/// A frame, or what stands for several, with its header.
fn frame(len: usize) -> Vec<u8> {
    let several = len > 1400 + 18;
    let header = |at| u8::from(at == 1 && several);
    (0..HEADER_LEN + len).map(|at| if at < HEADER_LEN { header(at) } else { (at / 3) as u8 }).collect()
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
    let net = Net::new(vec![wire], CONFIG).unwrap();
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
    let net = Net::new(vec![wire], CONFIG).unwrap();
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
fn where_a_frame_is_one_chain_it_waits_for_one_or_is_dropped_whole() {
    let (wire, peer, _) = Wire::new();
    let net = Net::new(vec![wire], CONFIG).unwrap();
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
    let mut net = Net::new(vec![wire], CONFIG).unwrap();
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
    let mut driver = Driver::attach(Net::new(vec![wire], CONFIG).unwrap());
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
    assert!(matches!(Tap::open("0123456789abcdef", TapQueues::UpTo(1)), Err(TapError::Name(_))));
    let socket = UnixDatagram::unbound().unwrap();
    assert!(matches!(Tap::from_fd(socket.into()), Err(TapError::Kind)));
    let tap = Tap::open("probe0", TapQueues::UpTo(1)).unwrap().remove(0);
    let tap = Tap::from_fd(tap.as_fd().try_clone_to_owned().unwrap()).unwrap();
    for args in ["link set probe0 up", "addr add 192.0.2.1/24 dev probe0", "tuntap add probe1 mode tap"] {
        let output = std::process::Command::new("ip").args(args.split(' ')).output();
        if !output.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: needs the command ip");
            return;
        }
    }
    let error = Tap::open("probe1", TapQueues::Exactly(2)).unwrap_err();
    assert!(error.to_string().contains("`ip tuntap add probe1 mode tap multi_queue`"), "{error}");
    let single = Tap::open("probe1", TapQueues::UpTo(4)).unwrap();
    assert_eq!(single.len(), 1);
    let error = Tap::open("probe1", TapQueues::UpTo(4)).unwrap_err();
    assert!(error.to_string().contains("cannot attach to tap probe1"), "{error}");
    // Queues of one that was made for several come and go, also when they have done so before.
    let queues = Tap::open("probe2", TapQueues::Exactly(3)).unwrap();
    for on in [false, false, true, true, false] {
        queues[1..].iter().for_each(|queue| queue.attach(on).unwrap());
    }
    assert_eq!(queues[2].again().unwrap().features(), queues[0].features());
    drop(queues);
    let net = Net::new(vec![tap], CONFIG).unwrap();
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
    let net = Net::new(vec![wire], NetConfig { rx_limits: limits, tx_limits: limits, ..CONFIG }).unwrap();
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

#[test]
fn a_driver_is_given_only_what_it_was_told_to_expect() {
    let (wire, peer, _) = Wire::new();
    let net = Net::new(vec![wire], CONFIG).unwrap();
    let counts = Arc::clone(net.net_metrics());
    let mut driver = Driver::attach(net);
    let mut checked = frame(60);
    checked[0] = 2;
    let mut long = frame(1419);
    long[1] = 0;
    for (without, flags, dropped) in [(0, 2, 1), (1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_MTU, 0, 1)] {
        let mut queues = driver.prepare_all(without);
        driver.start();
        peer.send(&long).unwrap();
        peer.send(&checked).unwrap();
        let mut received = driver.run(&mut queues[RX], &[Piece::Write(DATA, 0x1_2000)]);
        if without != 0 {
            assert_eq!(received as usize, long.len(), "nobody has said how long frames are");
            received = driver.run(&mut queues[RX], &[Piece::Write(DATA, 0x1_2000)]);
        }
        assert_eq!(received as usize, checked.len());
        assert_eq!(driver.get(DATA, 1), [flags]);
        assert_eq!(counts.rx_dropped.value(), dropped, "longer than the MTU");
    }
}

/// A device with several pairs, its driver, and the other ends of its links.
struct Several {
    driver: Driver,
    peers: Vec<UnixDatagram>,
    attached: Vec<Arc<AtomicBool>>,
    stuck: Vec<Arc<AtomicBool>>,
    metrics: Arc<DeviceMetrics>,
}

/// Number of the control queue.
const CONTROL: usize = 6;

impl Several {
    fn new(config: NetConfig, responder: Option<Responder>) -> Self {
        let (mut links, mut peers) = (Vec::new(), Vec::new());
        for (wire, peer, _) in (0..3).map(|_| Wire::new()) {
            links.push(wire);
            peers.push(peer);
        }
        let attached = links.iter().map(Wire::attached).collect();
        let stuck = links.iter().map(Wire::stuck).collect();
        let mut net = Net::new(links, config).unwrap();
        if let Some(responder) = responder {
            net.set_responder(responder).unwrap();
        }
        let metrics = Arc::clone(net.metrics());
        Self { driver: Driver::attach(net), peers, attached, stuck, metrics }
    }

    /// Which links frames come to.
    fn attached(&self) -> Vec<bool> {
        self.attached.iter().map(|one| one.load(Ordering::SeqCst)).collect()
    }

    /// Gives a command in two pieces; the device's answer.
    fn command(&self, queue: &mut DriverQueue, command: &[u8]) -> u8 {
        self.driver.put(DATA, command);
        self.driver.put(DATA + 0x100, &[0xff]);
        let (head, rest) = (command.len().min(2) as u32, command.len().saturating_sub(2) as u32);
        let pieces = [Piece::Read(DATA, head), Piece::Read(DATA + 2, rest), Piece::Write(DATA + 0x100, 1)];
        let pieces: Vec<_> = pieces.into_iter().filter(|piece| !matches!(piece, Piece::Read(_, 0))).collect();
        assert_eq!(self.driver.run(queue, &pieces), 1);
        self.driver.get(DATA + 0x100, 1)[0]
    }

    fn use_pairs(&self, queue: &mut DriverQueue, count: u16) -> u8 {
        let [low, high] = count.to_le_bytes();
        self.command(queue, &[4, 0, low, high])
    }
}

#[test]
fn the_driver_says_how_many_pairs_it_uses_and_each_of_them_works() {
    let mut several = Several::new(CONFIG, None);
    assert_eq!(several.attached(), [true, false, false], "one until a driver asks for more");
    let features = several.driver.offered();
    assert_eq!(features >> VIRTIO_NET_F_CTRL_VQ & 1, 1);
    assert_eq!(several.driver.machine.read::<2>(several.driver.device_config(8)), [3, 0]);
    for round in 0..2 {
        let mut queues = several.driver.up();
        assert_eq!(queues.len(), CONTROL + 1);
        assert_eq!(several.attached(), [true, false, false], "round {round}");
        // What is offered to a pair that is off waits.
        several.driver.put(DATA + 0x1000, &frame(60));
        queues[3].add(&[Piece::Read(DATA + 0x1000, 72)]);
        several.driver.kick(&queues[3]);
        queues[2].add(&[Piece::Write(DATA + 0x2000, 0x1_2000)]);
        several.driver.kick(&queues[2]);
        assert_eq!(several.use_pairs(&mut queues[CONTROL], 3), 0);
        assert_eq!(several.attached(), [true; 3]);
        assert_eq!(queues[3].wait().1, 0);
        several.peers[1].recv(&mut [0; 100]).unwrap();
        several.peers[1].send(&frame(100)).unwrap();
        assert_eq!(queues[2].wait().1, 112);
        for (pair, peer) in several.peers.iter().enumerate() {
            assert_eq!(several.driver.run(&mut queues[2 * pair + 1], &[Piece::Read(DATA + 0x1000, 72)]), 0);
            assert_eq!(peer.recv(&mut [0; 100]).unwrap(), 72);
        }
        assert_eq!(several.use_pairs(&mut queues[CONTROL], 1), 0);
        assert_eq!(several.attached(), [true, false, false]);
        // Nobody looks at it any more; whoever does so later finds it.
        several.peers[2].send(&frame(100)).unwrap();
        let before = queues[4].used_index();
        queues[4].add(&[Piece::Write(DATA + 0x2000, 0x1_2000)]);
        several.driver.kick(&queues[4]);
        assert_eq!(several.driver.run(&mut queues[TX], &[Piece::Read(DATA + 0x1000, 72)]), 0);
        several.peers[0].recv(&mut [0; 100]).unwrap();
        assert_eq!(queues[4].used_index(), before);
        assert_eq!(several.use_pairs(&mut queues[CONTROL], 3), 0);
        assert_eq!(queues[4].wait().1, 112);
    }
    assert_eq!((several.metrics.guest_faults.value(), several.metrics.first_host_fault()), (0, None));
    several.driver.set_status(0);
    several.driver.up();
    assert_eq!(several.attached(), [true, false, false], "a new driver begins with one");
}

#[test]
fn commands_that_are_none_are_answered_with_an_error_and_change_nothing() {
    let mut several = Several::new(CONFIG, None);
    let mut queues = several.driver.up();
    assert_eq!(several.use_pairs(&mut queues[CONTROL], 2), 0);
    let before = several.metrics.guest_faults.value();
    for count in [0, 4, 0x8000, 0xffff] {
        assert_eq!(several.use_pairs(&mut queues[CONTROL], count), 1, "{count} pairs");
    }
    // Receive modes, MAC tables, VLANs, receive-side scaling, what nobody knows; cut and too long ones.
    let others: [&[u8]; 8] = [
        &[0, 0, 1],
        &[1, 1, 2, 0, 0, 0, 0, 9],
        &[2, 0, 1, 0],
        &[4, 1, 1, 0],
        &[0xff; 4],
        &[4, 0, 1],
        &[4],
        &[4, 0, 1, 0, 0],
    ];
    for command in others {
        assert_eq!(several.command(&mut queues[CONTROL], command), 1, "{command:?}");
    }
    assert_eq!(several.metrics.guest_faults.value(), before + 12);
    // No room for an answer; nothing to read; buffers outside of RAM; the wrong order.
    several.driver.put(DATA, &[4, 0, 3, 0]);
    let chains: [&[Piece]; 4] = [
        &[Piece::Read(DATA, 4)],
        &[Piece::Write(DATA + 0x100, 1)],
        &[Piece::Read(1 << 40, 4), Piece::Write(DATA + 0x100, 1)],
        &[Piece::Write(DATA + 0x100, 1), Piece::Read(DATA, 4)],
    ];
    for (chain, len) in chains.into_iter().zip([0, 1, 0, 0]) {
        assert_eq!(several.driver.run(&mut queues[CONTROL], chain), len);
    }
    assert_eq!(several.metrics.guest_faults.value(), before + 16);
    assert_eq!(several.attached(), [true, true, false]);

    // The host refuses: as many as before, and the driver is told.
    several.stuck[2].store(true, Ordering::SeqCst);
    assert_eq!(several.use_pairs(&mut queues[CONTROL], 3), 1);
    assert_eq!((several.attached(), several.metrics.host_faults.value()), (vec![true, true, false], 1));
    several.stuck[2].store(false, Ordering::SeqCst);
    assert_eq!(several.use_pairs(&mut queues[CONTROL], 3), 0);

    // A driver that does not know of pairs has its control queue where the second pair would be.
    let mut queues = several.driver.prepare_all(1 << VIRTIO_NET_F_MQ);
    several.driver.start();
    assert_eq!(several.use_pairs(&mut queues[2], 2), 1);
    assert_eq!(several.attached(), [true, false, false]);
    // One that has not made a pair ready cannot use it, nor those behind it.
    let mut queues = several.driver.prepare_without(0, &[3]);
    several.driver.start();
    let control = queues.len() - 1;
    assert_eq!(several.use_pairs(&mut queues[control], 2), 1);
    assert_eq!(several.use_pairs(&mut queues[control], 3), 1);
    // Without a control queue there is one pair, whatever is in the place of the queue.
    let mut queues = several.driver.prepare_all(1 << VIRTIO_NET_F_CTRL_VQ);
    several.driver.start();
    several.driver.put(DATA, &[4, 0, 2, 0]);
    queues[CONTROL].add(&[Piece::Read(DATA, 4), Piece::Write(DATA + 0x100, 1)]);
    several.driver.kick(&queues[CONTROL]);
    several.driver.put(DATA + 0x1000, &frame(60));
    assert_eq!(several.driver.run(&mut queues[TX], &[Piece::Read(DATA + 0x1000, 72)]), 0);
    assert_eq!((several.attached(), queues[CONTROL].used_index()), (vec![true, false, false], 0));
}

#[test]
fn pairs_change_while_frames_pass_and_only_so_often() {
    let mut several = Several::new(CONFIG, None);
    let mut queues = several.driver.up();
    several.driver.put(DATA + 0x1000, &frame(60));
    let start = Instant::now();
    for round in 0..48u16 {
        // Left as they are while the pair is switched: served before, after or when it is on again.
        (0..4).for_each(|_| _ = queues[5].add(&[Piece::Read(DATA + 0x1000, 72)]));
        several.driver.kick(&queues[5]);
        assert_eq!(several.use_pairs(&mut queues[CONTROL], 1 + round % 3), 0);
        if round % 3 == 2 {
            (0..12).for_each(|_| assert_eq!(queues[5].wait().1, 0));
            (0..12).for_each(|_| assert_eq!(several.peers[2].recv(&mut [0; 100]).unwrap(), 72));
        }
    }
    assert!(start.elapsed() > Duration::from_millis(1500), "32 of 48 changes have to be earned");
    // A reset does not wait for what is not earned.
    let start = Instant::now();
    (0..8).for_each(|_| _ = queues[CONTROL].add(&[Piece::Read(DATA, 4), Piece::Write(DATA + 0x100, 1)]));
    several.driver.kick(&queues[CONTROL]);
    several.driver.set_status(0);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn pairs_share_their_limits_and_the_metadata_server() {
    let bucket = BucketConfig { size: 2, one_time_burst: 0, refill_time: Duration::from_millis(400) };
    let limits = LimiterConfig { bandwidth: None, operations: Some(bucket) };
    let config = NetConfig { tx_limits: limits, ..CONFIG };
    let mut several = Several::new(config, Some(Responder::new(SERVER, Box::new(Echo))));
    let mut queues = several.driver.up();
    assert_eq!(several.use_pairs(&mut queues[CONTROL], 3), 0);
    several.driver.put(DATA + 0x1000, &frame(60));
    let start = Instant::now();
    for round in 0..6 {
        let queue = &mut queues[2 * (round % 3) + 1];
        assert_eq!(several.driver.run(queue, &[Piece::Read(DATA + 0x1000, 72)]), 0);
    }
    assert!(start.elapsed() > Duration::from_millis(600), "four of six frames have to be earned, over whichever pair");
    // Who has the server's address? asked over the last pair, answered over the first.
    let mut ask = frame(42);
    ask[12..26].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7, 8, 6]);
    ask[26..44].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 7, 10, 0, 0, 2]);
    ask[44..50].fill(0);
    ask[50..].copy_from_slice(&SERVER.octets());
    several.driver.put(DATA + 0x2000, &ask);
    queues[RX].add(&[Piece::Write(DATA + 0x3000, 0x1_2000)]);
    several.driver.kick(&queues[RX]);
    assert_eq!(several.driver.run(&mut queues[5], &[Piece::Read(DATA + 0x2000, 54)]), 0);
    assert_eq!(queues[RX].wait().1, 54);
    assert_eq!(several.driver.get(DATA + 0x3000 + 24, 4), [8, 6, 0, 1]);
    assert_eq!(several.metrics.first_host_fault(), None);
}
