//! Backends that work, that hang, lie and die.

mod disk;
mod scripted;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vhost::vhost_user::message::FrontendReq as Request;
use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_OK};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use self::disk::{LEN, Server};
use self::scripted::{Answer, PATIENCE, PROTOCOL, Script, Scripted, VERSION_1, send_with};
use super::*;
use crate::testing::{Driver, DriverQueue, Machine, Piece, ram};
use crate::virtio::block::Cache;
use crate::virtio::net::{NetConfig, VhostUserNet};

const NEEDS_RESET: u8 = 0x40;
const HEADER: u64 = Driver::BUFFERS;
const DATA: u64 = Driver::BUFFERS + 0x1000;
const STATUS: u64 = Driver::BUFFERS + 0x2000;

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A driver of a disk that the crate's backend has.
fn disk(queues: usize) -> (Driver, VhostUserBlockControl, Arc<DeviceMetrics>, Server) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.sock");
    let (frontend, server) = Server::start(&path, || Frontend::connect(&path).unwrap());
    let machine = Machine::new();
    let (device, control) = VhostUser::block(frontend, &machine.memory, Cache::Writeback, queues).unwrap();
    let metrics = Arc::clone(device.metrics());
    (Driver::attach_to(machine, device), control, metrics, server)
}

fn request(driver: &Driver, queue: &mut DriverQueue, kind: u32, sector: u64) -> u8 {
    driver.put(HEADER, &[kind.to_le_bytes().to_vec(), vec![0; 4], sector.to_le_bytes().to_vec()].concat());
    driver.put(STATUS, &[0xff]);
    let data = if kind == 0 { Piece::Write(DATA, 512) } else { Piece::Read(DATA, 512) };
    driver.run(queue, &[Piece::Read(HEADER, 16), data, Piece::Write(STATUS, 1)]);
    driver.get(STATUS, 1)[0]
}

#[test]
fn a_disk_is_read_and_written_before_and_after_a_reset() {
    let (mut driver, _, metrics, _server) = disk(2);
    for round in 0..3u8 {
        let mut queues = driver.up();
        assert_eq!(queues.len(), 2);
        for (index, queue) in (0..).zip(&mut queues) {
            for sector in 0..40u64 {
                driver.put(DATA, &[round ^ index ^ sector as u8; 512]);
                assert_eq!(request(&driver, queue, 1, 50 * u64::from(index) + sector), 0);
            }
        }
        for (index, queue) in (0..).zip(&mut queues) {
            for sector in 0..40u64 {
                assert_eq!(request(&driver, queue, 0, 50 * u64::from(index) + sector), 0);
                assert_eq!(driver.get(DATA, 512), [round ^ index ^ sector as u8; 512], "{round} {index} {sector}");
            }
        }
    }
    driver.set_status(0);
    assert_eq!((metrics.guest_faults.value(), metrics.host_faults.value()), (0, 0));
    // Nobody here has seen any of it.
    assert_eq!((metrics.chains.value(), metrics.interrupts.value(), metrics.notifications.value()), (0, 0, 0));
}

#[test]
fn a_disk_changes_its_size_and_the_driver_is_told() {
    let (mut driver, control, _, server) = disk(1);
    let queues = driver.up();
    assert_eq!(queues.len(), 1);
    assert_eq!(driver.offered() >> 12 & 1, 0, "one queue is no several");
    let capacity = |driver: &Driver| u64::from_le_bytes(driver.machine.read(driver.device_config(0)));
    assert_eq!(capacity(&driver), LEN / 512);
    let generation = |driver: &Driver| driver.machine.read::<1>(driver.common(21))[0];
    let before = generation(&driver);
    server.sectors.store(7, Ordering::SeqCst);
    assert_eq!(capacity(&driver), LEN / 512, "it has not been asked");
    control.read_again().unwrap();
    assert_eq!((capacity(&driver), generation(&driver)), (7, before.wrapping_add(1)));
    let vector = Arc::clone(&driver.machine.host.vectors.lock().unwrap()[0]);
    assert!(vector.take() > 0);
    // Without a driver there is nobody to tell.
    driver.set_status(0);
    server.sectors.store(8, Ordering::SeqCst);
    control.read_again().unwrap();
    assert_eq!((capacity(&driver), vector.take()), (8, 0));
}

#[test]
fn a_backend_that_dies_is_known_at_once_and_its_device_is_reset_without_it() {
    let (mut driver, control, metrics, server) = disk(1);
    let mut queues = driver.up();
    assert_eq!(request(&driver, &mut queues[0], 0, 0), 0);
    server.die();
    until("the driver to be told", || driver.status() & NEEDS_RESET != 0);
    let why = metrics.first_host_fault().unwrap();
    assert!(why.contains("b.sock has closed the connection; start it and the VM anew"), "{why}");
    let (began, faults) = (Instant::now(), metrics.host_faults.value());
    assert_eq!(faults, 1);
    driver.set_status(0);
    assert_eq!((driver.status(), metrics.host_faults.value()), (0, faults));
    // It does not come back, and says so each time.
    for round in 1..4 {
        driver.up();
        assert_eq!((driver.status() & NEEDS_RESET, metrics.host_faults.value()), (NEEDS_RESET, faults + round));
    }
    assert!(control.read_again().unwrap_err().to_string().contains("was given up: it has closed the connection"));
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[test]
fn nobody_there_and_somebody_who_never_accepts_are_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.sock");
    let said = Frontend::connect(&path).map(|_| ()).unwrap_err().to_string();
    assert!(said.contains("none.sock: No such file") && said.contains("start it before the VM"), "{said}");
    let _listener =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&_listener, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&_listener, 0).unwrap();
    // One is let in; then the queue is full.
    let _first = UnixStream::connect(&path).unwrap();
    let began = Instant::now();
    let error = connection::connect(&path, began + PATIENCE).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!((PATIENCE..PATIENCE * 4).contains(&began.elapsed()));
}

/// What a frontend says that cannot be made.
fn refused(script: Script) -> String {
    let (frontend, _backend) = Scripted::start(script);
    frontend.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_backend_has_to_speak_of_features_and_be_modern() {
    for (features, word) in [(VERSION_1, "protocol features"), (PROTOCOL, "modern virtio")] {
        let said = refused(Script { features, ..Script::default() });
        assert!(
            said.contains(&format!("backend at /run/b has no {word}")) && said.contains("use a newer one"),
            "{said}"
        );
    }
}

#[test]
fn at_each_first_message_a_backend_may_hang_close_or_lie() {
    let header = |code: u32, flags: u32, len: u32| [code, flags, len].iter().flat_map(|n| n.to_ne_bytes()).collect();
    for request in [Request::GET_FEATURES, Request::GET_PROTOCOL_FEATURES, Request::SET_OWNER, Request::GET_QUEUE_NUM] {
        let code = u32::from(request);
        let lie = |bytes: Vec<u8>| Answer::Raw([bytes, vec![0; 8]].concat());
        for (answer, word) in [
            (Answer::Silence, "does not answer in time"),
            (Answer::Trickle, "does not answer in time"),
            (Answer::Raw(vec![code as u8]), "does not answer in time"),
            (Answer::Close, "has closed the connection"),
            (lie(header(code + 1, 5, 8)), "with something else"),
            (lie(header(code, 1, 8)), "with something else"),
            (lie(header(code, 6, 8)), "with something else"),
            (lie(header(code, 5, 7)), "with something else"),
            (lie(header(code, 5, 0)), "with something else"),
            (lie(header(code, 5, u32::MAX)), "with something else"),
        ] {
            let began = Instant::now();
            let said = refused(Script { twist: Some((request, 1, answer)), ..Script::default() });
            assert!(said.contains("backend at /run/b") && said.contains(word), "{request:?}: {said}");
            assert!(word.contains("closed") || said.contains(&format!("{request:?}")), "{said}");
            assert!(began.elapsed() < PATIENCE * 4, "{request:?}: {:?}", began.elapsed());
        }
    }
    let said =
        refused(Script { twist: Some((Request::SET_OWNER, 1, Answer::Payload(vec![1; 8]))), ..Script::default() });
    assert!(said.contains("refuses SET_OWNER"), "{said}");
}

#[test]
fn descriptors_that_come_with_an_answer_are_closed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (kept, sent) = UnixStream::pair().unwrap();
    let backend = thread::spawn(move || {
        (&theirs).read_exact(&mut [0; 12]).unwrap();
        let answer: Vec<u8> = [1u32, 5, 8, 0, 0].iter().flat_map(|n| n.to_ne_bytes()).collect();
        send_with(&theirs, &answer, &sent);
        drop(sent);
        theirs
    });
    let _ = Frontend::over(ours, "b".into(), PATIENCE);
    let _theirs = backend.join().unwrap();
    kept.set_nonblocking(true).unwrap();
    assert_eq!((&kept).read(&mut [0; 1]).unwrap(), 0, "somebody still has it");
}

/// A disk over a scripted backend, and its driver.
fn scripted(script: Script) -> (Driver, VhostUserBlockControl, Arc<DeviceMetrics>, Scripted) {
    let (frontend, backend) = Scripted::start(script);
    let machine = Machine::new();
    let (device, control) = VhostUser::block(frontend.unwrap(), &machine.memory, Cache::Writeback, 1).unwrap();
    let metrics = Arc::clone(device.metrics());
    (Driver::attach_to(machine, device), control, metrics, backend)
}

#[test]
fn at_each_message_of_a_start_a_backend_may_hang_close_lie_or_refuse() {
    for request in [
        Request::SET_FEATURES,
        Request::SET_MEM_TABLE,
        Request::SET_VRING_NUM,
        Request::SET_VRING_BASE,
        Request::SET_VRING_ADDR,
        Request::SET_VRING_ERR,
        Request::SET_VRING_CALL,
        Request::SET_VRING_KICK,
        Request::SET_VRING_ENABLE,
    ] {
        for answer in
            [Answer::Silence, Answer::Trickle, Answer::Close, Answer::Raw(vec![0; 20]), Answer::Payload(vec![1; 8])]
        {
            let (mut driver, _, metrics, _backend) =
                scripted(Script { twist: Some((request, 1, answer)), ..Script::default() });
            let began = Instant::now();
            driver.up();
            assert_ne!(driver.status() & NEEDS_RESET, 0, "{request:?}");
            let why = metrics.first_host_fault().unwrap();
            assert!(why.contains("backend at /run/b"), "{request:?}: {why}");
            driver.set_status(0);
            assert_eq!(driver.status(), 0);
            assert!(began.elapsed() < PATIENCE * 4, "{request:?}: {:?}", began.elapsed());
            // It is not asked twice.
            driver.up();
            assert_ne!(driver.status() & NEEDS_RESET, 0, "{request:?}");
        }
    }
}

#[test]
fn a_backend_that_does_not_let_go_is_left_and_the_reset_is_done() {
    let position = |ring: u32, position: u32| Answer::Payload([ring.to_ne_bytes(), position.to_ne_bytes()].concat());
    for (answer, word) in [
        (Answer::Silence, "does not answer in time (GET_VRING_BASE)"),
        (Answer::Close, "has closed the connection"),
        (position(1, 0), "answers GET_VRING_BASE with something else"),
        (position(0, 0x1_0000), "answers GET_VRING_BASE with something else"),
    ] {
        let (mut driver, _, metrics, backend) =
            scripted(Script { twist: Some((Request::GET_VRING_BASE, 1, answer)), ..Script::default() });
        driver.up();
        assert_eq!((driver.status(), metrics.host_faults.value()), (15, 0));
        let began = Instant::now();
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        assert!(began.elapsed() < PATIENCE * 4, "{:?}", began.elapsed());
        let why = metrics.first_host_fault().unwrap();
        assert!(why.contains(word), "{why}");
        drop(driver);
        // Its connection is closed, by which one that lives knows that it is not wanted.
        drop(backend);
    }
}

#[test]
fn a_backend_is_told_of_memory_and_rings_and_nothing_of_this_process() {
    let (mut driver, _, _, backend) = scripted(Script::default());
    let queues = driver.up();
    let number = |bytes: &[u8], at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
    let table = &backend.payloads(Request::SET_MEM_TABLE)[0];
    assert_eq!((table.len(), number(table, 0)), (40, 1));
    assert_eq!([8, 16, 24, 32].map(|at| number(table, at)), [0, Machine::RAM as u64, 1 << 52, 0]);
    let ring = &backend.payloads(Request::SET_VRING_ADDR)[0];
    let expected = [0, queues[0].table, queues[0].used, queues[0].avail].map(|address| address + (1 << 52));
    assert_eq!([8, 16, 24].map(|at| number(ring, at)), expected[1..]);
    assert_eq!(backend.payloads(Request::SET_FEATURES), [(VERSION_1 | PROTOCOL).to_ne_bytes()]);
    // What it has not is not offered: neither to the driver.
    assert_eq!(driver.offered(), VERSION_1);
    // The file is the memory.
    use std::os::unix::fs::FileExt;
    driver.put(DATA, b"seen by both");
    let mut seen = [0; 12];
    backend.file(Request::SET_MEM_TABLE).read_exact_at(&mut seen, DATA).unwrap();
    assert_eq!(&seen, b"seen by both");
}

#[test]
fn a_ring_that_a_backend_gives_up_is_broken_until_a_reset() {
    let (mut driver, _, metrics, backend) = scripted(Script::default());
    for round in 1..3 {
        driver.up();
        assert_eq!(driver.status(), 15);
        backend.file(Request::SET_VRING_ERR).write_all(&1u64.to_ne_bytes()).unwrap();
        until("the driver to be told", || driver.status() & NEEDS_RESET != 0);
        assert_eq!((metrics.guest_faults.value(), metrics.host_faults.value()), (round, 0));
        driver.set_status(0);
    }
}

#[test]
fn whoever_shares_an_event_cannot_make_us_wait_for_it() {
    let (mut driver, _, metrics, backend) = scripted(Script::default());
    driver.up();
    let call = backend.file(Request::SET_VRING_CALL);
    // Of the open file, and so for all who have it.
    fcntl_setfl(&call, fcntl_getfl(&call).unwrap() & !OFlags::NONBLOCK).unwrap();
    let mask = |masked: u32| driver.machine.write(driver.bar + 0x4000 + 16 + 12, &masked.to_le_bytes());
    let pending = || driver.machine.read::<1>(driver.bar + 0x5000)[0];
    let vector = Arc::clone(&driver.machine.host.vectors.lock().unwrap()[1]);
    let began = Instant::now();
    mask(1);
    assert_eq!(pending(), 0, "a read of an empty one would wait");
    (&call).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    mask(0);
    assert!(vector.route().is_some() && vector.take() == 1, "a write to a full one would wait");
    mask(1);
    (&call).write_all(&5u64.to_ne_bytes()).unwrap();
    assert_eq!((pending(), pending()), (2, 2));
    // A notification that KVM does not take: there is no way for it.
    let kick = backend.file(Request::SET_VRING_KICK);
    fcntl_setfl(&kick, fcntl_getfl(&kick).unwrap() & !OFlags::NONBLOCK).unwrap();
    (&kick).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    driver.machine.write(driver.bar + 0x3000, &[0, 0]);
    driver.machine.ports.write(driver.notify_port(0).into(), &[0, 0]);
    assert_eq!(metrics.guest_faults.value(), 2);
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_disk_that_cannot_be_is_not_shown() {
    let with = |change: &dyn Fn(&mut Script)| {
        let mut script = Script { features: VERSION_1 | PROTOCOL | 1 << 6, ..Script::default() };
        script.config[20..24].copy_from_slice(&512u32.to_le_bytes());
        change(&mut script);
        let (frontend, _backend) = Scripted::start(script);
        let memory: Memory = Arc::new(ram(&[(GuestAddress(0), 4096)]));
        let made = VhostUser::block(frontend.unwrap(), &memory, Cache::Writeback, 1);
        made.map(|_| ()).map_err(|error| error.to_string()).err().unwrap_or_default()
    };
    assert_eq!(with(&|_| ()), "");
    for block in [0, 256, 1000, 1 << 21] {
        let said = with(&|script| script.config[20..24].copy_from_slice(&u32::to_le_bytes(block)));
        assert!(said.contains(&format!("blocks of {block} bytes")), "{said}");
    }
    let said = with(&|script| script.config[..8].fill(0xff));
    assert!(said.contains("18446744073709551615 sectors"), "{said}");
    assert!(with(&|script| script.protocol = 9).contains("no configuration to be read"));
    for len in [0, 12] {
        let answer = Answer::Payload(vec![0; len]);
        let said = with(&|script| script.twist = Some((Request::GET_CONFIG, 1, answer.clone())));
        assert!(said.contains("refuses GET_CONFIG"), "{said}");
    }
    let other = Answer::Payload(vec![1; 72]);
    assert!(with(&|script| script.twist = Some((Request::GET_CONFIG, 1, other.clone()))).contains("something else"));
}

#[test]
fn a_backend_that_hangs_when_it_is_asked_again_holds_nobody_up_and_the_driver_is_told() {
    let (mut driver, control, metrics, _backend) =
        scripted(Script { twist: Some((Request::GET_CONFIG, 2, Answer::Silence)), ..Script::default() });
    driver.up();
    let began = Instant::now();
    assert!(control.read_again().unwrap_err().to_string().contains("does not answer in time (GET_CONFIG)"));
    assert!(began.elapsed() < PATIENCE * 4);
    until("the driver to be told", || driver.status() & NEEDS_RESET != 0);
    assert!(metrics.first_host_fault().unwrap().contains("does not answer in time (GET_CONFIG)"));
}

#[test]
fn memory_is_shared_whole_or_not_at_all() {
    let make = |memory: Memory| {
        let (frontend, _backend) = Scripted::start(Script::default());
        VhostUser::file_system(frontend.unwrap(), &memory, "tag").map(|_| ()).map_err(|error| error.to_string())
    };
    let many = |count: u64| Arc::new(ram(&(0..count).map(|n| (GuestAddress(n << 20), 4096)).collect::<Vec<_>>()));
    assert_eq!(make(many(8)), Ok(()));
    assert!(make(many(9)).unwrap_err().contains("more than 8 parts"));
    let private = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    assert!(make(Arc::new(private)).unwrap_err().contains("in no file"));
}

#[test]
fn a_file_system_has_its_tag_and_two_queues() {
    let (frontend, _backend) = Scripted::start(Script { queues: 2, ..Script::default() });
    let machine = Machine::new();
    let device = VhostUser::file_system(frontend.unwrap(), &machine.memory, "data").unwrap();
    let mut driver = Driver::attach_to(machine, device);
    assert_eq!(driver.machine.read_config(driver.slot, 0), 0x105a_1af4);
    assert_eq!(driver.up().len(), 2);
    let mut config = [0; 40];
    config[..4].copy_from_slice(b"data");
    config[36] = 1;
    assert_eq!(driver.machine.read::<40>(driver.device_config(0)), config);
    driver.set_status(0);

    let (frontend, _backend) = Scripted::start(Script { queues: 1, ..Script::default() });
    let memory: Memory = Arc::new(ram(&[(GuestAddress(0), 4096)]));
    let said = VhostUser::file_system(frontend.unwrap(), &memory, "t").map(|_| ()).unwrap_err().to_string();
    assert!(said.contains("no second virtqueue"), "{said}");
}

#[test]
fn pairs_of_queues_are_switched_by_the_backend() {
    let (frontend, backend) = Scripted::start(Script::default());
    let machine = Machine::new();
    let config = NetConfig { mac: [2, 0, 0, 0, 0, 1], ..NetConfig::default() };
    let device = VhostUserNet::new(frontend.unwrap(), &config, &machine.memory, None, 8).unwrap();
    let metrics = Arc::clone(device.metrics());
    let mut driver = Driver::attach_to(machine, device);
    let enabled = |backend: &Scripted| -> Vec<[u8; 2]> {
        backend.payloads(Request::SET_VRING_ENABLE).iter().map(|payload| [payload[0], payload[4]]).collect()
    };
    let mut queues = driver.up();
    assert_eq!(queues.len(), 5, "two pairs and their control queue");
    let one_pair = [[0, 1], [1, 1], [2, 0], [3, 0]];
    assert_eq!(enabled(&backend), one_pair);
    let switch = |driver: &Driver, queues: &mut [DriverQueue], pairs: u8| {
        driver.put(HEADER, &[VIRTIO_NET_CTRL_MQ as u8, 0, pairs, 0]);
        driver.run(&mut queues[4], &[Piece::Read(HEADER, 4), Piece::Write(STATUS, 1)]);
        driver.get(STATUS, 1)[0]
    };
    assert_eq!(switch(&driver, &mut queues, 2), VIRTIO_NET_OK as u8);
    assert_eq!(enabled(&backend)[4..], [[2, 1], [3, 1]]);
    assert_eq!(switch(&driver, &mut queues, 1), VIRTIO_NET_OK as u8);
    assert_eq!(enabled(&backend)[6..], [[2, 0], [3, 0]]);
    assert_eq!(switch(&driver, &mut queues, 2), VIRTIO_NET_OK as u8);
    driver.set_status(0);
    // All are taken from it, and the next driver begins with one pair.
    assert_eq!(backend.payloads(Request::GET_VRING_BASE).len(), 4);
    driver.up();
    assert_eq!(enabled(&backend)[10..], one_pair);
    assert_eq!(metrics.host_faults.value(), 0);

    let (frontend, _backend) = Scripted::start(Script::default());
    let memory: Memory = Arc::new(ram(&[(GuestAddress(0), 4096)]));
    let said = VhostUserNet::new(frontend.unwrap(), &config, &memory, Some(3), 8).map(|_| ()).unwrap_err().to_string();
    assert!(said.contains("no more pairs of queues") && said.contains("queue_pairs"), "{said}");
}
